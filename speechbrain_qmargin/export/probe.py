"""Noise to compare two encoders with."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from speechbrain_qmargin.export.encoder import SpeakerEncoder

__all__ = ["TOLERANCE", "difference", "on_cpu", "probe", "probe_images"]

Kind = TypeVar("Kind", bound=nn.Module)

TOLERANCE = 1e-4  # of an embedding's length; float32 rounding through the networks is near 1e-6


def probe(encoder: SpeakerEncoder, from_waveform: bool, batch: int, samples: int) -> Tensor:
    """Noise whose level changes, so that neither end nor channel is like another.

    Examples
    --------
    >>> from speechbrain_qmargin.export.encoder import PARTS
    >>> encoder = SpeakerEncoder(dict.fromkeys(PARTS, nn.Identity()))
    >>> noise = probe(encoder, from_waveform=True, batch=2, samples=8000)
    >>> noise.shape, bool(noise.abs().amax() <= 0.5)
    (torch.Size([2, 8000]), True)
    """
    generator = torch.Generator().manual_seed(samples)
    noise = torch.randn(batch, samples, generator=generator).cumsum(1).mul(0.01).sin()
    noise = noise * torch.linspace(0.02, 0.5, samples)
    return noise if from_waveform else encoder.compute_features(noise)


def probe_images(batch: int, size: int) -> Tensor:
    """Images [batch, 3, size, size] in [-1, 1], none like its mirror image, no channel another.

    Examples
    --------
    >>> images = probe_images(2, 32)
    >>> images.shape, torch.equal(images, images.flip(3))
    (torch.Size([2, 3, 32, 32]), False)
    """
    generator = torch.Generator().manual_seed(batch)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator).mul(2).sub(1)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def on_cpu(module: Kind) -> Kind:
    """A module, or its copy if it is elsewhere: a GPU multiplies in TF32, which is no tolerance.

    Examples
    --------
    >>> network = nn.Linear(2, 1)
    >>> on_cpu(network) is network      # it is there
    True
    """
    if next(module.parameters()).device.type == "cpu":
        return module
    return copy.deepcopy(module).to("cpu")


def difference(a: Tensor, b: Tensor) -> float:
    """The largest ``|a - b|`` of the rows, relative to the rows' length.

    Examples
    --------
    >>> difference(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.5]]))
    0.25
    >>> difference(torch.ones(1, 2), torch.ones(1, 3))
    inf
    """
    if a.shape != b.shape:
        return float("inf")
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).max())
