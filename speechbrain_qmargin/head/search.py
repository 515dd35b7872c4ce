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

Scores of size batch x classes are never stored. Where the candidates themselves would not fit
(ties, a tiny scale: everything is active), and at alpha = 1, tau comes from passes over chunks
(:func:`dense_level`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    "Prototypes",
    "candidate_level",
    "chunked_cosines",
    "dense_level",
    "posterior",
    "screening_slack",
    "search",
    "uniform_measure",
]

_CHUNK = 8192  # rows of a screening product: its output stays in the cache
_BLOCK = 32768  # surviving rows scored in float32 at a time
_SAMPLE = 16384  # rows the floor is guessed from
_SAMPLE_TOP = 256
_EXACT_TOP = 64  # of each chunk, where all classes are scored in float32
_MAX_CANDIDATES = 4_000_000  # padded candidates of a batch: 16 MB a buffer
_SHARE = 0.5  # of the estimated mass the guess relies on; lower is safer, higher tighter
_EXACT_AT_ONCE = 4096  # rows computed again in float64


class Prototypes(NamedTuple):
    """What a search reads: rows [C, D] float32, 1/norm [C], unit rows in bf16 [C, D], their error.

    `residual` bounds ||w/||w|| - bf16 row|| over the rows (zero-dimensional).
    """

    weight: Tensor
    inverse_norm: Tensor
    screen: Tensor | None
    residual: Tensor | None

    def unit(self, rows: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype == torch.float64:
            unit = self.weight[rows].double()
            length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
            return unit.div_(length.clamp_(min=1e-12))
        if isinstance(rows, slice):
            return self.weight[rows] * self.inverse_norm[rows].unsqueeze(1)
        unit = self.weight.index_select(0, rows)
        return unit.mul_(self.inverse_norm.index_select(0, rows).unsqueeze(1))


class Candidates(NamedTuple):
    """A superset of the active classes other than the target, padded: cosine -inf, class 0."""

    cosines: Tensor  # [B, K] float32
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
        cosines = embeddings @ prototypes.unit(block).T
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


def uniform_measure(target: Tensor, alpha: float, log_q: float) -> Measure:
    """q = exp(log_q) for every target [B], 1 for the other classes."""
    return Measure(alpha, torch.full_like(target, log_q))


def candidate_level(
    logits: Tensor, target: Tensor, alpha: float, log_q: float, weight: float = 1.0
) -> Tensor:
    """Level [B] of padded logits [B, K] and the target's [B]; each logit counts `weight` times."""
    peak = logits.amax(1)
    block = Block(logits * (alpha - 1), alpha, weight=weight)
    count = 1 + max(1, round(weight * logits.shape[1]))
    measure = uniform_measure(target, alpha, log_q)
    lower = single_class_level(peak, alpha)
    return solve(block.sums, target, measure, lower, peak, count, abs(log_q))


def _guess(
    embeddings: Tensor, labels: Tensor, target: Tensor, prototypes: Prototypes, alpha, scale, log_q
) -> Tensor:
    """A floor [B] in logits that is probably, not certainly, below tau - k.

    Without a bf16 copy, where classes are few, it is certain: tau of the largest float32 logits.
    """
    classes = prototypes.weight.shape[0]
    if prototypes.screen is None:
        tops = [
            cosines.topk(min(_EXACT_TOP, cosines.shape[1]), 1, sorted=False).values
            for _, cosines in chunked_cosines(embeddings, labels, prototypes)
        ]
        level = candidate_level(torch.cat(tops, 1) * scale, target, alpha, log_q)
        return edge(level, alpha) - 2 * rounding(level, alpha, scale, embeddings.shape[1])
    stride = max(1, classes // _SAMPLE)
    rows = prototypes.screen[::stride][:_SAMPLE]
    scores = torch.mm(embeddings.to(rows.dtype), rows.T).float()
    place = (labels // stride).clamp(0, rows.shape[0] - 1)
    is_target = (place * stride == labels).unsqueeze(1)  # it is no competitor of itself
    own = scores.gather(1, place.unsqueeze(1)).masked_fill(is_target, -math.inf)
    scores.scatter_(1, place.unsqueeze(1), own)
    top = scores.topk(min(_SAMPLE_TOP, scores.shape[1]), 1, sorted=False).values * scale
    weight = max(1.0, _SHARE * classes / rows.shape[0])
    # a target alone has the same tau here and in the end: rounding must not fail its certificate
    level = candidate_level(top, target, alpha, log_q, weight)
    return edge(level, alpha) - 2 * rounding(level, alpha, scale, embeddings.shape[1])


def rounding(level: Tensor, alpha: float, scale: float, dim: int) -> Tensor:
    """[B]: more than float32 cosines and tau can move a class across the edge, in logits."""
    return scale * dim * 2**-23 + 2**-20 * (1 + tau_of(level, alpha).abs())


def _widened(found: Candidates, width: int) -> Candidates:
    """A padded copy with `width` columns."""
    more = (0, width - found.cosines.shape[1])
    return Candidates(F.pad(found.cosines, more, value=-math.inf), F.pad(found.classes, more))


def search(
    embeddings: Tensor,
    labels: Tensor,
    target_cosine: Tensor,
    prototypes: Prototypes,
    alpha: float,
    scale: float,
    margin: float,
) -> tuple[Candidates, Tensor] | None:
    """Candidates that contain the whole support, and the level [B]; None: too many for memory.

    Parameters
    ----------
    embeddings : Tensor, [B, D], float32, unit rows
    labels : Tensor, [B], int64
    target_cosine : Tensor, [B]
    prototypes : Prototypes
    alpha : float, > 1
    """
    log_q = -scale * margin
    target = target_cosine * scale
    floor = _guess(embeddings, labels, target, prototypes, alpha, scale, log_q)
    found = _collect(embeddings, labels, floor / scale, prototypes)
    if found is None:
        return None
    level = candidate_level(found.cosines * scale, target, alpha, log_q)
    proved = edge(level, alpha) - rounding(level, alpha, scale, embeddings.shape[1])
    failed = (proved < floor).nonzero().squeeze(1)
    if failed.numel():
        again = _collect(embeddings[failed], labels[failed], proved[failed] / scale, prototypes)
        if again is None:
            return None
        width = max(found.cosines.shape[1], again.cosines.shape[1])
        if width * found.cosines.shape[0] > _MAX_CANDIDATES:
            return None
        cosines, classes = _widened(found, width)
        cosines[failed], classes[failed] = _widened(again, width)
        found = Candidates(cosines, classes)
        level[failed] = candidate_level(cosines[failed] * scale, target[failed], alpha, log_q)
    return found, level


def dense_level(
    embeddings: Tensor,
    labels: Tensor,
    target_cosine: Tensor,
    prototypes: Prototypes,
    alpha: float,
    scale: float,
    margin: float,
) -> Tensor:
    """Level [B], float64, where everything may be active: passes over chunks, nothing kept.

    One pass at alpha = 1, else one per Newton step. `embeddings` and `target_cosine` as for
    :func:`chunked_cosines`, whose dtype is theirs.
    """
    z_y = target_cosine.double() * scale
    measure = uniform_measure(z_y, alpha, -scale * margin)
    if alpha == 1:
        total = single_class_level(z_y, alpha, measure.target)
        for _, cosines in chunked_cosines(embeddings, labels, prototypes):
            total = torch.logaddexp(total, torch.logsumexp(cosines * scale, 1).double())
        return total
    peak = torch.full_like(z_y, -math.inf)
    for _, cosines in chunked_cosines(embeddings, labels, prototypes):
        peak = torch.maximum(peak, cosines.amax(1))
    peak = peak * scale

    def sums(level: Tensor) -> tuple[Tensor, Tensor]:
        s, slope = torch.zeros_like(level), torch.zeros_like(level)
        for _, cosines in chunked_cosines(embeddings, labels, prototypes):
            more = Block(cosines.mul_(scale * (alpha - 1)), alpha).sums(level)
            s, slope = s + more[0], slope + more[1]
        return s, slope

    lower, classes = single_class_level(peak, alpha), prototypes.weight.shape[0]
    return solve(sums, z_y, measure, lower, peak, classes, scale * margin)


def chunked_cosines(
    embeddings: Tensor, labels: Tensor, prototypes: Prototypes
) -> Iterator[tuple[slice, Tensor]]:
    """(classes, cosines [B, chunk]) over all classes, -inf at each sample's target.

    In the dtype of `embeddings`: float32 is enough at alpha = 1, where a posterior is as exact
    relative to itself as its logit is absolutely; above, 1 + (alpha - 1)(theta - tau) may nearly
    cancel, so float64.
    """
    classes = prototypes.weight.shape[0]
    for start in range(0, classes, _CHUNK):
        rows = slice(start, min(start + _CHUNK, classes))
        cosines = embeddings @ prototypes.unit(rows, embeddings.dtype).T
        place = (labels - start).clamp(0, cosines.shape[1] - 1).unsqueeze(1)
        inside = ((labels >= start) & (labels < rows.stop)).unsqueeze(1)
        value = cosines.gather(1, place).masked_fill(inside, -math.inf)
        yield rows, cosines.scatter_(1, place, value)


def posterior(logits: Tensor, level: Tensor, alpha: float) -> Tensor:
    """p [B, K] of the classes other than the target, from logits [B, K] and the level [B]."""
    if alpha == 1:
        return torch.exp(logits - level.to(logits.dtype).unsqueeze(1))
    return Block(logits * (alpha - 1), alpha).posterior(level)


def refined(
    exact: Tensor,
    found: Candidates,
    level: Tensor,
    prototypes: Prototypes,
    alpha: float,
    scale: float,
) -> Candidates:
    """The candidates that may be active, their cosines in float64.

    A loss near zero is a difference of nearly equal cosines, whose float32 rounding would be most
    of it. Only what may be active is computed again, so the cost is the support's.

    Parameters
    ----------
    exact : Tensor, [B, D], float64, unit rows
    found, level
        What :func:`search` gave.
    """
    least = edge(level, alpha) - rounding(level, alpha, scale, exact.shape[1])
    keep = found.cosines * scale > least.unsqueeze(1)
    samples, place = keep.nonzero(as_tuple=True)
    column = (keep.cumsum(1) - 1)[samples, place]
    classes = found.classes[samples, place]
    width = int(keep.sum(1).max().clamp(min=1))
    cosines = exact.new_full((exact.shape[0], width), -math.inf)
    names = torch.zeros_like(cosines, dtype=torch.int64)
    cosines[samples, column] = exact_cosines(exact, samples, classes, prototypes)
    names[samples, column] = classes
    return Candidates(cosines, names)


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
