"""Samples of audio files: any stretch, any format of the corpora, one sample rate.

wav, flac, ogg, opus and mp3 are read by libsndfile; m4a (AAC, as VoxCeleb2 is published) by PyAV.
What cannot be trusted is refused where it is read, with the file's name: samples that are not
finite, files without samples, files that hold less than their headers promise. Where the process
may not open more files, or has no memory left, the system's error is raised: no recording is at
fault.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import fault_of, is_lack

__all__ = [
    "AUDIO_SUFFIXES",
    "MAX_SECONDS",
    "MIN_SECONDS",
    "UNREAD_AUDIO",
    "decode_audio",
    "decode_stretches",
    "inspect_audio",
    "read_audio",
    "resampled",
    "said_seconds",
]

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a")
UNREAD_AUDIO = (".aac", ".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".mka", ".mp2", ".sph",
                ".w64", ".wma", ".wv")  # fmt: skip
MIN_SECONDS = 0.1  # less than the networks' context
MAX_SECONDS = 3600.0  # of what is read in one piece
_STRETCH = 600.0  # seconds that are decoded at once of a recording of any length

_RATES = 1_000, 768_000  # Hz; a header that says otherwise is damaged
_MAX_SAMPLES = 1 << 28  # 1 GB of float32, over all channels
_MAX_FILTER = 1 << 22  # coefficients of a resampling filter that are tabulated
_AAC_FRAME = 1024
_PREROLL = 3  # frames decoded before a stretch: each overlaps with the one before it
_NAMED = 10  # files that are said to be scaled, before it is said that there are more
_scaled: set[str] = set()


def read_audio(
    path: str | Path,
    sample_rate: int,
    start: float = 0.0,
    length: float | None = None,
    speed: float = 1.0,
    channel: int | None = None,
) -> torch.Tensor:
    """Mono float32 samples of a stretch of an audio file, at `sample_rate`.

    Only the stretch is read. In m4a too it is sample for sample that of the whole recording:
    decoding begins a few frames early. Samples of floating-point files beyond full scale are
    divided by the stretch's peak, and a warning names the file.

    Parameters
    ----------
    path : str or Path
        wav, flac, ogg, opus, mp3 or m4a.
    sample_rate : int
        Hz; other rates are resampled.
    start, length : float
        Where to begin, in seconds of the file, and the seconds of the result. `length` None reads
        to the end.
    speed : float
        How much faster it is played, pitch included (sox's ``speed``): ``length * speed`` seconds
        of the file become `length`.
    channel : int, optional
        Take this one; by default the mean of all. Of m4a it is always the mean.

    Returns
    -------
    Tensor, [time], float32

    Raises
    ------
    OSError
        The file cannot be decoded, has no samples there, holds less than its header promises or
        samples that are not finite, would be read in one piece of more than an hour, or has a
        sample rate that no recording has. The message names it.
    ImportError
        An m4a file without PyAV, the extra ``voxceleb``.

    Examples
    --------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, np.zeros(8000), 8000)
    >>> read_audio(path, 16000, start=0.5, length=0.25).shape
    torch.Size([4000])
    """
    reach = None if length is None else length * speed
    if str(path).lower().endswith(".m4a"):
        samples, rate = _read_m4a(path, start, reach)
    else:
        samples, rate = _read_sndfile(path, start, reach, channel)
    if not len(samples):
        raise OSError(f"{path}: no samples" + (f" at {start:.2f} s" if start else ", it is empty"))
    return resampled(torch.from_numpy(samples), round(rate * speed), sample_rate)


def _read_sndfile(
    path: str | Path, start: float, reach: float | None, channel: int | None
) -> tuple[np.ndarray, int]:
    """Mono samples [time] float32 and their rate."""
    import soundfile

    try:
        with soundfile.SoundFile(str(path)) as file:
            rate, channels, total = file.samplerate, file.channels, file.frames
            _check_rate(path, rate)
            if reach is None:
                _check_length(path, total, rate, channels)
                _check_whole(path)
            first = min(round(start * rate), total)
            if first:
                file.seek(first)
            wanted = total - first if reach is None else round(reach * rate)
            samples = file.read(
                -1 if reach is None else wanted, dtype="float32", always_2d=channels > 1
            )
            floating = file.subtype in ("FLOAT", "DOUBLE")
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _undecodable(path, error) from error
    if len(samples) < min(wanted, total - first) and _promises(path):
        raise OSError(f"{path}: truncated: its header promises more samples than it holds")
    if channels > 1:
        samples = samples.mean(axis=1) if channel is None else samples[:, channel].copy()
    return _usable(path, samples, floating), rate


def _check_rate(path: str | Path, rate: int) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise OSError(
            f"{path}: its header says {rate} samples a second; {_RATES[0]:,} to {_RATES[1]:,} are "
            "read"
        )


def _check_length(path: str | Path, frames: int, rate: int, channels: int) -> None:
    if frames > MAX_SECONDS * rate or frames * channels > _MAX_SAMPLES:
        raise OSError(
            f"{path}: lasts {frames / rate / 3600:.1f} h in {channels} channels, too much to be "
            "taken in one piece; cut it into recordings of minutes"
        )


def _usable(path: str | Path, samples: np.ndarray, floating: bool) -> np.ndarray:
    """The samples, refused if they are not finite, scaled if they are floats beyond full scale."""
    if not floating or not len(samples):
        return samples
    peak = max(float(samples.max()), -float(samples.min()))  # of NaN and infinity it is one
    if not math.isfinite(peak):
        bad = int(np.count_nonzero(~np.isfinite(samples)))
        raise OSError(f"{path}: {bad:,} of its samples are not finite (NaN or infinity)")
    if peak > 1:
        _say_scaled(str(path), peak)
        samples = samples / np.float32(peak)
    return samples


def _say_scaled(path: str, peak: float) -> None:
    if path in _scaled or len(_scaled) > _NAMED:
        return
    _scaled.add(path)
    if len(_scaled) > _NAMED:
        logger.warning("more recordings are beyond full scale; they are scaled and not named")
        return
    logger.warning(f"{path}: samples up to {peak:.3g}, full scale is 1: its peaks are scaled to 1")


def _undecodable(path: str | Path, error: Exception, what: str = "cannot be decoded") -> OSError:
    """What a decoder's error is: the decoders know not why the system would not open a file."""
    reason = getattr(error, "strerror", None) or str(error).split(": ", 1)[-1]
    try:
        with open(path, "rb") as file:
            reason = reason if file.read(1) else "an empty file"
    except OSError as refused:
        if is_lack(refused):
            return refused
        reason = refused.strerror or str(refused)
    return OSError(f"{path}: {what} ({reason or type(error).__name__})")


