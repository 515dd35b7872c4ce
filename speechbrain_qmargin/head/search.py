r"""The exact support of the alpha-softargmax over millions of classes, in one pass over them.

A class is active iff :math:`\theta_j > \tau - k` with :math:`k = 1/(\alpha - 1)`, and tau solved on
any subset of the classes is a lower bound of tau. So whatever set of classes is collected, as long
as it contains *every* class above a floor g,

    tau(collected) - k >= g   proves that nothing active was left out.

1. **Guess** a floor per sample, from the scores of a small strided sample of the classes whose
   mass is scaled up to all of them. Only speed depends on it.
2. **Screen** all classes with a bf16 product; keep those that may exceed a floor. The margin left
   for rounding is the bound of :func:`screening_slack`, so no class above the floor is lost.
3. **Score** the kept ones in float32, solve tau on them and check the certificate, rounding
   allowed for. The samples that fail it (the guess was too high) take a second pass, with the floor
   tau(collected) - k, which is proved and cannot fail.
4. **Refine** what may be active in float64 (:func:`refined`): a loss near zero is a difference of
   nearly equal cosines, and is to be exact relative to itself.

None of it asks for the classes' reference measure q, which is in no class's activity; the guess
and tau weight each class by it. With the classes in shards each rank collects its own, the sums
that give tau go over the ranks, and what depends on the data (the floors, the samples that fail,
the end of a loop) is the first rank's or a maximum, so that all go the same way.

Scores of size batch x classes are never stored. Where the candidates themselves would not fit
(ties, a tiny scale: everything is active), and at alpha = 1, see ``dense``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_qmargin.head.communicator import Communicator
from speechbrain_qmargin.head.precision import product_roundoff
from speechbrain_qmargin.head.prototypes import Prototypes
from speechbrain_qmargin.loss.solver import (
    Block,
    Measure,
    edge,
    single_class_level,
    solve,
    tau_of,
)

__all__ = [
    "Candidates",
    "Query",
    "agreed_level",
    "candidate_level",
    "chunked_cosines",
    "exact_cosines",
    "refined",
    "rounding",
    "screening_slack",
    "search",
]

_CHUNK = 8192  # rows of a screening product: its output stays in the cache
_BLOCK = 32768  # surviving rows scored in float32 at a time
_SAMPLE = 16384  # rows the floor is guessed from
_SAMPLE_TOP = 256
_EXACT_TOP = 64  # of each chunk, where all classes are scored in float32
_MAX_CANDIDATES = 4_000_000  # padded candidates of a batch: 16 MB a buffer
_SHARE = 0.5  # of the estimated mass the guess relies on; lower is safer, higher tighter
_EXACT_AT_ONCE = 4096  # rows computed again in float64


class Query(NamedTuple):
    """A batch, of all ranks, as a shard of the classes sees it.

    Attributes
    ----------
    unit, exact : Tensor, [B, D]
        Embeddings of unit length in float32 and float64.
    labels : Tensor, [B], int64
        The targets' rows; -1 where they are in another shard.
    target : Tensor, [B], float64
        The targets' logits.
    measure : Measure
        Its `classes` are those of the shard.
    scale : float
    spread : float
        log(q_max / q_min), targets included.
    classes : int
        In all shards.
    """

    unit: Tensor
    exact: Tensor
    labels: Tensor
    target: Tensor
    measure: Measure
    scale: float
    spread: float
    classes: int

    def rows(self, samples: Tensor) -> Query:
        """The same for some samples."""
        unit, exact, labels, target = (part[samples] for part in self[:4])
        return self._replace(
            unit=unit, exact=exact, labels=labels, target=target, measure=self.measure.rows(samples)
        )


class Candidates(NamedTuple):
    """A superset of the active classes other than the target, padded: cosine -inf, class 0."""

    cosines: Tensor  # [B, K] float32 or float64
    classes: Tensor  # [B, K] int64


def screening_slack(embeddings: Tensor, rounded: Tensor, residual: Tensor) -> Tensor:
    r"""[B]: by how much a bf16 product may fall short of the true cosine, its own rounding aside.

    With x = x_b + dx and w = w_b + dw, where x_b and w_b are the rounded vectors,
    :math:`x \cdot w - x_b \cdot w_b = dx \cdot w + x_b \cdot dw`, at most
    :math:`\|dx\| + \|x_b\| \|dw\|` for unit w (Cauchy-Schwarz); the residuals are measured, not
    estimated. Accumulation in float32 adds :math:`D 2^{-23}` at most. Rounding the result to bf16
    is monotone, so it never takes a value from above a bf16 number to below it; thresholds are
    bf16 numbers and need no slack for it.
    """
    dx = (embeddings - rounded.float()).norm(dim=1)
    xb = rounded.float().norm(dim=1)
    accumulation = embeddings.shape[1] * 2.0**-23
    return (dx + xb * residual) * (1 + 2**-20) + xb * accumulation + 1e-7


def _round_down(x: Tensor) -> Tensor:
    """The largest bf16 number not above x, nearly: one or two units lower at most."""
    return (x - x.abs() * 2.0**-7 - 1e-30).bfloat16()


def _surviving_rows(embeddings: Tensor, floor: Tensor, prototypes: Prototypes) -> Tensor:
    """Rows whose cosine with some embedding may be >= its floor [B] (in cosine)."""
    screen = prototypes.screen
    assert screen is not None
    classes, device = screen.shape[0], screen.device
    hit = torch.empty(classes, dtype=torch.bool, device=device)
    out = torch.empty(min(_CHUNK, classes), embeddings.shape[0], dtype=screen.dtype, device=device)
    # Embeddings divided by their threshold have one threshold in common: 1, and one maximum per
    # row decides. That takes positive thresholds, which is the rule.
    coarse = floor - 1.3 * (2.0**-9 + prototypes.residual) - 1e-4
    if bool((coarse > 0.02).all()):
        scaled = embeddings / coarse.unsqueeze(1)
        rounded = scaled.to(screen.dtype)
        slack = screening_slack(scaled, rounded, prototypes.residual)
        threshold = _round_down((floor / coarse - slack).min())
        offset = None
    else:
        rounded = embeddings.to(screen.dtype)
        slack = screening_slack(embeddings, rounded, prototypes.residual)
        offset, threshold = _round_down(floor - slack), 0.0
    columns = rounded.T.contiguous()
    for start in range(0, classes, _CHUNK):
        rows = screen[start : start + _CHUNK]
        scores = torch.mm(rows, columns, out=out[: rows.shape[0]])
        if offset is not None:
            scores.sub_(offset)  # the sign of a difference survives rounding
        torch.ge(scores.amax(1), threshold, out=hit[start : start + _CHUNK])
    return hit.nonzero().squeeze(1)


def _compact(cosines: Tensor, keep: Tensor, classes: Tensor) -> Candidates:
    """The kept entries of [B, R] moved to the left; classes is [R] or [B, R]."""
    samples, positions = keep.nonzero(as_tuple=True)
    counts = torch.bincount(samples, minlength=keep.shape[0])
    width = max(int(counts.max()), 1)
    starts = counts.cumsum(0) - counts
    place = torch.arange(samples.numel(), device=samples.device) - starts[samples]
    place += samples * width
    shape = (keep.shape[0], width)
    values = cosines.new_full(shape, -math.inf)
    names = torch.zeros(shape, dtype=torch.int64, device=cosines.device)
    flat = samples * keep.shape[1] + positions
    values.view(-1)[place] = cosines.reshape(-1)[flat]
    source = classes[positions] if classes.ndim == 1 else classes.reshape(-1)[flat]
    names.view(-1)[place] = source
    return Candidates(values, names)


def _collect(
    embeddings: Tensor, labels: Tensor, floor: Tensor, prototypes: Prototypes
) -> Candidates | None:
    """All classes but the target with cosine >= floor [B]; None if they are too many."""
    if prototypes.screen is None:
        rows = torch.arange(prototypes.weight.shape[0], device=labels.device)
    else:
        rows = _surviving_rows(embeddings, floor, prototypes)
    found, total = [], 0
    for block in rows.split(_BLOCK) if rows.numel() else ():
        cosines = product(embeddings, prototypes.unit(block))
        place = torch.searchsorted(block, labels).clamp_(max=block.numel() - 1)
        is_target = (block[place] == labels).unsqueeze(1)
        column = place.unsqueeze(1)
        cosines.scatter_(1, column, cosines.gather(1, column).masked_fill(is_target, -math.inf))
        part = _compact(cosines, cosines >= floor.unsqueeze(1), block)
        total += part.cosines.numel()
        if total > _MAX_CANDIDATES:
            return None
        found.append(part)
    if not found:
        empty = embeddings.new_full((embeddings.shape[0], 1), -math.inf)
        return Candidates(empty, torch.zeros_like(empty, dtype=torch.int64))
    if len(found) == 1:
        return found[0]
    return Candidates(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def candidate_level(
    query: Query, found: Candidates, comm: Communicator, lower: Tensor | None = None
) -> Tensor:
    """The level [B], float64, of candidates of all shards and the targets, the same on all ranks.

    Parameters
    ----------
    query : Query
    found : Candidates
        float32 or float64; the level is as exact as they are.
    lower : Tensor, [B], optional
        A lower bound of the level, where one is known.
    """
    measure = query.measure
    logits, log_q = found.cosines * query.scale, measure.of(found.classes)
    own = single_class_level(logits, measure.alpha, log_q).amax(1).double()
    own = own if lower is None else torch.maximum(lower, own)
    own, peak = comm.max(torch.stack((own, logits.amax(1).double())))
    block = Block(logits.mul_(measure.alpha - 1), measure.alpha, log_q)
    return agreed_level(query, block.sums, own, peak.to(logits.dtype), comm)


def agreed_level(query: Query, sums, lower: Tensor, peak: Tensor, comm: Communicator) -> Tensor:
    """The level [B] from the sums of each shard; loop counts and result are the first rank's."""

    def of_all(level: Tensor) -> tuple[Tensor, Tensor]:
        if comm.world == 1:
            return sums(level)
        s, h = comm.sum(torch.stack(sums(level)))
        return s, h

    level = solve(
        of_all,
        query.target,
        query.measure,
        lower,
        peak,
        query.classes,
        query.spread,
        settled=comm.settled,
    )
    return comm.from_first(level)


