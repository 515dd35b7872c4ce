"""What differs between speech and faces: how a file becomes embeddings, and what is refused.

Everything else of the verifier knows a :class:`Reader` alone.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from speechbrain_qmargin.data.audio import inspect_audio, read_audio
from speechbrain_qmargin.data.images import image_size, read_image, read_pixels
from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.files import fault_of
from speechbrain_qmargin.verify.face_quality import FaceLimits, FaceQuality, measure_face
from speechbrain_qmargin.verify.speech_quality import (
    SpeechLimits,
    SpeechQuality,
    measure_speech,
    summarised,
)

__all__ = [
    "FaceReader",
    "Quality",
    "Reader",
    "Sample",
    "Source",
    "SpeechReader",
    "Unfit",
    "called",
]

Quality = SpeechQuality | FaceQuality
Source = str | Path | bytes
"""A file, or the content of one."""

_MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3"}


class Unfit(ValueError):
    """A recording or image that no decision can rest on.

    Attributes
    ----------
    faults : tuple of str
        Why, each with its figure.
    quality : SpeechQuality, FaceQuality or None
        What was measured, as far as that went.

    Examples
    --------
    >>> error = Unfit("ann.wav", ["too short: 0.1 s, at least 0.5 s are wanted"])
    >>> print(error)
    ann.wav: too short: 0.1 s, at least 0.5 s are wanted
    >>> error.faults
    ('too short: 0.1 s, at least 0.5 s are wanted',)
    """

    def __init__(self, source: Source, faults: Sequence[str], quality: Quality | None = None):
        super().__init__(f"{called(source)}: {'; '.join(faults)}")
        self.faults, self.quality = tuple(faults), quality


@dataclass(frozen=True)
class Sample:
    """A recording or image that was read and is fit to be embedded.

    Attributes
    ----------
    inputs : list of Tensor
        What the encoder takes: windows [samples] of a recording, or one image [3, H, W].
    quality : SpeechQuality or FaceQuality

    Examples
    --------
    >>> from speechbrain_qmargin.verify.speech_quality import measure_speech
    >>> second = np.sin(np.arange(16000) / 10)
    >>> sample = Sample([torch.from_numpy(second)], measure_speech(second, 16000))
    >>> len(sample.inputs), sample.quality.seconds
    (1, 1.0)
    """

    inputs: list[Tensor]
    quality: Quality


class Reader(Protocol):
    """From files to embeddings, of one encoder. Calls from several threads are safe.

    Attributes
    ----------
    modality : str
        "speech" or "faces".
    digest : str
        The encoder's.
    rules : str
        By which it is decided what is fit, and how that is read: embeddings of files taken by other
        rules are others.

    Examples
    --------
    >>> class Written:      # embeddings as text
    ...     modality, digest, rules = "speech", "encoder 1", ""
    ...
    ...     def read(self, source):
    ...         return Sample([torch.tensor([float(number) for number in source.split()])], None)
    ...
    ...     def embed(self, samples):
    ...         return np.stack([sample.inputs[0].numpy() for sample in samples])
    >>> reader = Written()
    >>> reader.embed([reader.read(b"1 0"), reader.read(b"0.6 0.8")])
    array([[1. , 0. ],
           [0.6, 0.8]], dtype=float32)
    """

    modality: str
    digest: str
    rules: str

    def read(self, source: Source) -> Sample:
        """Read and check; OSError for what cannot be decoded, :class:`Unfit` for what is not fit.

        With `checked` of the reader False what is decodable and long enough is fit.
        """
        ...

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """Embeddings float32 [len(samples), D], not of unit length."""
        ...


def called(source: Source) -> str:
    """What a message calls a source.

    Examples
    --------
    >>> called("ann.wav"), called(b"RIFF")
    ('ann.wav', 'the content')
    """
    return "the content" if isinstance(source, bytes) else str(source)


class SpeechReader:
    """Recordings by a speaker encoder.

    Parameters
    ----------
    encoder : SpeakerEncoder
    limits : SpeechLimits
    window : float
        Seconds. A longer recording is cut into stretches of one length, none longer than this;
        its embedding is the mean of theirs. Time and memory of a network grow with what it takes
        at once: ECAPA-TDNN with 1,024 channels takes gigabytes for some minutes.
    checked : bool
        Whether what is no speech is refused, or only what is too short for the network.

    Raises
    ------
    ValueError
        A window below 1 s.

    Examples
    --------
    What nobody speaks in is refused before the encoder sees it.

    >>> import soundfile
    >>> from speechbrain_qmargin.export.encoder import PARTS
    >>> encoder = SpeakerEncoder(dict.fromkeys(PARTS, torch.nn.Identity()))
    >>> path = getfixture("tmp_path") / "silence.wav"
    >>> soundfile.write(path, np.zeros(16000), 16000)
    >>> SpeechReader(encoder).read(path)
    Traceback (most recent call last):
    speechbrain_qmargin.verify.readers.Unfit: ...silence.wav: silent: all its samples are equal
    """

    modality = "speech"

    def __init__(
        self,
        encoder: SpeakerEncoder,
        limits: SpeechLimits | None = None,
        window: float = 20.0,
        checked: bool = True,
    ) -> None:
        if not window >= 1:
            raise ValueError(f"the window is {window!r} s; at least 1 s")
        self.encoder, self.limits = encoder, limits or SpeechLimits()
        self.window, self.checked = window, checked
        self.digest, self.rules = encoder.digest(), f"{checked} {self.limits} {window}"
        self._lock = threading.Lock()

    def read(self, source: Source) -> Sample:
        """Read a recording, in windows where it is long; see :class:`Reader`.

        Windows of a long recording in which nobody speaks are left out.

        Raises
        ------
        Unfit
            A recording that no decision can rest on, with every fault.
        OSError
            One that is not there or cannot be decoded.
        """
        with _as_file(source) as path:
            seconds, fault = inspect_audio(path)
            if fault:
                raise OSError(f"{called(source)}: {fault}")
            if seconds < self.limits.seconds:
                raise Unfit(
                    source, self.limits.faults(_only_length(seconds)), _only_length(seconds)
                )
            if seconds > self.limits.max_seconds:
                long = f"too long: {seconds:.0f} s, at most {self.limits.max_seconds:g} s"
                raise Unfit(source, [long], _only_length(seconds))
            return self._windows(path, source, seconds)

    def _windows(self, path: Path, source: Source, seconds: float) -> Sample:
        count = math.ceil(seconds / self.window)
        rate = self.encoder.sample_rate
        inputs, found = [], []
        for number in range(count):
            start, length = number * seconds / count, seconds / count
            whole = count == 1
            try:
                signal = read_audio(path, rate, 0.0 if whole else start, None if whole else length)
            except OSError as error:
                raise OSError(fault_of(error).replace(str(path), called(source))) from None
            quality = measure_speech(signal.numpy(), rate)
            if whole or not self.checked or not self.limits.faults(quality):
                inputs.append(signal)
                found.append(quality)
            else:
                found.append(replace(quality, faults=self.limits.faults(quality)))
        good = [one for one in found if not one.faults]
        quality = replace(summarised(good or found), seconds=seconds)
        if self.checked:
            faults = self.limits.faults(quality) if good else found[0].faults
            if faults:
                raise Unfit(source, faults, replace(quality, faults=faults))
        return Sample(inputs, quality)

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """Embeddings float32 [len(samples), D]: recordings one by one, as they differ in length."""
        rows = []
        with self._lock, torch.inference_mode():
            for sample in samples:
                windows = [
                    self.encoder(signal[None].to(self.encoder.device))[0].float().cpu().numpy()
                    for signal in sample.inputs
                ]
                rows.append(np.mean(windows, axis=0) if len(windows) > 1 else windows[0])
        return np.stack(rows)


class FaceReader:
    """Aligned images by a face encoder.

    Parameters
    ----------
    encoder : Module
        From images [B, 3, S, S], RGB in [-1, 1], to embeddings [B, D]; with ``image_size``,
        ``device`` and ``digest()``.
    limits : FaceLimits
    batch : int
        Images embedded at once.
    checked : bool
        Whether images are refused by `limits`, or only those that show nothing.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> from PIL import Image
    >>> path = getfixture("tmp_path") / "black.png"
    >>> Image.new("RGB", (112, 112)).save(path)
    >>> encoder = SimpleNamespace(image_size=112, digest=lambda: "encoder 1")
    >>> FaceReader(encoder).read(path)
    Traceback (most recent call last):
    speechbrain_qmargin.verify.readers.Unfit: ...black.png: shows nothing: all its pixels are equal
    """

    modality = "faces"

    def __init__(
        self,
        encoder: Any,
        limits: FaceLimits | None = None,
        batch: int = 32,
        checked: bool = True,
    ) -> None:
        self.encoder, self.limits = encoder, limits or FaceLimits()
        self.batch, self.checked = batch, checked
        self.digest, self.rules = encoder.digest(), f"{checked} {self.limits}"
        self._lock = threading.Lock()

    def read(self, source: Source) -> Sample:
        """Read an image; see :class:`Reader`.

        Raises
        ------
        Unfit
            An image that no decision can rest on, with every fault.
        OSError
            One that is not there or cannot be decoded.
        """
        _refuse_name(source)
        try:
            width, height = image_size(source)
            if width * height > self.limits.max_pixels:
                large = f"too large: {width} x {height} pixels, at most {self.limits.max_pixels:,}"
                raise Unfit(source, [large])
            quality = measure_face(read_pixels(source))
            faults = self.limits.faults(quality)
            if faults and (self.checked or not quality.contrast):
                raise Unfit(source, faults, replace(quality, faults=faults))
            return Sample([read_image(source, self.encoder.image_size)], quality)
        except OSError as error:
            name = f"{called(source)}: " if isinstance(source, bytes) else ""
            raise OSError(f"{name}{fault_of(error)}") from None

    def embed(self, samples: Sequence[Sample]) -> np.ndarray:
        """Embeddings float32 [len(samples), D], in batches."""
        rows = []
        with self._lock, torch.inference_mode():
            for start in range(0, len(samples), self.batch):
                images = torch.stack([one.inputs[0] for one in samples[start : start + self.batch]])
                rows.append(self.encoder(images.to(self.encoder.device)).float().cpu().numpy())
        return np.concatenate(rows)


def _only_length(seconds: float) -> SpeechQuality:
    return SpeechQuality(seconds, 0.0, -math.inf, 0.0, 0.0, 0.0, 0.0)


def _refuse_name(source: Source) -> None:
    """Refuse a path of bytes that are no text: neither libsndfile nor a message could have it."""
    try:
        called(source).encode()
    except UnicodeEncodeError:
        raise OSError(f"{str(source)!a}: its name is not UTF-8: rename it") from None


@contextmanager
def _as_file(source: Source) -> Iterator[Path]:
    """A path to read; content gets a file of its own, gone at the end, named by what is in it."""
    if not isinstance(source, bytes):
        _refuse_name(source)
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        yield path
        return
    if not source:
        raise OSError("the content is empty")
    suffix = next((end for start, end in _MAGIC.items() if source.startswith(start)), "")
    if source[4:8] == b"ftyp":
        suffix = ".m4a"
    elif not suffix and source[0] == 0xFF and source[1:2] and source[1] & 0xE0 == 0xE0:
        suffix = ".mp3"
    if not suffix:
        raise OSError("the content is not wav, flac, ogg, opus, mp3 or m4a")
    with tempfile.TemporaryDirectory(prefix="qmargin-") as folder:  # of this user alone
        path = Path(folder) / f"content{suffix}"
        path.write_bytes(source)
        yield path
