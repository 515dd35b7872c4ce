"""Inter-top-k (Zhao et al. 2021): the hardest wrong classes of each sample are pushed further."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from speechbrain_qmargin.loss.arcface import angular_margin
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.dense import DenseScores
from speechbrain_qmargin.loss.interface import Objective, Rows, Scores, flat

__all__ = ["InterTopKLoss"]

_MARGIN = 0.2  # of ArcFace, at which m' is what it is said to be


class InterTopKLoss(Loss):
    r"""ArcFace with the inter-top-k penalty (Zhao et al., SpeakIn's VoxSRC 2021 system).

    The k largest cosines of wrong classes become :math:`\cos(\theta_j - m')`, as in WeSpeaker.

    Which they are is known where all cosines are: on the dense head, and, at its cost, on a sparse
    head of one process. In shards it raises.

    Parameters
    ----------
    scale, margin : float
    top_margin : float, >= 0
        m' at a margin of 0.2, in radians; 0.06 as in WeSpeaker. It grows and falls with the margin:
        while a schedule keeps that at 0, so is m'.
    k : int
        5 as in WeSpeaker. All classes that tie with the k-th count.

    Raises
    ------
    ValueError
        A setting outside its range.
    TypeError
        When it is called on a head in shards.

    Notes
    -----
    In large-margin fine-tuning WeSpeaker has no m': give a `top_margin` of 0 there.

    Examples
    --------
    >>> InterTopKLoss()
    InterTopKLoss(scale=32, margin=0.2, top_margin=0.06)
    >>> loss = InterTopKLoss(scale=1.0, margin=0.2, top_margin=0.2, k=1)
    >>> outputs = torch.tensor([[math.sin(0.2), -math.sin(0.2)]])       # 0.2 from a right angle
    >>> loss(outputs, torch.tensor([0]))                                # both become 0: log 2
    tensor(0.6931)
    """

    settings = ("scale", "margin", "top_margin")
    options = ("k",)
    top_margin: float

    def __init__(
        self, scale: float = 32.0, margin: float = 0.2, top_margin: float = 0.06, k: int = 5
    ) -> None:
        super().__init__(scale=scale, margin=margin, top_margin=top_margin)
        if int(k) != k or k < 1:
            raise ValueError(f"k must be a whole number >= 1, got {k}")
        self.k = int(k)

    def check(self, **values: float) -> None:
        super().check(**values)
        for name in ("margin", "top_margin"):
            if not 0 <= values[name] <= math.pi:
                raise ValueError(f"{name} is an angle in radians, in [0, pi], got {values[name]}")
        if values["top_margin"] * values["margin"] / _MARGIN > math.pi:
            raise ValueError(
                f"top_margin: {values['top_margin']} at a margin of {_MARGIN}, which at "
                f"{values['margin']} is more than pi"
            )

    def rows(self, scores: Scores, targets: Tensor, *, statistics: bool = False) -> Rows:
        dense = DenseScores(scores.cosines(), scores.embeddings)
        k, targets = min(self.k, dense.num_classes), flat(targets)
        places = targets.clamp(0, dense.num_classes - 1).unsqueeze(1)  # checked below
        wrong = dense.cosines().detach().scatter(1, places, -math.inf)
        least = wrong.topk(k, 1).values[:, -1:]
        angle = self.top_margin * self.margin / _MARGIN

        def move_others(cosines: Tensor, target: Tensor) -> Tensor:
            eps = torch.finfo(cosines.dtype).eps
            sine = (1 - cosines.square()).clamp(min=eps).sqrt()
            nearer = cosines * math.cos(angle) + sine * math.sin(angle)
            return torch.where(cosines >= least, nearer, cosines)

        objective = Objective(
            scale=self.scale,
            move_target=lambda cosines: angular_margin(cosines, self.margin),
            move_others=move_others,
        )
        return dense.evaluate(targets, objective, statistics=statistics)
