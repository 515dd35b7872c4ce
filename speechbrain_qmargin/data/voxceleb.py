"""VoxCeleb as it is published: where it lies, what of it is trained on, its m4a decoded once.

====================  ==========================================
VoxCeleb1             ``wav/idXXXXX/<video>/<utterance>.wav``, the archives ``vox1_dev_wav`` and
                      ``vox1_test_wav`` (or ``dev`` and ``test``) merged or side by side
VoxCeleb2             ``dev/aac/idXXXXX/<video>/<utterance>.m4a``; its test part, ``aac`` as the
                      archive has it or ``test/aac``, is not trained on
====================  ==========================================

VoxCeleb2's speakers are id00012 to id09272, VoxCeleb1's id10001 to id11251.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, read_audio
from speechbrain_qmargin.files import replacing, write_text

__all__ = ["audio_roots", "convert_to_flac", "training_roots", "warn_of_too_many_speakers"]

logger = logging.getLogger(__name__)

_AUDIO_FOLDERS = ("wav", "flac", "aac")  # in the order of preference
_VOXCELEB2_SPEAKER = re.compile(r"id0\d{4}")
_VOXCELEB2_TRAINING_SPEAKERS = 5994


def audio_roots(folder: str | Path) -> list[Path]:
    """The folders below which ``<speaker>/<session>/<utterance>`` lie.

    These are ``wav``, ``flac`` and ``aac`` in the folder itself, one level below it
    (``vox1_dev_wav/wav``, ``dev/aac``), and in a ``dev`` or ``test`` there
    (``vox2_dev_aac/dev/aac``).

    Raises
    ------
    FileNotFoundError
        The folder does not exist or has no such folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data_folder: {folder} does not exist")
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    inner = [path for path in inner if path.name not in _AUDIO_FOLDERS]
    parents = [folder, *inner, *(path / part for path in inner for part in ("dev", "test"))]
    roots = [path / name for path in parents for name in _AUDIO_FOLDERS if (path / name).is_dir()]
    if not roots:
        raise FileNotFoundError(
            f"data_folder: {folder} must hold wav/<speaker>/<session>/<utterance>.wav or .flac, "
            "as VoxCeleb1, or dev/aac/<speaker>/<session>/<utterance>.m4a, as VoxCeleb2"
        )
    return roots


def training_roots(folder: str | Path) -> list[Path]:
    """:func:`audio_roots` less VoxCeleb2's test part, on which published systems are not trained.

    Where roots hold VoxCeleb2's speakers and some of them lie in a folder called ``dev`` or
    ``train``, or at least not in one called ``test``, the others are left out with a warning; but
    not those that share speakers with the former, as a converted copy does. VoxCeleb1's test
    speakers are kept: the trial lists hold them out.

    Raises
    ------
    FileNotFoundError
        As :func:`audio_roots`.
    """
    folder = Path(folder)
    roots = audio_roots(folder)
    second = {root: found for root in roots if (found := _voxceleb2_speakers(root))}
    words = {
        root: set(re.split(r"[^a-z0-9]+", root.relative_to(folder).as_posix().lower()))
        for root in second
    }
    dev = [root for root in second if words[root] & {"dev", "train"}]
    dev = dev or [root for root in second if "test" not in words[root]] or list(second)
    speakers = {speaker for root in dev for speaker in second[root]}
    left_out = [root for root in second if root not in dev and not second[root] & speakers]
    if left_out:
        logger.warning(
            f"{folder}: VoxCeleb2's development part is {_listed(dev)}; its test part, "
            f"{_listed(left_out)}, is not trained on"
        )
    return [root for root in roots if root not in left_out]


def warn_of_too_many_speakers(speakers: Iterable[str]) -> None:
    """Say so where more of VoxCeleb2's speakers are to be trained on than its dev part has."""
    count = sum(_VOXCELEB2_SPEAKER.fullmatch(speaker) is not None for speaker in speakers)
    if count > _VOXCELEB2_TRAINING_SPEAKERS:
        logger.warning(
            f"{count:,} training speakers are VoxCeleb2's by their ids, and its development part "
            f"has {_VOXCELEB2_TRAINING_SPEAKERS:,}: its test part seems to be trained on, which "
            "published systems are not. Name the development part in data_folder, or its speakers "
            "(vox2_meta.csv has them) in train_speakers"
        )


def _voxceleb2_speakers(root: Path) -> set[str]:
    """Whose folders a root has, VoxCeleb1's aside; only VoxCeleb2 comes in a folder ``aac``."""
    with os.scandir(root) as entries:
        names = {entry.name for entry in entries}
    return names if root.name == "aac" else set(filter(_VOXCELEB2_SPEAKER.fullmatch, names))


def _listed(roots: list[Path]) -> str:
    return ", ".join(map(str, roots))


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
        In one of the layouts of :func:`audio_roots`; VoxCeleb2's test part is left out, as by
        :func:`training_roots`.
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
    roots = training_roots(source)
    for root in roots:
        for name, entry in audio_files(root):
            target = destination / "wav" / Path(name).with_suffix(".flac")
            tasks.append((name, Path(entry.path), target))
    if not tasks:
        raise FileNotFoundError(f"{source}: no audio below {_listed(roots)}")
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
