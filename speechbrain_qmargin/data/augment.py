"""Rooms and noise on training crops, as WeSpeaker's VoxCeleb recipe adds them.

A crop is left as it is with probability 0.4. Otherwise it is, with equal chance, reverberated with
one room impulse response or mixed with a stretch of one noise recording, and its peak brought to 1.
The signal-to-noise ratio is uniform: noise 0 to 15 dB, speech 10 to 30, music 5 to 15.

Every draw is from the generator handed in, which
:func:`~speechbrain_qmargin.data.speech.speech_dataset` seeds by (seed, epoch, utterance): a
resumed run repeats it, with any number of workers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, read_audio, resampled

__all__ = ["WESPEAKER_SPEEDS", "Augment", "room_and_noise"]

logger = logging.getLogger(__name__)

WESPEAKER_SPEEDS = (1.0, 0.9, 1.1)
"""Speed perturbation; at the second and third speed a speaker is another one."""

SNR = {"noise": (0.0, 15.0), "speech": (10.0, 30.0), "music": (5.0, 15.0)}  # dB

Augment = Callable[[Tensor, np.random.Generator, str], Tensor]
"""``augmented = augment(signal, rng, speaker)``, [time] to [time]."""


def room_and_noise(
    sample_rate: int,
    *,
    musan: str | Path | None = None,
    rirs: str | Path | None = None,
    speech: Mapping[str, dict] | None = None,
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
    speech : mapping, optional
        A manifest whose recordings of 3 to 7 other speakers make synthetic babble.
    probability : float
        Of a crop to be changed.

    Raises
    ------
    FileNotFoundError
        A folder that does not exist or has no audio.

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
        noise = partial(_synthetic_noise, _others(speech or {}), sample_rate)
    else:
        noise = partial(_recorded_noise, _labelled(Path(musan)), sample_rate)
    if rirs is None:
        logger.warning(
            "rir_folder: none given; rooms are SYNTHETIC (decaying noise) and results are not "
            "comparable with published ones, which use RIRS_NOISES/simulated_rirs"
        )
        room = partial(_synthetic_room, sample_rate)
    else:
        room = partial(_recorded_room, _impulse_responses(Path(rirs)), sample_rate)

    def augment(signal: Tensor, rng: np.random.Generator, speaker: str = "") -> Tensor:
        if rng.random() >= probability:
            return signal
        if rng.random() < 0.5:
            changed = _reverberated(signal, room(rng))
        else:
            recording, snr = noise(rng, len(signal), speaker)
            changed = signal + recording * _gain(signal, recording, rng.uniform(*snr))
        return changed / (changed.abs().max() + 1e-4)

    return augment


def _gain(signal: Tensor, noise: Tensor, snr: float) -> float:
    """What to multiply the noise with for a ratio of `snr` dB; silence counts as -40 dB."""
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


def _files(folder: Path, setting: str) -> list[str]:
    """Audio below a folder, sorted: a draw is an index, the same on every machine."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{setting}: {folder} does not exist")
    found = []
    for where, _, names in os.walk(folder, followlinks=True):
        found += [
            os.path.join(where, name)
            for name in names
            if name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith(".")
        ]
    if not found:
        raise FileNotFoundError(f"{setting}: no audio below {folder}")
    return sorted(found)


def _labelled(folder: Path) -> list[tuple[str, str]]:
    """(kind, path) of a folder in MUSAN's layout."""
    labelled = []
    for path in _files(folder, "noise_folder"):
        kind = Path(path).relative_to(folder).parts[0]
        labelled.append((kind if kind in SNR else "noise", path))
    return labelled


def _impulse_responses(folder: Path) -> list[str]:
    for inner in (folder / "RIRS_NOISES" / "simulated_rirs", folder / "simulated_rirs"):
        if inner.is_dir():
            folder = inner
    return _files(folder, "rir_folder")


def _drawn(items: list, rng: np.random.Generator, read: Callable):
    """`read` of an item; of another where it cannot be read, so that one bad file stops nothing."""
    for attempt in range(20):
        item = items[int(rng.integers(len(items)))]
        try:
            return read(item)
        except OSError as error:
            logger.warning(f"augmentation: {error}; another file is drawn")
            if attempt == 19:
                raise
    raise AssertionError


def _stretch(path: str, rng: np.random.Generator, rate: int, length: int) -> Tensor:
    """[length] samples of a file from a random start; a short one is repeated."""
    import soundfile

    wanted = length / rate
    try:
        seconds = soundfile.info(path).duration
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise OSError(f"{path}: cannot be decoded ({error})") from error
    start = rng.uniform(0, max(0.0, seconds - wanted))
    signal = read_audio(path, rate, start, wanted)
    if not len(signal):
        raise OSError(f"{path}: empty")
    return signal.repeat(-(-length // len(signal)))[:length]


def _recorded_noise(
    labelled: list[tuple[str, str]], rate: int, rng: np.random.Generator, length: int, speaker: str
) -> tuple[Tensor, tuple[float, float]]:
    def read(item: tuple[str, str]) -> tuple[Tensor, tuple[float, float]]:
        kind, path = item
        return _stretch(path, rng, rate, length), SNR[kind]

    return _drawn(labelled, rng, read)


def _recorded_room(paths: list[str], rate: int, rng: np.random.Generator) -> Tensor:
    import soundfile

    def read(path: str) -> Tensor:
        try:
            samples, its_rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise OSError(f"{path}: cannot be decoded ({error})") from error
        if not len(samples):
            raise OSError(f"{path}: empty")
        first = np.ascontiguousarray(samples[:, 0])  # an array's microphones are not to be averaged
        return resampled(torch.from_numpy(first), its_rate, rate)

    return _drawn(paths, rng, read)


# -------------------------------------------------------------------- synthetic


def _others(manifest: Mapping[str, dict]) -> list[tuple[str, str, float]]:
    return [(item["spk_id"], item["wav"], item["duration"]) for item in manifest.values()]


def _synthetic_noise(
    speech: list[tuple[str, str, float]],
    rate: int,
    rng: np.random.Generator,
    length: int,
    speaker: str,
) -> tuple[Tensor, tuple[float, float]]:
    """Noise with a spectrum between white and brown; in one draw of three babble, if there is."""
    if speech and rng.random() < 1 / 3:

        def read(item: tuple[str, str, float]) -> Tensor:
            other, path, duration = item
            if other == speaker:
                return torch.zeros(length)
            start = rng.uniform(0, max(0.0, duration - length / rate))
            signal = read_audio(path, rate, start, length / rate)
            if not len(signal):
                raise OSError(f"{path}: empty")
            signal = signal.repeat(-(-length // len(signal)))[:length]
            return signal / (signal.square().mean().sqrt() + 1e-4)

        voices = [_drawn(speech, rng, read) for _ in range(int(rng.integers(3, 8)))]
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
