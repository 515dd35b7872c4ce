"""A :class:`~speechbrain_qmargin.loss.interface.BinaryObjective` on all cosines of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speechbrain_qmargin.loss.interface import BinaryObjective, Rows, check_rows
from speechbrain_qmargin.loss.solver import compute_dtype, row_dtype

__all__ = ["binary_rows"]


def binary_rows(cosines: Tensor, targets: Tensor, objective: BinaryObjective) -> Rows:
    """Losses of cosines [B, C] and targets [B], int64, checked; every class is in the support.

    Examples
    --------
    >>> scaled = BinaryObjective(target=lambda c: 4 * c, others=lambda c: 4 * c)
    >>> binary_rows(torch.tensor([[0.5, -0.5]]), torch.tensor([0]), scaled).loss
    tensor([0.2539])
    """
    place = targets.unsqueeze(1)
    dtype = compute_dtype(cosines)
    with torch.autocast(cosines.device.type, enabled=False):
        at = cosines.gather(1, place).squeeze(1).to(row_dtype(cosines))
        own = objective.target(at)
        check_rows("target", own, at)
        # the targets are not among the others, whose slope may be infinite at a cosine of 1
        at = cosines.to(dtype).scatter(1, place, 0.0)
        logits = objective.others(at)
        check_rows("others", logits, at)
        others = -F.logsigmoid(-logits).scatter(1, place, 0.0).sum(1)
        loss = objective.others_weight * others - objective.target_weight * F.logsigmoid(own)
    support = torch.full_like(targets, cosines.shape[1])
    return Rows(loss.to(dtype), own.detach().sigmoid().to(dtype), support)
