"""The alpha-entmax and sparsemax losses: Q-Margin without a margin."""

from __future__ import annotations

from typing import ClassVar

from speechbrain_qmargin.loss.qmargin import QMarginLoss

__all__ = ["EntmaxLoss", "SparsemaxLoss"]


class EntmaxLoss(QMarginLoss):
    """The alpha-entmax loss (Peters et al., ACL 2019): Q-Margin without a margin.

    Parameters
    ----------
    alpha, scale : float
        As for :class:`~speechbrain_qmargin.QMarginLoss`.
    margin : float
        0.

    Raises
    ------
    ValueError
        A setting outside its range; another margin than 0.

    Examples
    --------
    >>> EntmaxLoss()
    EntmaxLoss(alpha=1.5, scale=10.0, margin=0, hard_margin_cos=0.2)
    >>> import torch
    >>> loss, target = EntmaxLoss(scale=1.0), torch.tensor([0])
    >>> loss(torch.ones(1, 2), target)          # a tie: (1 - 2 * 0.5^1.5) / (1.5 * 0.5)
    tensor(0.3905)
    >>> EntmaxLoss(scale=10.0)(torch.tensor([[0.8, 0.5]]), target)      # a lead of 0.2 is enough
    tensor(0.)
    """

    fixed: ClassVar = {"margin": 0.0}

    def __init__(self, alpha: float = 1.5, scale: float = 10.0, margin: float = 0.0) -> None:
        super().__init__(alpha, scale, margin)


class SparsemaxLoss(QMarginLoss):
    """The sparsemax loss (Martins and Astudillo, ICML 2016): alpha = 2 without a margin.

    Parameters
    ----------
    alpha, margin : float
        2 and 0.
    scale : float
        As for :class:`~speechbrain_qmargin.QMarginLoss`.

    Raises
    ------
    ValueError
        A setting outside its range; another alpha than 2, another margin than 0.

    Examples
    --------
    >>> SparsemaxLoss()
    SparsemaxLoss(alpha=2, scale=5.0, margin=0, hard_margin_cos=0.2)
    >>> import torch
    >>> loss = SparsemaxLoss(scale=1.0)
    >>> loss(torch.ones(1, 2), torch.tensor([0]))       # a tie: (1 - 0.5^2 - 0.5^2) / 2
    tensor(0.2500)
    """

    fixed: ClassVar = {"alpha": 2.0, "margin": 0.0}

    def __init__(self, alpha: float = 2.0, scale: float = 5.0, margin: float = 0.0) -> None:
        super().__init__(alpha, scale, margin)
