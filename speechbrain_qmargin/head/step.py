"""Forward and backward of the head, for one process and for shards alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.head.dense import AllClasses, AllOfGenerator
from speechbrain_qmargin.head.precision import exact_accumulation
from speechbrain_qmargin.head.prototypes import Prototypes
from speechbrain_qmargin.head.search import (
    Candidates,
    Query,
    agreed_solution,
    candidate_level,
    exact_cosines,
    refined,
    rounding,
    search,
)
from speechbrain_qmargin.loss.device import add_rows, refuse_unless
from speechbrain_qmargin.loss.f_operators import GeneratorMeasure, Moments, masses
from speechbrain_qmargin.loss.interface import (
    Objective,
    label_outside,
    refuse_second_derivatives,
    slope_of,
)
from speechbrain_qmargin.loss.solver import Block, Measure, Solution, fenchel_young

__all__ = [
    "ChunkGradients",
    "Evaluation",
    "HeadLoss",
    "RowsInOrder",
    "Shard",
    "check_backward",
    "gathered",
    "of_rows",
    "refuse_labels",
    "target_cosines",
]


class RowsInOrder:
    """Remembers the rows of the last row-sparse gradient that was made: they rise, each once.

    Autograd forgets that a gradient is coalesced, and to look at its rows is to wait for the
    device. These are known again by where they are, as long as nothing was written there. The
    memory is the gradient's own and ends with it.

    Examples
    --------
    >>> known, rows = RowsInOrder(), torch.tensor([3, 5, 8])
    >>> known.remember(rows)
    >>> known.holds(rows), known.holds(rows[:2]), known.holds(rows.clone())
    (True, False, False)
    >>> rows[0] = 9
    >>> known.holds(rows)
    False
    """

    _known: tuple | None = None

    def __getstate__(self) -> dict:
        return {}  # a copy has gradients of its own

    def remember(self, rows: Tensor) -> None:
        """`rows` [R] rise, each once."""
        self._known = _place(rows)

    def holds(self, rows: Tensor) -> bool:
        """Whether these are the rows last remembered, unchanged."""
        return self._known is not None and self._known == _place(rows)


def _place(rows: Tensor) -> tuple:
    storage = StorageWeakRef(rows.untyped_storage())  # while it is kept, none has its address
    return storage, rows.storage_offset(), rows.shape, rows.stride(), rows._version


class Shard(NamedTuple):
    """The classes [start, stop) of all, their rows, and whom to ask about the others.

    Attributes
    ----------
    prototypes : Prototypes
        Of this shard.
    start, stop, classes : int
        `classes` is the number of all.
    comm : Communicator
    in_order : RowsInOrder or None
        None: the gradient of the rows is dense.
    subcentres : int
        Rows of each class.

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> shard = Shard(Derived().of(torch.eye(3)), 0, 3, 3, Communicator(), None)
    >>> shard.stop - shard.start == shard.classes       # of one process
    True
    """

    prototypes: Prototypes
    start: int
    stop: int
    classes: int
    comm: Communicator
    in_order: RowsInOrder | None  # None: the gradient of the rows is dense
    subcentres: int = 1


class Evaluation(NamedTuple):
    """Of this rank's samples, all [B]; only the loss has a gradient.

    Attributes
    ----------
    loss, target_posterior : Tensor, float32
    support : Tensor, float32
        Active classes, the target included.
    residual : Tensor, float64
        p_y - 1, without the rounding of that difference.
    target_cosines : Tensor, float64
        Not moved.
    """

    loss: Tensor
    target_posterior: Tensor
    support: Tensor
    residual: Tensor
    target_cosines: Tensor


class HeadLoss(torch.autograd.Function):
    """What :class:`Evaluation` says.

    The gradient of the embeddings is that of this rank's loss, for DDP to average; the prototypes'
    is that of the ranks' mean loss, which is what the average would have been.
    """

    @staticmethod
    def forward(ctx: Any, unit, weight, anchor, labels, raw, valid, sizes, shard, objective):
        """
        Parameters
        ----------
        unit, raw : Tensor, [b, D], float32
            This rank's embeddings, of unit length and as they are.
        weight, anchor : Parameter
            The shard's prototypes; what DDP is to see of them, or None.
        labels : Tensor, [b], int64
        valid : Tensor, bool, or None
            Whether all embeddings of all ranks are finite: otherwise all losses are NaN, and all
            gradients zero.
        sizes : list of int
            b of all ranks.
        shard : Shard
        objective : Objective
            Its `target_log_q` and `spread` are given.
        """
        comm, prototypes = shard.comm, shard.prototypes
        own = comm.own(sizes)
        raw, labels, target_log_q = gathered(
            torch.where(valid, raw, 0), labels, objective.target_log_q, comm, sizes
        )
        exact = F.normalize(raw.double(), dim=1)
        here = (labels >= shard.start) & (labels < shard.stop)
        labels = torch.where(here, labels - shard.start, -1)
        mine = here.nonzero().squeeze(1)
        cos_y, target_rows = target_cosines(exact, mine, labels[mine], shard)
        own_cosines, slope = cos_y[own], 1.0
        if objective.move_target is not None:
            moved = torch.stack(slope_of(objective.move_target, own_cosines), 1)
            cos_y, slope = comm.gather(moved, sizes).T
        log_q = None if objective.log_q is None else objective.log_q[shard.start : shard.stop]
        if objective.generator is None:
            measure = Measure(objective.alpha, target_log_q, log_q)
        else:
            measure = GeneratorMeasure(objective.generator, target_log_q)
        query = Query(
            exact.float(),
            exact,
            labels,
            cos_y * objective.scale,
            measure,
            objective.scale,
            objective.spread,
            shard.classes,
            shard.subcentres,
        )
        with exact_accumulation(raw.device):
            if objective.generator is None:
                solved = _solved(query, shard, objective)
            else:
                solved = _solved_of_generator(query, prototypes, comm)
        solution, support = solved.solution, solved.support
        residual = (solution.residual * slope).float()
        p_y = solution.target_posterior.float()
        loss = torch.where(valid, solution.loss.float(), torch.nan)
        support = (support + (p_y > 0)).float()
        ctx.entries = None
        if solved.active is not None:
            rows, p = solved.active
            samples, place = p.nonzero(as_tuple=True)
            share = p[samples, place] * solution.inverse_total[samples]
            # the target is an entry like the others
            ctx.entries = (
                torch.cat([samples, mine]),
                torch.cat([rows[samples, place], target_rows]),
                torch.cat([share.float(), residual[mine]]),
            )
        ctx.save_for_backward(query.unit, solved.level, solution.inverse_total, residual, valid)
        ctx.everything, ctx.shard, ctx.scale = solved.everything, shard, objective.scale
        ctx.sizes, ctx.anchored = sizes, anchor is not None
        ctx.weight, ctx.version = weight, weight._version
        outputs = loss[own], p_y[own], support[own], solution.residual[own], own_cosines
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        check_backward(ctx)
        comm = ctx.shard.comm
        unit, level, inverse_total, residual, valid = ctx.saved_tensors  # once: a checkpoint's rule
        upstream = comm.gather(gradients[0], ctx.sizes) * ctx.scale
        upstream = torch.where(valid, upstream, 0)
        with torch.autocast(upstream.device.type, enabled=False):
            if ctx.entries is not None:
                grad_unit, grad_weight = _sparse_backward(ctx, upstream, unit)
            else:
                found = _dense_backward(ctx, upstream, unit, level, inverse_total, residual)
                grad_unit, grad_weight = found.by_unit, found.by_weight
        if grad_unit is not None:
            grad_unit = comm.sum_of_own(grad_unit, ctx.sizes)
        if grad_weight is not None and comm.world > 1:
            (grad_weight._values() if grad_weight.is_sparse else grad_weight).div_(comm.world)
        anchor = torch.zeros(1, device=upstream.device) if ctx.anchored else None
        return grad_unit, grad_weight, anchor, *[None] * 6


def gathered(
    raw: Tensor, labels: Tensor, target_log_q: Tensor, comm: Communicator, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, D], labels and log q of the targets [B] of all ranks, in one exchange.

    Parameters
    ----------
    raw : Tensor, [b, D], float32
    labels : Tensor, [b], int64
    target_log_q : Tensor, [b], float64
    sizes : list of int
        b of all ranks.

    Examples
    --------
    >>> raw, labels, log_q = torch.ones(2, 4), torch.tensor([3, 1]), torch.zeros(2).double()
    >>> everywhere = gathered(raw, labels, log_q, Communicator(), sizes=[2])
    >>> everywhere[1]                                   # of one process: its own
    tensor([3, 1])
    """
    if comm.world == 1:
        return raw, labels, target_log_q
    # two numbers of float64 as four of float32
    names = torch.stack((labels.double(), target_log_q), 1)
    both = comm.gather(torch.cat((raw, names.view(torch.float32)), 1), sizes)
    # a copy: a view of eight bytes wants strides and a beginning at multiples of eight
    raw, names = both[:, :-4].contiguous(), both[:, -4:].flatten().clone()
    names = names.view(torch.float64).view(-1, 2)
    return raw, names[:, 0].long(), names[:, 1].contiguous()


