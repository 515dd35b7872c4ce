"""VoxCeleb as it is published: where its audio lies, and its m4a decoded once.

====================  ==========================================
VoxCeleb1             ``wav/idXXXXX/<video>/<utterance>.wav``, the archives ``vox1_dev_wav`` and
                      ``vox1_test_wav`` (or ``dev`` and ``test``) merged or side by side
VoxCeleb2             ``dev/aac/idXXXXX/<video>/<utterance>.m4a``
====================  ==========================================
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, read_audio
from speechbrain_qmargin.files import replacing, write_text

__all__ = ["audio_roots", "convert_to_flac"]

logger = logging.getLogger(__name__)

_AUDIO_FOLDERS = ("wav", "flac", "aac")  # in the order of preference


def audio_roots(folder: str | Path) -> list[Path]:
    """The folders below which ``<speaker>/<session>/<utterance>`` lie.

    These are ``wav``, ``flac`` and ``aac`` in the folder itself or one level below it
    (``vox1_dev_wav/wav``, ``dev/aac``). VoxCeleb2's ``test/aac`` counts only where there is no
    ``dev/aac`` beside it: the published systems are trained on the development part alone.

    Raises
    ------
    FileNotFoundError
        The folder does not exist or has no such folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data_folder: {folder} does not exist")
    parents = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    parents = [path for path in parents if path.name not in _AUDIO_FOLDERS or path == folder]
    roots = [path / name for path in parents for name in _AUDIO_FOLDERS if (path / name).is_dir()]
    if folder / "dev" / "aac" in roots and folder / "test" / "aac" in roots:
        roots.remove(folder / "test" / "aac")
        logger.warning(f"{folder}: dev/aac is used, test/aac is not")
    if not roots:
        raise FileNotFoundError(
            f"data_folder: {folder} must hold wav/<speaker>/<session>/<utterance>.wav or .flac, "
            "as VoxCeleb1, or dev/aac/<speaker>/<session>/<utterance>.m4a, as VoxCeleb2"
        )
    return roots


def audio_files(root: Path) -> Iterable[tuple[str, os.DirEntry]]:
    """Every audio file below a root: its path from there, with ``/``, and its directory entry."""
    stack = [(root, "")]
    while stack:
        folder, prefix = stack.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    stack.append((Path(entry.path), f"{prefix}{entry.name}/"))
                elif entry.name.lower().endswith(AUDIO_SUFFIXES):
                    yield prefix + entry.name, entry


def convert_to_flac(
    source: str | Path,
    destination: str | Path,
    *,
    sample_rate: int = 16000,
    jobs: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Decode a corpus once: every audio file of `source` as FLAC below ``destination/wav``.

    A file appears whole or not at all, those that are there already and not older than their
    source are kept: started again, it goes on where it was interrupted. What cannot be decoded is
    listed in ``destination/not_converted.txt``.

    Parameters
    ----------
    source : path
        In one of the layouts of :func:`audio_roots`.
    destination : path
        Afterwards a ``data_folder`` for :func:`~speechbrain_qmargin.data.speech.prepare_speech`.
    sample_rate : int
        Hz; other rates are resampled.
    jobs : int, optional
        Processes; the number of CPUs by default.

    Returns
    -------
    dict with the counts ``converted``, ``kept`` and ``failed``

    Raises
    ------
    FileNotFoundError
        Nothing to convert there.
    OSError
        A file cannot be written (the disk is full); what is converted stays.
    """
    destination = Path(destination)
    tasks = []
    for root in audio_roots(source):
        for name, entry in audio_files(root):
            target = destination / "wav" / Path(name).with_suffix(".flac")
            tasks.append((name, Path(entry.path), target))
    if not tasks:
        raise FileNotFoundError(f"{source}: no audio below {audio_roots(source)}")
    jobs = jobs or os.cpu_count() or 1
    counts = dict.fromkeys(("converted", "kept", "failed"), 0)
    failures = []
    convert = partial(_convert, sample_rate=sample_rate)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(tasks), desc="to FLAC", unit="file", disable=not progress)
        )
        run = map
        if jobs > 1:  # processes: PyAV holds Python's lock most of the time
            pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
            run = partial(stack.enter_context(pool).map, chunksize=16)
        for start in range(0, len(tasks), 4096):
            for outcome, failure in run(convert, tasks[start : start + 4096]):
                counts[outcome] += 1
                failures += [failure] if failure else []
                bar.update()
    if failures:
        write_text(destination / "not_converted.txt", "".join(failures))
        logger.warning(
            f"{len(failures)} files could not be decoded, all listed in "
            f"{destination / 'not_converted.txt'}: {failures[0].strip()}"
        )
    return counts


def _convert(task: tuple[str, Path, Path], sample_rate: int) -> tuple[str, str]:
    """(converted, kept or failed, the reason)."""
    import soundfile

    name, path, target = task
    if target.is_file() and target.stat().st_mtime_ns >= path.stat().st_mtime_ns:
        return "kept", ""
    try:
        signal = read_audio(path, sample_rate)
    except OSError as error:
        return "failed", f"{name}\t{error}\n"
    if not signal.numel():
        return "failed", f"{name}\t{path}: empty\n"
    try:
        with replacing(target) as partial_file:
            soundfile.write(str(partial_file), signal.numpy(), sample_rate, subtype="PCM_16")
    except (OSError, soundfile.LibsndfileError) as error:
        raise OSError(
            f"{target}: cannot be written ({error}). What is converted stays; make room and start "
            "again"
        ) from error
    return "converted", ""
