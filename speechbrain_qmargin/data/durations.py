"""How long recordings are and whether they can be read: opened once, then known to every run.

One file a folder of recordings, ``durations/<hash of the folder's path>.npz`` below
:func:`~speechbrain_qmargin.files.cache_folder`, holds what was found. It is keyed by each
recording's path, size and time of change, so it never goes stale. Recordings that could not be read
are not in it: the next run tries them again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.data.audio import inspect_audio
from speechbrain_qmargin.files import cache_folder, replacing

__all__ = ["durations", "durations_file"]

logger = logging.getLogger(__name__)

_WRITE_EVERY = 100_000  # files: what an interruption may cost
_MANY = 10_000  # m4a files, from which on processes are worth their start

_Known = dict[str, tuple[int, int, float, str]]  # name: size, time of change, seconds, fault


def durations_file(folder: str | Path) -> Path:
    """The cache of a folder of recordings, the same by whichever path one comes to it."""
    digest = hashlib.sha256(os.fsencode(Path(folder).resolve())).hexdigest()
    return cache_folder() / "durations" / f"{digest[:32]}.npz"


def durations(
    folder: str | Path, files: Mapping[str, tuple[int, int]], *, progress: bool = True
) -> dict[str, tuple[float, str]]:
    """(seconds, what is wrong or "") of recordings; only those that are new or changed are opened.

    The cache is written on the way and at the end, also of an interrupted call, whole each time. Of
    two calls at once the later one's is kept. Where it cannot be written, a warning says so.

    Parameters
    ----------
    folder : path
    files : mapping
        Path below the folder, with ``/``, to (bytes, time of change in ns).
    progress : bool
        Show a bar.

    Examples
    --------
    >>> import numpy, soundfile
    >>> folder = getfixture("tmp_path")
    >>> getfixture("monkeypatch").setenv("SPEECHBRAIN_QMARGIN_CACHE", str(folder / "cache"))
    >>> soundfile.write(folder / "a.wav", numpy.zeros(8000), 16000)
    >>> status = (folder / "a.wav").stat()
    >>> durations(folder, {"a.wav": (status.st_size, status.st_mtime_ns)}, progress=False)
    {'a.wav': (0.5, '')}
    """
    folder, cache = Path(folder), durations_file(folder)
    known = _read(cache)
    stale = [name for name, key in files.items() if known.get(name, ())[:2] != tuple(key)]
    if stale:
        bar = tqdm(total=len(stale), desc="reading durations", unit="file", disable=not progress)
        try:
            with bar, _pool(stale) as pool:
                for start in range(0, len(stale), _WRITE_EVERY):
                    for at in range(start, min(start + _WRITE_EVERY, len(stale)), 4096):
                        names = stale[at : min(at + 4096, start + _WRITE_EVERY)]
                        paths = [folder / name for name in names]
                        found = pool.map(inspect_audio, paths, chunksize=64)  # of processes
                        for name, one in zip(names, found, strict=True):
                            known[name] = (*files[name], *one)
                            bar.update()
                    _write(cache, known)
        except BaseException:
            _write(cache, known)
            raise
    return {name: known[name][2:] for name in files}


def _pool(names: list[str]) -> Executor:
    """Threads; processes for many m4a files, of which PyAV decodes one at a time in a process."""
    if sum(name.lower().endswith(".m4a") for name in names) < _MANY:
        return ThreadPoolExecutor()
    return ProcessPoolExecutor(mp_context=get_context("spawn"))


def _read(cache: Path) -> _Known:
    if not cache.is_file():
        return {}
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            names, faults = (
                os.fsdecode(arrays[key].tobytes()).split("\0") for key in ("names", "faults")
            )
            numbers = (arrays[key].tolist() for key in ("sizes", "times", "seconds"))
            return dict(zip(names[:-1], zip(*numbers, faults[:-1], strict=True), strict=True))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        logger.warning(f"{cache} is damaged ({error}); the recordings are opened again")
        return {}


def _write(cache: Path, known: _Known) -> None:
    known = {name: one for name, one in known.items() if not one[3]}
    if not known:
        return
    sizes, times, seconds, faults = zip(*known.values(), strict=True)
    names, faults = (
        np.frombuffer(os.fsencode("".join(f"{text}\0" for text in texts)), np.uint8)
        for texts in (known, faults)
    )
    try:
        with replacing(cache) as partial_file:
            np.savez_compressed(
                partial_file,
                names=names,
                sizes=np.array(sizes, np.int64),
                times=np.array(times, np.int64),
                seconds=np.array(seconds, np.float64),
                faults=faults,
            )
    except OSError as error:
        logger.warning(
            f"{cache} cannot be written ({error}); the next run opens every recording again. Name "
            "a folder that can be in SPEECHBRAIN_QMARGIN_CACHE"
        )