def target_cosines(
    exact: Tensor, mine: Tensor, labels: Tensor, shard: Shard
) -> tuple[Tensor, Tensor]:
    """(cosines [B] of all targets, the nearest rows [n] of those in this shard), in float64.

    Parameters
    ----------
    exact : Tensor, [B, D], float64
    mine, labels : Tensor, [n]
        The samples whose targets are in this shard, and the targets among its classes.
    shard : Shard

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> prototypes = Derived().of(torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    >>> shard = Shard(prototypes, 0, 2, 2, Communicator(), None)
    >>> exact = torch.tensor([[0.6, 0.8]]).double()
    >>> target_cosines(exact, torch.tensor([0]), torch.tensor([1]), shard)
    (tensor([0.8000], dtype=torch.float64), tensor([1]))
    """
    cosines = torch.zeros_like(exact[:, 0])
    centres = torch.arange(shard.subcentres, device=exact.device)
    rows = labels.unsqueeze(1) * shard.subcentres + centres
    each = mine.repeat_interleave(shard.subcentres)
    near = exact_cosines(exact, each, rows.flatten(), shard.prototypes).view_as(rows).max(1)
    cosines[mine] = near.values
    return shard.comm.sum(cosines), rows.gather(1, near.indices.unsqueeze(1)).squeeze(1)


