"""IResNet, the improved residual network that InsightFace trains (arcface_torch)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BLOCKS", "IResNet"]

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}


class _Block(nn.Module):
    """BN, convolution, BN, PReLU, convolution, BN, and the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, plain_shortcuts: bool) -> None:
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs or (stride != 1 and not plain_shortcuts):
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride != 1:
            x = x[..., :: self.stride, :: self.stride]
        return self.bn3(y) + x


class IResNet(nn.Module):
    """Aligned faces to embeddings, [B, 3, 112, 112] in [-1, 1] to [B, 1, 512].

    Source: ``arcface_torch`` of InsightFace, whose parameters' names these are: 43.6 M of them at
    depth 50, 65.2 M at 100, 119 M at 200. The last normalisation's weight is fixed at
    1: the embeddings' length is the network's, their scale is not a parameter.

    Parameters
    ----------
    depth : int
        18, 34, 50, 100 or 200.
    embedding_dim : int
    channels : int
        Of the first stage; they double in each of the other three. 64 in the published networks.
    dropout : float
        Before the linear layer.
    image_size : int
        Height and width; halved four times, rounding up.
    plain_shortcuts : bool
        A shortcut that halves the image and keeps the channels takes every other pixel, as in
        AdaFace's and CVLface's networks; otherwise it is a convolution, as in arcface_torch's.

    Raises
    ------
    ValueError
        Another depth.

    Examples
    --------
    >>> model = IResNet(18, embedding_dim=8, channels=4, image_size=32).eval()
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 1, 8])
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        depth: int = 50,
        embedding_dim: int = 512,
        channels: int = 64,
        dropout: float = 0.0,
        image_size: int = 112,
        plain_shortcuts: bool = False,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth: {depth}; choose {', '.join(map(str, BLOCKS))}")
        self.plain_shortcuts = plain_shortcuts
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        inputs, side = channels, image_size
        for stage, blocks in enumerate(BLOCKS[depth]):
            outputs = channels * 2**stage
            sizes, strides = [inputs] + [outputs] * (blocks - 1), [2] + [1] * (blocks - 1)
            layer = [
                _Block(size, outputs, step, plain_shortcuts)
                for size, step in zip(sizes, strides, strict=True)
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
            inputs, side = outputs, (side + 1) // 2
        self.bn2 = nn.BatchNorm2d(inputs)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs * side * side, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, 1, embedding_dim] of images [B, 3, H, W]; float32 from `fc` on."""
        y = self.prelu(self.bn1(self.conv1(x)))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        y = self.bn2(y).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # as arcface_torch
            y = self.fc(self.dropout(y.float()))
            return self.features(y).unsqueeze(1)
