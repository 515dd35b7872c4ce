"""How long recordings are and whether they can be read: opened once, then known to every run.

One file per folder of recordings, ``<kind>/<hash of the folder's path>.npz`` below
:func:`~speechbrain_qmargin.files.cache_folder`, holds what was found. It is keyed by each
recording's path, size and time of change, so it never goes stale. Recordings that could not be read
are not in it: the next run tries them again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.data.audio import decode_audio, decode_stretches, inspect_audio
from speechbrain_qmargin.data.manifest import Texts
from speechbrain_qmargin.files import cache_folder, fault_of, load_arrays, replacing

__all__ = ["check_recordings", "durations", "durations_file"]

logger = logging.getLogger(__name__)

_WRITE_EVERY = 100_000  # files, or a quarter of those read: what the end of the process may cost
_AT_ONCE = 4096
_MANY = 10_000  # m4a files, from which on processes are worth their start


class _Known(NamedTuple):
    """Recordings by name: bytes, time of change in ns, seconds."""

    names: Texts
    sizes: np.ndarray
    times: np.ndarray
    seconds: np.ndarray


def durations_file(folder: str | Path, kind: str = "durations") -> Path:
    """The cache of a folder of recordings, the same by whichever path one comes to it.

    It lies in :func:`~speechbrain_qmargin.files.cache_folder`, and need not exist yet.

    Examples
    --------
    >>> one, two = (durations_file(folder) for folder in ("VoxCeleb1", "../VoxCeleb1/"))
    >>> one.suffix, one == durations_file("VoxCeleb1/wav/.."), one == two
    ('.npz', True, False)
    """
    digest = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()
    return cache_folder() / kind / f"{digest[:32]}.npz"


def durations(
    folder: str | Path,
    names: Sequence[str],
    *,
    progress: bool = True,
    inspect: Callable[[Path], tuple[float, str]] | None = None,
    kind: str = "durations",
) -> tuple[np.ndarray, dict[int, str]]:
    """Seconds of recordings, and what is wrong with some; only new and changed ones are opened.

    The cache is written on the way, ever more seldom, and at the end, also of an interrupted call,
    whole each time. Of two calls at once the later one's is kept. Where it cannot be written, a
    warning says so.

    Parameters
    ----------
    folder : path
    names : sequence of str
        Distinct paths below the folder, with ``/``.
    progress : bool
        Show a bar.
    inspect : callable
        From a path to (seconds, what is wrong or ""), defined at the top of a module;
        :func:`~speechbrain_qmargin.data.audio.inspect_audio` by default.
    kind : str
        What the cache is called.

    Returns
    -------
    float64 array [N]
        NaN where something is wrong.
    dict
        From the row of such a recording to what is wrong.

    Examples
    --------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> getfixture("monkeypatch").setenv("SPEECHBRAIN_QMARGIN_CACHE", str(folder / "cache"))
    >>> soundfile.write(folder / "a.wav", np.zeros(8000), 16000)
    >>> durations(folder, ["a.wav", "b.wav"], progress=False)
    (array([0.5, nan]), {1: 'No such file or directory'})
    """
    folder, cache, inspect = Path(folder), durations_file(folder, kind), inspect or inspect_audio
    names = names if isinstance(names, Texts) else Texts.of(names)
    sizes, times = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    faults: dict[int, str] = {}
    for row, name in enumerate(names):
        try:
            status = os.stat(folder / name)
        except OSError as error:
            broken = (folder / name).is_symlink() and isinstance(error, FileNotFoundError)
            faults[row] = "a link to nothing" if broken else error.strerror or str(error)
            continue
        sizes[row], times[row] = status.st_size, status.st_mtime_ns
    known = _read(cache)
    seconds = _still_true(known, names, sizes, times)
    stale = [row for row in np.flatnonzero(np.isnan(seconds)).tolist() if row not in faults]
    if not stale:
        return seconds, faults

    def keep() -> None:
        _write(cache, _updated(known, _Known(names, sizes, times, seconds)))

    bar = tqdm(total=len(stale), desc="reading recordings", unit="file", disable=not progress)
    try:
        with bar, _pool(names[row] for row in stale) as pool:
            written = 0
            for start in range(0, len(stale), _AT_ONCE):
                rows = stale[start : start + _AT_ONCE]
                found = pool.map(inspect, [folder / names[row] for row in rows], chunksize=64)
                for row, (length, fault) in zip(rows, found, strict=True):
                    seconds[row] = np.nan if fault else length
                    if fault:
                        faults[row] = fault
                    bar.update()
                done = start + len(rows)
                if done - written >= max(_WRITE_EVERY, written // 4) or done == len(stale):
                    keep()
                    written = done
    except BaseException:
        keep()
        raise
    return seconds, faults


def check_recordings(
    folder: str | Path, files: Sequence[str], *, whole: bool = True, progress: bool = True
) -> None:
    """Decode every recording once, and for later runs only what has changed.

    Parameters
    ----------
    folder : path
        Names the cache.
    files : sequence of str
        Paths.
    whole : bool
        False: only stretches of them are taken, so that they may last for hours.

    Raises
    ------
    OSError
        Some cannot be decoded, or taken in one piece: their number, and the first three of them.

    Examples
    --------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> getfixture("monkeypatch").setenv("SPEECHBRAIN_QMARGIN_CACHE", str(folder / "cache"))
    >>> soundfile.write(folder / "a.wav", np.zeros(8000), 16000)
    >>> files = [str(folder / "a.wav"), str(folder / "b.wav")]
    >>> check_recordings(folder, files[:1], progress=False)
    >>> _ = (folder / "b.wav").write_bytes(b"no audio")
    >>> check_recordings(folder, files, progress=False)
    Traceback (most recent call last):
    OSError: 1 of 2 recordings to test on cannot be used, repair them or take their trials out: ...
    """
    distinct = sorted(set(files))
    _, faults = durations(
        folder,
        [os.path.abspath(file) for file in distinct],
        progress=progress,
        inspect=decode_audio if whole else decode_stretches,
        kind="decoded" if whole else "decoded_stretches",
    )
    if faults:
        some = "; ".join(f"{distinct[row]}: {faults[row]}" for row in sorted(faults)[:3])
        raise OSError(
            f"{len(faults)} of {len(distinct)} recordings to test on cannot be used, repair them "
            f"or take their trials out: {some}"
        )


def _pool(names: Iterable[str]) -> Executor:
    """Threads; processes for many m4a files, of which PyAV decodes one at a time in a process."""
    if sum(name.lower().endswith(".m4a") for name in names) < _MANY:
        return ThreadPoolExecutor()
    return ProcessPoolExecutor(mp_context=get_context("spawn"))


def _still_true(known: _Known, names: Texts, sizes: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Seconds as known; NaN where nothing is known of a recording or it has changed."""
    rows = np.full(len(names), -1)
    if _equal(known.names, names):
        rows = np.arange(len(names))
    elif len(known.names):
        place = {name: row for row, name in enumerate(known.names)}
        rows = np.fromiter((place.get(name, -1) for name in names), np.int64, len(names))
    seconds = np.full(len(names), np.nan)
    there = np.flatnonzero(rows >= 0)
    at = rows[there]
    same = (known.sizes[at] == sizes[there]) & (known.times[at] == times[there])
    seconds[there[same]] = known.seconds[at[same]]
    return seconds