class ChunkGradients:
    """Gradients by unit embeddings and by rows, from those by cosines, chunk by chunk.

    Attributes
    ----------
    by_unit, by_weight : Tensor or None
        The first of this shard's classes alone.

    Examples
    --------
    >>> from speechbrain_qmargin.head.prototypes import Derived
    >>> prototypes = Derived().of(torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    >>> shard = Shard(prototypes, 0, 2, 2, Communicator(), None)
    >>> found = ChunkGradients(torch.tensor([[0.6, 0.8]]), shard, needed=(True, True))
    >>> found.add(slice(0, 2), torch.tensor([[0.0, 1.0]]), None)        # by the cosine of class 1
    >>> found.by_unit                                   # its direction
    tensor([[0., 1.]])
    >>> found.by_weight                                 # the embedding across it, by its length
    tensor([[0.0000, 0.0000],
            [0.1200, 0.0000]])
    """

    def __init__(self, unit: Tensor, shard: Shard, needed: tuple[bool, bool]) -> None:
        self._unit, self._shard = unit, shard
        self.by_unit = torch.zeros_like(unit) if needed[0] else None
        self.by_weight = torch.empty_like(shard.prototypes.weight) if needed[1] else None

    def add(self, classes: slice, g: Tensor, nearest: Tensor | None) -> None:
        """g [B, chunk], of all of some classes; `nearest` as in ``chunked_cosines``."""
        prototypes, centres = self._shard.prototypes, self._shard.subcentres
        rows = slice(classes.start * centres, classes.stop * centres)
        if nearest is not None:  # the other rows of a class have no gradient
            each = g.new_zeros(*g.shape, centres)
            g = each.scatter_(2, nearest.long().unsqueeze(2), g.unsqueeze(2)).flatten(1)
        directions = prototypes.unit(rows)
        if self.by_unit is not None:
            self.by_unit.addmm_(g, directions)
        if self.by_weight is not None:
            chunk = torch.mm(g.T, self._unit, out=self.by_weight[rows])
            _project(chunk, directions, prototypes.inverse_norm[rows])


def check_backward(ctx: Any) -> None:
    """Refuse second derivatives, and prototypes that were changed since the forward pass.

    Raises
    ------
    RuntimeError
        Either.
    """
    refuse_second_derivatives(
        "QMarginHead", "use the loss on all cosines, as the dense classifier gives them"
    )
    if ctx.weight._version != ctx.version:
        raise RuntimeError(
            "the prototypes were changed between the forward and the backward of QMarginHead"
        )


def refuse_labels(labels: Tensor, num_classes: int) -> None:
    """Raise for labels, of which one at least is outside [0, num_classes).

    Raises
    ------
    ValueError
        The first of them, and how many classes there are.

    Examples
    --------
    >>> refuse_labels(torch.tensor([0, 3]), 3)
    Traceback (most recent call last):
    ValueError: target label 3 is outside [0, 3): the outputs have 3 classes. ...
    """
    valid = (labels >= 0) & (labels < num_classes)
    raise ValueError(label_outside(int(labels[~valid][0]), num_classes))