# --------------------------------------------------------- what a header promises, what is there


def _promises(path: str | Path) -> bool:
    """Whether the number of samples in the header is stated and not estimated, as mp3 may."""
    if not str(path).lower().endswith(".mp3"):
        return True
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    return b"Xing" in head or b"Info" in head


def _check_whole(path: str | Path) -> None:
    """Refuse a wav or ogg file that is shorter than it says; libsndfile reads what there is."""
    suffix = os.path.splitext(str(path))[1].lower()
    if (suffix == ".wav" and _wav_lacks(path)) or (
        suffix in (".ogg", ".opus") and _ogg_lacks(path)
    ):
        raise OSError(f"{path}: truncated: its header promises more samples than it holds")


def _wav_lacks(path: str | Path) -> bool:
    """Whether the data chunk of a RIFF file ends beyond the file's end.

    Sizes of 0 and near 2^31 and 2^32 are those of a stream, whose length was not known.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if file.read(4) != b"RIFF":
            return False
        at = 12
        while at + 8 <= size:
            file.seek(at)
            name, length = struct.unpack("<4sI", file.read(8))
            if name == b"data":
                streamed = length in (0, 0x7FFFFFFF) or length >= 0xFFFFFF00
                return not streamed and at + 8 + length > size
            at += 8 + length + length % 2
    return False


def _ogg_lacks(path: str | Path) -> bool:
    """Whether the last page of an Ogg file ends beyond the file's end."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        begin = max(0, size - (1 << 17))  # two pages of the largest size
        file.seek(begin)
        tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0 or at + 27 > len(tail):
        return True
    segments = tail[at + 26]
    table = tail[at + 27 : at + 27 + segments]
    return len(table) < segments or at + 27 + segments + sum(table) > len(tail)


