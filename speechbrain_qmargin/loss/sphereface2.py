"""SphereFace2 (Wen et al. 2022): is the sample of this class, or not, for each class on its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import BinaryObjective, Scores

__all__ = ["SphereFace2Loss", "similarity"]

_MARGINS = {"C": 0.2, "A": 0.15}
_LARGE = {"C": 0.3, "A": 0.25}  # of large-margin fine-tuning


def similarity(cosines: Tensor, t: int) -> Tensor:
    """2 ((z + 1) / 2)^t - 1: cosines of wrong classes, which crowd at 0, are spread.

    Examples
    --------
    >>> similarity(torch.tensor([1.0, 0.0, -1.0]), 3)
    tensor([ 1.0000, -0.7500, -1.0000])
    """
    return 2 * ((cosines + 1) / 2) ** t - 1


class SphereFace2Loss(Loss):
    r"""SphereFace2 (Wen, Liu, Weller, Raj and Singh, ICLR 2022), as in WeSpeaker.

    With :math:`g(z) = 2 ((z + 1) / 2)^t - 1` and a learnt bias b,

    .. math:: L = \lambda \log(1 + e^{-s (g(\cos_y) - m) - b})
        + (1 - \lambda) \sum_{j \ne y} \log(1 + e^{s (g(\cos_j) + m) + b})

    for kind "C"; for "A" the margin is in the angles, :math:`g(\cos(\theta_y + m))` and
    :math:`g(\cos(\theta_j - m))`. Every class has a gradient: the sparse head and its shards
    compute it exactly, in chunks.

    Parameters
    ----------
    scale : float
        32 as in WeSpeaker.
    margin : float, optional
        None: 0.2 for "C" and, in radians, 0.15 for "A", WeSpeaker's.
    balance : float, in (0, 1)
        lambda, the weight of the target; 0.7 as published.
    t : int, >= 1
        3 as published.
    kind : "C" or "A"
    bias : float
        Where b begins; 0 as in WeSpeaker.

    Attributes
    ----------
    bias : Parameter
        b. The recipes train it with the encoder, weight decay included, and save it.

    Raises
    ------
    ValueError
        A setting outside its range.

    Notes
    -----
    Where :math:`\theta_y + m > \pi`, kind "A" goes on by :math:`\cos\theta_y - (1 - \cos m)`, as in
    WeSpeaker. The paper's scale of the whole loss is left out, as there.

    Examples
    --------
    >>> SphereFace2Loss()
    SphereFace2Loss(scale=32, margin=0.2, balance=0.7)
    >>> loss = SphereFace2Loss(scale=1.0, margin=0.2, t=1)          # g(z) = z
    >>> round(loss(torch.tensor([[0.2, -0.2]]), torch.tensor([0])).item(), 4)   # (0.7 + 0.3) log 2
    0.6931
    """

    settings = ("scale", "margin", "balance")
    options = ("kind", "t")
    balance: float

    def __init__(
        self,
        scale: float = 32.0,
        margin: float | None = None,
        balance: float = 0.7,
        t: int = 3,
        kind: str = "C",
        bias: float = 0.0,
    ) -> None:
        if kind not in _MARGINS:
            raise ValueError(f"kind must be 'C' or 'A', got {kind!r}")
        if int(t) != t or t < 1:
            raise ValueError(f"t must be a whole number >= 1, got {t}")
        super().__init__(
            scale=scale, margin=_MARGINS[kind] if margin is None else margin, balance=balance
        )
        self.kind, self.t = kind, int(t)
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def check(self, **values: float) -> None:
        super().check(**values)
        if not 0 < values["balance"] < 1:
            raise ValueError(f"balance must be in (0, 1), got {values['balance']}")

    def large_margin(self) -> float:
        """0.3 for "C" and 0.25 for "A", as WeSpeaker."""
        return _LARGE[self.kind]

    def _turned(self, cosines: Tensor, angle: float) -> Tensor:
        """cos(theta + angle); at a cosine of 1 or -1 without a slope by the sine."""
        sine = (1 - cosines.square()).clamp(min=torch.finfo(cosines.dtype).eps).sqrt()
        return cosines * math.cos(angle) - sine * math.sin(angle)

    def objective(self, scores: Scores, targets: Tensor) -> BinaryObjective:
        s, m, t, bias = self.scale, self.margin, self.t, self.bias

        def target(cosines: Tensor) -> Tensor:
            if self.kind == "C":
                return s * (similarity(cosines, t) - m) + bias
            far = cosines - (1 - math.cos(m))
            moved = torch.where(cosines > -math.cos(m), self._turned(cosines, m), far)
            return s * similarity(moved, t) + bias

        def others(cosines: Tensor) -> Tensor:
            if self.kind == "C":
                return s * (similarity(cosines, t) + m) + bias
            return s * similarity(self._turned(cosines, -m), t) + bias

        return BinaryObjective(
            target, others, self.balance, 1 - self.balance, parameters=(self.bias,)
        )
