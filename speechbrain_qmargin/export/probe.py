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
    """Noise whose level changes, so that neither end nor channel is like another."""
    generator = torch.Generator().manual_seed(samples)
    noise = torch.randn(batch, samples, generator=generator).cumsum(1).mul(0.01).sin()
    noise = noise * torch.linspace(0.02, 0.5, samples)
    return noise if from_waveform else encoder.compute_features(noise)


def probe_images(batch: int, size: int) -> Tensor:
    """Images [batch, 3, size, size] in [-1, 1], none like its mirror image, no channel another."""
    generator = torch.Generator().manual_seed(batch)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator).mul(2).sub(1)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def on_cpu(module: Kind) -> Kind:
    """A module, or its copy if it is elsewhere: a GPU multiplies in TF32, which is no tolerance."""
    if next(module.parameters()).device.type == "cpu":
        return module
    return copy.deepcopy(module).to("cpu")


def difference(a: Tensor, b: Tensor) -> float:
    """The largest ``|a - b|`` of the rows, relative to the rows' length."""
    if a.shape != b.shape:
        return float("inf")
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).max())
