"""Samples of audio files: any stretch, any format of the corpora, one sample rate.

wav, flac, ogg and mp3 are read by libsndfile; m4a (AAC, as VoxCeleb2 is published) by PyAV.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from speechbrain_qmargin.extras import require

__all__ = ["AUDIO_SUFFIXES", "MIN_SECONDS", "inspect_audio", "read_audio", "resampled"]

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a")
MIN_SECONDS = 0.1  # less than the networks' context

_AAC_FRAME = 1024
_PREROLL = 3  # frames decoded before a stretch: each overlaps with the one before it


def read_audio(
    path: str | Path,
    sample_rate: int,
    start: float = 0.0,
    length: float | None = None,
    speed: float = 1.0,
) -> torch.Tensor:
    """Mono float32 samples of a stretch of an audio file, at `sample_rate`.

    Only the stretch is read. In m4a too it is sample for sample that of the whole recording:
    decoding begins a few frames early.

    Parameters
    ----------
    path : str or Path
        wav, flac, ogg, mp3 or m4a.
    sample_rate : int
        Hz; other rates are resampled.
    start, length : float
        Seconds of the file and of the result. `length` None reads to the end.
    speed : float
        Played so much faster, pitch included (sox's ``speed``): ``length * speed`` seconds of the
        file become `length`.

    Returns
    -------
    Tensor, [time], float32

    Raises
    ------
    OSError
        The file cannot be decoded; the message names it.
    ImportError
        An m4a file without PyAV, the extra ``voxceleb``.
    """
    reach = None if length is None else length * speed
    if str(path).lower().endswith(".m4a"):
        samples, rate = _read_m4a(path, start, reach)
    else:
        import soundfile

        try:
            with soundfile.SoundFile(str(path)) as file:
                rate = file.samplerate
                file.seek(min(round(start * rate), file.frames))
                frames = -1 if reach is None else round(reach * rate)
                samples = file.read(frames, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise OSError(f"{path}: cannot be decoded ({error})") from error
        samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    return resampled(torch.from_numpy(samples), round(rate * speed), sample_rate)


def resampled(signal: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    """The signal [..., time] of `rate` Hz at `wanted` Hz, float32 (windowed sinc).

    Examples
    --------
    >>> resampled(torch.zeros(8000), 8000, 16000).shape
    torch.Size([16000])
    """
    if rate == wanted:
        return signal
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


def inspect_audio(path: Path) -> tuple[float, str]:
    """(seconds, what is wrong): the header, and whether the last samples are really there."""
    import soundfile

    try:
        if path.suffix.lower() == ".m4a":
            return _inspect_m4a(path)
        with soundfile.SoundFile(str(path)) as file:
            frames, rate = file.frames, file.samplerate
            if frames == 0:
                return 0.0, "empty: it has no samples"
            tail = min(frames, rate // 100)
            file.seek(frames - tail)
            if len(file.read(tail)) < tail:
                return 0.0, "truncated: its header promises more samples than it holds"
            return frames / rate, ""
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        reason = "empty file" if path.stat().st_size == 0 else str(error).split(": ", 1)[-1]
        return 0.0, f"empty, truncated or not audio ({reason})"


def _open_m4a(path: str | Path):
    require("av", why=f"{path}: m4a files are read by PyAV", extra="voxceleb")
    import av

    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise OSError(f"{path}: cannot be decoded ({error.strerror})") from error
    if not container.streams.audio or not getattr(container.streams.audio[0], "rate", None):
        container.close()
        raise OSError(f"{path}: cannot be decoded (it has no audio track)")
    return container


def _read_m4a(path: str | Path, start: float, length: float | None) -> tuple[np.ndarray, int]:
    """Samples [time] float32 and their rate."""
    with _open_m4a(path) as container:
        import av

        stream = container.streams.audio[0]
        rate = stream.rate
        total = round(stream.duration * stream.time_base * rate)
        begin = min(round(start * rate), total)
        end = total if length is None else min(begin + round(length * rate), total)
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
        except av.FFmpegError as error:
            raise OSError(f"{path}: cannot be decoded ({error.strerror})") from error
    if not parts or begin < 0:
        raise OSError(f"{path}: cannot be decoded (no samples at {start:.2f} s)")
    return np.concatenate(parts)[begin:end].astype(np.float32, copy=False), rate


def _inspect_m4a(path: Path) -> tuple[float, str]:
    with _open_m4a(path) as container:
        stream = container.streams.audio[0]
        if not stream.duration:
            return 0.0, "empty: it has no samples"
        seconds = float(stream.duration * stream.time_base)
    if len(_read_m4a(path, max(0.0, seconds - 0.02), None)[0]) == 0:
        return 0.0, "truncated: its header promises more samples than it holds"
    return seconds, ""
