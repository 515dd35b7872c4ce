"""The embeddings' norms, for losses that take them for a measure of quality."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from speechbrain_qmargin.loss.base import Loss
from speechbrain_qmargin.loss.interface import Scores

__all__ = ["RunningNorms", "norms_of"]

_LEAST, _MOST = 1e-3, 100.0  # norms are clipped to these, as in AdaFace's code


def norms_of(loss: Loss, scores: Scores) -> Tensor:
    """Norms [B], float64, in the graph.

    Raises
    ------
    TypeError
        Where the classifier shows cosines only.
    """
    if scores.embeddings is None:
        raise TypeError(
            f"{type(loss).__name__} looks at the embeddings' norms, which cosines have not: use it "
            "in the recipes of speechbrain_qmargin, or with its QMarginHead as the classifier"
        )
    return torch.linalg.vector_norm(scores.embeddings.double(), dim=1)


class RunningNorms(nn.Module):
    """Running mean and standard deviation of norms, over all processes.

    Attributes
    ----------
    mean, deviation : Tensor
        Buffers; 20 and 100 at first, as in AdaFace's code.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("deviation", torch.tensor(100.0, dtype=torch.float64))

    @torch.no_grad()
    def quality(self, norms: Tensor, h: float, weight: float) -> Tensor:
        """In [-1, 1], [B], of norms [B], after the running values have taken them in."""
        norms = norms.clamp(_LEAST, _MOST)
        if weight:
            sums = torch.stack((torch.ones_like(norms), norms, norms.square())).sum(1)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums)
            count, total, squares = sums
            mean = total / count
            # one sample has no deviation: the running value stays
            variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
            deviation = torch.where(count > 1, variance.sqrt(), self.deviation.to(norms.device))
            if bool(torch.isfinite(mean)):  # a batch that diverged is no measure
                self.mean = weight * mean + (1 - weight) * self.mean.to(norms.device)
                self.deviation = weight * deviation + (1 - weight) * self.deviation.to(norms.device)
        mean, deviation = self.mean.to(norms.device), self.deviation.to(norms.device)
        return (h * (norms - mean) / (deviation + _LEAST)).clamp(-1, 1)
