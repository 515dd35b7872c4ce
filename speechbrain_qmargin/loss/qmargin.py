"""Q-Margin, Fenchel-Young losses of the alpha-divergences (arXiv 2606.31664)."""

from __future__ import annotations

from torch import Tensor

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.functional import (
    check_loss_parameters,
    hard_margin,
    margin_for,
    q_margin_objective,
)
from speechbrain_qmargin.loss.interface import Objective, Scores

__all__ = ["QMarginFaceLoss", "QMarginLoss"]

# Of large-margin fine-tuning, the lead in cosine beyond which a sample rests: 0.5 as a margin m
# would ask for more than two cosines can differ by
_LARGE_LEAD = 0.9


class QMarginLoss(Loss):
    r"""Q-Margin (arXiv 2606.31664) on the cosines of a classifier: SpeechBrain's ``compute_cost``.

    The defaults are the paper's for VoxCeleb's 5,994 speakers; for millions of faces see
    :class:`QMarginFaceLoss`, for another number of classes, and for short trainings,
    :func:`~speechbrain_qmargin.suggest_parameters`. The printed `hard_margin_cos` is the lead in
    cosine from which on a sample has zero loss; at the same hard margin a larger alpha goes with a
    smaller scale. The module has no parameters and no state; it need not be in `modules` or in the
    checkpointer.

    Under ``torch.compile`` loss and gradient stay the same and the checks of values are skipped.
    CUDA tensors, and alpha = 1, give one whole graph; on the CPU the graph breaks where the solver
    checks for convergence, and nothing is gained.

    Parameters
    ----------
    alpha : float, >= 1
        Order of the divergence. 1 is CosFace's cross-entropy.
    scale : float, > 0
        Scale s of the cosines.
    margin : float, >= 0
        Margin m, in cosine: the target's reference measure is ``exp(-s m)``.

    Raises
    ------
    ValueError
        Parameters outside their range, or so large that the loss overflows float32.

    Examples
    --------
    >>> import torch
    >>> loss_fn = QMarginLoss()
    >>> loss_fn
    QMarginLoss(alpha=1.5, scale=10.0, margin=0.2, hard_margin_cos=0.544)
    >>> outputs = torch.tensor([[[0.6, 0.1, 0.0]], [[0.2, 0.5, 0.4]]])      # [B, 1, C]
    >>> targets = torch.tensor([[0], [1]])                                  # [B, 1]
    >>> loss_fn(outputs, targets)
    tensor(0.7801)

    In a SpeechBrain recipe::

        compute_cost: !new:speechbrain_qmargin.QMarginLoss
            alpha: 1.5
            scale: 10
            margin: 0.2

    or, without editing it, on its command line::

        --compute_cost='!new:speechbrain_qmargin.QMarginLoss [1.75, 5, 0.2]'
    """

    settings = ("alpha", "scale", "margin")

    def __init__(self, alpha: float = 1.5, scale: float = 10.0, margin: float = 0.2) -> None:
        super().__init__(alpha=alpha, scale=scale, margin=margin)

    def check(self, **values: float) -> None:
        check_loss_parameters(**values)
        exponent = (values["alpha"] - 1) * values["scale"] * values["margin"]
        if exponent > 80:
            raise ValueError(
                f"(alpha - 1) * scale * margin = {exponent:.3g} > 80: the loss overflows float32, "
                f"and its hard margin, {hard_margin(**values):.3g}, is beyond any "
                "cosine. Lower alpha, scale or margin"
            )

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        return q_margin_objective(targets, self.alpha, self.scale, self.margin)

    def resting_lead(self) -> float | None:
        return None if self.alpha == 1 else hard_margin(self.alpha, self.scale, self.margin)

    def large_margin(self) -> float:
        """The margin of large-margin fine-tuning: whose hard margin is 0.9; 0.5 at alpha = 1."""
        if self.alpha == 1 or "margin" in self.fixed:
            return super().large_margin()
        return max(self.margin, margin_for(self.alpha, self.scale, _LARGE_LEAD))

    def warning(self) -> str | None:
        lead = hard_margin(self.alpha, self.scale, self.margin)
        if self.alpha == 1 or lead <= 2:
            return None
        return (
            f"the hard margin of alpha {self.alpha:g}, scale {self.scale:g}, margin "
            f"{self.margin:g} is {lead:.3g}, more than two cosines can differ by: no sample "
            "will be at zero loss"
        )

    def extra_repr(self) -> str:
        reach = hard_margin(self.alpha, self.scale, self.margin)
        more = (f", {name}={self.value(name):g}" for name in self.settings[3:])
        return (
            f"alpha={self.alpha:g}, scale={self.scale}, margin={self.margin:.3g}, "
            f"hard_margin_cos={reach:.3g}{''.join(more)}"
        )


class QMarginFaceLoss(QMarginLoss):
    """Q-Margin for 1e5 to 1e7 face identities (arXiv 2606.31664, section 4: WebFace42M).

    Raises
    ------
    ValueError
        As :class:`QMarginLoss`.

    Examples
    --------
    >>> QMarginFaceLoss()
    QMarginFaceLoss(alpha=1.25, scale=32.0, margin=0.2, hard_margin_cos=0.619)
    >>> import torch
    >>> QMarginFaceLoss()(torch.tensor([[0.9, 0.2]]), torch.tensor([0]))   # a lead of 0.7: it rests
    tensor(0.)
    """

    def __init__(self, alpha: float = 1.25, scale: float = 32.0, margin: float = 0.2) -> None:
        super().__init__(alpha, scale, margin)
