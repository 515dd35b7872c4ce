"""The embeddings' norms, for losses that take them for a measure of quality."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Scores

__all__ = ["RunningNorms", "embeddings_of", "norms_of"]

_LEAST, _MOST = 1e-3, 100.0  # norms are clipped to these, as in AdaFace's code


def embeddings_of(loss: Loss, scores: Scores, what: str = "embeddings") -> Tensor:
    """Embeddings [B, D], in the graph.

    Raises
    ------
    TypeError
        Where the classifier shows cosines only; `what` is what the loss looks at.

    Examples
    --------
    >>> from speechbrain_qmargin import ArcFaceLoss
    >>> from speechbrain_qmargin.loss.dense import scores_of
    >>> embeddings_of(ArcFaceLoss(), scores_of(torch.ones(1, 2)))
    Traceback (most recent call last):
    TypeError: ArcFaceLoss looks at the embeddings, which cosines have not: give it ...
    """
    if scores.embeddings is None:
        raise TypeError(
            f"{type(loss).__name__} looks at the {what}, which cosines have not: give it "
            "scores_of(cosines, embeddings) of speechbrain_qmargin.loss.dense, or the output of "
            "QMarginHead; the recipes do"
        )
    return scores.embeddings


def norms_of(loss: Loss, scores: Scores) -> Tensor:
    """Norms [B], float64, in the graph; TypeError as in :func:`embeddings_of`.

    Examples
    --------
    >>> from speechbrain_qmargin import MagFaceLoss
    >>> from speechbrain_qmargin.loss.dense import scores_of
    >>> norms_of(MagFaceLoss(), scores_of(torch.ones(1, 2), embeddings=torch.tensor([[3.0, 4.0]])))
    tensor([5.], dtype=torch.float64)
    """
    embeddings = embeddings_of(loss, scores, "embeddings' norms")
    return torch.linalg.vector_norm(embeddings.double(), dim=1)


class RunningNorms(nn.Module):
    """Running mean and standard deviation of norms, over all processes.

    Attributes
    ----------
    mean, deviation : Tensor
        Buffers; 20 and 100 at first, as in AdaFace's code.

    Examples
    --------
    >>> norms = RunningNorms()
    >>> norms.quality(torch.tensor([10.0, 20.0, 30.0]).double(), h=1 / 3, weight=1.0)
    tensor([-0.3333,  0.0000,  0.3333], dtype=torch.float64)
    >>> norms.mean, norms.deviation
    (tensor(20., dtype=torch.float64), tensor(10., dtype=torch.float64))
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("deviation", torch.tensor(100.0, dtype=torch.float64))

    @torch.no_grad()
    def quality(self, norms: Tensor, h: float, weight: float) -> Tensor:
        """In [-1, 1], [B], of norms [B], after the running values took them in; no gradient."""
        norms = norms.clamp(_LEAST, _MOST)
        self.to(norms.device)
        if weight:
            sums = torch.stack((torch.ones_like(norms), norms, norms.square())).sum(1)
            count, total, squares = Communicator().sum(sums)
            mean = total / count
            # one sample has no deviation: the running value stays
            variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
            deviation = torch.where(count > 1, variance.sqrt(), self.deviation)
            kept = torch.isfinite(mean)  # a batch that diverged is no measure
            mean = weight * mean + (1 - weight) * self.mean
            deviation = weight * deviation + (1 - weight) * self.deviation
            self.mean = torch.where(kept, mean, self.mean)
            self.deviation = torch.where(kept, deviation, self.deviation)
        return (h * (norms - self.mean) / (self.deviation + _LEAST)).clamp(-1, 1)
