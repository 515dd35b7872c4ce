"""ArcFace beside Q-Margin: SpeechBrain's own on cosines, and the same on a sparse head's output."""

from __future__ import annotations

import math

import torch
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
from torch import Tensor

__all__ = ["ArcFaceLoss", "angular_margin"]


def angular_margin(cosines: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """cos(theta + margin) of the targets' cosines, and its slope.

    Beyond theta = pi - margin, where it would rise again, the line cos(theta) - margin
    sin(margin) takes over, as in SpeechBrain's ``AdditiveAngularMargin``.

    Examples
    --------
    >>> found, slope = angular_margin(torch.tensor([0.6, -1.0]), 0.2)
    >>> found, slope
    (tensor([ 0.4291, -1.0397]), tensor([1.1291, 1.0000]))
    """
    inside = cosines > math.cos(math.pi - margin)
    sine = (1 - cosines.square()).clamp(min=torch.finfo(cosines.dtype).eps).sqrt()
    moved = cosines * math.cos(margin) - sine * math.sin(margin)
    slope = math.cos(margin) + math.sin(margin) * cosines / sine
    beyond = cosines - margin * math.sin(margin)
    return torch.where(inside, moved, beyond), torch.where(inside, slope, 1.0)


class ArcFaceLoss(LogSoftmaxWrapper):
    """SpeechBrain's ``LogSoftmaxWrapper(AdditiveAngularMargin)``, which a sparse head can evaluate.

    Every class counts in a cross-entropy: the head computes it in chunks and in shards, exactly,
    but saves memory only.

    Parameters
    ----------
    scale : float
    margin : float
        In radians.

    Examples
    --------
    >>> loss = ArcFaceLoss(margin=0.2, scale=32.0)
    >>> float(loss(torch.tensor([[[0.6, 0.1]]]), torch.tensor([[0]]))) < 1e-4
    True
    """

    def __init__(self, scale: float = 32.0, margin: float = 0.2) -> None:
        super().__init__(AdditiveAngularMargin(margin=margin, scale=scale))

    def forward(self, outputs, targets: Tensor, length: Tensor | None = None) -> Tensor:
        """Mean loss of cosines [B, 1, C] or of a sparse head's training output; targets [B, 1]."""
        if hasattr(outputs, "arcface_loss"):
            return outputs.arcface_loss(targets.flatten(), self.loss_fn.scale, self.loss_fn.margin)
        return super().forward(outputs, targets, length)
