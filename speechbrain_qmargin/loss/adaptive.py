"""Adaptive Q-Margin: the margin of each sample in the reference measure, by others' rules."""

from __future__ import annotations

from torch import Tensor

from speechbrain_qmargin.loss.elasticface import Draws
from speechbrain_qmargin.loss.functional import q_margin_objective
from speechbrain_qmargin.loss.interface import Objective, Rows, Scores
from speechbrain_qmargin.loss.magface import check_norms, share_of_norms, with_magnitude_cost
from speechbrain_qmargin.loss.norms import RunningNorms, norms_of
from speechbrain_qmargin.loss.qmargin import QMarginLoss

__all__ = ["ElasticQMarginLoss", "MagnitudeQMarginLoss", "NormQMarginLoss"]


class NormQMarginLoss(QMarginLoss):
    r"""Q-Margin whose margin follows the embedding's norm, by AdaFace's rule.

    The reference measure of the target is :math:`e^{-s m (1 + r z)}` with the quality z in
    [-1, 1] of :class:`~speechbrain_qmargin.loss.adaface.AdaFaceLoss`: less is asked of
    a poor sample. Exact on the sparse head and in shards, as every reference measure is.

    Parameters
    ----------
    alpha, scale, margin : float
        As for ``QMarginLoss``; the margin of a sample of mean norm.
    reach : float, in [0, 1]
        r: how far the margin moves, as a share of it.
    h, t_alpha : float
        As for AdaFace.

    Raises
    ------
    ValueError
        A setting outside its range.
    TypeError
        When it is called on cosines alone: it looks at the norms of embeddings.

    Examples
    --------
    A norm of 20 is the mean at first, where the margin is as given.

    >>> import torch
    >>> from speechbrain_qmargin.loss.dense import scores_of
    >>> cosines, targets = torch.tensor([[0.6, 0.1, 0.0]]), torch.tensor([1])
    >>> scores = scores_of(cosines, embeddings=torch.tensor([[12.0, 16.0]]))
    >>> torch.isclose(NormQMarginLoss()(scores, targets), QMarginLoss()(cosines, targets))
    tensor(True)
    """

    settings = ("alpha", "scale", "margin", "reach", "h", "t_alpha")
    needs_embeddings = True
    reach: float
    h: float
    t_alpha: float

    def __init__(
        self,
        alpha: float = 1.5,
        scale: float = 10.0,
        margin: float = 0.2,
        reach: float = 0.5,
        h: float = 0.333,
        t_alpha: float = 0.01,
    ) -> None:
        super(QMarginLoss, self).__init__(
            alpha=alpha, scale=scale, margin=margin, reach=reach, h=h, t_alpha=t_alpha
        )
        self.norms = RunningNorms()

    def check(self, **values: float) -> None:
        reach, h, t_alpha = values.pop("reach"), values.pop("h"), values.pop("t_alpha")
        super().check(**values)
        super().check(**{**values, "margin": values["margin"] * (1 + reach)})
        if not (0 <= reach <= 1 and h > 0 and 0 < t_alpha <= 1):
            raise ValueError(
                "reach must be in [0, 1], h > 0 and t_alpha in (0, 1], got "
                f"{reach}, {h} and {t_alpha}"
            )

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        weight = self.t_alpha if self.training else 0.0
        quality = self.norms.quality(norms_of(self, scores), self.h, weight)
        margins = self.margin * (1 + self.reach * quality)
        return q_margin_objective(targets, self.alpha, self.scale, margins)


