"""Every class of a shard, in chunks: for posteriors that are dense, or nearly so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.head.prototypes import Prototypes
from speechbrain_qmargin.head.search import Query, agreed_level, chunked_cosines, rounding
from speechbrain_qmargin.loss.device import refuse_unless
from speechbrain_qmargin.loss.f_operators import masses
from speechbrain_qmargin.loss.interface import check_rows, slope_of
from speechbrain_qmargin.loss.solver import Block, single_class_level

__all__ = ["AllClasses", "AllOfGenerator", "not_alone", "of_a_chunk"]

_LEARNS = (
    "move_others uses a tensor that requires a gradient, which a sparse head does not form: train "
    "it with --head dense"
)
_KEPT_BYTES = 128 * 1024 * 1024  # of scores: above, they are computed again in each pass


def not_alone(name: str, value: str) -> str:
    """The refusal of a function of cosines that cannot be taken chunk by chunk.

    Examples
    --------
    >>> not_alone("others", "logit")
    'others gives a class another logit beside other classes, or twice; a sparse head takes ...'
    """
    return (
        f"{name} gives a class another {value} beside other classes, or twice; a sparse head takes "
        "some classes at a time: element by element, nothing drawn within, or --head dense"
    )


def of_a_chunk(
    name: str, function: Callable[[Tensor], Tensor], cosines: Tensor, refusal: str
) -> tuple[Tensor, Tensor]:
    """What a function gives of cosines [B, K], and of the first of them alone, both in the graph.

    Raises
    ------
    TypeError
        With `refusal`, where the function fails on one class.
    ValueError
        What it gives is not [B, K], see :func:`~speechbrain_qmargin.loss.interface.check_rows`.

    Examples
    --------
    >>> of_a_chunk("others", torch.square, torch.tensor([[0.5, 1.0]]), "not by itself")
    (tensor([[0.2500, 1.0000]]), tensor([[0.2500]]))
    >>> def largest_two(cosines):
    ...     return cosines.topk(2, dim=1).values
    >>> of_a_chunk("others", largest_two, torch.tensor([[0.5, 1.0]]), "not by itself")
    Traceback (most recent call last):
    TypeError: not by itself
    """
    with torch.enable_grad():
        together = function(cosines.clone())
        try:
            alone = function(cosines[:, :1].clone())
        except (RuntimeError, IndexError) as error:  # say, more of the largest than there are
            raise TypeError(refusal) from error
    check_rows(name, together, cosines)
    return together, alone


class _Pieces:
    """The logits of all classes of a shard times a factor, chunk by chunk.

    They are kept where they fit 128 MB; else nothing is stored, and each pass forms them again.
    What an iteration gives is not to be changed.

    Parameters
    ----------
    query : Query
    prototypes : Prototypes
    scored : Tensor, [B, D]
        The query's embeddings in the precision that the cosines are to have.
    factor : float
    move : callable, optional
        New cosines for cosines [B, chunk]. What it gives is not kept.
    """

    def __init__(
        self,
        query: Query,
        prototypes: Prototypes,
        scored: Tensor,
        factor: float = 1.0,
        move: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._query, self._prototypes = query, prototypes
        self._scored, self._factor, self._move = scored, query.scale * factor, move
        size = len(query.labels) * len(prototypes.weight) * scored.element_size()
        self._keep, self._kept = size <= _KEPT_BYTES and move is None, None

    def cosines(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """As :func:`~.search.chunked_cosines`, neither moved nor kept."""
        query = self._query
        return chunked_cosines(self._scored, query.labels, self._prototypes, query.subcentres)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """(classes, logits times the factor [B, chunk], nearest); -inf at the targets."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for rows, cosines, nearest in self.cosines():
            if self._move is not None:
                cosines = self._move(cosines)
            cosines.mul_(self._factor)
            if self._keep:
                kept.append((rows, cosines, nearest))
            yield rows, cosines, nearest
        self._kept = kept if self._keep else None