def of_rows(rows: Tensor, values: Tensor, like: Tensor, known: RowsInOrder | None) -> Tensor:
    """A gradient like a weight, from its rows [R], in order, and their values [R, D].

    Row-sparse, and remembered by `known`; dense where that is None.

    Examples
    --------
    >>> rows, values, weight = torch.tensor([1]), torch.tensor([[5.0, 6.0]]), torch.zeros(3, 2)
    >>> of_rows(rows, values, weight, None)
    tensor([[0., 0.],
            [5., 6.],
            [0., 0.]])
    >>> of_rows(rows, values, weight, RowsInOrder()).is_sparse
    True
    """
    if known is not None:
        # torch.sparse_coo_tensor of torch 2.11 warns of unchecked invariants in spite of
        # check_invariants=False; this is what it calls when it has checked nothing.
        grad = torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors(
            1,
            like.ndim - 1,
            like.shape,
            rows.unsqueeze(0),
            values,
            dtype=values.dtype,
            layout=torch.sparse_coo,
            device=values.device,
            is_coalesced=True,
        )
        known.remember(grad._indices()[0])
        return grad
    return torch.zeros_like(like).index_copy_(0, rows, values)


class _Solved(NamedTuple):
    """A batch's losses, and from what its gradients are made.

    Attributes
    ----------
    solution : Solution
    support : Tensor, [B]
        Active classes beside the target.
    level : Tensor, [B]
        At which `everything` gives the posteriors.
    active : (rows [B, K], posteriors [B, K]) or None
        Of the candidates, the posteriors before division by their sum.
    everything : AllClasses, AllOfGenerator or None
        Where there are no candidates.
    """

    solution: Solution
    support: Tensor
    level: Tensor
    active: tuple[Tensor, Tensor] | None = None
    everything: AllClasses | AllOfGenerator | None = None


def _solved(query: Query, shard: Shard, objective: Objective) -> _Solved:
    """For the alpha-divergences."""
    active = everything = candidates = lower = None
    bound, most, peak = None, False, None
    prototypes, comm = shard.prototypes, shard.comm
    if objective.alpha > 1:
        candidates, bound, most, peak = search(query, prototypes, comm)
        if candidates is not None:
            candidates, lower = refined(query, candidates, bound, prototypes)
    if candidates is None or lower is None:
        everything = AllClasses(query, prototypes, objective.move_others, rounded=most)
        level = everything.level(comm, bound)
        moments = comm.sum(_all_moments(everything, level))
    else:
        if peak is None:
            level = candidate_level(query, candidates, lower)
            p, moments = _posterior(query, candidates, level)
        else:
            level, moments = agreed_solution(query, candidates, lower, peak, comm)
            p, _ = _posterior(query, candidates, level)
        active = candidates.rows, p
    others, gap, support = moments
    solution = fenchel_young(query.of_alpha, query.target, level, others, gap)
    _check_mass(solution, objective.alpha)
    return _Solved(solution, support, level, active, everything)


def _check_mass(solution: Solution, alpha: float) -> None:
    """Refuse posteriors that have lost most of their mass to rounding.

    u of a class alone is q^(1 - alpha): where that is less than a logit's rounding, no level
    holds it.
    """
    lost = solution.inverse_total > 2  # False where it is not a number
    message = (
        f"log_q: the posteriors of a sample do not sum to 1. At alpha = {alpha:g} it is too large "
        "for float64 to hold next to the logits: take a smaller alpha, a smaller log_q, or "
        "--head dense"
    )
    refuse_unless(~lost.any(), ValueError, message)


def _solved_of_generator(query: Query, prototypes: Prototypes, comm: Communicator) -> _Solved:
    """For another divergence; the level is the targets' depth.

    Every sum goes over the ranks, and what the first rank finds is the depth of all.
    """
    measure = query.of_generator
    candidates = active = everything = lower = None
    leads: Callable[[], Iterable[Tensor]]
    if measure.generator.is_sparse:
        candidates, bound, _, _ = search(query, prototypes, comm)
        if candidates is None:
            lower = bound - rounding(query, bound)
        else:
            candidates, lower = refined(query, candidates, bound, prototypes)
        lower = measure.depth_at(lower, query.target)
    if candidates is None:
        everything = AllOfGenerator(query, prototypes)
        leads = everything.leads
    else:
        lead = candidates.cosines * query.scale - query.target.unsqueeze(1)
        leads = [lead].__iter__
    most = torch.full_like(query.target, -math.inf)
    for part in leads():
        most = torch.maximum(most, part.amax(1))
    depth = measure.depth(
        leads,
        comm.max(most),
        query.classes,
        lower=lower,
        total=comm.sum,
        settled=comm.settled if comm.world > 1 else None,
    )
    depth = comm.from_first(depth)
    moments = Moments(*comm.sum(torch.stack(measure.moments(leads(), depth))))
    if candidates is not None:
        p, _ = masses(measure.generator, depth.unsqueeze(1) - lead)
        active = candidates.rows, p
    solution = measure.solution(depth, moments)
    return _Solved(solution, moments.support, depth, active, everything)


