"""A3M (arXiv 2511.13621): the alpha-divergence's loss with the margin in the target's logit."""

from __future__ import annotations

from torch import Tensor

from speechbrain_qmargin.loss.arcface import angular_margin, check_angle
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.functional import check_loss_parameters
from speechbrain_qmargin.loss.interface import Objective, Scores

__all__ = ["A3MLoss"]


class A3MLoss(Loss):
    r"""A3M, the alpha-divergence loss with ArcFace's margin: Q-Margin's authors' first preprint.

    Q-Margin moves the target's reference measure, A3M its logit, to :math:`s \cos(\theta_y + m)`,
    with q = 1: the alpha-entmax loss of ArcFace's logits. alpha = 1 is ArcFace. It is exact on the
    sparse head and in shards.

    Early in training nearly every target's posterior is 0: its logit begins :math:`s \sin m` below
    the others, which a sparse posterior leaves out. The gradient there is that of the logits, and
    does not depend on how far behind the target is. By public summaries the preprint re-initialises
    prototypes that training left behind ("A3M-I"); its abstract does not say how. In the recipes
    `reset_after_epochs` sets them to the mean of their samples' embeddings, see
    :class:`~speechbrain_qmargin.training.prototype_reset.PrototypeReset`.

    Parameters
    ----------
    alpha : float, >= 1
    scale : float, > 0
    margin : float
        In radians, at most pi.

    Raises
    ------
    ValueError
        A setting outside its range.

    Notes
    -----
    arXiv 2511.13621, "Alpha Divergence Losses for Biometric Verification", whose full text was not
    available. That its margin is ArcFace's is inferred from its name. Beyond an angle of pi - m the
    target's cosine continues as in :func:`~speechbrain_qmargin.loss.arcface.angular_margin`, which
    may not be the preprint's choice. The defaults are Q-Margin's.

    Examples
    --------
    >>> import torch
    >>> loss = A3MLoss()
    >>> loss
    A3MLoss(alpha=1.5, scale=10, margin=0.2)
    >>> loss(torch.tensor([[[0.9, 0.1, 0.0]], [[0.2, 0.5, 0.4]]]), torch.tensor([[0], [1]]))
    tensor(0.4585)
    >>> import math
    >>> outputs = torch.tensor([[math.cos(0.3), math.cos(0.5)]])
    >>> A3MLoss(alpha=2.0, scale=1.0)(outputs, torch.tensor([0]))   # a tie: (1 - 0.5^2 - 0.5^2) / 2
    tensor(0.2500)
    """

    settings = ("alpha", "scale", "margin")

    def __init__(self, alpha: float = 1.5, scale: float = 10.0, margin: float = 0.2) -> None:
        super().__init__(alpha=alpha, scale=scale, margin=margin)

    def check(self, **values: float) -> None:
        check_loss_parameters(**values)
        check_angle(values["margin"])

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        return Objective(
            scale=self.scale,
            alpha=self.alpha,
            move_target=lambda cosines: angular_margin(cosines, self.margin),
        )
