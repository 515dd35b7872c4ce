"""A trained speaker encoder for runtimes without PyTorch."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.probe import TOLERANCE, difference, probe
from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import replacing

__all__ = ["export_onnx"]


def export_onnx(
    encoder: SpeakerEncoder, path: str | Path, *, from_waveform: bool = True
) -> dict[str, float]:
    """Write the encoder as one ONNX file, checked against PyTorch in onnxruntime.

    Input ``waveform`` [batch, samples], or ``features`` [batch, frames, n_mels] as
    ``compute_features`` gives them; output ``embedding`` [batch, D]. Batch and length are dynamic;
    the recordings of one batch have one length. The encoder must be on the CPU.

    Returns
    -------
    dict
        ``"batch x length"`` to the largest difference between the two runtimes' embeddings,
        relative to the embedding's length.

    Raises
    ------
    ImportError
        The extra ``onnx`` is not installed.
    ValueError
        Some embedding differs by more than 1e-4 of its length; no file is left.
    """
    require("onnxruntime", "onnxscript", why="ONNX export", extra="onnx")
    import onnxruntime

    rate = encoder.sample_rate
    graph = _Graph(encoder, from_waveform).eval()
    name, axis = ("waveform", "samples") if from_waveform else ("features", "frames")
    with replacing(path) as partial, torch.no_grad():
        dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        example = (probe(encoder, from_waveform, 2, rate),)
        graph(*example)  # SpeechBrain wraps some functions when they are first called
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing's own
            torch.onnx.export(
                torch.export.export(graph, example, dynamic_shapes=dynamic, strict=True),
                example,
                partial,
                dynamo=True,
                input_names=[name],
                output_names=["embedding"],
                dynamic_shapes=({0: "batch", 1: axis},),
                external_data=False,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        differences = {}
        for batch, seconds in ((1, 0.3), (3, 1.37), (2, 5.0), (1, 12.0)):
            noise = probe(encoder, from_waveform, batch, round(seconds * rate))
            ours = encoder(noise) if from_waveform else encoder.embed(noise)
            theirs = torch.from_numpy(session.run(None, {name: noise.numpy()})[0])
            size = f"{batch} x {noise.shape[1]}"
            differences[size] = difference(ours, theirs)
            if not differences[size] <= TOLERANCE:
                raise ValueError(
                    f"{path}: onnxruntime's embeddings differ from PyTorch's by "
                    f"{differences[size]:.1e} of their length at {size} ({name}); not written"
                )
    return differences


class _Graph(nn.Module):
    """What is written: a copy of the encoder with its Fourier transform as a convolution."""

    encoder: SpeakerEncoder

    def __init__(self, encoder: SpeakerEncoder, from_waveform: bool) -> None:
        super().__init__()
        self.encoder, self.from_waveform = copy.deepcopy(encoder), from_waveform
        stft = getattr(encoder.compute_features, "compute_STFT", None)
        if stft is not None:
            self.encoder.compute_features.compute_STFT = _ConvolvedSTFT(stft)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encoder(inputs) if self.from_waveform else self.encoder.embed(inputs)


class _ConvolvedSTFT(nn.Module):
    """SpeechBrain's STFT for the runtimes that have none.

    onnxruntime has one, but not an exact one where n_fft is no power of two, as 400 is not.
    """

    basis: Tensor

    def __init__(self, stft: Any) -> None:
        super().__init__()
        n, bins = stft.n_fft, stft.n_fft // 2 + 1
        window = torch.zeros(n, dtype=torch.float64)
        start = (n - stft.win_length) // 2
        window[start : start + stft.win_length] = stft.window
        turns = torch.outer(torch.arange(bins), torch.arange(n)) % n
        angles = turns.double() * (2 * math.pi / n)
        basis = torch.cat([angles.cos(), -angles.sin()]) * window
        if stft.normalized_stft:
            basis /= math.sqrt(n)
        self.register_buffer("basis", basis[:, None].float())
        self.hop, self.padding = stft.hop_length, n // 2 if stft.center else 0
        self.mode = stft.pad_mode

    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, samples] to [B, frames, bins, 2]."""
        padded = F.pad(waveforms[:, None], (self.padding, self.padding), mode=self.mode)
        parts = F.conv1d(padded, self.basis, stride=self.hop)
        return torch.stack(parts.chunk(2, dim=1), dim=-1).transpose(1, 2)
