"""CurricularFace (Huang et al. 2020): hard wrong classes count for more as training goes on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.loss.arcface import angular_margin
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Rows, Scores

__all__ = ["CurricularFaceLoss"]


class CurricularFaceLoss(Loss):
    r"""CurricularFace (Huang et al., CVPR 2020).

    The target has ArcFace's margin. A wrong class whose cosine is above
    :math:`\cos(\theta_y + m)` is hard, and its cosine c becomes :math:`c (t + c)`. t is the running
    mean of the targets' cosines, the batch's included: a buffer, which the recipes save with a
    checkpoint, of all processes together. In evaluation it stays as it is.

    Parameters
    ----------
    scale, margin : float
        64 and 0.5 (radians) as published.
    momentum : float, in (0, 1]
        Weight of a batch in t.

    Raises
    ------
    ValueError
        A setting outside its range.

    Examples
    --------
    >>> CurricularFaceLoss()
    CurricularFaceLoss(scale=64, margin=0.5, momentum=0.01)
    >>> loss = CurricularFaceLoss(scale=1.0, margin=0.0, momentum=1.0)
    >>> loss(torch.tensor([[0.5, 0.8]]), torch.tensor([0]))     # log(1 + e^(0.8 (0.5 + 0.8) - 0.5))
    tensor(0.9992)
    """

    settings = ("scale", "margin", "momentum")
    momentum: float
    t: Tensor

    def __init__(self, scale: float = 64.0, margin: float = 0.5, momentum: float = 0.01) -> None:
        super().__init__(scale=scale, margin=margin, momentum=momentum)
        self.register_buffer("t", torch.tensor(0.0, dtype=torch.float64))
        self._next: Tensor | None = None

    def check(self, **values: float) -> None:
        super().check(**values)
        if values["margin"] > math.pi / 2:
            raise ValueError(f"margin is an angle in radians, at most pi/2, got {values['margin']}")
        if not 0 < values["momentum"] <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {values['momentum']}")

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        margin = self.margin
        self._next = None

        def move_target(cosines: Tensor) -> Tensor:
            if self._next is None:
                self._next = self._after(cosines.detach()) if self.training else self.t
            return angular_margin(cosines, margin)

        def move_others(cosines: Tensor, target: Tensor) -> Tensor:
            assert self._next is not None  # the targets come first
            # below -1 the target is beyond pi - margin, on the line that angular_margin goes on by
            own = target + margin * math.sin(margin)
            sine = (1 - own.square()).clamp(min=0).sqrt()
            turned = own * math.cos(margin) - sine * math.sin(margin)
            threshold = torch.where(target < -1, turned, target)
            hard = cosines * (self._next.to(cosines.dtype) + cosines)
            return torch.where(cosines > threshold, hard, cosines)

        return Objective(scale=self.scale, move_target=move_target, move_others=move_others)

    def _after(self, cosines: Tensor) -> Tensor:
        """t after a batch whose targets have these cosines."""
        sums = cosines.double().sum()
        sums = torch.stack((sums, sums.new_full((), len(cosines))))
        sums = Communicator().sum(sums)
        mean, t = sums[0] / sums[1], self.t.to(sums.device)
        moved = self.momentum * mean + (1 - self.momentum) * t
        return torch.where(torch.isfinite(mean), moved, t)

    def rows(self, scores: Scores, targets: Tensor, *, statistics: bool = False) -> Rows:
        rows = super().rows(scores, targets, statistics=statistics)
        if self.training and self._next is not None:
            self.t = self._next
        return rows
