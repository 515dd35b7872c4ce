"""Partial FC (An et al., 2021) as the benchmarks of the head have it, at rate 0.1. Not exact."""

import torch
from torch import Tensor


def sampled(weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The positives and random negatives, a tenth of the classes.

    Their rows of the weight [C, D], sorted; these rows, a leaf to be trained; `labels` [B] among
    them.
    """
    draw = torch.rand(len(weight), device=weight.device)
    draw[labels] = 2.0
    count = max(len(weight) // 10, len(labels))
    rows = draw.topk(count, sorted=False).indices.sort().values
    part = weight.detach().index_select(0, rows).requires_grad_()
    return rows, part, torch.searchsorted(rows, labels)
