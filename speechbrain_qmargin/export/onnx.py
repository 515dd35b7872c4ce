"""A trained encoder for runtimes without PyTorch."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.face_encoder import FaceEncoder
from speechbrain_qmargin.export.probe import TOLERANCE, difference, on_cpu, probe, probe_images
from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import replacing

__all__ = ["export_onnx"]


def export_onnx(
    encoder: SpeakerEncoder | FaceEncoder,
    path: str | Path,
    *,
    from_waveform: bool = True,
    say: Callable[[str], object] = lambda step: None,
) -> dict[str, float]:
    """Write the encoder as one ONNX file, checked against PyTorch in onnxruntime.

    Of speech: input ``waveform`` [batch, samples], or ``features`` [batch, frames, n_mels] as
    ``compute_features`` gives them. Batch and length are dynamic; the recordings of one batch have
    one length. Of faces: input ``image`` [batch, 3, image_size, image_size], RGB in [-1, 1]; the
    batch is dynamic, mirror images are made inside where the encoder adds them. Output
    ``embedding`` [batch, D]. The file's metadata say what the input is: ``sample_rate``, or
    ``image_size``, ``channels``, ``normalisation``, ``alignment`` and ``flip``; and ``encoder``,
    the encoder's digest.

    Parameters
    ----------
    encoder : SpeakerEncoder or FaceEncoder
    path : path
    from_waveform : bool
        Of speech: whether features are computed in the graph.
    say : callable
        Gets a line before each of the steps, which together take minutes for a large network.

    Returns
    -------
    dict
        The input's size, as ``"batch x length"``, to the largest difference between the two
        runtimes' embeddings, relative to the embedding's length.

    Raises
    ------
    ImportError
        The extra ``onnx`` is not installed.
    ValueError
        Some embedding differs by more than 1e-4 of its length; no file is left.
    """
    require("onnx", "onnxruntime", "onnxscript", why="ONNX export", extra="onnx")
    about = {"encoder": encoder.digest()}
    encoder = on_cpu(encoder)
    if isinstance(encoder, FaceEncoder):
        size = encoder.image_size
        about |= {
            "image_size": str(size),
            "channels": "RGB",
            "normalisation": "(value - 127.5) / 127.5, of values 0 to 255",
            "alignment": f"ArcFace's five points, scaled to {size} x {size}",
            "flip": encoder.flip,
        }
        inputs = {f"{batch} x {size} x {size}": probe_images(batch, size) for batch in (1, 2, 5)}
        given = _Given("image", {0: "batch"}, probe_images(3, size), inputs)
        return _write(copy.deepcopy(encoder), encoder, given, about, path, say)
    rate = encoder.sample_rate
    about |= {"sample_rate": str(rate)}
    name, axis = ("waveform", "samples") if from_waveform else ("features", "frames")
    inputs = {}
    for batch, seconds in ((1, 0.3), (3, 1.37), (2, 5.0), (1, 12.0)):
        noise = probe(encoder, from_waveform, batch, round(seconds * rate))
        inputs[f"{batch} x {noise.shape[1]}"] = noise
    example = probe(encoder, from_waveform, 2, rate)
    given = _Given(name, {0: "batch", 1: axis}, example, inputs)
    ours = encoder.forward if from_waveform else encoder.embed
    return _write(_Graph(encoder, from_waveform).eval(), ours, given, about, path, say)


class _Given(NamedTuple):
    """What an ONNX file takes."""

    name: str
    axes: dict[int, str]  # that are dynamic
    example: Tensor
    compared: dict[str, Tensor]


def _write(
    graph: nn.Module,
    ours: Callable[[Tensor], Tensor],
    given: _Given,
    about: dict[str, str],
    path: str | Path,
    say: Callable[[str], object],
) -> dict[str, float]:
    import onnx
    import onnxruntime

    with replacing(path) as partial, torch.no_grad():
        dynamic = (dict.fromkeys(given.axes, torch.export.Dim.DYNAMIC),)
        example = (given.example,)
        say("1 of 3: the network is traced")
        graph(*example)  # SpeechBrain wraps some functions when they are first called
        with warnings.catch_warnings(), _without_torchvision():
            warnings.simplefilter("ignore")  # of tracing's own
            traced = torch.export.export(graph, example, dynamic_shapes=dynamic, strict=True)
            say("2 of 3: it is translated to ONNX")
            torch.onnx.export(
                traced,
                example,
                partial,
                dynamo=True,
                input_names=[given.name],
                output_names=["embedding"],
                dynamic_shapes=(given.axes,),
                external_data=False,
                verbose=False,
            )
        say(f"3 of 3: onnxruntime's embeddings are compared at {', '.join(given.compared)}")
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        differences = {}
        for size, noise in given.compared.items():
            theirs = torch.from_numpy(session.run(None, {given.name: noise.numpy()})[0])
            differences[size] = difference(ours(noise), theirs)
            if not differences[size] <= TOLERANCE:
                raise ValueError(
                    f"{path}: onnxruntime's embeddings differ from PyTorch's by "
                    f"{differences[size]:.1e} of their length at {size} ({given.name}); not written"
                )
        model = onnx.load(str(partial))
        onnx.helper.set_model_props(model, about)
        onnx.save(model, str(partial))
    return differences


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Do not be told that torchvision, of which nothing is exported, is not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
