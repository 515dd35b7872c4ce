"""The step of ``fused`` with the classes in shards: what each finds, and what all agree on.

Every rank searches its own classes for the samples of all, by the kernels of ``fused``. The largest
logits that each finds give a lower bound of the levels; from there Newton's method takes a few
steps, each one exchange of five numbers a sample. Entries of the gradient, and the gradients
themselves, are then those of ``fused``, on each rank of its own classes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.head.fused import Step, by_class, ones, stage
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
from speechbrain_qmargin.head.search import shown_by
from speechbrain_qmargin.head.step import Shard, gathered
from speechbrain_qmargin.loss.interface import Objective, slope_of

if TYPE_CHECKING:  # they need Triton
    from speechbrain_qmargin.head.kernels import Batch
    from speechbrain_qmargin.head.solve_kernels import Bracket

__all__ = ["evaluate"]


def evaluate(
    raw: Tensor, labels: Tensor, objective: Objective, shard: Shard, room: Room, sizes: list[int]
) -> Step | None:
    """As :func:`speechbrain_qmargin.head.fused.evaluate`, for the samples of all ranks.

    None on all of them where one has no room for its classes, or something is not a number.

    Parameters
    ----------
    raw, labels : Tensor, [b, D] float32, [b] int64
        Of this rank; the labels are in range.
    objective : Objective
        With `target_log_q`; alpha > 1.
    shard : Shard
    room : Room
        Of this rank.
    sizes : list of int
        b of all ranks.
    """
    from speechbrain_qmargin.head import kernels, solve_kernels

    comm, prototypes, device = shard.comm, shard.prototypes, raw.device
    assert objective.target_log_q is not None
    own = comm.own(sizes)
    with stage("search"), exact_accumulation(device):
        raw, labels, target_log_q = gathered(raw, labels, objective.target_log_q, comm, sizes)
        log_q = None if objective.log_q is None else objective.log_q[shard.start : shard.stop]
        # labels of other shards are no rows of this one; their cosines are zero here
        batch = kernels.prepare(
            raw, labels - shard.start, target_log_q, log_q, objective.alpha, objective.scale,
            prototypes,
        )  # fmt: skip
        unmoved = cosine = comm.sum(batch.cosine)
        slope = ones(len(raw), device)
        if objective.move_target is not None:
            moved = torch.stack(slope_of(objective.move_target, unmoved[own]), 1)
            cosine, slope = comm.gather(moved, sizes).T.contiguous()
        batch = batch._replace(cosine=cosine)
        found = _search(batch, prototypes, room)
        most = shown_by(comm.world)
        shown = torch.stack(comm.gather_rows(_shown(batch, found, most)))
        if bool(shown[:, 0, most + 1].any()) or found is None:  # the host waits
            return None
    with stage("solve"):
        bracket = solve_kernels.bound(batch, shown)
        parts = _agreed(batch, found, bracket, comm)
        if parts is None:
            return None
        classes = len(prototypes.weight)
        solved = solve_kernels.finish(batch, *found, slope, bracket.levels, parts, classes)
        step, (*_, failed, rows) = by_class(batch._replace(cosine=unmoved), solved)
    return None if failed else step.with_rows(rows)


class _Found(NamedTuple):
    """Classes of this shard that may be active, in order, and their cosines; [B, K]."""

    kept: Tensor
    cosines: Tensor


def _search(batch: Batch, prototypes: Prototypes, room: Room) -> _Found | None:
    """None where no room is enough, or a cosine is not a number."""
    samples, sizes = len(batch.raw), prototypes.sizes
    most = Asked(0, 0)
    for halvings in range(room.halvings, MOST_HALVINGS + 1):
        found, most = [], Asked(0, 0)
        for part in parts(samples, halvings):
            each, asked, unsound = _search_part(batch.rows(part), prototypes, room)
            if unsound:
                return None
            most = Asked(*map(max, most, asked))
            if each is None:
                break
            found.append(each)
        else:
            room.halvings = halvings_for(most, samples, sizes)
            return _joined(found, max(most.kept, 1))
    say_too_small(room, most, samples, sizes)
    return None


def _search_part(
    batch: Batch, prototypes: Prototypes, room: Room
) -> tuple[_Found | None, Asked, bool]:
    """Of samples that go at a time, if they can; what room they need; whether one is unsound."""
    from speechbrain_qmargin.head import kernels

    sizes = prototypes.sizes
    while True:
        here = room.of(len(batch.raw), sizes)
        batch.counts.zero_()  # of an earlier try, with less room or of more samples
        batch.peaks.zero_()
        kept, cosines = near_support(batch, prototypes, here)
        cosines.masked_fill_(kept == kernels.ABSENT, -math.inf)
        facts = torch.stack((batch.peaks.max(), batch.counts.max(), cosines.isnan().any()))
        *numbers, unsound = facts.tolist()  # the host waits
        asked = Asked(*numbers)
        if asked.fits(here):
            return _Found(kept, cosines), asked, bool(unsound)
        if not asked.fits(Asked.most(len(batch.raw), sizes)):
            return None, asked, False
        room.grow(asked)


def _joined(found: list[_Found], width: int) -> _Found:
    """Of all parts, as wide as any of them needs."""
    from speechbrain_qmargin.head import kernels

    if len(found) == 1:
        return found[0]
    whole = []
    for parts_of_one, nothing in zip(
        zip(*found, strict=True), (kernels.ABSENT, -math.inf), strict=True
    ):
        cut = [part[:, :width] for part in parts_of_one]
        padded = [F.pad(part, (0, width - part.shape[1]), value=nothing) for part in cut]
        whole.append(torch.cat(padded))
    return _Found(*whole)


def _shown(batch: Batch, found: _Found | None, most: int) -> Tensor:
    """What a shard shows the others for ``solve_kernels.bound``: [B, most + 2 or 2 most + 2].

    The `most` largest cosines, a lower bound of the level, whether there is nothing to show, and
    with a reference measure the log q of those classes.
    """
    columns = most + 2 + (0 if batch.log_q is None else most)
    shown = batch.levels.new_zeros(len(batch.raw), columns)
    if found is None:
        shown[:, most + 1] = 1
        return shown
    width = min(most, found.cosines.shape[1])
    shown[:, width:most] = -math.inf
    shown[:, :width], place = found.cosines.topk(width, 1, sorted=False)
    shown[:, most] = batch.levels
    if batch.log_q is not None:
        there = shown[:, :width] > -math.inf
        classes = torch.where(there, found.kept.gather(1, place), 0)
        shown[:, most + 2 : most + 2 + width] = batch.log_q[classes]
    return shown


def _agreed(batch: Batch, found: _Found, bracket: Bracket, comm: Communicator) -> Tensor | None:
    """What all shards' candidates amount to, [ranks, 5, B], at the bracket's levels, which move.

    Every exchange says whether the first rank was done before it, and all end alike, whatever their
    processors' rounding. None where a level does not settle.
    """
    from speechbrain_qmargin.head.solve_kernels import MOST_STEPS, exchange

    parts = None
    for step in range(MOST_STEPS):
        mine = exchange(batch, *found, bracket, parts, step - 1)
        parts = torch.stack(comm.gather_rows(mine))
        # the bound is below its level by more than rounding: nothing is done at the first step
        if step > 1 and bool(parts[0, 4].all()):  # the host waits
            return parts
    return None
