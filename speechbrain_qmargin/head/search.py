r"""The exact support of the alpha-softargmax over millions of classes, in one pass over them.

A class is active iff :math:`\theta_j > \tau - k` with :math:`k = 1/(\alpha - 1)`, and tau solved on
any subset of the classes is a lower bound of tau. So with tau of what was seen so far, every class
at or below tau - k is proved inactive, whatever follows: one pass with a rising floor finds the
support, and nothing is looked at twice.

1. **Sample**: tau on a small strided sample of the classes gives the first floors.
2. **Screen** the classes, part by part, with a product in few bits (:class:`Screening`); keep those
   that may exceed a floor. The margin left for rounding is a bound, so no class above a floor is
   lost.
3. **Score** the kept ones in float32, and raise the floors to tau - k of all that was found, less
   what rounding can move.
4. **Refine** what may be active in float64 (:func:`refined`): a loss near zero is a difference of
   nearly equal cosines, and is to be exact relative to itself.

With sub-centres a class has several rows, and its cosine is that of the nearest: a class is active
iff that row is above the floor, so rows are screened as classes are, and of each class the nearest
found row enters tau.

None of it asks for the classes' reference measure q, which is in no class's activity; tau alone
weights each class by it. Nor does it ask for the divergence: with any f whose f'(0) is finite a
class is active iff :math:`\theta_j > \tau + f'(0)`, and tau of a subset is a lower bound.

With the classes in shards each rank collects its own, from the highest first floor of all ranks;
the sums that give tau go over the ranks, and the end of a loop is the first rank's, so that all go
the same way.

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

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.head.precision import product_roundoff
from speechbrain_qmargin.head.prototypes import Prototypes, int8_product
from speechbrain_qmargin.loss.f_operators import GeneratorMeasure
from speechbrain_qmargin.loss.solver import (
    FEW_STEPS,
    Block,
    Measure,
    single_class_level,
    solve,
)

__all__ = [
    "Agreed",
    "Candidates",
    "Found",
    "Query",
    "Screening",
    "agreed_level",
    "agreed_solution",
    "candidate_level",
    "chunked_cosines",
    "exact_cosines",
    "nearest_rows",
    "refined",
    "rounding",
    "screening_slack",
    "search",
    "shown_by",
]


def shown_by(world: int) -> int:
    """How many of a sample's logits each of so many shards shows the others: about 1,024 in all.

    Examples
    --------
    >>> [shown_by(world) for world in (2, 8, 12, 64, 1000)]
    [128, 128, 64, 16, 16]
    """
    return max(16, min(128, 1 << (1024 // world or 1).bit_length() - 1))


class Query(NamedTuple):
    """A batch, of all ranks, as a shard of the classes sees it.

    Attributes
    ----------
    unit, exact : Tensor, [B, D]
        Embeddings of unit length in float32 and float64.
    labels : Tensor, [B], int64
        The targets among the shard's classes; -1 where they are in another shard.
    target : Tensor, [B], float64
        The targets' logits.
    measure : Measure or GeneratorMeasure
        Its `classes` are those of the shard.
    scale : float
    spread : float
        log(q_max / q_min), targets included.
    classes : int
        In all shards.
    subcentres : int
        Rows of each class, one after the other.

    Examples
    --------
    >>> unit = torch.tensor([[0.6, 0.8]])
    >>> query = Query(
    ...     unit=unit,
    ...     exact=unit.double(),
    ...     labels=torch.tensor([1]),
    ...     target=torch.tensor([8.0]).double(),        # the scale times a cosine of 0.8
    ...     measure=Measure(2.0, torch.zeros(1).double()),
    ...     scale=10.0,
    ...     spread=0.0,                                 # q = 1 for all
    ...     classes=2,
    ...     subcentres=2,
    ... )
    >>> [rows.item() for rows in query.target_rows()]   # class 0 has rows 0 and 1
    [2, 3]
    """

    unit: Tensor
    exact: Tensor
    labels: Tensor
    target: Tensor
    measure: Measure | GeneratorMeasure
    scale: float
    spread: float
    classes: int
    subcentres: int = 1

    @property
    def of_alpha(self) -> Measure:
        """The measure, where the divergence is one of the alpha-divergences."""
        assert isinstance(self.measure, Measure)
        return self.measure

    @property
    def of_generator(self) -> GeneratorMeasure:
        """The measure, where it is another."""
        assert isinstance(self.measure, GeneratorMeasure)
        return self.measure

    def target_rows(self) -> Iterator[Tensor]:
        """[B]: of the targets the first row, then the second, ...; negative in other shards."""
        for centre in range(self.subcentres):
            yield self.labels * self.subcentres + centre

    def log_q(self, rows: Tensor) -> Tensor | None:
        """Of the classes of some rows, in the shape of `rows`; None: q = 1."""
        return self.measure.of(rows // self.subcentres if self.subcentres > 1 else rows)

    def rows(self, samples: Tensor | slice) -> Query:
        """The same for some samples."""
        unit, exact, labels, target = (part[samples] for part in self[:4])
        return self._replace(
            unit=unit, exact=exact, labels=labels, target=target, measure=self.measure.rows(samples)
        )


class Candidates(NamedTuple):
    """A superset of the active rows, the target's left out, padded: cosine -inf, row 0.

    Examples
    --------
    >>> cosines = torch.tensor([[0.8, 0.5], [0.7, -torch.inf]])
    >>> found = Candidates(cosines, torch.tensor([[4, 9], [4, 0]]))
    >>> (found.cosines > -torch.inf).sum(1)             # two of the first sample, one of the second
    tensor([2, 1])
    """

    cosines: Tensor  # [B, K] float32 or float64
    rows: Tensor  # [B, K] int64


def screening_slack(embeddings: Tensor, rounded: Tensor, residual: Tensor) -> Tensor:
    r"""[B]: by how much a bf16 product may fall short of the true cosine, its own rounding aside.

    With x = x_b + dx and w = w_b + dw, where x_b and w_b are the rounded vectors,
    :math:`x \cdot w - x_b \cdot w_b = dx \cdot w + x_b \cdot dw`, at most
    :math:`\|dx\| + \|x_b\| \|dw\|` for unit w (Cauchy-Schwarz); the residuals are measured, not
    estimated. Accumulation in float32 adds :math:`D 2^{-23}` at most. Rounding the result to bf16
    is monotone, so it never takes a value from above a bf16 number to below it; thresholds are
    bf16 numbers and need no slack for it.

    Examples
    --------
    >>> x = torch.tensor([[0.6, 0.8]])                  # 0.6 is no bf16 number, and nor is 0.8
    >>> slack = screening_slack(x, x.bfloat16(), residual=torch.tensor(0.0))
    >>> missing = (x - x.bfloat16().float()).norm(dim=1)
    >>> bool(slack >= missing), bool(slack < missing + 1e-5)
    (True, True)
    """
    dx = (embeddings - rounded.float()).norm(dim=1)
    xb = rounded.float().norm(dim=1)
    accumulation = embeddings.shape[1] * 2.0**-23
    return (dx + xb * residual) * (1 + 2**-20) + xb * accumulation + 1e-7


def _round_down(x: Tensor) -> Tensor:
    """The largest bf16 number not above x, nearly: one or two units lower at most."""
    return (x - x.abs() * 2.0**-7 - 1e-30).bfloat16()


class Screening:
    r"""Which rows may have a cosine with some embedding at or above its floor.

    Embeddings divided by their floors have one threshold in common, and one maximum a row
    decides; that takes positive floors, which is the rule. In int8, with embeddings
    :math:`c (X + \delta)` and rows :math:`f (R + \epsilon)`, a cosine of at least the floor g has

    .. math:: X \cdot R \ge \frac{g - \|c \delta\|}{c f} - \|X\| \|\epsilon\|

    exactly, integers being added without rounding; the residuals are measured.

    Parameters
    ----------
    embeddings : Tensor, [B, D], float32, unit rows
    floor : Tensor, [B], float32
        In cosine.
    prototypes : Prototypes
        With a screen.

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> from speechbrain_qmargin.head.sizes import Sizes
    >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> prototypes = Derived(Sizes(screen_from=1)).of(rows)
    >>> screening = Screening(torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]), prototypes)
    >>> screening.survivors(slice(0, 3))                # cosines 1, 0.8 and 0
    tensor([0, 1])
    """

    def __init__(self, embeddings: Tensor, floor: Tensor, prototypes: Prototypes) -> None:
        assert prototypes.screen is not None
        self._screen, self._prototypes = prototypes.screen, prototypes
        kind = self._screen.rows.dtype
        common = bool((floor > 0.05).all())
        self._offset, self._threshold = None, None
        if not common and kind == torch.int8:
            kind = torch.float32
        self._kind = kind
        if kind == torch.int8:
            self._int8(embeddings, floor)
        elif kind == torch.bfloat16:
            self._bf16(embeddings, floor, common)
        else:
            slack = embeddings.shape[1] * 2.0**-23 + 2 * product_roundoff(embeddings.device) + 1e-6
            self._columns = embeddings.T.contiguous()
            self._offset = floor - slack
            if common:
                self._columns = self._columns / self._offset
                self._offset, self._threshold = None, 1 - 1e-6

    def _int8(self, embeddings: Tensor, floor: Tensor) -> None:
        # one step for all embeddings after division by their floors; the largest still fits
        scaled = embeddings / floor.unsqueeze(1)
        step = scaled.abs().amax().clamp(min=1e-30) / 127
        integers = (scaled / step).round_().clamp_(-127, 127)
        lacking = (embeddings - integers * (step * floor.unsqueeze(1))).norm(dim=1)
        share = (floor - lacking * (1 + 2**-20) - 1e-6) / floor
        least = share.min() / step
        self._threshold = least - least.abs() * 1e-5  # times 1 / factor
        self._allowance = (integers.norm(dim=1).max() * self._screen.residual) * (1 + 1e-5)
        self._columns = integers.to(torch.int8).T.contiguous()

    def _bf16(self, embeddings: Tensor, floor: Tensor, common: bool) -> None:
        residual = self._screen.residual
        if common:
            coarse = floor - 1.3 * (2.0**-9 + residual) - 1e-4
            scaled = embeddings / coarse.unsqueeze(1)
            rounded = scaled.bfloat16()
            slack = screening_slack(scaled, rounded, residual)
            self._threshold = _round_down((floor / coarse - slack).min())
        else:
            rounded = embeddings.bfloat16()
            slack = screening_slack(embeddings, rounded, residual)
            self._offset, self._threshold = _round_down(floor - slack), None
        self._columns = rounded.T.contiguous()

    def survivors(self, part: slice) -> Tensor:
        """Rows of a part of the classes, sorted."""
        batch, device = self._columns.shape[1], self._columns.device
        size = 2 if self._kind == torch.bfloat16 else 4
        chunk = self._prototypes.sizes.rows_of_product(batch, size, least=64)
        hit = torch.empty(part.stop - part.start, dtype=torch.bool, device=device)
        out = torch.empty(0, device=device)
        for start in range(part.start, part.stop, chunk):
            rows = slice(start, min(start + chunk, part.stop))
            here = hit[rows.start - part.start : rows.stop - part.start]
            if self._kind == torch.int8:
                assert self._screen.factor is not None
                assert self._threshold is not None
                best = int8_product(self._screen.rows[rows], self._columns).amax(1)
                least = self._threshold / self._screen.factor[rows] - self._allowance
                torch.ge(best, least, out=here)
                continue
            if self._kind == torch.bfloat16:
                if out.shape[0] != rows.stop - rows.start:
                    out = self._columns.new_empty(rows.stop - rows.start, batch)
                scores = torch.mm(self._screen.rows[rows], self._columns, out=out)
            else:
                scores = torch.mm(self._prototypes.unit(rows), self._columns)
            if self._offset is not None:
                scores.sub_(self._offset)  # the sign of a difference survives rounding
            least = 0.0 if self._threshold is None else self._threshold
            if self._kind == torch.bfloat16 and device.type == "cpu":
                # as integers numbers above zero have the same order, and their maximum is cheap
                bits = torch.as_tensor(least, dtype=torch.bfloat16, device=device).view(torch.int16)
                torch.ge(scores.view(torch.int16).amax(1), bits, out=here)
            else:
                torch.ge(scores.amax(1), least, out=here)
        return hit.nonzero().squeeze(1).add_(part.start)


def _compact(cosines: Tensor, keep: Tensor, rows: Tensor) -> Candidates:
    """The kept entries of [B, R] moved to the left; rows is [R] or [B, R]."""
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
    source = rows[positions] if rows.ndim == 1 else rows.reshape(-1)[flat]
    names.view(-1)[place] = source
    return Candidates(values, names)


def _scored(
    query: Query, rows: Tensor, floor: Tensor, prototypes: Prototypes, room: int
) -> list[Candidates] | None:
    """Those of `rows`, sorted, at or above the floors [B], in cosine; None if more than `room`."""
    found, sizes = [], prototypes.sizes
    at_once = sizes.fit(sizes.block, 4 * (2 * query.unit.shape[1] + 3 * len(query.unit)))
    for block in rows.split(at_once) if rows.numel() else ():
        cosines = product(query.unit, prototypes.unit(block))
        for targets in query.target_rows():
            place = torch.searchsorted(block, targets).clamp_(max=block.numel() - 1)
            is_target = (block[place] == targets).unsqueeze(1)
            column = place.unsqueeze(1)
            cosines.scatter_(1, column, cosines.gather(1, column).masked_fill(is_target, -math.inf))
        part = _compact(cosines, cosines >= floor.unsqueeze(1), block)
        room -= part.cosines.numel()
        if room < 0:
            return None
        found.append(part)
    return found


def _joined(found: list[Candidates], query: Query) -> Candidates:
    if len(found) == 1:
        return found[0]
    if not found:
        empty = query.unit.new_full((len(query.labels), 1), -math.inf)
        return Candidates(empty, torch.zeros_like(empty, dtype=torch.int64))
    return Candidates(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def nearest_rows(query: Query, found: Candidates) -> Candidates:
    """The same with one row of each class, the nearest (of equal ones the first).

    Examples
    --------
    >>> unit, exact = torch.ones(1, 1), torch.ones(1, 1).double()
    >>> measure = Measure(2.0, torch.zeros(1).double())
    >>> query = Query(unit, exact, torch.tensor([0]), exact[0], measure, 1.0, 0.0, 2, subcentres=2)
    >>> found = Candidates(torch.tensor([[0.3, 0.4]]), torch.tensor([[2, 3]]))  # both of class 1
    >>> nearest_rows(query, found).cosines
    tensor([[  -inf, 0.4000]])
    """
    if query.subcentres == 1:
        return found
    samples, place = (found.cosines > -math.inf).nonzero(as_tuple=True)
    cosines, rows = found.cosines[samples, place], found.rows[samples, place]
    names = samples * query.classes + rows // query.subcentres
    classes, group = torch.unique(names, return_inverse=True)
    best = cosines.new_full((len(classes),), -math.inf)
    best.scatter_reduce_(0, group, cosines, "amax")
    entry = torch.arange(len(group), device=group.device)
    entry = entry.masked_fill_(cosines < best[group], len(group))
    first = torch.full_like(classes, len(group)).scatter_reduce_(0, group, entry, "amin")
    kept = torch.full_like(found.cosines, -math.inf)
    kept[samples[first], place[first]] = cosines[first]
    return found._replace(cosines=kept)


def candidate_level(
    query: Query, found: Candidates, lower: Tensor | None = None, *, bound: bool = False
) -> Tensor:
    """The level [B], float64, of the candidates of one process and the targets.

    Parameters
    ----------
    query : Query
    found : Candidates
        float32 or float64, one row of a class; the level is as exact as they are.
    lower : Tensor, [B], optional
        A lower bound of the level, where one is known.
    bound : bool
        Whether a lower bound will do.

    Examples
    --------
    >>> unit, target = torch.ones(1, 1), torch.tensor([2.0]).double()   # scale 2, cosine 1
    >>> measure = Measure(2.0, torch.zeros(1).double())
    >>> query = Query(unit, unit.double(), torch.tensor([0]), target, measure, 2.0, 0.0, classes=2)
    >>> found = Candidates(torch.tensor([[0.8]]).double(), torch.tensor([[1]]))
    >>> candidate_level(query, found)                   # sparsemax of (2, 1.6) is (0.7, 0.3)
    tensor([1.3000], dtype=torch.float64)
    """
    logits = found.cosines * query.scale
    return _level_of(query, logits, query.log_q(found.rows), lower, bound)


def _level_of(
    query: Query, logits: Tensor, log_q: Tensor | None, lower: Tensor | None, bound: bool
) -> Tensor:
    """As :func:`candidate_level`, from logits [B, K], which are overwritten, and their log q."""
    measure, peak = query.measure, logits.amax(1)
    if isinstance(measure, GeneratorMeasure):
        lead = logits.double() - query.target.unsqueeze(1)
        depth = None if lower is None else measure.depth_at(lower, query.target)
        depth = measure.depth(lambda: [lead], lead.amax(1), query.classes, lower=depth)
        return measure.level(depth, query.target)
    own = single_class_level(logits, measure.alpha, log_q).amax(1).double()
    own = own if lower is None else torch.maximum(lower, own)
    block = Block(logits.mul_(measure.alpha - 1), measure.alpha, log_q)
    few = FEW_STEPS if bound or lower is not None else None
    return solve(
        block.sums,
        query.target,
        measure,
        own,
        peak,
        query.classes,
        query.spread,
        few=few,
        exact=not bound,
    )


class Agreed(NamedTuple):
    """A level that shards have found together, and what their candidates amount to there.

    Attributes
    ----------
    level : Tensor, [B], float64
        Of all candidates and the targets.
    moments : Tensor, [3, B], float64
        Sums over the candidates of all shards: p, p times (logit - target's), active ones.
    """

    level: Tensor
    moments: Tensor


def agreed_solution(
    query: Query, found: Candidates, lower: Tensor, peak: Tensor, comm: Communicator
) -> Agreed:
    """The level of candidates in shards, by one exchange a step of Newton's method.

    Every exchange carries the moments and whether the first rank was done before it: the last one
    is at the level that is returned, and all ranks end alike, whatever their processors' rounding.

    Parameters
    ----------
    query : Query
    found : Candidates
        In float64, one row of a class.
    lower, peak : Tensor, [B], float64
        A lower bound of the level, and an upper one of all logits.
    comm : Communicator

    Examples
    --------
    >>> unit, target = torch.ones(1, 1), torch.tensor([2.0]).double()
    >>> measure = Measure(2.0, torch.zeros(1).double())
    >>> query = Query(unit, unit.double(), torch.tensor([0]), target, measure, 2.0, 0.0, classes=2)
    >>> found = Candidates(torch.tensor([[0.8]]).double(), torch.tensor([[1]]))
    >>> agreed_solution(query, found, target - 1, target, Communicator())   # 0.3, 0.3 * -0.4, 1
    Agreed(level=tensor([1.3000], dtype=torch.float64), moments=tensor([[ 0.3000],
            [-0.1200],
            [ 1.0000]], dtype=torch.float64))
    """
    logits = found.cosines * query.scale
    lead = logits - query.target.unsqueeze(1)
    lead.masked_fill_(lead == -math.inf, 0)
    measure = query.of_alpha
    block = Block(logits.mul_(measure.alpha - 1), measure.alpha, query.log_q(found.rows))
    done, ended, last = torch.zeros_like(lower, dtype=torch.bool), False, Agreed(lower, lower)

    def sums(level: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal ended, last
        s, h = block.sums(level)
        p = block.posterior(level)
        mine = torch.stack((s, h, torch.linalg.vecdot(p, lead), (p > 0).sum(1).to(s), done.to(s)))
        parts = comm.gather_rows(mine)
        ended = bool(parts[0][4].all())
        s, h, gap, many = torch.stack([part[:4] for part in parts]).sum(0)
        last = Agreed(level, torch.stack((s, gap, many)))
        return s, h

    def settled(found: Tensor) -> bool:
        nonlocal done
        done = found
        return ended

    solve(sums, query.target, measure, lower, peak, query.classes, query.spread, settled)
    return last


def agreed_level(query: Query, sums, lower: Tensor, peak: Tensor, comm: Communicator) -> Tensor:
    """The level [B] from the sums of each shard; loop counts and result are the first rank's.

    For sums that cost a pass over the classes.

    Examples
    --------
    >>> unit, target = torch.ones(1, 1), torch.tensor([2.0]).double()
    >>> measure = Measure(2.0, torch.zeros(1).double())
    >>> query = Query(unit, unit.double(), torch.tensor([0]), target, measure, 2.0, 0.0, classes=2)
    >>> block = Block(torch.tensor([[1.6]]).double(), 2.0)
    >>> agreed_level(query, block.sums, target - 1, target, Communicator())
    tensor([1.3000], dtype=torch.float64)
    """

    def of_all(level: Tensor) -> tuple[Tensor, Tensor]:
        if comm.world == 1:
            return sums(level)
        s, h = comm.sum(torch.stack(sums(level)))
        return s, h

    level = solve(
        of_all,
        query.target,
        query.of_alpha,
        lower,
        peak,
        query.classes,
        query.spread,
        settled=comm.settled,  # a pass takes longer than to wait for its outcome, on a GPU too
    )
    return comm.from_first(level)


def _sampled_level(query: Query, prototypes: Prototypes) -> tuple[Tensor, float]:
    """The level [B] of the targets and some evenly spaced classes, and what share they leave.

    The level is a lower bound; the share, that of the classes above its edge.
    """
    # with sub-centres the first of each class: at most its cosine, so the bound stands
    stride = (
        max(1, len(prototypes.weight) // query.subcentres // prototypes.sizes.sample)
        * query.subcentres
    )
    scores = product(query.unit, prototypes.unit(slice(None, None, stride)))
    targets = query.labels * query.subcentres
    place = (targets // stride).clamp(0, scores.shape[1] - 1).unsqueeze(1)
    is_target = place.squeeze(1) * stride == targets  # it is no competitor of itself
    own = scores.gather(1, place).masked_fill(is_target.unsqueeze(1), -math.inf)
    scores.scatter_(1, place, own)
    top, names = scores.topk(min(prototypes.sizes.sample_top, scores.shape[1]), 1, sorted=False)
    level = candidate_level(query, Candidates(top, names * stride), bound=True)
    floor = ((query.measure.edge(level) - rounding(query, level)) / query.scale).float()
    return level, float((scores >= floor.unsqueeze(1)).float().mean())


def rounding(query: Query, level: Tensor) -> Tensor:
    """[B]: more than computed cosines and levels can move a class across the edge, in logits.

    Examples
    --------
    >>> unit, target = F.normalize(torch.ones(1, 192)), torch.tensor([10.0]).double()
    >>> measure = Measure(1.5, torch.zeros(1).double())
    >>> query = Query(unit, unit.double(), torch.tensor([0]), target, measure, 10.0, 0.0, classes=9)
    >>> bool(rounding(query, target) < 1e-3)            # of logits up to 10
    True
    """
    dim = query.unit.shape[1]
    cosine = dim * 2**-23 + 2 * product_roundoff(query.unit.device)
    return query.scale * cosine + 2**-20 * (1 + query.measure.tau(level).abs())


class Found(NamedTuple):
    """What :func:`search` finds.

    Attributes
    ----------
    candidates : Candidates or None
        They contain the whole support; None: they are too many.
    level : Tensor, [B], float64
        Of the candidates; without any, a lower bound.
    most : bool
        Whether so many classes are active that looking at all of them is cheaper than finding out
        what to skip.
    peak : Tensor, [B], float64, or None
        In shards, an upper bound of the logits of the candidates of all of them.
    """

    candidates: Candidates | None
    level: Tensor
    most: bool
    peak: Tensor | None = None


def search(query: Query, prototypes: Prototypes, comm: Communicator) -> Found:
    """The support among a few candidates, or that there is no looking for it.

    Of posteriors that are sparse: alpha > 1, or a generator with an edge.

    All ranks go the same way.

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])   # cosines 1, 0.8 and 0
    >>> unit, target = rows[:1], torch.tensor([2.0]).double()
    >>> measure = Measure(2.0, torch.zeros(1).double())
    >>> query = Query(unit, unit.double(), torch.tensor([0]), target, measure, 2.0, 0.0, classes=3)
    >>> found = search(query, Derived().of(rows), Communicator())
    >>> found.candidates.rows                           # sparsemax of (2, 1.6, 0) is (0.7, 0.3, 0)
    tensor([[1]])
    """

    def floor_of(level: Tensor) -> Tensor:
        return ((query.measure.edge(level) - rounding(query, level)) / query.scale).float()

    level, share = _sampled_level(query, prototypes)
    sizes = prototypes.sizes
    room, screened = sizes.max_candidates, prototypes.are_screened
    found: list[Candidates] | None = []
    wide = screened and share * len(level) * len(prototypes.weight) > 2 * room
    level, (most, wide) = comm.max_and_flags(level, screened and share > sizes.most, wide)
    if most or wide:
        return Found(None, level, most)
    bound = level
    everything = len(prototypes.weight)
    parts = sizes.parts_of(everything) if screened else [slice(0, everything)]
    for number, part in enumerate(parts):
        if number:
            nearest = nearest_rows(query, _joined(found, query))
            level = candidate_level(query, nearest, level, bound=True)
        floor = floor_of(level)
        if not screened:
            rows = torch.arange(part.start, part.stop, device=query.unit.device)
        else:
            rows = Screening(query.unit, floor, prototypes).survivors(part)
        more = _scored(query, rows, floor, prototypes, room)
        if more is None:
            found = None
            break
        found += more
        room -= sum(each.cosines.numel() for each in more)
    whole = _joined(found, query) if found is not None else _joined([], query)
    nearest = nearest_rows(query, whole)
    if comm.world == 1:
        if found is None:
            return Found(None, bound, False)
        return Found(whole, candidate_level(query, nearest, level, bound=True), False)
    shared = _shared_bound(query, (nearest, level) if found is not None else None, comm)
    return shared._replace(candidates=whole) if shared is not None else Found(None, bound, False)


def _shared_bound(
    query: Query, found: tuple[Candidates, Tensor] | None, comm: Communicator
) -> Found | None:
    """With lower bounds of the levels from the largest logits of each shard; None if one has none.

    They hold nearly all mass, so that from their level Newton's method needs few steps.

    Parameters
    ----------
    query : Query
    found : (Candidates, Tensor [B]) or None
        Of this shard, one row per class, and lower bounds of the levels.
    comm : Communicator
    """
    failed, most = found is None, shown_by(comm.world)
    candidates, level = found or (_joined([], query), query.target)
    width = min(most, candidates.cosines.shape[1])
    top, place = candidates.cosines.topk(width, 1, sorted=False)
    log_q = query.log_q(candidates.rows.gather(1, place))
    logits = query.exact.new_full((len(level), most), -math.inf)
    logits[:, :width] = top.double() * query.scale
    mine = [logits, level.unsqueeze(1), torch.full_like(level, float(failed)).unsqueeze(1)]
    if log_q is not None:
        mine.append(F.pad(log_q.double(), (0, most - width)))
    parts = torch.stack(comm.gather_rows(torch.cat(mine, 1)))
    if bool(parts[:, :, most + 1].any()):
        return None
    logits = parts[:, :, :most].transpose(0, 1).flatten(1)
    log_q = parts[:, :, most + 2 :].transpose(0, 1).flatten(1) if log_q is not None else None
    level, peak = parts[:, :, most].amax(0), logits.amax(1)
    level = torch.maximum(level, _level_of(query, logits, log_q, None, True))
    return Found(candidates, level, False, peak + rounding(query, level))


def product(embeddings: Tensor, rows: Tensor) -> Tensor:
    """[B, R], in the precision in force, of which :func:`rounding` knows.

    Examples
    --------
    >>> product(torch.tensor([[0.6, 0.8]]), torch.eye(2))
    tensor([[0.6000, 0.8000]])
    """
    return embeddings @ rows.T


def chunked_cosines(
    embeddings: Tensor, labels: Tensor, prototypes: Prototypes, subcentres: int = 1
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(classes, cosines [B, chunk], nearest) over all classes, in the dtype of `embeddings`.

    The cosines are -inf at the targets. `nearest` [B, chunk], uint8, is the sub-centre that gave
    each, at the targets too; None where classes have one row.

    Parameters
    ----------
    embeddings : Tensor, [B, D]
        float32 or float64, unit rows.
    labels : Tensor, [B]
        The targets among these classes; -1 where they are in another shard.
    subcentres : int
        Rows of each class.

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> from speechbrain_qmargin.head.sizes import Sizes
    >>> prototypes = Derived(Sizes(chunk=2)).of(torch.eye(3))
    >>> unit = torch.tensor([[0.6, 0.8, 0.0]])
    >>> for classes, cosines, _ in chunked_cosines(unit, torch.tensor([1]), prototypes):
    ...     print(classes, cosines)
    slice(0, 2, None) tensor([[0.6000,   -inf]])
    slice(2, 3, None) tensor([[0.]])
    """
    classes, nearest = prototypes.weight.shape[0] // subcentres, None
    sizes, each = prototypes.sizes, embeddings.element_size()
    chunk = sizes.fit(sizes.chunk, each * (embeddings.shape[1] + 4 * len(embeddings)))
    chunk = max(1, chunk // subcentres)
    for start in range(0, classes, chunk):
        part = slice(start, min(start + chunk, classes))
        rows = slice(part.start * subcentres, part.stop * subcentres)
        cosines = product(embeddings, prototypes.unit(rows, embeddings.dtype))
        if subcentres > 1:
            cosines, nearest = cosines.unflatten(1, (-1, subcentres)).max(2)
            nearest = nearest.to(torch.uint8)
        place = (labels - start).clamp(0, cosines.shape[1] - 1).unsqueeze(1)
        inside = ((labels >= start) & (labels < part.stop)).unsqueeze(1)
        value = cosines.gather(1, place).masked_fill(inside, -math.inf)
        yield part, cosines.scatter_(1, place, value), nearest


def refined(
    query: Query, found: Candidates, level: Tensor, prototypes: Prototypes
) -> tuple[Candidates, Tensor]:
    """The candidates that may be active, one row per class, in float64, and a bound of the level.

    A loss near zero is a difference of nearly equal cosines, whose float32 rounding would be most
    of it. Only what may be active is computed again, so the cost is the support's.

    Parameters
    ----------
    query : Query
    found, level
        What :func:`search` gave.

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> unit, target = rows[:1], torch.tensor([2.0]).double()
    >>> measure = Measure(2.0, torch.zeros(1).double())
    >>> query = Query(unit, unit.double(), torch.tensor([0]), target, measure, 2.0, 0.0, classes=3)
    >>> found = Candidates(torch.tensor([[0.8, 0.0]]), torch.tensor([[1, 2]]))
    >>> kept, _ = refined(query, found, torch.tensor([1.3]).double(), Derived().of(rows))
    >>> kept.rows, kept.cosines.dtype                   # a logit of 0 is below the edge, 1.3
    (tensor([[1]]), torch.float64)
    """
    slack = rounding(query, level)
    floor = query.measure.edge(level) - slack
    keep = found.cosines * query.scale > floor.unsqueeze(1)
    samples, place = keep.nonzero(as_tuple=True)
    column = (keep.cumsum(1) - 1)[samples, place]
    rows = found.rows[samples, place]
    width = int(keep.sum(1).max().clamp(min=1))
    cosines = query.exact.new_full((keep.shape[0], width), -math.inf)
    names = torch.zeros_like(cosines, dtype=torch.int64)
    cosines[samples, column] = exact_cosines(query.exact, samples, rows, prototypes)
    names[samples, column] = rows
    return nearest_rows(query, Candidates(cosines, names)), level - slack


def exact_cosines(exact: Tensor, samples: Tensor, rows: Tensor, prototypes: Prototypes) -> Tensor:
    """cos(exact[samples], prototypes[rows]) in float64, a few megabytes at a time.

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> prototypes = Derived().of(torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    >>> exact = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    >>> exact_cosines(exact, torch.tensor([0, 0]), torch.tensor([0, 1]), prototypes)
    tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    cosines = exact.new_empty(samples.numel())
    at_once = prototypes.sizes.fit(prototypes.sizes.exact, 32 * exact.shape[1])
    for start in range(0, samples.numel(), at_once):
        part = slice(start, start + at_once)
        unit = prototypes.unit(rows[part], exact.dtype)
        cosines[part] = torch.linalg.vecdot(exact[samples[part]], unit)
    return cosines
