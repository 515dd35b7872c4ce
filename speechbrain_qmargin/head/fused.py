r"""The exact step in a few launches: what ``search`` and ``step`` do, for a GPU.

1. **Sample**: tau of the targets and of up to 16,384 evenly spaced classes gives the first floors.
2. **Screen** the classes, part by part, by products in bf16, of which one piece is there
   at a time; the classes seen grow eightfold in each part. What may exceed its floor is put into a
   sample's room in a buffer of fixed size, with its product, by a counter on the device. After each
   part tau of what is there raises the floors, and what is at or below them is dropped.
3. **Refine**: the few classes left are sorted, so that nothing depends on the order in which they
   were found; their cosines are computed in float64, and from them all Newton steps, the
   posteriors, the loss.
4. **Gradients**: the entries are sorted by class and summed class by class, in order.

Why nothing is lost: with s a product of rounded vectors and :math:`\sigma` the bound of
``search.screening_slack``, a cosine is in :math:`[s - \sigma, s + \sigma]`, and s is within 0.4 %
of what is read, which is rounded to bf16. tau increases with every logit, so tau of the lower ends,
on any subset of the classes, is a lower bound of tau; a class whose upper end does not exceed its
edge is inactive. Such a bound is found by bisection: a level counts only where the mass there,
summed in fixed point and rounded down, exceeds 1 by more than the rounding of its terms.

Everything is checked once, in the only wait for the device: labels, embeddings that are not finite,
whether all was found that has to be (if not, the room grows, and the step is done again), whether
Newton's method converged, and how many rows have a gradient. Where the support is too wide for
that, the batch is taken in halves, quarters or eighths; where it is too wide for any room, the step
is that of ``step``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from speechbrain_qmargin.head.kernel_search import (
    MOST_HALVINGS,
    Asked,
    Room,
    halvings_for,
    near_support,
    parts,
    say_too_small,
)
from speechbrain_qmargin.head.precision import exact_accumulation
from speechbrain_qmargin.head.prototypes import Prototypes
from speechbrain_qmargin.head.step import check_backward, of_rows, refuse_labels
from speechbrain_qmargin.loss.interface import Objective, slope_of

if TYPE_CHECKING:  # they need Triton
    from speechbrain_qmargin.head.kernels import Batch
    from speechbrain_qmargin.head.solve_kernels import Solved

__all__ = ["FusedLoss", "Step", "by_class", "bytes_of_a_step", "evaluate", "ones", "stage"]


class Step(NamedTuple):
    """A step whose losses are known.

    Attributes
    ----------
    batch, solved
        See ``kernels`` and ``solve_kernels``; the batch's cosines of the targets are not moved.
    order, rows, starts : Tensor
        Entries in the order of their classes, the classes with a gradient, and where each begins.
    """

    batch: Batch
    solved: Solved
    order: Tensor
    rows: Tensor
    starts: Tensor

    def with_rows(self, count: int) -> Step:
        """Without the room that is left."""
        return self._replace(rows=self.rows[:count], starts=self.starts[: count + 1])


def evaluate(
    raw: Tensor, labels: Tensor, objective: Objective, prototypes: Prototypes, room: Room
) -> list[tuple[slice, Step]] | None:
    """All that can be computed without the losses' gradient; None where no room is enough.

    As a rule the batch is one part. Where its samples' classes do not fit, it is halved, three
    times at most: fewer samples have more room each. How often depends on nothing but the batch, so
    that a resumed run has the same sums.

    Parameters
    ----------
    raw : Tensor, [B, D], float32
    labels : Tensor, [B], int64
        Rows of the prototypes.
    objective : Objective
        With `target_log_q`; alpha > 1.
    prototypes : Prototypes
        See :func:`~.kernel_search.takes`.
    room : Room

    Raises
    ------
    ValueError
        Labels that are none.
    """
    samples, sizes = len(raw), prototypes.sizes
    while True:
        steps, asked = [], Asked(0, 0)
        for part in parts(samples, room.halvings):
            step, needed = _evaluate_part(
                raw[part], labels[part], _of_part(objective, part, samples), prototypes, room
            )
            asked = Asked(*map(max, asked, needed))
            if step is None:
                break
            steps.append((part, step))
        enough = halvings_for(asked, samples, sizes)
        if enough > room.halvings:
            if room.halvings == MOST_HALVINGS:
                say_too_small(room, asked, samples, sizes)
                return None
            room.halvings += 1
        elif len(steps) < len(parts(samples, room.halvings)):
            return None  # some sample's level, or a prototype, is not a number
        elif enough == room.halvings:
            return steps
        else:
            room.halvings = enough


def _of_part(objective: Objective, part: slice, samples: int) -> Objective:
    """The objective of some of a batch's samples."""
    if part == slice(0, samples):
        return objective
    move, target_log_q = objective.move_target, objective.target_log_q
    assert target_log_q is not None

    def moved(cosines: Tensor) -> Tensor:
        # it may have a margin for each sample of the batch
        assert move is not None
        return move(F.pad(cosines, (part.start, samples - part.stop)))[part]

    return replace(
        objective,
        target_log_q=target_log_q[part],
        move_target=None if move is None else moved,
    )


