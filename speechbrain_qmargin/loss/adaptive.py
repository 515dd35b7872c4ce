"""Adaptive Q-Margin: the margin of each sample in the reference measure, by others' rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speechbrain_qmargin.loss.elasticface import Draws
from speechbrain_qmargin.loss.functional import q_margin_objective
from speechbrain_qmargin.loss.interface import Objective, Scores
from speechbrain_qmargin.loss.norms import RunningNorms, norms_of
from speechbrain_qmargin.loss.qmargin import QMarginLoss

__all__ = ["ElasticQMarginLoss", "NormQMarginLoss", "PriorQMarginLoss"]


class NormQMarginLoss(QMarginLoss):
    r"""Q-Margin whose margin follows the embedding's norm, by AdaFace's rule.

    The reference measure of the target is :math:`e^{-s m (1 + r z)}` with the quality z in
    [-1, 1] of :class:`~speechbrain_qmargin.loss.adaface.AdaFaceLoss`: a bad sample is asked for
    less. Exact on the sparse head and in shards, as every reference measure is.

    Parameters
    ----------
    alpha, scale, margin : float
        As for ``QMarginLoss``; the margin of a sample of mean norm.
    reach : float, in [0, 1]
        r: how far the margin moves, as a share of it.
    h, t_alpha : float
        As for AdaFace.

    Examples
    --------
    >>> NormQMarginLoss().settings
    ('alpha', 'scale', 'margin', 'reach', 'h', 't_alpha')
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
        norms = norms_of(self, scores).detach()
        quality = self.norms.quality(norms, self.h, self.t_alpha if self.training else 0.0)
        margins = self.margin * (1 + self.reach * quality)
        return q_margin_objective(targets, self.alpha, self.scale, margins)


class ElasticQMarginLoss(QMarginLoss):
    r"""Q-Margin whose margins are drawn from :math:`N(m, \sigma^2)`, as ElasticFace's.

    Parameters
    ----------
    alpha, scale, margin : float
    sigma : float, >= 0
    seed : int

    Examples
    --------
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
        margins = self.margin + self.sigma * self.draws.next(len(targets)).to(targets.device)
        return q_margin_objective(targets, self.alpha, self.scale, margins)


class PriorQMarginLoss(QMarginLoss):
    r"""Q-Margin with a prior of the classes in its reference measure, for long-tailed corpora.

    :math:`\log q_j = t (\log n_j - \overline{\log n})` with the number n_j of training items of
    class j: a frequent class is expected, so a rare one must be the clearer to be told from it.

    Parameters
    ----------
    counts : sequence of numbers > 0, or Tensor, [C], optional
        The recipes give those of their training data.
    alpha, scale, margin : float
    temperature : float
        t; 0 is plain Q-Margin.

    Examples
    --------
    >>> loss = PriorQMarginLoss(counts=[100, 10, 1], temperature=1.0)
    >>> loss.log_q
    tensor([ 2.3026,  0.0000, -2.3026])
    """

    settings = ("alpha", "scale", "margin", "temperature")
    needs_counts = True
    temperature: float
    log_counts: Tensor | None

    def __init__(
        self,
        counts: Sequence[float] | Tensor | None = None,
        alpha: float = 1.5,
        scale: float = 10.0,
        margin: float = 0.2,
        temperature: float = 0.5,
    ) -> None:
        super(QMarginLoss, self).__init__(
            alpha=alpha, scale=scale, margin=margin, temperature=temperature
        )
        self.register_buffer("log_counts", None, persistent=False)
        if counts is not None:
            self.count_classes(counts)

    def count_classes(
        self, counts: Sequence[float] | Tensor, embedding_dim: int | None = None
    ) -> None:
        found = torch.as_tensor(counts, dtype=torch.float64)
        if found.ndim != 1 or not bool((found > 0).all()):
            raise ValueError("counts must be one number > 0 for each class")
        logs = found.log()
        self.log_counts = (logs - logs.mean()).float()

    def check(self, **values: float) -> None:
        values.pop("temperature")
        super().check(**values)

    @property
    def log_q(self) -> Tensor:
        """[C]."""
        if self.log_counts is None:
            raise ValueError(
                "PriorQMarginLoss: counts: the number of items of each class is not known; give "
                "it, or train in the recipes, which count"
            )
        return self.temperature * self.log_counts

    def objective(self, scores: Scores, targets: Tensor) -> Objective:
        log_q = self.log_q.to(targets.device)
        return q_margin_objective(targets, self.alpha, self.scale, self.margin, log_q)
