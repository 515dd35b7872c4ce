"""UniFace (Zhou et al. 2023): one threshold for all classes, learnt with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import BinaryObjective, Scores

__all__ = ["UniFaceLoss"]


class UniFaceLoss(Loss):
    r"""UniFace's unified cross-entropy (Zhou, Jia, Li, Shen and Duan, ICCV 2023).

    .. math:: L = \log(1 + e^{-s (\cos_y - m) + b})
        + \lambda \sum_{j \ne y} \log(1 + e^{s \cos_j - b})

    with a learnt threshold b, the same for all samples and classes. Every class has a gradient: the
    sparse head and its shards compute it exactly, in chunks. The paper's sampling of negative
    classes at a rate r is a head, ``--head partial``.

    Parameters
    ----------
    scale, margin : float
        64 and 0.4 as published.
    balance : float, > 0
        lambda, the weight of the wrong classes; 1 as in the authors' code.

    Attributes
    ----------
    threshold : Parameter
        b. It begins at log(10 C) with the first batch, as in the authors' code. The recipes train
        it with the encoder, weight decay included, and save it.

    Raises
    ------
    ValueError
        A setting outside its range.

    Notes
    -----
    The authors' code clips the exponents to [-s, s], which takes the gradient from targets whose
    cosine is below m + b / s - 1. Here nothing overflows, and nothing is clipped.

    Examples
    --------
    >>> loss = UniFaceLoss()
    >>> loss
    UniFaceLoss(scale=64, margin=0.4, balance=1)
    >>> _ = loss(torch.zeros(1, 1000), torch.tensor([0]))
    >>> round(loss.threshold.item(), 2)
    9.21
    """

    settings = ("scale", "margin", "balance")
    balance: float
    begun: Tensor

    def __init__(self, scale: float = 64.0, margin: float = 0.4, balance: float = 1.0) -> None:
        super().__init__(scale=scale, margin=margin, balance=balance)
        self.threshold = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("begun", torch.tensor(False))
        self._asks = True

    def check(self, **values: float) -> None:
        super().check(**values)
        if not values["balance"] > 0:
            raise ValueError(f"balance must be > 0, got {values['balance']}")

    def large_margin(self) -> float:
        """The published margin: there is none for fine-tuning."""
        return 0.4

    def objective(self, scores: Scores, targets: Tensor) -> BinaryObjective:
        if self._asks:  # once: on a GPU the host waits
            self._asks = False
            if not bool(self.begun):
                with torch.no_grad():
                    self.threshold.fill_(math.log(10 * scores.num_classes))
                    self.begun.fill_(True)
        s, m, b = self.scale, self.margin, self.threshold
        return BinaryObjective(
            target=lambda cosines: s * (cosines - m) - b,
            others=lambda cosines: s * cosines - b,
            others_weight=self.balance,
            parameters=(b,),
        )
