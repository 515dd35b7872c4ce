"""ResNets with temporal statistics pooling, as in WeSpeaker's VoxCeleb recipes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_qmargin.models.frames import kept_frames, silence, temporal_statistics

__all__ = ["BLOCKS", "ResNet"]

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    221: (6, 16, 48, 3),
    293: (10, 20, 64, 3),
}
_BOTTLENECKS_FROM = 50


class _Block(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(inputs, channels, stride)

    def forward(self, x: Tensor, before: Tensor | None = None, kept: Tensor | None = None):
        y = silence(F.relu(self.bn1(self.conv1(x))), kept)
        return silence(F.relu(self.bn2(self.conv2(y)) + self.shortcut(x)), kept)


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor, before: Tensor | None = None, kept: Tensor | None = None):
        y = silence(F.relu(self.bn1(self.conv1(x))), before)
        y = F.relu(self.bn2(self.conv2(y)))
        return silence(F.relu(self.bn3(self.conv3(y)) + self.shortcut(x)), kept)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    if stride == 1 and inputs == outputs:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Frames to embeddings, with blocks of two or, from depth 50 on, of three convolutions.

    Source: WeSpeaker (Wang et al. 2023), ``ResNet18`` to ``ResNet293`` with TSTP pooling and one
    embedding layer; parameters have its names. With 80 bands, 32 channels and 256 dimensions depth
    34 has 6.63 M parameters, 221 23.79 M, 293 28.63 M. Time and frequency are halved three times.
    In a padded batch the frames beyond an item's length are zeroed before every convolution and do
    not enter the statistics: in evaluation its embedding is that of the item alone, up to rounding.
    (In training the batch normalisations still count the zeros.)

    Parameters
    ----------
    input_size : int
        Frequency bands.
    channels : int
        Of the first stage; they double in each of the other three.
    lin_neurons : int
        Dimensions of the embedding.
    depth : int
        18, 34, 50, 101, 152, 221 or 293.
    embedding_norm : bool
        Batch normalisation of the embedding (``seg_bn_1``), which WeSpeaker's models do not have.
        Without it the embeddings of an untrained network all point one way, and a sparse loss may
        move that direction instead of telling speakers apart.

    Raises
    ------
    ValueError
        Another depth.

    Examples
    --------
    >>> import torch
    >>> model = ResNet(input_size=16, channels=4, lin_neurons=8).eval()
    >>> model(torch.randn(2, 50, 16)).shape
    torch.Size([2, 1, 8])
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        input_size: int = 80,
        channels: int = 32,
        lin_neurons: int = 256,
        depth: int = 34,
        embedding_norm: bool = False,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth: {depth}; choose {', '.join(map(str, BLOCKS))}")
        self.input_size, self.depth = input_size, depth
        block = _Bottleneck if depth >= _BOTTLENECKS_FROM else _Block
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        inputs, bands = channels, input_size
        for stage, blocks in enumerate(BLOCKS[depth]):
            width, stride = channels * 2**stage, 1 if stage == 0 else 2
            outputs = width * block.expansion
            strides = [stride] + [1] * (blocks - 1)
            sizes = [inputs] + [outputs] * (blocks - 1)
            layer = [block(size, width, step) for size, step in zip(sizes, strides, strict=True)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
            inputs, bands = outputs, (bands - 1) // stride + 1
        self.seg_1 = nn.Linear(2 * inputs * bands, lin_neurons)
        self.seg_bn_1 = nn.BatchNorm1d(lin_neurons) if embedding_norm else nn.Identity()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings [B, 1, lin_neurons] of frames [B, T, input_size].

        `lengths` [B] are relative lengths in (0, 1] of a padded batch.
        """
        kept = kept_frames(lengths, x)
        y = x.transpose(1, 2).unsqueeze(1)
        y = silence(F.relu(self.bn1(self.conv1(silence(y, kept)))), kept)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                before = kept
                if kept is not None and block.stride == 2:
                    kept = (kept / 2).ceil()
                y = block(y, before, kept)
        if kept is not None:
            lengths = kept / y.shape[3]
        return self.seg_bn_1(self.seg_1(temporal_statistics(y, lengths))).unsqueeze(1)
