"""ERes2Net (Chen et al. 2023, arXiv 2305.12838) and ERes2NetV2: Res2Nets with fused features."""

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

__all__ = ["ERes2Net", "ERes2NetV2"]

BLOCKS = (3, 4, 6, 3)


def _clipped(x: Tensor) -> Tensor:
    return x.clamp(0, 20)


class _Fusion(nn.Module):
    """Two maps as one, weighted by what both show."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.local_att = nn.Sequential(
            nn.Conv2d(2 * channels, channels // 4, 1),
            nn.BatchNorm2d(channels // 4),
            nn.SiLU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = torch.tanh(self.local_att(torch.cat([x, y], 1)))
        return x * (1 + weight) + y * (1 - weight)


class _Block(nn.Module):
    """Groups of channels, each added to the one before it, or fused with it.

    With `apart` the first group's convolution has a name of its own, as in WeSpeaker's ERes2Net.
    """

    def __init__(
        self, inputs: int, channels: int, stride: int, base: int, scale: int, expansion: int,
        fused: bool = False, apart: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        width, outputs = channels * base // 64, channels * expansion
        self.stride, self.width = stride, width
        self.conv1 = nn.Conv2d(inputs, width * scale, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scale)
        self.apart = apart
        if apart:
            self.conv2_1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2_1 = nn.BatchNorm2d(width)
        groups = scale - apart
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(groups)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(groups))
        self.fuse_models = nn.ModuleList(_Fusion(width) for _ in range(scale - 1) if fused)
        self.conv3 = nn.Conv2d(width * scale, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        groups = _clipped(self.bn1(self.conv1(x))).split(self.width, 1)
        convs, bns = [*self.convs], [*self.bns]
        if self.apart:
            convs, bns = [self.conv2_1, *convs], [self.bn2_1, *bns]
        outputs: list[Tensor] = []
        for number, (conv, bn) in enumerate(zip(convs, bns, strict=True)):
            y = groups[number]
            if outputs and len(self.fuse_models):
                y = self.fuse_models[number - 1](outputs[-1], y)
            elif outputs:
                y = outputs[-1] + y
            outputs.append(_clipped(bn(conv(silence(y, kept)))))
        y = self.bn3(self.conv3(torch.cat(outputs, 1))) + self.shortcut(x)
        return silence(_clipped(y), kept)


class _Backbone(nn.Module):
    """What both share: the stem and four stages, with the frames that count after each."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self, input_size: int, channels: int, lin_neurons: int, base: int, scale: int,
        expansion: int, least_variance: float, apart: bool, embedding_norm: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        if input_size % 8:
            raise ValueError(f"input_size: {input_size} bands; a multiple of 8 is wanted")
        self.input_size, self.least_variance = input_size, least_variance
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        inputs = channels
        for stage, blocks in enumerate(BLOCKS):
            layer, width, fused = [], channels * 2**stage, stage >= 2
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                sizes = (inputs, width, stride, base, scale, expansion)
                layer.append(_Block(*sizes, fused=fused, apart=apart and fused))
                inputs = width * expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
        self.outputs = inputs
        self._make_fusions(channels * expansion)
        self.seg_1 = nn.Linear(2 * inputs * (input_size // 8), lin_neurons)
        self.seg_bn_1 = nn.BatchNorm1d(lin_neurons) if embedding_norm else nn.Identity()

    def _make_fusions(self, channels: int) -> None:
        raise NotImplementedError

    def _fused(self, maps: list[Tensor], kept: list[Tensor | None]) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings [B, 1, lin_neurons] of frames [B, T, input_size].

        `lengths` [B] are relative lengths in (0, 1] of a padded batch.
        """
        now = kept_frames(lengths, x)
        y = silence(x.transpose(1, 2).unsqueeze(1), now)
        y = silence(F.relu(self.bn1(self.conv1(y))), now)
        maps: list[Tensor] = []
        kept: list[Tensor | None] = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                if now is not None and block.stride == 2:
                    now = (now / 2).ceil()
                y = block(y, now)
            maps.append(y)
            kept.append(now)
        y = self._fused(maps, kept)
        share = None if now is None else now / y.shape[3]
        statistics = temporal_statistics(y, share, self.least_variance)
        return self.seg_bn_1(self.seg_1(statistics)).unsqueeze(1)


def _halving(inputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, 2 * inputs, 3, 2, 1, bias=False)


class ERes2NetV2(_Backbone):
    """Frames to embeddings: 17.86 M parameters with 80 bands, 64 channels, 192 dimensions.

    Source: 3D-Speaker's ``ERes2NetV2``; parameters have its names. In a padded batch an item's
    embedding in evaluation is that of the item alone, up to rounding.

    Parameters
    ----------
    input_size : int
        Frequency bands, a multiple of 8.
    channels : int
        Of the first stage; they double in each of the other three.
    lin_neurons : int
        Dimensions of the embedding.
    base, scale, expansion : int
        Width of a group in 64ths of the channels, number of groups, factor of a block's output.
    embedding_norm : bool
        As of :class:`~speechbrain_qmargin.models.resnet.ResNet`.

    Raises
    ------
    ValueError
        Bands that are not a multiple of 8.

    Examples
    --------
    >>> model = ERes2NetV2(16, channels=8, lin_neurons=6).eval()
    >>> model(torch.randn(2, 50, 16)).shape
    torch.Size([2, 1, 6])
    """

    def __init__(
        self,
        input_size: int = 80,
        channels: int = 64,
        lin_neurons: int = 192,
        base: int = 26,
        scale: int = 2,
        expansion: int = 2,
        embedding_norm: bool = False,
    ) -> None:
        sizes = (input_size, channels, lin_neurons, base, scale, expansion)
        super().__init__(*sizes, 1e-8, False, embedding_norm)

    def _make_fusions(self, channels: int) -> None:
        self.layer3_ds = _halving(4 * channels)
        self.fuse34 = _Fusion(8 * channels)

    def _fused(self, maps: list[Tensor], kept: list[Tensor | None]) -> Tensor:
        return self.fuse34(maps[3], self.layer3_ds(maps[2]))


class ERes2Net(_Backbone):
    """Frames to embeddings: 9.89 M parameters with 80 bands, 32 channels, 512 dimensions.

    Source: WeSpeaker's ``ERes2Net34_Base``, ``_Large`` (64 channels) and ``_aug`` (64 channels,
    base 24, scale 3, expansion 4); parameters have its names, of which 3D-Speaker's differ.

    Parameters
    ----------
    input_size, channels, lin_neurons, base, scale, expansion, embedding_norm
        As in :class:`ERes2NetV2`.

    Examples
    --------
    >>> model = ERes2Net(16, channels=8, lin_neurons=6).eval()
    >>> model(torch.randn(2, 50, 16)).shape
    torch.Size([2, 1, 6])
    """

    def __init__(
        self,
        input_size: int = 80,
        channels: int = 32,
        lin_neurons: int = 512,
        base: int = 32,
        scale: int = 2,
        expansion: int = 2,
        embedding_norm: bool = False,
    ) -> None:
        sizes = (input_size, channels, lin_neurons, base, scale, expansion)
        super().__init__(*sizes, LEAST_VARIANCE, True, embedding_norm)

    def _make_fusions(self, channels: int) -> None:
        self.layer1_downsample = _halving(channels)
        self.layer2_downsample = _halving(2 * channels)
        self.layer3_downsample = _halving(4 * channels)
        self.fuse_mode12 = _Fusion(2 * channels)
        self.fuse_mode123 = _Fusion(4 * channels)
        self.fuse_mode1234 = _Fusion(8 * channels)

    def _fused(self, maps: list[Tensor], kept: list[Tensor | None]) -> Tensor:
        y = self.fuse_mode12(maps[1], self.layer1_downsample(maps[0]))
        y = self.fuse_mode123(maps[2], self.layer2_downsample(silence(y, kept[1])))
        return self.fuse_mode1234(maps[3], self.layer3_downsample(silence(y, kept[2])))