def _equal(one: Texts, other: Texts) -> bool:
    return len(one) == len(other) and (
        np.array_equal(one.offsets, other.offsets) and np.array_equal(one.content, other.content)
    )


def _updated(known: _Known, new: _Known) -> _Known:
    """What is known of both, the new ones first, as far as their seconds are known."""
    good = np.flatnonzero(~np.isnan(new.seconds))
    now = _Known(new.names.take(good), new.sizes[good], new.times[good], new.seconds[good])
    if _equal(known.names, now.names) or not len(known.names):
        return now
    names = set(new.names)
    rest = np.flatnonzero([name not in names for name in known.names])
    return _Known(
        Texts.of([*now.names, *known.names.take(rest)]),
        np.concatenate([now.sizes, known.sizes[rest]]),
        np.concatenate([now.times, known.times[rest]]),
        np.concatenate([now.seconds, known.seconds[rest]]),
    )


def _read(cache: Path) -> _Known:
    none = np.zeros(0, np.int64)
    nothing = _Known(Texts.of([]), none, none, np.zeros(0))
    if not cache.is_file():
        return nothing
    try:
        arrays = load_arrays(cache, "durations")
        names = Texts(arrays["names"], arrays["offsets"])
        found = _Known(names, arrays["sizes"], arrays["times"], arrays["seconds"])
        if {len(column) for column in found} != {len(names)}:
            raise ValueError("columns of several lengths")
        return found
    except (ValueError, LookupError, OSError) as error:
        logger.warning(f"{cache} is damaged ({fault_of(error)}); the recordings are opened again")
        return nothing


def _write(cache: Path, known: _Known) -> None:
    if not len(known.names):
        return
    try:
        with replacing(cache) as partial_file:
            np.savez_compressed(
                partial_file,
                names=known.names.content,
                offsets=known.names.offsets,
                sizes=known.sizes,
                times=known.times,
                seconds=known.seconds,
            )
    except OSError as error:
        logger.warning(
            f"{cache} cannot be written ({error}); the next run opens every recording again. Name "
            "a folder that can be in SPEECHBRAIN_QMARGIN_CACHE"
        )
