"""Frames of a padded batch: which of them count, what stands beyond them, their statistics."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEAST_VARIANCE", "kept_frames", "silence", "temporal_statistics", "widened"]

LEAST_VARIANCE = 1e-7
"""Added to variances before their root is taken, as in WeSpeaker's networks."""


def kept_frames(lengths: Tensor | None, features: Tensor) -> Tensor | None:
    """How many frames of each item count: float32 [B], whole numbers of at least 1.

    Parameters
    ----------
    lengths : Tensor, [B], optional
        Relative lengths in (0, 1] of a padded batch; None where all items have length T.
    features : Tensor, [B, T, F]

    Returns
    -------
    Tensor, [B], or None where `lengths` is None

    Examples
    --------
    >>> kept_frames(torch.tensor([1.0, 0.52, 0.01]), torch.zeros(3, 10, 80))
    tensor([10.,  5.,  1.])
    """
    if lengths is None:
        return None
    return (lengths.to(features.device, torch.float32) * features.shape[1]).round().clamp(min=1)


def silence(frames: Tensor, kept: Tensor | None) -> Tensor:
    """Zeros beyond the first `kept` [B] frames of [B, ..., T]: what a convolution pads with.

    Examples
    --------
    >>> silence(torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]]), torch.tensor([2.0, 3.0]))
    tensor([[[1., 2., 0.]],
            [[4., 5., 6.]]])
    """
    if kept is None:
        return frames
    beyond = torch.arange(frames.shape[-1], device=frames.device) >= kept.unsqueeze(1)
    return frames.masked_fill(beyond.view(len(beyond), *[1] * (frames.ndim - 2), -1), 0.0)


def temporal_statistics(
    frames: Tensor, lengths: Tensor | None = None, least_variance: float = LEAST_VARIANCE
) -> Tensor:
    """Mean and standard deviation over time of every channel and frequency, in float32 or wider.

    Parameters
    ----------
    frames : Tensor, [B, C, F, T]
    lengths : Tensor, [B], optional
        Relative lengths in (0, 1]; frames beyond them do not count.
    least_variance : float
        Added to the variance. With 0 the gradient of a deviation of 0 is taken as 0.

    Returns
    -------
    Tensor, [B, 2 C F]
        Means, then standard deviations (of the sample, with T - 1).

    Examples
    --------
    >>> frames = torch.tensor([1.0, 3.0, 9.0]).view(1, 1, 1, 3)
    >>> temporal_statistics(frames, torch.tensor([2 / 3]))
    tensor([[2.0000, 1.4142]])
    """
    frames = widened(frames)
    count = frames.shape[3]
    if lengths is None:
        mask = frames.new_ones(1, 1, 1, count)
    else:
        kept = (lengths.to(frames) * count).round().clamp(min=1)
        mask = (torch.arange(count, device=frames.device) < kept.unsqueeze(1)).to(frames)
        mask = mask[:, None, None, :]
    total = mask.sum(3)
    mean = (frames * mask).sum(3) / total
    squares = ((frames - mean.unsqueeze(3)) * mask).square().sum(3)
    variance = squares / (total - 1).clamp(min=1) + least_variance
    if least_variance == 0:  # the root has no gradient at 0
        moving = variance > 0
        std = variance.where(moving, torch.ones_like(variance)).sqrt() * moving
    else:
        std = variance.sqrt()
    return torch.cat((mean.flatten(1), std.flatten(1)), 1)


def widened(x: Tensor) -> Tensor:
    """Half precision as float32; what is wider as it is.

    Examples
    --------
    >>> widened(torch.ones(1, dtype=torch.bfloat16)).dtype, widened(torch.ones(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