def _posterior(query: Query, found: Candidates, level: Tensor) -> tuple[Tensor, Tensor]:
    """Posteriors [B, K] of candidates, and their sum, gap and number [3, B]."""
    logits, alpha = found.cosines * query.scale, query.of_alpha.alpha
    lead = logits - query.target.unsqueeze(1)
    block = Block(logits.mul_(alpha - 1), alpha, query.log_q(found.rows))
    p = block.posterior(level)
    gap = torch.linalg.vecdot(p, lead.masked_fill_(p == 0, 0))
    return p, torch.stack((p.sum(1), gap, (p > 0).sum(1)))


def _all_moments(everything: AllClasses, level: Tensor) -> Tensor:
    moments = torch.zeros(3, *level.shape, dtype=torch.float64, device=level.device)
    target = everything.query.target.unsqueeze(1)
    alpha = everything.query.of_alpha.alpha
    for _, p, scores, *_ in everything.posteriors(level):
        if alpha > 1:
            lead = (scores / (alpha - 1)).sub_(target).masked_fill_(p == 0, 0)
            gap = torch.linalg.vecdot(p, lead).double()
        else:
            gap = torch.zeros_like(level)  # does not count
        moments += torch.stack((p.sum(1).double(), gap, (p > 0).sum(1)))
    return moments


def _sparse_backward(ctx: Any, scale: Tensor, unit: Tensor) -> tuple[Tensor | None, Tensor | None]:
    samples, entries, g = ctx.entries
    prototypes = ctx.shard.prototypes
    weight, inverse_norm = prototypes.weight, prototypes.inverse_norm
    factor = scale[samples]
    g = torch.where(factor == 0, 0, g * factor)  # a share may be no number where the loss is none
    keep = (g != 0).nonzero().squeeze(1)
    samples, entries, g = samples[keep], entries[keep], g[keep]
    grad_unit = grad_weight = None
    at_once = prototypes.sizes.fit(prototypes.sizes.rows, 8 * unit.shape[1])
    parts = torch.arange(keep.numel(), device=unit.device).split(at_once)
    if ctx.needs_input_grad[0]:
        grad_unit = torch.zeros_like(unit)
        for part in parts:
            rows = weight.index_select(0, entries[part])
            rows.mul_((g[part] * inverse_norm[entries[part]]).unsqueeze(1))
            add_rows(grad_unit, samples[part], rows)
    if ctx.needs_input_grad[1]:
        rows, slot = torch.unique(entries, return_inverse=True)
        values = unit.new_zeros(rows.numel(), unit.shape[1])
        for part in parts:
            add_rows(values, slot[part], unit[samples[part]] * g[part].unsqueeze(1))
        for start in range(0, rows.numel(), at_once):
            part = slice(start, start + at_once)
            _project(values[part], prototypes.unit(rows[part]), inverse_norm[rows[part]])
        grad_weight = of_rows(rows, values, weight, ctx.shard.in_order)
    return grad_unit, grad_weight


def _project(grad: Tensor, unit: Tensor, inverse_norm: Tensor) -> None:
    """Gradient by the unit rows to gradient by the rows, in place."""
    radial = torch.linalg.vecdot(grad, unit).unsqueeze(1)
    grad.sub_(unit.mul_(radial)).mul_(inverse_norm.unsqueeze(1))


def _dense_backward(
    ctx: Any, scale: Tensor, unit: Tensor, level: Tensor, inverse_total: Tensor, residual: Tensor
) -> ChunkGradients:
    labels = ctx.everything.query.labels
    gradients = ChunkGradients(unit, ctx.shard, ctx.needs_input_grad[:2])
    everyone = torch.arange(labels.numel(), device=labels.device)
    for classes, p, _, slopes, nearest in ctx.everything.posteriors(level, with_slopes=True):
        g = (p * inverse_total.unsqueeze(1)).float()
        if slopes is not None:
            g *= slopes
        inside = (labels >= classes.start) & (labels < classes.stop)
        place = (labels - classes.start).clamp(0, g.shape[1] - 1)
        g[everyone, place] += torch.where(inside, residual, 0)
        g *= scale.unsqueeze(1)
        gradients.add(classes, g, nearest)
    return gradients
