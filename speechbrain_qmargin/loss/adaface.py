"""AdaFace (Kim et al. 2022): the margin follows the embedding's norm, as a measure of quality."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Scores
from speechbrain_qmargin.loss.norms import RunningNorms, norms_of

__all__ = ["AdaFaceLoss", "adaptive_margin"]

_EDGE = 1e-3  # of the angle, as published


def adaptive_margin(cosines: Tensor, margin: float, quality: Tensor) -> Tensor:
    r"""AdaFace's :math:`\cos(\theta - m z) - (m + m z)` for a quality z in [-1, 1].

    Examples
    --------
    >>> adaptive_margin(torch.tensor([0.6]), 0.4, torch.tensor([-1.0]))     # ArcFace's margin
    tensor([0.2411])
    >>> adaptive_margin(torch.tensor([0.6]), 0.4, torch.tensor([0.0]))      # CosFace's
    tensor([0.2000])
    """
    limit = 1 - torch.finfo(cosines.dtype).eps
    angle = torch.acos(cosines.clamp(-limit, limit)) - margin * quality
    return torch.cos(angle.clamp(_EDGE, math.pi - _EDGE)) - margin * (1 + quality)


class AdaFaceLoss(Loss):
    r"""AdaFace (Kim, Jain and Liu, CVPR 2022).

    The quality of a sample is its embedding's norm, standardised by a running mean and deviation
    and clipped: :math:`z = clip(h (\|x\| - \mu) / \sigma, -1, 1)`. The target's logit is
    :math:`s (\cos(\theta - m z) - m - m z)`.

    The running values are buffers: the recipes save them with a checkpoint. In several processes
    they are those of all their samples.

    Parameters
    ----------
    scale, margin : float
        64 and 0.4 as published.
    h : float, > 0
        How many deviations the quality's range takes: 1 / h to either side.
    t_alpha : float, in (0, 1]
        Weight of a batch in the running values.

    Raises
    ------
    ValueError
        A setting outside its range.
    TypeError
        When it is called on cosines alone: it looks at the norms of embeddings.

    Notes
    -----
    Norms are clipped to [0.001, 100] first, as in the authors' code: where an encoder's are all
    longer, the quality is the same for every sample, and so is the margin.

    Examples
    --------
    >>> AdaFaceLoss()
    AdaFaceLoss(scale=64, margin=0.4, h=0.333, t_alpha=0.01)

    A norm of 20 is the mean at first: the margin is CosFace's, and 1 - 0.4 as near as 0.6.

    >>> import torch
    >>> from speechbrain_qmargin.loss.dense import scores_of
    >>> scores = scores_of(torch.tensor([[1.0, 0.6]]), embeddings=torch.tensor([[12.0, 16.0]]))
    >>> AdaFaceLoss(scale=1.0)(scores, torch.tensor([0]))           # log 2
    tensor(0.6931)
    """

    settings = ("scale", "margin", "h", "t_alpha")
    needs_embeddings = True
    h: float
    t_alpha: float

    def __init__(
        self, scale: float = 64.0, margin: float = 0.4, h: float = 0.333, t_alpha: float = 0.01
    ) -> None:
        super().__init__(scale=scale, margin=margin, h=h, t_alpha=t_alpha)
        self.norms = RunningNorms()

    def check(self, **values: float) -> None:
        super().check(**values)
        if not values["h"] > 0:
            raise ValueError(f"h must be > 0, got {values['h']}")
        if not 0 < values["t_alpha"] <= 1:
            raise ValueError(f"t_alpha must be in (0, 1], got {values['t_alpha']}")

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        weight = self.t_alpha if self.training else 0.0
        quality = self.norms.quality(norms_of(self, scores), self.h, weight)
        return Objective(
            scale=self.scale,
            move_target=lambda cosines: adaptive_margin(cosines, self.margin, quality),
        )