def _evaluate_part(
    raw: Tensor, labels: Tensor, objective: Objective, prototypes: Prototypes, room: Room
) -> tuple[Step | None, Asked]:
    """A step of samples that go at a time, if they can; and what room they asked for."""
    sizes = prototypes.sizes
    while True:
        here = room.of(len(raw), sizes)
        step, (found, kept, bad_label, _, failed, rows) = _attempt(
            raw, labels, objective, prototypes, here
        )
        asked = Asked(found, kept)
        if bad_label:
            refuse_labels(labels, len(prototypes.weight))
        if asked.fits(here):
            return None if failed else step.with_rows(rows), asked
        if not asked.fits(Asked.most(len(raw), sizes)):
            return None, asked
        room.grow(asked)


def bytes_of_a_step(
    batch: int, dim: int, sample: int, products: int, screened: int, kept: int
) -> int:
    """The most that a step allocates at a time, beside the gradient of the prototypes' rows.

    Parameters
    ----------
    batch, dim : int
    sample, products : int
        Classes the first floors come from; classes whose products are computed in one piece.
    screened, kept : int
        As in :class:`~.kernel_search.Room`.

    Examples
    --------
    >>> bytes_of_a_step(1024, 512, sample=16384, products=74716, screened=15625, kept=2048) // 10**6
    294
    """
    embeddings = batch * (2 * dim + 8 * 4 + 4 + 3 * 4 + 100)  # rounded, numbers, what is returned
    first = 2 * sample * batch
    searching = batch * (8 * screened + 4 * kept + 2 * products)
    refining = batch * (4 + 4 + 8 + 8) * kept  # classes twice, their order, cosines
    entries = batch * (kept + 1)
    # shares and classes; then in order, the order, marks and their sums, rows, where they begin
    gradients = entries * (4 + 4 + 4 + 8 + 4 + 4 + 8 + 8)
    gradients += 2 * entries * (4 + 8)  # what a GPU's sort takes besides
    by_embeddings = 2 * 4 * dim * batch
    peak = max(first, searching, refining, refining - 16 * batch * kept + gradients)
    return embeddings + peak + by_embeddings + 4096


def _attempt(
    raw: Tensor, labels: Tensor, objective: Objective, prototypes: Prototypes, room: Asked
) -> tuple[Step, list[int]]:
    from speechbrain_qmargin.head import kernels, solve_kernels

    assert objective.target_log_q is not None
    device = raw.device
    with stage("search"), exact_accumulation(device):
        batch = kernels.prepare(
            raw, labels, objective.target_log_q, objective.log_q, objective.alpha,
            objective.scale, prototypes,
        )  # fmt: skip
        slope = ones(len(raw), device)
        if objective.move_target is not None:
            moved, slope = slope_of(objective.move_target, batch.cosine)
            moved, slope = moved.contiguous(), slope.contiguous()  # one of all ones is expanded
            unmoved, batch = batch.cosine, batch._replace(cosine=moved)
        else:
            unmoved = batch.cosine
        kept, cosines = near_support(batch, prototypes, room)
    with stage("solve"):
        solved = solve_kernels.solve(batch, kept, cosines, slope)
        del cosines, kept
        step, facts = by_class(batch._replace(cosine=unmoved), solved)
    return step, facts