# ------------------------------------------------------------------------------- sample rates


def resampled(signal: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    """The signal [..., time] of `rate` Hz at `wanted` Hz, float32 (windowed sinc).

    The filter is torchaudio's: a sinc under a Hann window, six zero crossings to a side, cut off at
    0.99 of the lower Nyquist frequency. Where the rates have few common factors its table would
    take gigabytes (256 million coefficients for 15,999 to 16,000 Hz), and it is computed for each
    sample instead.

    Examples
    --------
    >>> resampled(torch.zeros(8000), 8000, 16000).shape
    torch.Size([16000])
    """
    if rate == wanted:
        return signal
    divisor = math.gcd(rate, wanted)
    if (rate // divisor) * (wanted // divisor) > _MAX_FILTER:
        return _resampled_directly(signal, rate // divisor, wanted // divisor)
    # The convolution rounds by the number of threads; a worker has one, the main process many
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _resampler(rate, wanted)(signal)
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=16)
def _resampler(rate: int, wanted: int):
    from torchaudio.transforms import Resample

    return Resample(rate, wanted)


def _resampled_directly(signal: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    """The same filter, its coefficients computed at each sample of the result."""
    crossings, cutoff = 6, 0.99 * min(rate, wanted)
    samples = signal.numpy().astype(np.float64)
    count = -(-samples.shape[-1] * wanted // rate)
    reach = math.ceil(crossings * rate / cutoff)
    padded = np.pad(samples, [(0, 0)] * (samples.ndim - 1) + [(reach, reach + 1)])
    taps = np.arange(-reach, reach + 2)
    result = np.empty((*samples.shape[:-1], count), np.float32)
    for begin in range(0, count, 1 << 14):
        index = np.arange(begin, min(begin + (1 << 14), count))
        centre = index * rate // wanted  # the input's sample at or before it
        part = (index * rate % wanted) / wanted
        distance = ((taps - part[:, None]) * (cutoff / rate)).clip(-crossings, crossings)
        window = np.cos(distance * (np.pi / crossings / 2)) ** 2
        kernel = np.sinc(distance) * window * (cutoff / rate)
        values = padded[..., (centre + reach)[:, None] + taps]
        result[..., index] = (values * kernel).sum(-1)
    return torch.from_numpy(result)


# ------------------------------------------------------------------------------- before training


def inspect_audio(path: Path) -> tuple[float, str]:
    """(seconds, what is wrong): the header, and whether the last samples are really there.

    0 seconds where something is wrong; otherwise the text is empty. Nothing is raised but what the
    process lacks (:func:`~speechbrain_qmargin.files.is_lack`).

    Examples
    --------
    >>> import soundfile
    >>> file = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(file, np.zeros(8000), 16000)
    >>> inspect_audio(file)
    (0.5, '')
    >>> _ = file.write_bytes(file.read_bytes()[:-1000])
    >>> inspect_audio(file)
    (0.0, 'truncated: its header promises more samples than it holds')
    """
    try:
        return _seconds_m4a(path) if path.suffix.lower() == ".m4a" else _seconds(path), ""
    except OSError as error:
        return 0.0, _fault_of(path, error)


def said_seconds(path: str | Path) -> float:
    """How long a recording is by its header alone.

    Raises
    ------
    OSError, ImportError
        As :func:`read_audio`.

    Examples
    --------
    >>> import soundfile
    >>> file = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(file, np.zeros(8000), 16000)
    >>> said_seconds(file)
    0.5
    """
    import soundfile

    if str(path).lower().endswith(".m4a"):
        with _open_m4a(path) as container:
            stream = container.streams.audio[0]
            return float((stream.duration or 0) * stream.time_base)
    try:
        return soundfile.info(str(path)).duration
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _undecodable(path, error) from error


def decode_audio(path: Path) -> tuple[float, str]:
    """(seconds, what is wrong): every sample is read, as it will be for an embedding.

    As :func:`inspect_audio`, only slower and surer; the seconds are those at 16 kHz.

    Examples
    --------
    >>> import soundfile
    >>> file = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(file, np.zeros(4000), 8000)
    >>> decode_audio(file)
    (0.5, '')
    >>> _ = file.write_bytes(b"no audio")
    >>> decode_audio(file)
    (0.0, 'cannot be decoded (...)')
    """
    try:
        return len(read_audio(path, 16000)) / 16000, ""
    except OSError as error:
        return 0.0, _fault_of(path, error)


def decode_stretches(path: Path) -> tuple[float, str]:
    """As :func:`decode_audio`, of a recording that only stretches are taken of: of any length.

    Examples
    --------
    >>> import soundfile
    >>> file = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(file, np.zeros(3601 * 1000), 1000)
    >>> decode_stretches(file), decode_audio(file)
    ((3601.0, ''), (0.0, 'lasts 1.0 h in 1 channels, too much to be taken in one piece; ...'))
    """
    seconds, fault = inspect_audio(path)
    try:
        for number in range(0 if fault else math.ceil(seconds / _STRETCH - 1e-6)):
            read_audio(path, 16000, number * _STRETCH, _STRETCH)
    except OSError as error:
        return 0.0, _fault_of(path, error)
    return seconds, fault


def _fault_of(path: Path, error: OSError) -> str:
    return fault_of(error).removeprefix(f"{path}: ")


def _seconds(path: Path) -> float:
    import soundfile

    try:
        with soundfile.SoundFile(str(path)) as file:
            frames, rate = file.frames, file.samplerate
            _check_rate(path, rate)
            _check_whole(path)
            if frames == 0:
                raise OSError(f"{path}: empty: it has no samples")
            tail = min(frames, rate // 100)
            file.seek(frames - tail)
            if len(file.read(tail)) < tail and _promises(path):
                raise OSError(f"{path}: truncated: its header promises more samples than it holds")
            return frames / rate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _undecodable(path, error, "empty, truncated or not audio") from error


def _open_m4a(path: str | Path):
    require("av", why=f"{path}: m4a files are read by PyAV", extra="voxceleb")
    import av
    from av.error import FFmpegError

    try:
        container = av.open(str(path))
    except FFmpegError as error:
        raise _undecodable(path, error) from error
    if not container.streams.audio or not getattr(container.streams.audio[0], "rate", None):
        container.close()
        raise OSError(f"{path}: cannot be decoded (it has no audio track)")
    return container


def _read_m4a(path: str | Path, start: float, length: float | None) -> tuple[np.ndarray, int]:
    """Samples [time] float32 and their rate."""
    with _open_m4a(path) as container:
        from av.error import FFmpegError

        stream = container.streams.audio[0]
        rate = stream.rate
        total = round(stream.duration * stream.time_base * rate)
        begin = min(round(start * rate), total)
        end = total if length is None else min(begin + round(length * rate), total)
        _check_rate(path, rate)
        _check_length(path, end - begin, rate, 1)
        if begin == end:
            return np.zeros(0, np.float32), rate
        position, parts = None, []
        try:
            early = begin - _PREROLL * _AAC_FRAME
            if early > 0:
                container.seek(int(early / rate / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                samples = frame.to_ndarray()
                if position is None:
                    position = round(frame.pts * frame.time_base * rate)
                    begin, end = begin - position, end - position
                    position = 0
                parts.append(samples.mean(axis=0) if len(samples) > 1 else samples[0])
                position += samples.shape[1]
                if position >= end:
                    break
        except FFmpegError as error:
            raise _undecodable(path, error) from error
    if not parts or begin < 0:
        raise OSError(f"{path}: cannot be decoded (no samples at {start:.2f} s)")
    samples = np.concatenate(parts)[begin:end].astype(np.float32, copy=False)
    if len(samples) < end - begin - 2 * _AAC_FRAME:  # encoders differ in how they count the last
        raise OSError(f"{path}: truncated: its header promises more samples than it holds")
    return samples, rate


def _seconds_m4a(path: Path) -> float:
    with _open_m4a(path) as container:
        stream = container.streams.audio[0]
        if not stream.duration:
            raise OSError(f"{path}: empty: it has no samples")
        seconds = float(stream.duration * stream.time_base)
    if len(_read_m4a(path, max(0.0, seconds - 0.02), None)[0]) == 0:
        raise OSError(f"{path}: truncated: its header promises more samples than it holds")
    return seconds