class MagnitudeQMarginLoss(QMarginLoss):
    r"""Q-Margin whose margin grows with the embedding's norm, which is rewarded: MagFace's rule.

    With the norm a clipped to [l_a, u_a], the reference measure of the target is
    :math:`e^{-s m(a)}`, :math:`m(a) = m (1 - r + 2 r (a - l_a) / (u_a - l_a))`, and
    :math:`\lambda_g (a / u_a^2 + 1 / a)` is added to the loss. Both have a gradient by the norm:
    a sample that rests lengthens its embedding until its margin meets it, one that is lost among
    the others shortens it, so that the norm comes to say how good a sample is. Exact on the sparse
    head and in shards.

    Parameters
    ----------
    alpha, scale, margin : float
        As for ``QMarginLoss``; the margin half way between the two norms.
    reach : float, in [0, 1]
        r: the margin is from m (1 - r) to m (1 + r).
    lower_norm, upper_norm : float
        l_a and u_a, of MagFace.
    regulariser : float, >= 0
        lambda_g.

    Raises
    ------
    ValueError
        A setting outside its range.
    TypeError
        When it is called on cosines alone: it looks at the norms of embeddings.

    Notes
    -----
    MagFace's argument holds here: the loss is convex in m(a), with a slope in [0,
    :math:`s q_y^{1-\alpha} / \alpha`], so the optimal norm is unique, and it is within [l_a, u_a]
    if :math:`\lambda_g (1 / l_a^2 - 1 / u_a^2) \ge
    2 r m s e^{(\alpha - 1) s m (1 - r)} / (\alpha (u_a - l_a))`. That asks for 2.2 at the
    defaults. 3.5 is as far above it as MagFace's 35 is above what its own settings ask for. The
    bounds of the norm are MagFace's, for IResNet-100: where an encoder's norms are outside,
    nothing moves.

    Examples
    --------
    >>> import torch
    >>> MagnitudeQMarginLoss().margin_at(torch.tensor([1.0, 60.0, 200.0]))
    tensor([0.1000, 0.2000, 0.3000])
    """

    settings = ("alpha", "scale", "margin", "reach", "lower_norm", "upper_norm", "regulariser")
    needs_embeddings = True
    reach: float
    lower_norm: float
    upper_norm: float
    regulariser: float

    def __init__(
        self,
        alpha: float = 1.5,
        scale: float = 10.0,
        margin: float = 0.2,
        reach: float = 0.5,
        lower_norm: float = 10.0,
        upper_norm: float = 110.0,
        regulariser: float = 3.5,
    ) -> None:
        super(QMarginLoss, self).__init__(
            alpha=alpha,
            scale=scale,
            margin=margin,
            reach=reach,
            lower_norm=lower_norm,
            upper_norm=upper_norm,
            regulariser=regulariser,
        )

    def check(self, **values: float) -> None:
        reach = values.pop("reach")
        check_norms(*(values.pop(name) for name in ("lower_norm", "upper_norm", "regulariser")))
        if not 0 <= reach <= 1:
            raise ValueError(f"reach must be in [0, 1], got {reach}")
        super().check(**values)
        super().check(**{**values, "margin": values["margin"] * (1 + reach)})

    def margin_at(self, norms: Tensor) -> Tensor:
        """m(a)."""
        share = share_of_norms(norms, self.lower_norm, self.upper_norm)
        return self.margin * (1 - self.reach + 2 * self.reach * share)

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        margins = self.margin_at(norms_of(self, scores))
        return q_margin_objective(targets, self.alpha, self.scale, margins)

    def rows(self, scores: Scores, targets: Tensor, *, statistics: bool = False) -> Rows:
        rows, norms = super().rows(scores, targets, statistics=statistics), norms_of(self, scores)
        return with_magnitude_cost(rows, norms, self.lower_norm, self.upper_norm, self.regulariser)


class ElasticQMarginLoss(QMarginLoss):
    r"""Q-Margin whose margins are drawn from :math:`N(m, \sigma^2)`, as ElasticFace's.

    In evaluation they are m, and nothing is drawn.

    Parameters
    ----------
    alpha, scale, margin : float
    sigma : float, >= 0
    seed : int

    Raises
    ------
    ValueError
        A setting outside its range.

    Examples
    --------
    >>> import torch
    >>> loss = ElasticQMarginLoss(sigma=0.0)
    >>> outputs, targets = torch.tensor([[0.6, 0.1, 0.0]]), torch.tensor([1])
    >>> loss(outputs, targets) == QMarginLoss()(outputs, targets)
    tensor(True)
    """

    settings = ("alpha", "scale", "margin", "sigma")
    sigma: float

    def __init__(
        self,
        alpha: float = 1.5,
        scale: float = 10.0,
        margin: float = 0.2,
        sigma: float = 0.0125,
        seed: int = 0,
    ) -> None:
        super(QMarginLoss, self).__init__(alpha=alpha, scale=scale, margin=margin, sigma=sigma)
        self.draws = Draws(seed)

    def check(self, **values: float) -> None:
        sigma = values.pop("sigma")
        super().check(**values)
        if sigma < 0:
            raise ValueError(f"sigma must be >= 0, got {sigma}")

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        margins = self.draws.margins(self.margin, self.sigma, targets)
        return q_margin_objective(targets, self.alpha, self.scale, margins)
