"""Angular Sparsemax (Chan and Kittler 2020): sparsemax with ArcFace's margin."""

from __future__ import annotations

from typing import ClassVar

from speechbrain_qmargin.loss.a3m import A3MLoss

__all__ = ["AngularSparsemaxLoss"]


class AngularSparsemaxLoss(A3MLoss):
    r"""Angular Sparsemax (Chan and Kittler, ICPR 2020): the sparsemax loss of ArcFace's logits.

    The Fenchel-Young loss of alpha = 2 with the target's logit :math:`s \cos(\theta_y + m)` and no
    reference measure, which is A3M at alpha = 2. Exact on the sparse head and in shards, where only
    its support costs anything.

    Parameters
    ----------
    alpha : float
        2.
    scale : float
    margin : float
        In radians, at most pi.

    Raises
    ------
    ValueError
        A setting outside its range; another alpha than 2.

    Notes
    -----
    Written from the paper's abstract, "sparseness similar to sparsemax with Fenchel-Young
    regularisation" and "an additive angular margin on the score vector": its full text and numbers
    were not available. The defaults are this package's for sparsemax and ArcFace.

    Examples
    --------
    >>> AngularSparsemaxLoss()
    AngularSparsemaxLoss(alpha=2, scale=5, margin=0.2)
    >>> import math
    >>> import torch
    >>> loss = AngularSparsemaxLoss(scale=1.0, margin=0.2)
    >>> outputs = torch.tensor([[math.cos(0.3), math.cos(0.5)]])
    >>> loss(outputs, torch.tensor([0]))                        # a tie: (1 - 0.5^2 - 0.5^2) / 2
    tensor(0.2500)
    """

    fixed: ClassVar = {"alpha": 2.0}

    def __init__(self, alpha: float = 2.0, scale: float = 5.0, margin: float = 0.2) -> None:
        super().__init__(alpha, scale, margin)