class AllClasses:
    """The scores of all classes of a shard, for one query.

    float32 at alpha = 1, where a posterior is as exact relative to itself as its logit is
    absolutely; above, 1 + (alpha - 1)(theta - tau) may nearly cancel, so float64. With `rounded`,
    for a batch that has most classes active, float32 as the dense loss's.

    `move_others` is that of :class:`~speechbrain_qmargin.loss.interface.Objective`.

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> from speechbrain_qmargin.loss.solver import Measure
    >>> unit, label = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    >>> zero, one = torch.zeros(1).double(), torch.ones(1).double()
    >>> query = Query(unit, unit.double(), label, one, Measure(1.0, zero), 1.0, 0.0, classes=2)
    >>> everything = AllClasses(query, Derived().of(torch.eye(2)))
    >>> level = everything.level(Communicator())            # log(e^1 + e^0)
    >>> level
    tensor([1.3133], dtype=torch.float64)
    >>> [p for _, p, *_ in everything.posteriors(level)]    # 1 / (1 + e); the target's is left out
    [tensor([[0.0000, 0.2689]])]
    """

    def __init__(
        self,
        query: Query,
        prototypes: Prototypes,
        move_others: Callable[[Tensor, Tensor], Tensor] | None = None,
        rounded: bool = False,
    ) -> None:
        self.query, self._move = query, move_others
        alpha = query.of_alpha.alpha
        self._scored = query.unit if alpha == 1 or rounded else query.exact
        move = None if move_others is None else lambda at: self._moved(at, with_slopes=False)[0]
        # logits, times alpha - 1 above alpha = 1
        factor = alpha - 1 if alpha > 1 else 1.0
        self._pieces = _Pieces(query, prototypes, self._scored, factor, move)
        self._block: Block | None = None
        self._rounded, self._asked = rounded, move_others is None

    def _ask(self, cosines: Tensor, target: Tensor) -> None:
        """Refuse a `move_others` that cannot be taken chunk by chunk; once, of a first chunk."""
        self._asked = True
        move, refusal = self._move, not_alone("move_others", "cosine")
        assert move is not None
        all_of_them, alone = of_a_chunk(
            "move_others", lambda part: move(part, target), cosines, refusal
        )
        if all_of_them.requires_grad:
            raise TypeError(_LEARNS)
        same = torch.isclose(alone, all_of_them[:, :1], rtol=1e-5, atol=1e-5, equal_nan=True).all()
        refuse_unless(same, TypeError, refusal)

    def _moved(self, cosines: Tensor, with_slopes: bool) -> tuple[Tensor, Tensor | None]:
        """New cosines [B, chunk] and their slopes; -inf at the targets stays."""
        move = self._move
        assert move is not None
        target = (self.query.target / self.query.scale).to(cosines.dtype).unsqueeze(1)
        absent = cosines == -math.inf
        finite, slopes = cosines.masked_fill(absent, 0), None
        if not self._asked:
            self._ask(finite, target)
        if with_slopes:
            moved, slopes = slope_of(lambda at: move(at, target), finite, asked=True)
        else:
            moved = move(finite, target).clone()
        return moved.masked_fill_(absent, -math.inf), slopes

    def _blocks(self) -> Iterator[tuple[slice, Block, Tensor | None]]:
        measure = self.query.of_alpha
        for rows, v, nearest in self._pieces:
            if self._block is None or self._block.v.shape != v.shape:
                self._block = Block(v, measure.alpha)
            log_q = measure.of(rows)
            self._block.v = v
            self._block.log_q = None if log_q is None else log_q.to(v.dtype)
            yield rows, self._block, nearest

    def level(self, comm: Communicator, bound: Tensor | None = None) -> Tensor:
        """[B], float64, the same on all ranks; `bound` [B] is a lower bound where one is known."""
        measure, target = self.query.of_alpha, self.query.target
        alpha = measure.alpha
        if alpha == 1:
            total = torch.full_like(target, -math.inf)
            for rows, logits, _ in self._pieces:
                log_q = measure.of(rows)
                logits = logits if log_q is None else logits + log_q.to(logits.dtype)
                total = torch.logaddexp(total, torch.logsumexp(logits, 1).double())
            peak = comm.max(total)
            peak = torch.where(peak.isfinite(), peak, 0)
            total = comm.sum(torch.exp(total - peak)).log() + peak
            return comm.from_first(torch.logaddexp(total, target + measure.target))
        peak = torch.full_like(target, -math.inf)
        lower = peak if bound is None else bound.to(peak)
        if bound is not None and not self._rounded:  # it is of float32 cosines
            lower = lower - rounding(self.query, lower)
        for rows, v, _ in self._pieces:
            log_q = measure.of(rows)
            peak = torch.maximum(peak, v.amax(1).double() / (alpha - 1))
            if log_q is not None:
                alone = single_class_level(v.double() / (alpha - 1), alpha, log_q.double())
                lower = torch.maximum(lower, alone.amax(1))
        if measure.classes is None:
            lower = torch.maximum(lower, single_class_level(peak, alpha))
        peak, lower = comm.max(torch.stack((peak, lower)))

        def sums(level: Tensor) -> tuple[Tensor, Tensor]:
            s, h = torch.zeros_like(level), torch.zeros_like(level)
            for _, block, _ in self._blocks():
                more = block.sums(level)
                s, h = s + more[0], h + more[1]
            return s.to(self._scored.dtype), h.to(self._scored.dtype)

        return agreed_level(self.query, sums, lower, peak.to(self._scored.dtype), comm)

    def posteriors(
        self, level: Tensor, with_slopes: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """(classes, p [B, chunk], scores, slopes, nearest): p not yet of sum one, and overwritten.

        The scores are the logits, times alpha - 1 above alpha = 1; the slopes those of
        `move_others`, None where it moves nothing; `nearest` as of
        :func:`~.search.chunked_cosines`.
        """
        measure = self.query.of_alpha
        if measure.alpha > 1:
            for rows, block, nearest in self._blocks():
                yield rows, block.posterior(level), block.v, None, nearest
            return
        if self._move is not None and with_slopes:
            for rows, cosines, nearest in self._pieces.cosines():
                moved, slopes = self._moved(cosines, with_slopes=True)
                logits, log_q = moved.mul_(self.query.scale), measure.of(rows)
                shift = logits if log_q is None else logits + log_q.to(logits.dtype)
                p = torch.exp(shift - level.to(logits.dtype).unsqueeze(1))
                yield rows, p, logits, slopes, nearest
            return
        for rows, logits, nearest in self._pieces:
            log_q = measure.of(rows)
            shift = logits if log_q is None else logits + log_q.to(logits.dtype)
            p = torch.exp(shift - level.to(logits.dtype).unsqueeze(1))
            yield rows, p, logits, None, nearest


class AllOfGenerator:
    """All classes of a shard under another divergence than the alpha-divergences, in float64.

    Parameters
    ----------
    query : Query
        Whose measure is a ``GeneratorMeasure``.
    prototypes : Prototypes

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> from speechbrain_qmargin.loss.f_operators import GeneratorMeasure
    >>> from speechbrain_qmargin.loss.generators import generator_named
    >>> unit, label, one = torch.tensor([[1.0, 0.0]]), torch.tensor([0]), torch.ones(1).double()
    >>> measure = GeneratorMeasure(generator_named("le_cam"), torch.zeros(1).double())
    >>> query = Query(unit, unit.double(), label, one, measure, 1.0, 0.0, classes=2)
    >>> list(AllOfGenerator(query, Derived().of(torch.eye(2))).leads())
    [tensor([[-inf, -1.]], dtype=torch.float64)]
    """

    def __init__(self, query: Query, prototypes: Prototypes) -> None:
        self.query = query
        self._pieces = _Pieces(query, prototypes, query.exact)

    def leads(self) -> Iterator[Tensor]:
        """Logits less the target's, [B, chunk]; -inf at the targets."""
        target = self.query.target.unsqueeze(1)
        return (logits - target for _, logits, _ in self._pieces)

    def posteriors(
        self, level: Tensor, with_slopes: bool = False
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None, Tensor | None]]:
        """As in :class:`AllClasses`; `level` is the targets' depth, and nothing is moved."""
        measure, target = self.query.of_generator, self.query.target.unsqueeze(1)
        for rows, logits, nearest in self._pieces:
            p, _ = masses(measure.generator, level.unsqueeze(1) - (logits - target))
            yield rows, p, logits, None, nearest
