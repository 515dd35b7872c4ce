r"""Whether a recording is one to decide on: length, level, clipping, and whether somebody speaks.

An encoder gives an embedding for anything, and two recordings of one noise are alike: white noise
against white noise scores 0.999. What is no speech must be refused before it is scored. The
measures are of frames of 32 ms, every 16 ms, at the encoder's sample rate. The active frames are
those within 30 dB of the 95th percentile of the levels, the loud ones those within 20 dB.

* *modulation*: the spread of the frames' levels in dB, the 90th less the 10th percentile. Syllables
  and pauses make tens of dB; a steady noise, hum or tone makes about one.
* *voiced*: the share of active frames with a period of 2.5 to 16 ms (60 to 400 Hz), the normalised
  autocorrelation above 0.4 after pre-emphasis, which takes the slope out of coloured noise.
* *variation*: how much the shape of the spectrum changes between loud frames, in dB: 20 bands, each
  frame's mean taken out, half the distance of the 16th and 84th percentiles over frames, averaged
  over bands. A tone that is switched on and off keeps its shape.

Music, and a voice that is played or synthesised, pass: nothing here detects them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["SpeechLimits", "SpeechQuality", "measure_speech", "summarised"]

_FRAME, _HOP = 0.032, 0.016  # seconds
_ACTIVE, _LOUD = 30.0, 20.0  # dB below the 95th percentile
_PERIODIC, _PRE_EMPHASIS = 0.4, 0.97
_BANDS, _LOW, _HIGH = 20, 100.0, 7000.0  # Hz
_PERIODS = 60.0, 400.0  # Hz
_FLOOR = 1e-10  # of power: -100 dBFS


@dataclass(frozen=True)
class SpeechQuality:
    """What was measured on a recording.

    Attributes
    ----------
    seconds, active_seconds : float
        Its length, and of it what is within 30 dB of the loud.
    level : float
        Of the active frames, in dB below full scale.
    clipped : float
        The share of samples that lie in runs of three and more at the recording's peak.
    modulation, variation : float
        In dB, see the module.
    voiced : float
        The share of active frames that have a pitch.
    faults : tuple of str
        Why it is refused; empty for a good one.

    Examples
    --------
    >>> silent = measure_speech(np.zeros(8000), 16000)
    >>> silent.seconds, silent.active_seconds, silent.level
    (0.5, 0.0, -inf)
    """

    seconds: float
    active_seconds: float
    level: float
    clipped: float
    modulation: float
    voiced: float
    variation: float
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpeechLimits:
    """What a recording must have; each of a :class:`SpeechQuality`'s measures.

    Attributes
    ----------
    seconds, active_seconds : float
        The fewest.
    max_seconds : float
        Longer ones are refused before they are read.
    level, clipped, modulation, voiced, variation : float
        `clipped` is the most, the others are the least.

    Examples
    --------
    >>> clipped = SpeechQuality(2, 1.5, -3, clipped=0.25, modulation=20, voiced=0.5, variation=6)
    >>> SpeechLimits().faults(clipped)
    ("clipped: 25.0 % of its samples are cut off, at most 2 %; lower the microphone's level",)
    >>> SpeechLimits(clipped=0.3).faults(clipped)
    ()
    """

    seconds: float = 0.5
    active_seconds: float = 0.3
    max_seconds: float = 600.0
    level: float = -60.0
    clipped: float = 0.02
    modulation: float = 6.0
    voiced: float = 0.1
    variation: float = 3.5

    def faults(self, found: SpeechQuality) -> tuple[str, ...]:
        """What is wrong, in words, each with its figure and what is wanted."""
        if found.seconds < self.seconds:
            return (f"too short: {found.seconds:.3g} s, at least {self.seconds:g} s are wanted",)
        if found.level == -math.inf:
            return ("silent: all its samples are equal",)
        if found.level < self.level:
            return (
                f"too quiet: {found.level:.0f} dB below full scale, at least {self.level:g} dB; "
                "raise the microphone's level",
            )
        faults = []
        if found.active_seconds < self.active_seconds:
            faults.append(
                f"too little sound: {found.active_seconds:.2g} s above the pauses, at least "
                f"{self.active_seconds:g} s"
            )
        if found.clipped > self.clipped:
            faults.append(
                f"clipped: {100 * found.clipped:.1f} % of its samples are cut off, at most "
                f"{100 * self.clipped:g} %; lower the microphone's level"
            )
        why = []
        if found.modulation < self.modulation:
            why.append(f"its level is steady ({found.modulation:.1f} dB, {self.modulation:g})")
        if found.voiced < self.voiced:
            why.append(f"{100 * found.voiced:.0f} % of it has a pitch ({100 * self.voiced:g} %)")
        if found.variation < self.variation:
            why.append(f"its sound does not change ({found.variation:.1f} dB, {self.variation:g})")
        if why:
            faults.append(f"no speech: {', '.join(why)}; in brackets the least of speech")
        return tuple(faults)


def _frames_of(signal: np.ndarray, sample_rate: int) -> np.ndarray:
    """Frames [N, samples] of 32 ms, every 16 ms; at least one, padded with zeros."""
    size, hop = round(_FRAME * sample_rate), round(_HOP * sample_rate)
    if len(signal) < size:
        signal = np.pad(signal, (0, size - len(signal)))
    return np.lib.stride_tricks.sliding_window_view(signal, size)[::hop]


def measure_speech(signal: np.ndarray, sample_rate: int) -> SpeechQuality:
    """Measure a recording.

    Parameters
    ----------
    signal : float array [samples]
        Full scale is 1.
    sample_rate : int

    Examples
    --------
    >>> noise = 0.1 * np.random.default_rng(0).standard_normal(32000)
    >>> found = measure_speech(noise, 16000)
    >>> SpeechLimits().faults(found)[0][:35]
    'no speech: its level is steady (0.8'
    """
    signal = np.asarray(signal, dtype=np.float32)
    seconds = len(signal) / sample_rate
    if not len(signal) or signal.min() == signal.max():
        return SpeechQuality(seconds, 0.0, -math.inf, 0.0, 0.0, 0.0, 0.0)
    signal = signal - signal.mean(dtype=np.float64).astype(np.float32)
    frames = _frames_of(signal, sample_rate)
    power = np.einsum("ns,ns->n", frames, frames, dtype=np.float64) / frames.shape[1]
    levels = 10 * np.log10(power + _FLOOR)
    top = np.percentile(levels, 95)
    active, loud = levels > top - _ACTIVE, levels > top - _LOUD
    heights = 10 * np.log10(_bands(frames[loud], sample_rate) + _FLOOR)
    shapes = heights - heights.mean(axis=1, keepdims=True)
    emphasised = np.append(signal[:1], signal[1:] - np.float32(_PRE_EMPHASIS) * signal[:-1])
    voices = _frames_of(emphasised, sample_rate)
    low, high = np.percentile(levels, (10, 90))
    lower, upper = np.percentile(shapes, (16, 84), axis=0)
    return SpeechQuality(
        seconds=seconds,
        active_seconds=min(seconds, float(np.count_nonzero(active)) * _HOP),
        level=float(10 * np.log10(power[active].mean() + 1e-20)),
        clipped=_clipped(signal),
        modulation=float(high - low),
        voiced=float(np.mean(_periodicity(voices[active], sample_rate) > _PERIODIC)),
        variation=float((upper - lower).mean() / 2),
    )


def _bands(frames: np.ndarray, sample_rate: int) -> np.ndarray:
    """Power in bands of equal ratio [N, bands]."""
    size = frames.shape[1]
    length = 2 ** math.ceil(math.log2(2 * size))
    edges = np.geomspace(_LOW, min(_HIGH, 0.45 * sample_rate), _BANDS + 1)
    bins = np.unique(np.round(edges * length / sample_rate).astype(int))
    return np.concatenate(
        [
            np.add.reduceat(spectrum, bins, axis=1)[:, :-1] / np.diff(bins) / size
            for spectrum in _spectra(frames, length)
        ]
    )


def _periodicity(frames: np.ndarray, sample_rate: int) -> np.ndarray:
    """The largest autocorrelation [N] over the periods of a voice, relative to that at zero."""
    size = frames.shape[1]
    length = 2 ** math.ceil(math.log2(2 * size))
    shortest, longest = (round(sample_rate / f) for f in reversed(_PERIODS))
    window = np.hanning(size)
    own = np.fft.irfft(np.abs(np.fft.rfft(window, length)) ** 2, length)[: longest + 1]
    found = []
    for spectrum in _spectra(frames, length):
        correlation = np.fft.irfft(spectrum, length)[:, : longest + 1]
        relative = correlation / (correlation[:, :1] + 1e-20) * (own[0] / own)
        found.append(relative[:, shortest:].max(axis=1))
    return np.concatenate(found)


def _spectra(frames: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Power spectra of windowed frames, in blocks."""
    window = np.hanning(frames.shape[1]).astype(np.float32)
    for start in range(0, len(frames), 512):
        yield np.abs(np.fft.rfft(frames[start : start + 512] * window, length)) ** 2


