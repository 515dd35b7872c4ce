"""CAM++ (Wang et al. 2023, arXiv 2303.00332): a densely connected TDNN with context-aware masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_qmargin.models.frames import (
    LEAST_VARIANCE,
    kept_frames,
    silence,
    temporal_statistics,
)

__all__ = ["CAMPPlus"]

# Layers, kernel and dilation of the three dense blocks
BLOCKS = ((12, 3, 1), (24, 3, 2), (16, 3, 2))
SEGMENT = 100  # frames of a local context


class _ResBlock(nn.Module):
    """Two convolutions and a shortcut; only the bands are strided."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, (stride, 1), 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, channels, 1, (stride, 1), bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        y = silence(F.relu(self.bn1(self.conv1(x))), kept)
        return silence(F.relu(self.bn2(self.conv2(y)) + self.shortcut(x)), kept)


class _Head(nn.Module):
    """Bands [B, F, T] to [B, channels F / 8, T]: a small ResNet that halves bands three times."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(_ResBlock(channels, 2), _ResBlock(channels, 1))
        self.layer2 = nn.Sequential(_ResBlock(channels, 2), _ResBlock(channels, 1))
        self.conv2 = nn.Conv2d(channels, channels, 3, (2, 1), 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        y = silence(F.relu(self.bn1(self.conv1(silence(x.unsqueeze(1), kept)))), kept)
        for layer in (self.layer1, self.layer2):
            for block in layer:
                y = block(y, kept)
        return silence(F.relu(self.bn2(self.conv2(y))).flatten(1, 2), kept)


class _Norm(nn.Module):
    """Batch normalisation, then ReLU where it has parameters."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        y = self.batchnorm(x)
        return F.relu(y) if self.batchnorm.affine else y


class _Layer(nn.Module):
    """A convolution with what is before or after it."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.linear = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class _Tdnn(_Layer):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, kernel=5, stride=2)
        self.nonlinear = _Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x))


class _Transit(_Layer):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.nonlinear = _Norm(inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.nonlinear(x))


class _Dense(_Layer):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.nonlinear = _Norm(outputs, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.linear(x.unsqueeze(2)).squeeze(2))


class _Mask(nn.Module):
    """A convolution whose channels are weighted by the context, the whole's and the segment's."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int) -> None:
        super().__init__()
        padding = kernel // 2 * dilation
        self.linear_local = nn.Conv1d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False
        )
        self.linear1 = nn.Conv1d(inputs, inputs // 2, 1)
        self.linear2 = nn.Conv1d(inputs // 2, outputs, 1)

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        context = F.relu(self.linear1(_context(x, kept)))
        return self.linear_local(x) * torch.sigmoid(self.linear2(context))


def _context(x: Tensor, kept: Tensor | None) -> Tensor:
    """The mean of all frames plus that of the frame's segment; frames beyond `kept` are zeros."""
    frames = x.shape[2]
    segments = F.avg_pool1d(x, SEGMENT, SEGMENT, ceil_mode=True)
    if kept is None:
        whole = x.mean(2, keepdim=True)
    else:
        whole = x.sum(2, keepdim=True) / kept.view(-1, 1, 1)
        begins = SEGMENT * torch.arange(segments.shape[2], device=x.device)
        there = (frames - begins).clamp(max=SEGMENT)
        segments = segments * there / (kept.view(-1, 1, 1) - begins).clamp(1, SEGMENT)
    return whole + segments.repeat_interleave(SEGMENT, 2)[:, :, :frames]


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.nonlinear1 = _Norm(inputs)
        self.linear1 = nn.Conv1d(inputs, width, 1, bias=False)
        self.nonlinear2 = _Norm(width)
        self.cam_layer = _Mask(width, growth, kernel, dilation)

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        y = self.nonlinear2(self.linear1(self.nonlinear1(x)))
        return self.cam_layer(silence(y, kept), kept)


class _DenseBlock(nn.Module):
    """Every layer sees what all before it gave."""

    def __init__(
        self, layers: int, inputs: int, growth: int, width: int, kernel: int, dilation: int
    ) -> None:
        super().__init__()
        for number in range(layers):
            layer = _DenseLayer(inputs + number * growth, growth, width, kernel, dilation)
            self.add_module(f"tdnnd{number + 1}", layer)

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        for layer in self.children():
            x = torch.cat([x, layer(x, kept)], 1)
        return x


class CAMPPlus(nn.Module):
    """Frames to embeddings: 7.18 M parameters with 80 bands and 512 dimensions.

    Source: WeSpeaker's ``CAMPPlus`` and 3D-Speaker's, which differ in the deviation's floor alone;
    parameters have their names. In a padded batch an item's embedding in evaluation is that of the
    item alone, up to rounding.

    Parameters
    ----------
    input_size : int
        Frequency bands, a multiple of 8.
    lin_neurons : int
        Dimensions of the embedding.
    growth : int
        Channels that a layer adds.
    channels : int
        Of the first TDNN; the ResNet before it has a quarter of them.
    layers : sequence of 3 int
        Of the dense blocks.
    least_variance : float
        Added to the variances of the pooling: 1e-7 in WeSpeaker, 0 in 3D-Speaker.

    Raises
    ------
    ValueError
        Bands that are not a multiple of 8.

    Examples
    --------
    >>> model = CAMPPlus(16, 8, growth=4, channels=16, layers=(1, 1, 1)).eval()
    >>> model(torch.randn(2, 50, 16)).shape
    torch.Size([2, 1, 8])
    """

    def __init__(
        self,
        input_size: int = 80,
        lin_neurons: int = 512,
        growth: int = 32,
        channels: int = 128,
        layers: tuple[int, ...] = tuple(one[0] for one in BLOCKS),
        least_variance: float = LEAST_VARIANCE,
    ) -> None:
        super().__init__()
        if input_size % 8:
            raise ValueError(f"input_size: {input_size} bands; a multiple of 8 is wanted")
        self.input_size, self.least_variance = input_size, least_variance
        self.head = _Head(channels // 4)
        self.xvector = nn.Module()
        add = self.xvector.add_module
        add("tdnn", _Tdnn(channels // 4 * (input_size // 8), channels))
        count = channels
        for number, (depth, (_, kernel, dilation)) in enumerate(zip(layers, BLOCKS, strict=True)):
            block = _DenseBlock(depth, count, growth, 4 * growth, kernel, dilation)
            count += depth * growth
            add(f"block{number + 1}", block)
            add(f"transit{number + 1}", _Transit(count, count // 2))
            count //= 2
        add("out_nonlinear", _Norm(count))
        add("dense", _Dense(2 * count, lin_neurons))
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings [B, 1, lin_neurons] of frames [B, T, input_size].

        `lengths` [B] are relative lengths in (0, 1] of a padded batch.
        """
        kept = kept_frames(lengths, x)
        y = self.head(x.transpose(1, 2), kept)
        if kept is not None:
            kept = (kept / 2).ceil()
        *layers, dense = self.xvector.children()
        for layer in layers:
            y = layer(y, kept) if isinstance(layer, _DenseBlock) else layer(y)
        share = None if kept is None else kept / y.shape[2]
        return dense(temporal_statistics(y.unsqueeze(2), share, self.least_variance)).unsqueeze(1)
