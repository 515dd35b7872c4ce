"""MagFace (Meng et al. 2021): the margin grows with the embedding's norm, which is rewarded."""

from __future__ import annotations

from torch import Tensor

from speechbrain_qmargin.loss.arcface import angular_margin
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Rows, Scores
from speechbrain_qmargin.loss.norms import norms_of

__all__ = ["MagFaceLoss"]


class MagFaceLoss(Loss):
    r"""MagFace (Meng, Zhao, Huang and Zhou, CVPR 2021).

    With the norm a clipped to [l_a, u_a], ArcFace's margin is
    :math:`m(a) = l_m + (u_m - l_m) (a - l_a) / (u_a - l_a)`, and
    :math:`\lambda_g (a / u_a^2 + 1 / a)` is added to the loss. Both have a gradient by the norm.

    Parameters
    ----------
    scale : float
    lower_margin, upper_margin : float
        l_m and u_m, in radians.
    lower_norm, upper_norm : float
        l_a and u_a.
    regulariser : float
        lambda_g.

    Notes
    -----
    The defaults are the published ones for IResNet-100; norms of other encoders may all lie
    outside [l_a, u_a], where nothing moves.

    Examples
    --------
    >>> import torch
    >>> MagFaceLoss().margin_at(torch.tensor([1.0, 60.0, 200.0]))
    tensor([0.4500, 0.6250, 0.8000])
    """

    settings = (
        "scale",
        "lower_margin",
        "upper_margin",
        "lower_norm",
        "upper_norm",
        "regulariser",
    )
    needs_embeddings = True
    scale: float
    lower_margin: float
    upper_margin: float
    lower_norm: float
    upper_norm: float
    regulariser: float

    def __init__(
        self,
        scale: float = 64.0,
        lower_margin: float = 0.45,
        upper_margin: float = 0.8,
        lower_norm: float = 10.0,
        upper_norm: float = 110.0,
        regulariser: float = 35.0,
    ) -> None:
        super().__init__(
            scale=scale,
            lower_margin=lower_margin,
            upper_margin=upper_margin,
            lower_norm=lower_norm,
            upper_norm=upper_norm,
            regulariser=regulariser,
        )

    def check(self, **values: float) -> None:
        super().check(**values)
        if not 0 <= values["lower_margin"] <= values["upper_margin"]:
            raise ValueError(
                "lower_margin must be in [0, upper_margin], got "
                f"{values['lower_margin']} and {values['upper_margin']}"
            )
        if not 0 < values["lower_norm"] < values["upper_norm"]:
            raise ValueError(
                "lower_norm must be in (0, upper_norm), got "
                f"{values['lower_norm']} and {values['upper_norm']}"
            )

    def margin_at(self, norms: Tensor) -> Tensor:
        """m(a), in radians."""
        a = norms.clamp(self.lower_norm, self.upper_norm)
        share = (a - self.lower_norm) / (self.upper_norm - self.lower_norm)
        return self.lower_margin + (self.upper_margin - self.lower_margin) * share

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        margins = self.margin_at(norms_of(self, scores))
        return Objective(
            scale=self.scale, move_target=lambda cosines: angular_margin(cosines, margins)
        )

    def rows(self, scores: Scores, targets: Tensor, *, statistics: bool = False) -> Rows:
        rows = super().rows(scores, targets, statistics=statistics)
        a = norms_of(self, scores).clamp(self.lower_norm, self.upper_norm)
        more = self.regulariser * (a / self.upper_norm**2 + 1 / a)
        return rows._replace(loss=rows.loss + more.to(rows.loss.dtype))
