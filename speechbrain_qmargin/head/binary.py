"""Forward and backward of the head for a loss that decides about each class on its own.

Every class has a gradient. Its terms are formed chunk by chunk, again in the backward, so that
logits of size batch x classes are not stored; shards add theirs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_qmargin.head.dense import not_alone, of_a_chunk
from speechbrain_qmargin.head.precision import exact_accumulation
from speechbrain_qmargin.head.search import chunked_cosines
from speechbrain_qmargin.head.step import ChunkGradients, check_backward, target_cosines
from speechbrain_qmargin.loss.device import refuse_unless
from speechbrain_qmargin.loss.interface import BinaryObjective, check_rows, learns_another

__all__ = ["BinaryLoss"]


class BinaryLoss(torch.autograd.Function):
    """(losses [b], target posteriors [b]) of this rank's samples; only the losses have a gradient.

    The gradient of the embeddings is that of this rank's loss, that of prototypes and parameters
    that of the ranks' mean loss, as in :class:`~speechbrain_qmargin.head.step.HeadLoss`, of which
    the arguments are; the objective's parameters follow.
    """

    @staticmethod
    def forward(
        ctx: Any, unit, weight, anchor, labels, raw, valid, sizes, shard, objective, *parameters
    ):
        comm = shard.comm
        own = comm.own(sizes)
        raw = comm.gather(torch.where(valid, raw, 0), sizes)
        labels = comm.gather(labels, sizes)
        here = (labels >= shard.start) & (labels < shard.stop)
        labels = torch.where(here, labels - shard.start, -1)
        mine = here.nonzero().squeeze(1)
        exact = F.normalize(raw.double(), dim=1)
        unit = exact.float()
        cos_y, _ = target_cosines(exact, mine, labels[mine], shard)
        with torch.enable_grad():
            at = cos_y[own].detach().requires_grad_()
            logits = objective.target(at.clone())
            check_rows("target", logits, at)
            _check_learnt(logits, (at, *parameters))
            of_target = -objective.target_weight * F.logsigmoid(logits)
            (slope,) = torch.autograd.grad(of_target.sum(), at)
        total = torch.zeros_like(cos_y)
        with exact_accumulation(raw.device):
            for number, (_, cosines, absent, _) in enumerate(_chunks(unit, labels, shard)):
                if not number:
                    _ask(objective, cosines)
                terms = -F.logsigmoid(-objective.others(cosines))
                total += terms.masked_fill_(absent, 0).sum(1)
        loss = of_target.detach() + objective.others_weight * comm.sum(total)[own]
        ctx.save_for_backward(unit, labels, cos_y[own], slope, valid)
        ctx.shard, ctx.objective, ctx.sizes = shard, objective, sizes
        ctx.parameters, ctx.anchored = parameters, anchor is not None
        ctx.weight, ctx.version = weight, weight._version
        posterior = logits.detach().sigmoid().float()
        ctx.mark_non_differentiable(posterior)
        return torch.where(valid, loss.float(), torch.nan), posterior

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        check_backward(ctx)
        unit, labels, own_cosines, slope, valid = ctx.saved_tensors
        shard, objective, parameters = ctx.shard, ctx.objective, ctx.parameters
        comm = shard.comm
        mine = torch.where(valid, gradients[0], 0).double()
        by_target = comm.gather(torch.stack((mine, mine * slope), 1), ctx.sizes)
        upstream, residual = by_target[:, 0], by_target[:, 1]
        found = ChunkGradients(unit, shard, ctx.needs_input_grad[:2])
        of_parameters = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        weights = (objective.others_weight * upstream).float().unsqueeze(1)
        everyone = torch.arange(len(labels), device=labels.device)
        with torch.autocast(unit.device.type, enabled=False), exact_accumulation(unit.device):
            for classes, cosines, absent, nearest in _chunks(unit, labels, shard):
                with torch.enable_grad():
                    at = cosines.requires_grad_()
                    terms = -F.logsigmoid(-objective.others(at)) * weights
                    value = terms.masked_fill(absent, 0).sum()
                    g, *more = _gradients(value, (at, *parameters))
                _add(of_parameters, more)
                if g is None:
                    g = torch.zeros_like(cosines)
                inside = (labels >= classes.start) & (labels < classes.stop)
                place = (labels - classes.start).clamp(0, g.shape[1] - 1)
                g[everyone, place] += torch.where(inside, residual, 0).float()
                found.add(classes, g, nearest)
            with torch.enable_grad():
                terms = -objective.target_weight * F.logsigmoid(objective.target(own_cosines))
                _add(of_parameters, _gradients((terms * mine).sum(), parameters))
        by_unit, by_weight = found.by_unit, found.by_weight
        if by_unit is not None:
            by_unit = comm.sum_of_own(by_unit, ctx.sizes)
        if by_weight is not None:
            by_weight = by_weight.div_(comm.world)
        of_parameters = [comm.sum(grad) / comm.world for grad in of_parameters]
        of_parameters = [
            grad.to(p.dtype) for grad, p in zip(of_parameters, parameters, strict=True)
        ]
        anchor = torch.zeros(1, device=unit.device) if ctx.anchored else None
        return by_unit, by_weight, anchor, *[None] * 6, *of_parameters


def _ask(objective: BinaryObjective, cosines: Tensor) -> None:
    """Refuse an `others` that cannot be taken chunk by chunk."""
    refusal = not_alone("others", "logit")
    together, alone = of_a_chunk("others", objective.others, cosines, refusal)
    _check_learnt(alone, objective.parameters)
    size = 1 + together[:, :1].abs()
    same = ((alone - together[:, :1]).abs() <= 1e-5 * size).all()
    refuse_unless(same, TypeError, refusal)


def _check_learnt(logits: Tensor, parameters: tuple[Tensor, ...]) -> None:
    if learns_another(logits, parameters):
        raise TypeError(
            "a BinaryObjective uses a tensor that requires a gradient and is not among its "
            "parameters: list it there"
        )


def _chunks(unit: Tensor, labels: Tensor, shard: Any):
    """(classes, cosines, absent, nearest): the targets are absent, their cosines 0."""
    for classes, cosines, nearest in chunked_cosines(
        unit, labels, shard.prototypes, shard.subcentres
    ):
        absent = cosines == -math.inf
        yield classes, cosines.masked_fill_(absent, 0), absent, nearest


def _gradients(value: Tensor, by: tuple[Tensor, ...]) -> list[Tensor | None]:
    """None by what the value does not use."""
    used = [tensor for tensor in by if tensor.requires_grad]
    if not used or not value.requires_grad:
        return [None] * len(by)
    found = iter(torch.autograd.grad(value, used, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in by]


def _add(totals: list[Tensor], more: list[Tensor | None]) -> None:
    for total, grad in zip(totals, more, strict=True):
        if grad is not None:
            total += grad
