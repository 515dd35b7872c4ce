"""Rooms and noise on training crops, as WeSpeaker's VoxCeleb recipe adds them.

A crop is left as it is with probability 0.4. Otherwise it is, with equal chance, reverberated with
one room impulse response or mixed with a stretch of one noise recording, and its peak brought to 1.
The signal-to-noise ratio is uniform: noise 0 to 15 dB, speech 10 to 30, music 5 to 15.

Every draw is from the generator handed in, which
:class:`~speechbrain_qmargin.data.speech_dataset.SpeechDataset` seeds by (seed, epoch, utterance): a
resumed run repeats it, with any number of workers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from speechbrain.augment import time_domain
from torch import Tensor

from speechbrain_qmargin.data.audio import read_audio, said_seconds
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.manifest import Manifest, Texts
from speechbrain_qmargin.files import fault_of

__all__ = ["WESPEAKER_SPEEDS", "Augment", "DropChunk", "room_and_noise"]

logger = logging.getLogger(__name__)

WESPEAKER_SPEEDS = (1.0, 0.9, 1.1)
"""Speed perturbation; at the second and third speed a speaker counts as another one."""

SNR = {"noise": (0.0, 15.0), "speech": (10.0, 30.0), "music": (5.0, 15.0)}  # dB

Augment = Callable[[Tensor, np.random.Generator, str], Tensor]
"""``augmented = augment(signal, rng, speaker)``, [time] to [time]."""

Drawn = TypeVar("Drawn")

_SAID = 50  # files that cannot be read and are named, once each in a process
_said: set[str] = set()


def room_and_noise(
    sample_rate: int,
    *,
    musan: str | Path | None = None,
    rirs: str | Path | None = None,
    speech: Manifest | None = None,
    probability: float = 0.6,
) -> Augment:
    """An augmentation of crops by rooms and noise.

    Parameters
    ----------
    sample_rate : int
        Hz.
    musan : path, optional
        A folder with ``noise``, ``speech`` and ``music``; recordings elsewhere in it are noise.
        Without it the noise is synthetic, coloured noise and, with `speech`, babble.
    rirs : path, optional
        The folder RIRS_NOISES, of which ``simulated_rirs`` are used, or any folder of impulse
        responses. Without it they are synthetic, exponentially decaying noise.
    speech : Manifest, optional
        Its recordings of 3 to 7 other speakers make synthetic babble.
    probability : float
        That a crop is changed.

    Raises
    ------
    FileNotFoundError
        A folder that does not exist or has no audio.
    ValueError
        A probability outside [0, 1].

    Examples
    --------
    >>> augment = room_and_noise(16000, probability=1.0)
    >>> augment(torch.randn(32000), np.random.default_rng(0), "id00012").shape
    torch.Size([32000])
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: {probability} is not between 0 and 1")
    if musan is None:
        babble = f"babble of {len(speech):,} training recordings" if speech else "no babble"
        logger.warning(
            f"noise_folder: none given; noise is SYNTHETIC (coloured noise, {babble}, no music) "
            "and results are not comparable with published ones, which use MUSAN"
        )
        noise = partial(_synthetic_noise, speech, sample_rate)
    else:
        noise = partial(_recorded_noise, *_labelled(Path(musan)), sample_rate)
    if rirs is None:
        logger.warning(
            "rir_folder: none given; rooms are SYNTHETIC (decaying noise) and results are not "
            "comparable with published ones, which use RIRS_NOISES/simulated_rirs"
        )
        room = partial(_synthetic_room, sample_rate)
    else:
        room = partial(_recorded_room, _impulse_responses(Path(rirs)), sample_rate)
    return _RoomsAndNoise(probability, room, noise)


@dataclass(frozen=True)
class _RoomsAndNoise:
    """What :func:`room_and_noise` gives; it can be sent to a process."""

    probability: float
    room: Callable[[np.random.Generator], Tensor]
    noise: Callable[[np.random.Generator, int, str], tuple[Tensor, tuple[float, float]]]

    def __call__(self, signal: Tensor, rng: np.random.Generator, speaker: str = "") -> Tensor:
        if rng.random() >= self.probability:
            return signal
        if rng.random() < 0.5:
            changed = _reverberated(signal, self.room(rng))
        else:
            recording, snr = self.noise(rng, len(signal), speaker)
            changed = signal + recording * _gain(signal, recording, rng.uniform(*snr))
        return changed / (changed.abs().max() + 1e-4)


