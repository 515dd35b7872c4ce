"""Q-Margin for other f-divergences than the alpha-divergences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.functional import check_loss_parameters, q_margin_objective
from speechbrain_qmargin.loss.generators import f_hard_margin, generator_named
from speechbrain_qmargin.loss.interface import Objective, QMarginStats, Rows, Scores

__all__ = ["FDivergenceLoss"]


class FDivergenceLoss(Loss):
    r"""Q-Margin's construction for any f of Roulet et al. (2025) with a loss of one-hot labels.

    Logits :math:`s \cos_j`, reference measure :math:`q_y = e^{-s m}` and 1 elsewhere, as in
    Q-Margin. ``kl`` is ``cosface`` and ``chi_square`` is ``qmargin`` with alpha 2, which they are
    computed as. The others are solved in float64. All are exact on the sparse head and in shards:
    it searches for the support of ``le_cam`` as for that of Q-Margin, and looks at every class,
    chunk by chunk, for those whose posterior is dense.

    Parameters
    ----------
    divergence : str
        ``le_cam`` (sparse), ``jensen_shannon``, ``squared_hellinger`` (dense posteriors),
        ``chi_square``, ``kl``. ``reverse_kl`` has no loss: see
        :mod:`~speechbrain_qmargin.loss.generators`.
    scale, margin : float
        For Le Cam the hard margin is between 3 / scale and 4 / scale whatever the margin is.

    Raises
    ------
    ValueError
        Another divergence; scale * margin beyond 300, where the square of 1 / q_y overflows.

    Examples
    --------
    >>> loss = FDivergenceLoss("le_cam")
    >>> loss
    FDivergenceLoss(scale=10, margin=0.2, divergence=le_cam)
    >>> outputs = torch.tensor([[[0.6, 0.1, 0.0]], [[0.2, 0.5, 0.4]]])
    >>> loss(outputs, torch.tensor([[0], [1]]))
    tensor(0.4330)
    """

    def __init__(
        self, divergence: str = "le_cam", scale: float = 10.0, margin: float = 0.2
    ) -> None:
        self._f = generator_named(divergence)
        if not math.isfinite(self._f.at_zero):
            raise ValueError(
                f"divergence: {divergence} has no loss, for f(0) is infinite, and so is the "
                "divergence of a label from any measure"
            )
        super().__init__(scale=scale, margin=margin)

    @property
    def divergence(self) -> str:
        return self._f.name

    def check(self, **values: float) -> None:
        check_loss_parameters(1.0, **values)
        exponent = values["scale"] * values["margin"]
        if exponent > 300:
            raise ValueError(
                f"scale * margin = {exponent:.3g} > 300: 1 / q_y is too large for float64; lower "
                "scale or margin"
            )

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        if self._f.alpha is not None:
            return q_margin_objective(targets, self._f.alpha, self.scale, self.margin)
        prior = torch.full(
            targets.shape,
            -self.scale * self.margin,
            dtype=torch.float64,
            device=targets.device,
        )
        return Objective(self.scale, target_log_q=prior, generator=self._f)

    def resting_lead(self) -> float | None:
        if not self._f.is_sparse:
            return None
        return f_hard_margin(self._f, self.scale, self.margin)

    def statistics(self, rows: Rows) -> QMarginStats:
        # of what QMarginStats asks alpha: whether a zero is a rest or rounding
        return QMarginStats.of(rows, 2.0 if self._f.is_sparse else 1.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, divergence={self.divergence}"
