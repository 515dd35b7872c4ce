"""Angular Sparsemax (Chan and Kittler 2020): sparsemax with ArcFace's margin."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from speechbrain_qmargin.loss.arcface import angular_margin
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Scores

__all__ = ["AngularSparsemaxLoss"]


class AngularSparsemaxLoss(Loss):
    r"""Angular Sparsemax (Chan and Kittler, ICPR 2020): the sparsemax loss of ArcFace's logits.

    The Fenchel-Young loss of alpha = 2 with the target's logit :math:`s \cos(\theta_y + m)` and no
    reference measure. A moved target leaves the others' activity alone: exact on the sparse head
    and in shards, at the cost of the support.

    Parameters
    ----------
    alpha : float
        2.
    scale : float
    margin : float
        In radians, at most pi.

    Notes
    -----
    Written from the paper's abstract, "sparseness similar to sparsemax with Fenchel-Young
    regularisation" and "an additive angular margin on the score vector": its full text was not at
    hand, nor its numbers. The defaults are this package's for sparsemax and ArcFace.

    Examples
    --------
    >>> AngularSparsemaxLoss()
    AngularSparsemaxLoss(alpha=2, scale=5, margin=0.2)
    """

    settings = ("alpha", "scale", "margin")
    fixed: ClassVar = {"alpha": 2.0}
    alpha: float
    scale: float
    margin: float

    def __init__(self, alpha: float = 2.0, scale: float = 5.0, margin: float = 0.2) -> None:
        super().__init__(alpha=alpha, scale=scale, margin=margin)

    def check(self, **values: float) -> None:
        super().check(**values)
        if values["margin"] > math.pi:
            raise ValueError(f"margin is an angle in radians, at most pi, got {values['margin']}")

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        return Objective(
            scale=self.scale,
            alpha=2.0,
            move_target=lambda cosines: angular_margin(cosines, self.margin),
        )
