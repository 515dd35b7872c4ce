"""MobileFaceNet (Chen et al. 2018, arXiv 1804.07573): a face network of a million parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MobileFaceNet"]

# expansion, channels, blocks, stride of the first: table 1 of the paper
STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.PReLU(outputs),
    )


class _Bottleneck(nn.Module):
    """Wide, depthwise, narrow without activation; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.layers = nn.Sequential(
            _convolution(inputs, wide, 1),
            _convolution(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileFaceNet(nn.Module):
    """Aligned faces to embeddings, [B, 3, 112, 112] in [-1, 1] to [B, 1, 128].

    Source: Chen et al. 2018, table 1: 1.00 M parameters at 112 x 112 and 128 dimensions (the paper
    prints 0.99). The global depthwise convolution has the size of the last feature map.

    Parameters
    ----------
    embedding_dim : int
    image_size : int
        Height and width; halved four times, rounding up.

    Examples
    --------
    >>> model = MobileFaceNet(embedding_dim=16, image_size=32).eval()
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 1, 16])
    """

    def __init__(self, embedding_dim: int = 128, image_size: int = 112) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, 64, 3, 2), _convolution(64, 64, 3, groups=64)]
        inputs, side = 64, (image_size + 1) // 2
        for expansion, outputs, blocks, stride in STAGES:
            for block in range(blocks):
                step = stride if block == 0 else 1
                layers.append(_Bottleneck(inputs, outputs, expansion, step))
                inputs = outputs
            side = (side - 1) // stride + 1
        layers += [
            _convolution(inputs, 512, 1),
            nn.Conv2d(512, 512, side, groups=512, bias=False),
            nn.BatchNorm2d(512),
            nn.Conv2d(512, embedding_dim, 1, bias=False),
            nn.BatchNorm2d(embedding_dim),
        ]
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, 1, embedding_dim] of images [B, 3, H, W]; the last layer is float32."""
        y = self.layers[:-2](x)
        with torch.autocast(x.device.type, enabled=False):
            return self.layers[-2:](y.float()).flatten(1).unsqueeze(1)
