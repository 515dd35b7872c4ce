"""MagFace (Meng et al. 2021): the margin grows with the embedding's norm, which is rewarded."""

from __future__ import annotations

from torch import Tensor

from speechbrain_qmargin.loss.arcface import angular_margin
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Objective, Rows, Scores
from speechbrain_qmargin.loss.norms import norms_of

__all__ = [
    "MagFaceLoss",
    "check_norms",
    "magnitude_cost",
    "share_of_norms",
    "with_magnitude_cost",
]


def share_of_norms(norms: Tensor, lower: float, upper: float) -> Tensor:
    """Where norms [B] are between two bounds, to which they are clipped: in [0, 1].

    Examples
    --------
    >>> import torch
    >>> share_of_norms(torch.tensor([1.0, 60.0, 200.0]), 10.0, 110.0)
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (norms.clamp(lower, upper) - lower) / (upper - lower)


def magnitude_cost(norms: Tensor, lower: float, upper: float) -> Tensor:
    """g(a) = a / upper^2 + 1 / a of norms [B] clipped to the bounds: least at the upper one.

    Examples
    --------
    >>> import torch
    >>> magnitude_cost(torch.tensor([1.0, 2.0, 9.0]), 1.0, 4.0)
    tensor([1.0625, 0.6250, 0.5000])
    """
    a = norms.clamp(lower, upper)
    return a / upper**2 + 1 / a


def with_magnitude_cost(
    rows: Rows, norms: Tensor, lower: float, upper: float, regulariser: float
) -> Rows:
    """Losses [B] with :func:`magnitude_cost` of their norms [B] added.

    Examples
    --------
    >>> import torch
    >>> rows = Rows(torch.ones(1), torch.ones(1), None)
    >>> norms = torch.tensor([2.0])                     # 2 / 4^2 + 1 / 2 = 0.625
    >>> with_magnitude_cost(rows, norms, lower=1.0, upper=4.0, regulariser=2.0).loss
    tensor([2.2500])
    """
    cost = regulariser * magnitude_cost(norms, lower, upper)
    return rows._replace(loss=rows.loss + cost.to(rows.loss.dtype))


def check_norms(lower: float, upper: float, regulariser: float) -> None:
    """Refuse bounds that are none, and a reward for short embeddings.

    Raises
    ------
    ValueError
        Bounds other than 0 < lower < upper; regulariser < 0.

    Examples
    --------
    >>> check_norms(lower=10.0, upper=110.0, regulariser=35.0)
    >>> check_norms(lower=110.0, upper=10.0, regulariser=35.0)
    Traceback (most recent call last):
    ValueError: lower_norm must be in (0, upper_norm), got 110.0 and 10.0
    """
    if not 0 < lower < upper:
        raise ValueError(f"lower_norm must be in (0, upper_norm), got {lower} and {upper}")
    if regulariser < 0:
        raise ValueError(f"regulariser must be >= 0, got {regulariser}")


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
    regulariser : float, >= 0
        lambda_g.
    easy_margin : bool
        Only cosines above 0 move, as in the authors' code; otherwise as in
        :class:`~speechbrain_qmargin.loss.arcface.ArcFaceLoss`.

    Raises
    ------
    ValueError
        A setting outside its range.
    TypeError
        When it is called on cosines alone: it looks at the norms of embeddings.

    Notes
    -----
    The numbers are the published ones; norms of other encoders than IResNet's may all lie outside
    [l_a, u_a], where nothing moves.

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
    options = ("easy_margin",)
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
        easy_margin: bool = False,
    ) -> None:
        super().__init__(
            scale=scale,
            lower_margin=lower_margin,
            upper_margin=upper_margin,
            lower_norm=lower_norm,
            upper_norm=upper_norm,
            regulariser=regulariser,
        )
        self.easy_margin = bool(easy_margin)

    def check(self, **values: float) -> None:
        super().check(**values)
        if not 0 <= values["lower_margin"] <= values["upper_margin"]:
            raise ValueError(
                "lower_margin must be in [0, upper_margin], got "
                f"{values['lower_margin']} and {values['upper_margin']}"
            )
        check_norms(values["lower_norm"], values["upper_norm"], values["regulariser"])

    def margin_at(self, norms: Tensor) -> Tensor:
        """m(a), in radians."""
        share = share_of_norms(norms, self.lower_norm, self.upper_norm)
        return self.lower_margin + (self.upper_margin - self.lower_margin) * share

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        margins = self.margin_at(norms_of(self, scores))
        return Objective(
            scale=self.scale,
            move_target=lambda cosines: angular_margin(cosines, margins, self.easy_margin),
        )

    def rows(self, scores: Scores, targets: Tensor, *, statistics: bool = False) -> Rows:
        rows, norms = super().rows(scores, targets, statistics=statistics), norms_of(self, scores)
        return with_magnitude_cost(rows, norms, self.lower_norm, self.upper_norm, self.regulariser)