def _guess(query: Query, prototypes: Prototypes) -> Tensor:
    """A floor [B] in logits that is probably, not certainly, below the edge.

    Without a bf16 copy, where classes are few, it is certain: from the largest float32 logits.
    """
    (unit, _, labels, target, measure, scale, spread, _) = query
    classes, stride, weight = prototypes.weight.shape[0], 1, 1.0
    if prototypes.screen is None:
        tops = [
            (part.start, *cosines.topk(min(_EXACT_TOP, cosines.shape[1]), 1, sorted=False))
            for part, cosines in chunked_cosines(unit, labels, prototypes)
        ]
        top = torch.cat([values for _, values, _ in tops], 1)
        names = torch.cat([start + places for start, _, places in tops], 1)
    else:
        stride = max(1, classes // _SAMPLE)
        rows = prototypes.screen[::stride][:_SAMPLE]
        scores = torch.mm(unit.to(rows.dtype), rows.T).float()
        place = (labels // stride).clamp(0, rows.shape[0] - 1)
        is_target = (place * stride == labels).unsqueeze(1)  # it is no competitor of itself
        own = scores.gather(1, place.unsqueeze(1)).masked_fill(is_target, -math.inf)
        scores.scatter_(1, place.unsqueeze(1), own)
        top, names = scores.topk(min(_SAMPLE_TOP, scores.shape[1]), 1, sorted=False)
        names = names * stride
        weight = max(1.0, _SHARE * classes / rows.shape[0])
    log_q, logits = measure.of(names), top * scale
    lower = single_class_level(logits, measure.alpha, log_q).amax(1).double()
    block = Block(logits * (measure.alpha - 1), measure.alpha, log_q, weight)
    count = 1 + max(1, round(weight * top.shape[1]))
    level = solve(block.sums, target, measure, lower, logits.amax(1), count, spread)
    # a target alone has the same level here and in the end: rounding must not fail its certificate
    return edge(level, measure.alpha) - 2 * rounding(query, level)


def rounding(query: Query, level: Tensor) -> Tensor:
    """[B]: more than computed cosines and levels can move a class across the edge, in logits."""
    dim = query.unit.shape[1]
    cosine = dim * 2**-23 + 2 * product_roundoff(query.unit.device)
    return query.scale * cosine + 2**-20 * (1 + tau_of(level, query.measure.alpha).abs())


def _widened(found: Candidates, width: int) -> Candidates:
    """A padded copy with `width` columns."""
    more = (0, width - found.cosines.shape[1])
    return Candidates(F.pad(found.cosines, more, value=-math.inf), F.pad(found.classes, more))


def search(
    query: Query, prototypes: Prototypes, comm: Communicator
) -> tuple[Candidates, Tensor] | None:
    """Candidates that contain the whole support, and their level [B]; None: too many for memory.

    All ranks return None, or none does. alpha > 1.
    """
    alpha = query.measure.alpha
    floor = comm.max(_guess(query, prototypes)).float()
    found = _collect(query.unit, query.labels, floor / query.scale, prototypes)
    if comm.any(found is None):
        return None
    assert found is not None
    level = candidate_level(query, found, comm)
    proved = (edge(level, alpha) - rounding(query, level)).float()
    failed = comm.from_first(proved < floor).nonzero().squeeze(1)
    if not failed.numel():
        return found, level
    part = query.rows(failed)
    again = _collect(part.unit, part.labels, proved[failed] / query.scale, prototypes)
    width = 0 if again is None else max(found.cosines.shape[1], again.cosines.shape[1])
    if comm.any(again is None or width * len(query.labels) > _MAX_CANDIDATES):
        return None
    assert again is not None
    cosines, classes = _widened(found, width)
    cosines[failed], classes[failed] = _widened(again, width)
    level[failed] = candidate_level(part, Candidates(cosines[failed], classes[failed]), comm)
    return Candidates(cosines, classes), level


def product(embeddings: Tensor, rows: Tensor) -> Tensor:
    """[B, R], in the precision in force, of which :func:`rounding` knows."""
    return embeddings @ rows.T


def chunked_cosines(
    embeddings: Tensor, labels: Tensor, prototypes: Prototypes
) -> Iterator[tuple[slice, Tensor]]:
    """(classes, cosines [B, chunk]) over all classes, -inf at the targets; dtype of `embeddings`.

    Parameters
    ----------
    embeddings : Tensor, [B, D]
        float32 or float64, unit rows.
    labels : Tensor, [B]
        The targets' rows; -1 where they are in another shard.
    """
    classes = prototypes.weight.shape[0]
    for start in range(0, classes, _CHUNK):
        rows = slice(start, min(start + _CHUNK, classes))
        cosines = product(embeddings, prototypes.unit(rows, embeddings.dtype))
        place = (labels - start).clamp(0, cosines.shape[1] - 1).unsqueeze(1)
        inside = ((labels >= start) & (labels < rows.stop)).unsqueeze(1)
        value = cosines.gather(1, place).masked_fill(inside, -math.inf)
        yield rows, cosines.scatter_(1, place, value)


def refined(
    query: Query, found: Candidates, level: Tensor, prototypes: Prototypes
) -> tuple[Candidates, Tensor]:
    """The candidates that may be active, their cosines in float64, and a lower bound of the level.

    A loss near zero is a difference of nearly equal cosines, whose float32 rounding would be most
    of it. Only what may be active is computed again, so the cost is the support's.

    Parameters
    ----------
    query : Query
    found, level
        What :func:`search` gave.
    """
    slack = rounding(query, level)
    floor = edge(level, query.measure.alpha) - slack
    keep = found.cosines * query.scale > floor.unsqueeze(1)
    samples, place = keep.nonzero(as_tuple=True)
    column = (keep.cumsum(1) - 1)[samples, place]
    classes = found.classes[samples, place]
    width = int(keep.sum(1).max().clamp(min=1))
    cosines = query.exact.new_full((keep.shape[0], width), -math.inf)
    names = torch.zeros_like(cosines, dtype=torch.int64)
    cosines[samples, column] = exact_cosines(query.exact, samples, classes, prototypes)
    names[samples, column] = classes
    return Candidates(cosines, names), level - slack


def exact_cosines(
    exact: Tensor, samples: Tensor, classes: Tensor, prototypes: Prototypes
) -> Tensor:
    """cos(exact[samples], prototypes[classes]) in float64, a few megabytes at a time."""
    cosines = exact.new_empty(samples.numel())
    for start in range(0, samples.numel(), _EXACT_AT_ONCE):
        part = slice(start, start + _EXACT_AT_ONCE)
        rows = prototypes.unit(classes[part], exact.dtype)
        cosines[part] = torch.linalg.vecdot(exact[samples[part]], rows)
    return cosines
