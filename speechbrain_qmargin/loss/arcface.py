"""ArcFace (Deng et al. 2019), a cross-entropy with a margin in the angle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Scores

__all__ = ["ArcFaceLoss", "angular_margin", "check_angle"]


def angular_margin(cosines: Tensor, margin: float | Tensor, easy: bool = False) -> Tensor:
    """cos(theta + margin) of the targets' cosines, and a line where that would rise again.

    Parameters
    ----------
    cosines : Tensor
    margin : float or Tensor
        In radians, in [0, pi].
    easy : bool
        Only cosines above 0 move (ArcFace's easy margin). Otherwise cos(theta) - margin
        sin(margin) takes over where theta > pi - margin, as in SpeechBrain's
        ``AdditiveAngularMargin``.

    Examples
    --------
    >>> angular_margin(torch.tensor([0.6, -1.0]), 0.2)
    tensor([ 0.4291, -1.0397])
    """
    m = torch.as_tensor(margin, dtype=cosines.dtype, device=cosines.device)
    sine = (1 - cosines.square()).clamp(min=torch.finfo(cosines.dtype).eps).sqrt()
    moved = cosines * m.cos() - sine * m.sin()
    if easy:
        return torch.where(cosines > 0, moved, cosines)
    return torch.where(cosines > -m.cos(), moved, cosines - m * m.sin())


def check_angle(margin: float) -> None:
    """Refuse a margin that is no angle; what is wrong with it otherwise is the loss's to say.

    Parameters
    ----------
    margin : float
        In radians.

    Raises
    ------
    ValueError
        Beyond pi.

    Examples
    --------
    >>> check_angle(0.5)
    >>> check_angle(28.6)       # the same angle in degrees
    Traceback (most recent call last):
    ValueError: margin is an angle in radians, at most pi, got 28.6
    """
    if margin > math.pi:
        raise ValueError(f"margin is an angle in radians, at most pi, got {margin}")


class ArcFaceLoss(Loss):
    """ArcFace (Deng et al., CVPR 2019), equal to SpeechBrain's ``AdditiveAngularMargin``.

    Every class counts in a cross-entropy: a sparse head computes it in chunks and in shards,
    exactly, but saves memory only.

    Parameters
    ----------
    scale : float
    margin : float
        In radians, at most pi.
    easy_margin : bool
        See :func:`angular_margin`.

    Raises
    ------
    ValueError
        A setting outside its range.

    Examples
    --------
    >>> loss = ArcFaceLoss(scale=32.0, margin=0.2)
    >>> loss
    ArcFaceLoss(scale=32, margin=0.2)
    >>> float(loss(torch.tensor([[[0.6, 0.1]]]), torch.tensor([[0]]))) < 1e-4
    True
    >>> outputs = torch.tensor([[math.cos(0.3), math.cos(0.5)]])
    >>> ArcFaceLoss(scale=1.0, margin=0.2)(outputs, torch.tensor([0]))      # a tie: log 2
    tensor(0.6931)
    """

    options = ("easy_margin",)

    def __init__(self, scale: float = 32.0, margin: float = 0.2, easy_margin: bool = False) -> None:
        super().__init__(scale=scale, margin=margin)
        self.easy_margin = bool(easy_margin)

    def check(self, **values: float) -> None:
        super().check(**values)
        check_angle(values["margin"])

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        return Objective(
            scale=self.scale,
            move_target=lambda cosines: angular_margin(cosines, self.margin, self.easy_margin),
        )