def _clipped(signal: np.ndarray) -> float:
    """The share of samples in runs of three and more within 0.1 % of the largest or least."""
    total = 0
    for peak in (float(signal.max()), -float(signal.min())):
        at = np.flatnonzero((signal if peak == signal.max() else -signal) >= 0.999 * peak)
        if len(at) >= 3:
            runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
            total += sum(len(run) for run in runs if len(run) >= 3)
    return total / len(signal)


def summarised(parts: Iterable[SpeechQuality]) -> SpeechQuality:
    """One of several stretches: lengths added, measures weighted by what is active in each.

    Examples
    --------
    >>> one = SpeechQuality(10.0, 6.0, -20.0, 0.0, 30.0, voiced=0.4, variation=5.0)
    >>> other = SpeechQuality(10.0, 2.0, -20.0, 0.0, 30.0, voiced=0.8, variation=5.0)
    >>> both = summarised([one, other])
    >>> both.seconds, both.active_seconds, round(both.voiced, 4)        # (6 * 0.4 + 2 * 0.8) / 8
    (20.0, 8.0, 0.5)
    """
    parts = list(parts)
    weights = np.array([part.active_seconds for part in parts])
    weights = weights / weights.sum() if weights.sum() else np.full(len(parts), 1 / len(parts))

    def mean(name: str) -> float:
        values = np.array([getattr(part, name) for part in parts])
        return float(weights[weights > 0] @ values[weights > 0])

    power = [10 ** (part.level / 10) for part in parts]
    level = float(10 * np.log10(weights @ np.array(power))) if any(power) else -math.inf
    return SpeechQuality(
        seconds=sum(part.seconds for part in parts),
        active_seconds=sum(part.active_seconds for part in parts),
        level=level,
        clipped=mean("clipped"),
        modulation=mean("modulation"),
        voiced=mean("voiced"),
        variation=mean("variation"),
    )
