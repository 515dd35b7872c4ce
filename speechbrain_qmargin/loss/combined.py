"""The combined margin of ArcFace's authors: SphereFace, ArcFace and CosFace in one formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Scores

__all__ = ["CombinedMarginLoss", "combined_margin"]


def combined_margin(cosines: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    r"""cos(m1 theta + m2) - m3 of the targets' cosines, and on beyond m1 theta + m2 = pi.

    There the cosine would rise again; as in SphereFace it goes on falling,
    :math:`(-1)^k \cos(\phi) - 2k` for :math:`\phi` in :math:`[k\pi, (k+1)\pi]`.

    Examples
    --------
    >>> combined_margin(torch.tensor([0.6, -1.0]), 1.0, 0.2, 0.1)
    tensor([ 0.3291, -1.1198])
    """
    limit = 1 - torch.finfo(cosines.dtype).eps
    angle = m1 * torch.acos(cosines.clamp(-limit, limit)) + m2
    turns = torch.floor(angle.detach() / math.pi)
    return torch.where(turns % 2 == 0, 1, -1) * torch.cos(angle) - 2 * turns - m3


class CombinedMarginLoss(Loss):
    r"""Cross-entropy with :math:`\cos(m_1 \theta_y + m_2) - m_3` (Deng et al., CVPR 2019, eq. 4).

    (m1, 0, 0) is SphereFace (Liu et al., CVPR 2017) with a fixed scale, (1, m2, 0) ArcFace, and
    (1, 0, m3) CosFace.

    Parameters
    ----------
    scale : float
    m1 : float, > 0
    m2 : float, >= 0
        In radians, at most pi.
    m3 : float, >= 0

    Raises
    ------
    ValueError
        A setting outside its range.

    Notes
    -----
    Where m1 theta + m2 > pi the published code lets the cosine rise again; here it goes on falling
    as in SphereFace's paper, see :func:`combined_margin`.

    Examples
    --------
    >>> CombinedMarginLoss()
    CombinedMarginLoss(scale=32, m1=1, m2=0.3, m3=0.2)
    >>> sphereface = CombinedMarginLoss(scale=1.0, m1=2.0, m2=0.0, m3=0.0)
    >>> outputs = torch.tensor([[math.cos(0.4), math.cos(0.8)]])        # twice the angle: a tie
    >>> sphereface(outputs, torch.tensor([0]))                          # log 2
    tensor(0.6931)
    """

    settings = ("scale", "m1", "m2", "m3")
    m1: float
    m2: float
    m3: float

    def __init__(
        self, scale: float = 32.0, m1: float = 1.0, m2: float = 0.3, m3: float = 0.2
    ) -> None:
        super().__init__(scale=scale, m1=m1, m2=m2, m3=m3)

    def check(self, **values: float) -> None:
        super().check(**values)
        if not values["m1"] > 0:
            raise ValueError(f"m1 must be > 0, got {values['m1']}")
        if not 0 <= values["m2"] <= math.pi:
            raise ValueError(f"m2 is an angle in radians, in [0, pi], got {values['m2']}")
        if values["m3"] < 0:
            raise ValueError(f"m3 must be >= 0, got {values['m3']}")

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        return Objective(
            scale=self.scale,
            move_target=lambda cosines: combined_margin(cosines, self.m1, self.m2, self.m3),
        )