def _gain(signal: Tensor, noise: Tensor, snr: float) -> float:
    """The factor on the noise for a ratio of `snr` dB; silence counts as -40 dB."""
    levels = [10 * np.log10(float(x.square().mean()) + 1e-4) for x in (signal, noise)]
    return float(10 ** ((levels[0] - levels[1] - snr) / 20))


def _reverberated(signal: Tensor, response: Tensor) -> Tensor:
    """The beginning, as long as the signal, of its convolution with a response of energy 1."""
    energy = response.square().sum().sqrt()
    if energy == 0:
        return signal
    response = response[: len(signal)] / energy
    size = _fast_size(len(signal) + len(response) - 1)
    # numpy's FFT of one short signal takes a third of the time of torch's
    product = np.fft.rfft(signal.numpy(), size) * np.fft.rfft(response.numpy(), size)
    return torch.from_numpy(np.fft.irfft(product, size)[: len(signal)].astype(np.float32))


def _fast_size(least: int) -> int:
    """A size for the FFT: a power of two times 1, 3, 5, 9 or 15."""
    return min(m << max(0, (-(-least // m) - 1).bit_length()) for m in (1, 3, 5, 9, 15))


# -------------------------------------------------------------------- recorded


def _files(folder: Path, setting: str) -> Texts:
    """Audio below a folder, sorted: a draw is an index, the same on every machine."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{setting}: {folder} does not exist")
    found = [file.path for file in audio_files(folder) if not file.fault]
    if not found:
        raise FileNotFoundError(f"{setting}: no audio below {folder}")
    return Texts.of(sorted(found))


def _labelled(folder: Path) -> tuple[Texts, list[str]]:
    """Paths and kinds of a folder in MUSAN's layout."""
    paths = _files(folder, "noise_folder")
    kinds = [Path(path).relative_to(folder).parts[0] for path in paths]
    return paths, [kind if kind in SNR else "noise" for kind in kinds]


def _impulse_responses(folder: Path) -> Texts:
    for inner in (folder / "RIRS_NOISES" / "simulated_rirs", folder / "simulated_rirs"):
        if inner.is_dir():
            folder = inner
    return _files(folder, "rir_folder")


def _drawn(count: int, rng: np.random.Generator, read: Callable[[int], Drawn]) -> Drawn:
    """`read` of a drawn index; of another where it cannot be read: one bad file stops nothing."""
    for attempt in range(20):
        try:
            return read(int(rng.integers(count)))
        except OSError as error:
            fault = fault_of(error)
            if fault not in _said and len(_said) < _SAID:
                _said.add(fault)
                more = "; others are not named" if len(_said) == _SAID else ""
                logger.warning(f"augmentation: {fault}; another file is drawn{more}")
            if attempt == 19:
                raise OSError(
                    f"{fault}; of 20 recordings that were drawn for the augmentation none can be "
                    "read: look at noise_folder and rir_folder"
                ) from error
    raise AssertionError


def _stretch(path: str, rng: np.random.Generator, rate: int, length: int) -> Tensor:
    """[length] samples of a file from a random start; a short one is repeated."""
    wanted = length / rate
    start = rng.uniform(0, max(0.0, said_seconds(path) - wanted))
    signal = read_audio(path, rate, start, wanted)
    return signal.repeat(-(-length // len(signal)))[:length]


def _recorded_noise(
    paths: Sequence[str],
    kinds: Sequence[str],
    rate: int,
    rng: np.random.Generator,
    length: int,
    speaker: str,
) -> tuple[Tensor, tuple[float, float]]:
    def read(index: int) -> tuple[Tensor, tuple[float, float]]:
        return _stretch(paths[index], rng, rate, length), SNR[kinds[index]]

    return _drawn(len(paths), rng, read)


def _recorded_room(paths: Sequence[str], rate: int, rng: np.random.Generator) -> Tensor:
    # an array's microphones are not to be averaged
    return _drawn(len(paths), rng, lambda n: read_audio(paths[n], rate, channel=0))


# -------------------------------------------------------------------- synthetic


def _synthetic_noise(
    speech: Manifest | None,
    rate: int,
    rng: np.random.Generator,
    length: int,
    speaker: str,
) -> tuple[Tensor, tuple[float, float]]:
    """Noise between white and brown; in one draw of three babble, if there is any."""
    if speech and rng.random() < 1 / 3:

        def read(index: int) -> Tensor:
            other = speech[index]
            if other.label == speaker:
                return torch.zeros(length)
            wanted = length / rate
            start = other.start + rng.uniform(0, max(0.0, other.duration - wanted))
            if other.part:
                wanted = min(wanted, other.duration)
            signal = read_audio(other.file, rate, start, wanted)
            signal = signal.repeat(-(-length // len(signal)))[:length]
            return signal / (signal.square().mean().sqrt() + 1e-4)

        voices = [_drawn(len(speech), rng, read) for _ in range(int(rng.integers(3, 8)))]
        babble = torch.stack(voices).sum(0)
        if babble.any():
            return 0.1 * babble, SNR["speech"]
    slope = rng.uniform(0, 2)  # of the power over frequency: 0 white, 1 pink, 2 brown
    size = _fast_size(length)
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    spectrum *= np.arange(1, len(spectrum) + 1, dtype=np.float32) ** (-slope / 2)
    noise = np.fft.irfft(spectrum, size)[:length]
    noise *= 0.1 / np.sqrt(np.square(noise).mean())
    return torch.from_numpy(noise.astype(np.float32)), SNR["noise"]


def _synthetic_room(rate: int, rng: np.random.Generator) -> Tensor:
    """A direct sound and a tail of noise that decays by 60 dB in 0.1 to 0.8 s, 0 to 15 dB below."""
    reverberation = rng.uniform(0.1, 0.8)
    time = np.arange(int(reverberation * rate), dtype=np.float32) / rate
    tail = rng.standard_normal(len(time), dtype=np.float32)
    tail *= np.exp(np.float32(-np.log(1000) / reverberation) * time)
    tail[: int(0.002 * rate)] = 0
    tail *= 10 ** (-rng.uniform(0, 15) / 20) / np.sqrt(np.square(tail).sum())
    tail[0] = 1.0
    return torch.from_numpy(tail.astype(np.float32, copy=False))


# -------------------------------------------------------------------- of a batch


class DropChunk(time_domain.DropChunk):
    """SpeechBrain's DropChunk, which waits for a GPU once per batch instead of twice per crop.

    The stretches are the same ones for the same seed: they are drawn on the CPU, for all crops,
    before the batch is touched. Parameters as SpeechBrain's; with a `noise_factor` it is
    SpeechBrain's.

    Examples
    --------
    >>> drop = DropChunk(drop_length_low=2, drop_length_high=2, drop_count_high=1)
    >>> drop(torch.ones(2, 6), torch.tensor([1.0, 0.5])).sum(1)
    tensor([4., 4.])
    """

    def forward(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
        """Waveforms [batch, time] or [batch, time, channels] of relative lengths [batch]."""
        if self.noise_factor:
            return super().forward(waveforms, lengths)
        samples = (lengths * waveforms.shape[1]).long().tolist()
        dropped = np.zeros(waveforms.shape[:2], dtype=bool)
        counts = torch.randint(self.drop_count_low, self.drop_count_high + 1, (len(samples),))
        for row, length, count in zip(dropped, samples, counts.tolist(), strict=True):
            if count == 0:
                continue
            sizes = torch.randint(self.drop_length_low, self.drop_length_high + 1, (count,))
            first = self.drop_start + (length if self.drop_start < 0 else 0)
            end = length if self.drop_end is None else self.drop_end
            end += length if end < 0 else 0
            last = max(0, end - int(sizes.max()))
            starts = torch.randint(first, last + 1, (count,))
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                row[start : start + size] = True
        mask = torch.from_numpy(dropped).to(waveforms.device)
        return waveforms.masked_fill(mask.reshape(*mask.shape, *[1] * (waveforms.dim() - 2)), 0.0)
