"""CosFace (Wang et al. 2018), also called AM-softmax."""

from __future__ import annotations

from typing import ClassVar

from speechbrain_qmargin.loss.qmargin import QMarginLoss

__all__ = ["CosFaceLoss"]


class CosFaceLoss(QMarginLoss):
    """CosFace (Wang et al., CVPR 2018): Q-Margin's alpha = 1, a cross-entropy with a margin.

    Parameters
    ----------
    alpha : float
        1.
    scale, margin : float
        As for :class:`~speechbrain_qmargin.QMarginLoss`.

    Raises
    ------
    ValueError
        A setting outside its range; another alpha than 1.

    Examples
    --------
    >>> CosFaceLoss()
    CosFaceLoss(alpha=1, scale=32.0, margin=0.2, hard_margin_cos=inf)
    >>> import torch
    >>> loss = CosFaceLoss(scale=1.0, margin=0.4)
    >>> loss(torch.tensor([[1.0, 0.6]]), torch.tensor([0]))     # 1 - 0.4, as near as 0.6: log 2
    tensor(0.6931)
    """

    fixed: ClassVar = {"alpha": 1.0}

    def __init__(self, alpha: float = 1.0, scale: float = 32.0, margin: float = 0.2) -> None:
        super().__init__(alpha, scale, margin)
