"""ResNet34 with temporal statistics pooling, as in WeSpeaker's VoxCeleb recipe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNet34", "temporal_statistics"]

BLOCKS = (3, 4, 6, 3)
_LEAST_VARIANCE = 1e-7


def temporal_statistics(frames: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean and standard deviation over time of every channel and frequency, in float32.

    Parameters
    ----------
    frames : Tensor, [B, C, F, T]
    lengths : Tensor, [B], optional
        Relative lengths in (0, 1]; frames beyond them do not count.

    Returns
    -------
    Tensor, [B, 2 C F]
        Means, then standard deviations (of the sample, with T - 1; 1e-7 is added to the variance).

    Examples
    --------
    >>> frames = torch.tensor([1.0, 3.0, 9.0]).view(1, 1, 1, 3)
    >>> temporal_statistics(frames, torch.tensor([2 / 3]))
    tensor([[2.0000, 1.4142]])
    """
    frames = frames.float()
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
    std = (squares / (total - 1).clamp(min=1) + _LEAST_VARIANCE).sqrt()
    return torch.cat((mean.flatten(1), std.flatten(1)), 1)


def _silence(frames: Tensor, kept: Tensor | None) -> Tensor:
    """Zeros beyond the first `kept` [B] frames of [B, C, F, T]: what a convolution pads with."""
    if kept is None:
        return frames
    beyond = torch.arange(frames.shape[3], device=frames.device) >= kept.unsqueeze(1)
    return frames.masked_fill(beyond[:, None, None, :], 0.0)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        y = _silence(F.relu(self.bn1(self.conv1(x))), kept)
        return _silence(F.relu(self.bn2(self.conv2(y)) + self.shortcut(x)), kept)


class ResNet34(nn.Module):
    """Frames to embeddings: 6.63 M parameters with 80 bands, 32 channels, 256 dimensions.

    Source: WeSpeaker (Wang et al. 2023), ``ResNet34`` with TSTP pooling and one embedding layer;
    parameters have its names. Time and frequency are halved three times. In a padded batch the
    frames beyond an item's length are zeroed before every convolution and do not enter the
    statistics: in evaluation its embedding is that of the item alone, up to rounding. (In training
    the batch normalisations still count the zeros.)

    Parameters
    ----------
    input_size : int
        Frequency bands.
    channels : int
        Of the first stage; they double in each of the other three.
    lin_neurons : int
        Dimensions of the embedding.

    Examples
    --------
    >>> model = ResNet34(input_size=16, channels=4, lin_neurons=8).eval()
    >>> model(torch.randn(2, 50, 16)).shape
    torch.Size([2, 1, 8])
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, input_size: int = 80, channels: int = 32, lin_neurons: int = 256) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        inputs, bands = channels, input_size
        for stage, blocks in enumerate(BLOCKS):
            outputs, stride = channels * 2**stage, 1 if stage == 0 else 2
            strides = [stride] + [1] * (blocks - 1)
            sizes = [inputs] + [outputs] * (blocks - 1)
            layer = [_Block(size, outputs, step) for size, step in zip(sizes, strides, strict=True)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
            inputs, bands = outputs, (bands - 1) // stride + 1
        self.seg_1 = nn.Linear(2 * inputs * bands, lin_neurons)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings [B, 1, lin_neurons] of frames [B, T, input_size].

        `lengths` [B] are relative lengths in (0, 1] of a padded batch.
        """
        y = x.transpose(1, 2).unsqueeze(1)
        kept = None
        if lengths is not None:
            kept = (lengths.to(y.device, torch.float32) * y.shape[3]).round().clamp(min=1)
        y = _silence(F.relu(self.bn1(self.conv1(_silence(y, kept)))), kept)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                if kept is not None and block.stride == 2:
                    kept = (kept / 2).ceil()
                y = block(y, kept)
        if kept is not None:
            lengths = kept / y.shape[3]
        return self.seg_1(temporal_statistics(y, lengths)).unsqueeze(1)
