"""The alpha-entmax and sparsemax losses: Q-Margin without a margin."""

from __future__ import annotations

from typing import ClassVar

from speechbrain_qmargin.loss.qmargin import QMarginLoss

__all__ = ["EntmaxLoss", "SparsemaxLoss"]


class EntmaxLoss(QMarginLoss):
    """The alpha-entmax loss (Peters et al., ACL 2019): Q-Margin without a margin.

    Examples
    --------
    >>> EntmaxLoss()
    EntmaxLoss(alpha=1.5, scale=10.0, margin=0, hard_margin_cos=0.2)
    """

    fixed: ClassVar = {"margin": 0.0}

    def __init__(self, alpha: float = 1.5, scale: float = 10.0, margin: float = 0.0) -> None:
        super().__init__(alpha, scale, margin)


class SparsemaxLoss(QMarginLoss):
    """The sparsemax loss (Martins and Astudillo, ICML 2016): alpha = 2 without a margin.

    Examples
    --------
    >>> SparsemaxLoss()
    SparsemaxLoss(alpha=2, scale=5.0, margin=0, hard_margin_cos=0.2)
    """

    fixed: ClassVar = {"alpha": 2.0, "margin": 0.0}

    def __init__(self, alpha: float = 2.0, scale: float = 5.0, margin: float = 0.0) -> None:
        super().__init__(alpha, scale, margin)
