"""MobileFaceNet as arcface_torch has it (``mbf``, ``mbf_large``): wider than the paper's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from speechbrain_qmargin.models.frames import widened

__all__ = ["MBF"]


class _Layers(nn.Module):
    """Parts below the name that arcface_torch gives them; with a shortcut around them if asked."""

    def __init__(self, *parts: nn.Module, shortcut: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*parts)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, padding: int = 0
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def _activated(*sizes: int, **options: int) -> _Layers:
    parts = _convolution(*sizes, **options)
    return _Layers(*parts, nn.PReLU(sizes[1]))


def _bottleneck(inputs: int, outputs: int, wide: int, stride: int = 1, shortcut: bool = False):
    return _Layers(
        _activated(inputs, wide),
        _activated(wide, wide, 3, stride, groups=wide, padding=1),
        _Layers(*_convolution(wide, outputs)),
        shortcut=shortcut,
    )


def _stage(channels: int, blocks: int, wide: int) -> _Layers:
    return _Layers(*[_bottleneck(channels, channels, wide, shortcut=True) for _ in range(blocks)])


class MBF(nn.Module):
    """Aligned faces to embeddings, [B, 3, 112, 112] in [-1, 1] to [B, 1, 512].

    Source: ``get_mbf`` (2.06 M parameters) and ``get_mbf_large`` (scale 4, blocks 2, 8, 12, 4) of
    arcface_torch; parameters have its names. The paper's is
    :class:`~speechbrain_qmargin.models.mobilefacenet.MobileFaceNet`.

    Parameters
    ----------
    embedding_dim : int
    scale : int
        Channels are 64 and 128 times this.
    blocks : sequence of 4 int
        Of the stages; 1 for the first makes it one depthwise convolution.
    image_size : int
        Height and width, halved four times.

    Examples
    --------
    >>> model = MBF(8, scale=1, blocks=(1, 1, 1, 1), image_size=32).eval()
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 1, 8])
    """

    def __init__(
        self,
        embedding_dim: int = 512,
        scale: int = 2,
        blocks: Sequence[int] = (1, 4, 6, 2),
        image_size: int = 112,
    ) -> None:
        super().__init__()
        narrow, broad, side = 64 * scale, 128 * scale, image_size
        for _ in range(4):
            side = (side + 1) // 2
        first = _activated(narrow, narrow, 3, groups=64, padding=1)
        self.layers = nn.ModuleList(
            [
                _activated(3, narrow, 3, 2, padding=1),
                first if blocks[0] == 1 else _stage(narrow, blocks[0], 128),
                _bottleneck(narrow, narrow, 128, 2),
                _stage(narrow, blocks[1], 128),
                _bottleneck(narrow, broad, 256, 2),
                _stage(broad, blocks[2], 256),
                _bottleneck(broad, broad, 512, 2),
                _stage(broad, blocks[3], 256),
            ]
        )
        self.conv_sep = _activated(broad, 512)
        self.features = _Layers(
            _Layers(*_convolution(512, 512, side, groups=512)),
            nn.Flatten(),
            nn.Linear(512, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, 1, embedding_dim] of images [B, 3, H, W]; float32 from `conv_sep` on."""
        for layer in self.layers:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):  # as arcface_torch
            return self.features(self.conv_sep(widened(x))).unsqueeze(1)