def by_class(batch: Batch, solved: Solved) -> tuple[Step, list[int]]:
    """A step, its entries in the order of their classes, and what ``kernels.report`` says of it.

    The host waits. There is more room than there are `rows`, the last of the numbers.
    """
    from speechbrain_qmargin.head import kernels

    ordered, order = solved.entries.view(-1).sort(stable=True)
    numbered = kernels.mark_segments(ordered).cumsum(0, dtype=torch.int32)
    rows, starts = kernels.write_segments(ordered, numbered)
    return Step(batch, solved, order, rows, starts), kernels.report(batch, numbered).tolist()


def stage(name: str) -> AbstractContextManager:
    """A range that a profile shows, and NVTX; nothing where no profiler runs."""
    enabled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return record_function(f"qmargin::{name}") if enabled else nullcontext()


_KEPT_ONES: dict[tuple[int, torch.device], Tensor] = {}


def ones(size: int, device: torch.device) -> Tensor:
    """[size], float64; kept, as batches are alike."""
    key = (size, device)
    if key not in _KEPT_ONES:
        if len(_KEPT_ONES) > 16:
            _KEPT_ONES.clear()
        _KEPT_ONES[key] = torch.ones(size, dtype=torch.float64, device=device)
    return _KEPT_ONES[key]


class FusedLoss(torch.autograd.Function):
    """Like :class:`~speechbrain_qmargin.head.step.HeadLoss`, of what :func:`evaluate` gave."""

    @staticmethod
    def forward(ctx: Any, raw, weight, anchor, step, prototypes, in_order, comm, sizes):
        """
        Parameters
        ----------
        raw : Tensor, [b, D], float32
            This rank's embeddings, in the graph.
        weight, anchor : Parameter
            As there.
        step : Step
            Of the samples of all ranks.
        prototypes : Prototypes
        in_order : RowsInOrder or None
            Of a shard.
        comm : Communicator
        sizes : list of int
            b of all ranks.
        """
        ctx.set_materialize_grads(False)
        solved = step.solved
        # not the loss, whose graph this is
        ctx.entries = step.batch, solved.entries, solved.shares, step.order, step.rows, step.starts
        ctx.prototypes, ctx.in_order, ctx.anchored = prototypes, in_order, anchor is not None
        ctx.weight, ctx.version, ctx.comm, ctx.sizes = weight, weight._version, comm, sizes
        outputs = (
            solved.loss, solved.posterior, solved.support, solved.residual, step.batch.cosine,
        )  # fmt: skip
        if comm.world > 1:
            own = comm.own(sizes)
            outputs = tuple(each[own] for each in outputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        from speechbrain_qmargin.head import kernels

        check_backward(ctx)
        (batch, entries, shares, order, rows, starts), prototypes = ctx.entries, ctx.prototypes
        comm, upstream = ctx.comm, gradients[0]
        if upstream is None and comm.world == 1:
            return (None,) * 8
        if upstream is None:  # of this rank; the others wait for it
            upstream = batch.raw.new_zeros(ctx.sizes[comm.rank])
        upstream = comm.gather(upstream, ctx.sizes)
        grad_raw = grad_weight = None
        with stage("backward"):
            if ctx.needs_input_grad[0]:
                grad_raw = kernels.embedding_gradient(batch, prototypes, entries, shares, upstream)
                grad_raw = comm.sum_of_own(grad_raw, ctx.sizes)
            if ctx.needs_input_grad[1]:
                values = kernels.weight_gradient(
                    batch, prototypes, order, shares, rows, starts, upstream, 1.0 / comm.world
                )
                grad_weight = of_rows(rows, values, prototypes.weight, ctx.in_order)
        anchor = torch.zeros(1, device=upstream.device) if ctx.anchored else None
        return grad_raw, grad_weight, anchor, *[None] * 5
