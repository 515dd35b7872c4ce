"""ECAPA-TDNN (Desplanques et al. 2020) as WeSpeaker has it; SpeechBrain's is another network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_qmargin.models.frames import LEAST_VARIANCE, kept_frames, silence, widened

__all__ = ["WeSpeakerEcapa"]

SCALE, POOLED = 8, 1536


class _Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        return silence(self.bn(F.relu(self.conv(x))), kept)


class _Res2(nn.Module):
    """Groups of channels, each of which sees the one before it."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        width = channels // SCALE
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
            for _ in range(SCALE - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(SCALE - 1))

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        groups, outputs = x.chunk(SCALE, 1), []
        for number, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            y = groups[number] + outputs[-1] if outputs else groups[0]
            outputs.append(silence(bn(F.relu(conv(y))), kept))
        return torch.cat([*outputs, groups[-1]], 1)


class _Squeeze(nn.Module):
    """Channels weighted by their means."""

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, width)
        self.linear2 = nn.Linear(width, channels)

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        mean = x.mean(2) if kept is None else x.sum(2) / kept.unsqueeze(1)
        return x * torch.sigmoid(self.linear2(F.relu(self.linear1(mean)))).unsqueeze(2)


class _Block(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.se_res2block = nn.Sequential(
            _Convolution(channels, channels),
            _Res2(channels, dilation),
            _Convolution(channels, channels),
            _Squeeze(channels),
        )

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        y = x
        for part in self.se_res2block:
            y = part(y, kept)
        return x + y


class _Pooling(nn.Module):
    """Weighted means and deviations, the weights by frame and channel."""

    def __init__(self, channels: int, context: bool, width: int = 128) -> None:
        super().__init__()
        self.context = context
        self.linear1 = nn.Conv1d(channels * (3 if context else 1), width, 1)
        self.linear2 = nn.Conv1d(width, channels, 1)

    def forward(self, x: Tensor, kept: Tensor | None) -> Tensor:
        x = widened(x)
        count = x.new_tensor(x.shape[2]) if kept is None else kept.view(-1, 1, 1)
        seen = x
        if self.context:
            mean = silence(x, kept).sum(2, keepdim=True) / count
            squares = silence((x - mean).square(), kept).sum(2, keepdim=True)
            std = (squares / (count - 1).clamp(min=1) + LEAST_VARIANCE).sqrt()
            seen = torch.cat([x, mean.expand_as(x), std.expand_as(x)], 1)
        weights = widened(self.linear2(torch.tanh(self.linear1(seen))))
        if kept is not None:
            beyond = torch.arange(x.shape[2], device=x.device) >= kept.unsqueeze(1)
            weights = weights.masked_fill(beyond.unsqueeze(1), -torch.inf)
        weights = weights.softmax(2)
        mean = (weights * x).sum(2)
        variance = (weights * x.square()).sum(2) - mean.square()
        return torch.cat([mean, variance.clamp(min=LEAST_VARIANCE).sqrt()], 1)


class WeSpeakerEcapa(nn.Module):
    """Frames to embeddings: 6.19 M parameters with 512 channels, 14.65 M with 1,024.

    Both with 80 bands and 192 dimensions. Source: WeSpeaker's ``ECAPA_TDNN_GLOB_c512`` and
    ``_c1024``, with ``context=False`` those without ``GLOB``; parameters have its names. It differs
    from SpeechBrain's in pooling, padding and the width before the pooling. In a padded batch an
    item's embedding in evaluation is that of the item alone, up to rounding.

    Parameters
    ----------
    input_size : int
        Frequency bands.
    channels : int
        A multiple of 8.
    lin_neurons : int
        Dimensions of the embedding.
    context : bool
        Whether the attention sees mean and deviation of the recording.
    pooled : int
        Channels before the pooling.

    Examples
    --------
    >>> model = WeSpeakerEcapa(16, channels=8, lin_neurons=6, pooled=12).eval()
    >>> model(torch.randn(2, 50, 16)).shape
    torch.Size([2, 1, 6])
    """

    def __init__(
        self,
        input_size: int = 80,
        channels: int = 512,
        lin_neurons: int = 192,
        context: bool = True,
        pooled: int = POOLED,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.layer1 = _Convolution(input_size, channels, 5)
        self.layer2 = _Block(channels, 2)
        self.layer3 = _Block(channels, 3)
        self.layer4 = _Block(channels, 4)
        self.conv = nn.Conv1d(3 * channels, pooled, 1)
        self.pool = _Pooling(pooled, context)
        self.bn = nn.BatchNorm1d(2 * pooled)
        self.linear = nn.Linear(2 * pooled, lin_neurons)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings [B, 1, lin_neurons] of frames [B, T, input_size].

        `lengths` [B] are relative lengths in (0, 1] of a padded batch.
        """
        kept = kept_frames(lengths, x)
        first = self.layer1(silence(x.transpose(1, 2), kept), kept)
        second = self.layer2(first, kept)
        third = self.layer3(second, kept)
        y = torch.cat([second, third, self.layer4(third, kept)], 1)
        return self.linear(self.bn(self.pool(F.relu(self.conv(y)), kept))).unsqueeze(1)
