"""A corpus decoded once, to FLAC."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from speechbrain_qmargin.data.audio import read_audio
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.skipped import write_listing
from speechbrain_qmargin.data.voxceleb import training_roots
from speechbrain_qmargin.files import fault_of, replacing

__all__ = ["convert_to_flac"]

logger = logging.getLogger(__name__)


def convert_to_flac(
    source: str | Path,
    destination: str | Path,
    *,
    sample_rate: int = 16000,
    jobs: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Decode a corpus once: every audio file of `source` as FLAC below ``destination/wav``.

    A file appears whole or not at all. Those that are there already and not older than their
    source are kept, so that an interrupted conversion goes on when it is started again. What cannot
    be decoded is listed in ``destination/not_converted.txt``.

    Parameters
    ----------
    source : path
        In a layout of :func:`~speechbrain_qmargin.data.voxceleb.audio_roots`; VoxCeleb2's
        test part is left out, as by :func:`training_roots`.
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
    ValueError
        `destination` is where the recordings are; two files would be one, as a.wav and a.mp3.

    Examples
    --------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> (folder / "wav/ann/0").mkdir(parents=True)
    >>> soundfile.write(folder / "wav/ann/0/1.wav", torch.zeros(8000), 8000)
    >>> convert_to_flac(folder, folder / "flac", jobs=1, progress=False)
    {'converted': 1, 'kept': 0, 'failed': 0}
    >>> soundfile.info(folder / "flac/wav/ann/0/1.flac").samplerate
    16000
    """
    destination = Path(destination)
    tasks: list[tuple[str, Path, Path]] = []
    faults: dict[str, str] = {}
    roots = training_roots(source)
    if (destination / "wav").resolve() in [root.resolve() for root in roots]:
        raise ValueError(
            f"{destination}: FLAC files would lie among the recordings; another folder"
        )
    named: dict[Path, str] = {}
    for root in roots:
        for found in audio_files(root):
            if found.fault:
                faults[found.name] = found.fault
                continue
            target = destination / "wav" / Path(found.name).with_suffix(".flac")
            if target in named:
                raise ValueError(f"{target} would be of both {named[target]} and {found.name}")
            named[target] = found.name
            tasks.append((found.name, Path(found.path), target))
    if not tasks:
        raise FileNotFoundError(f"{source}: no audio below {', '.join(map(str, roots))}")
    jobs = jobs or os.cpu_count() or 1
    counts = dict.fromkeys(("converted", "kept"), 0) | {"failed": len(faults)}
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
            some = tasks[start : start + 4096]
            for (name, *_), (outcome, fault) in zip(some, run(convert, some), strict=True):
                counts[outcome] += 1
                if fault:
                    faults[name] = fault
                bar.update()
    listing = destination / "not_converted.txt"
    write_listing(listing, faults)
    if faults:
        name, fault = next(iter(faults.items()))
        logger.warning(
            f"{len(faults)} files could not be decoded, all listed in {listing}: {name}: {fault}"
        )
    return counts


def _convert(task: tuple[str, Path, Path], sample_rate: int) -> tuple[str, str]:
    """(converted, kept or failed, the reason)."""
    import soundfile

    _, path, target = task
    try:
        if target.is_file() and target.stat().st_mtime_ns >= path.stat().st_mtime_ns:
            return "kept", ""
        signal = read_audio(path, sample_rate)
    except OSError as error:
        return "failed", fault_of(error)
    peak = float(signal.abs().max())
    if peak > 1:  # decoders and resampling overshoot; 16 bits would clip it
        signal = torch.div(signal, peak)
    try:
        with replacing(target) as partial_file:
            soundfile.write(str(partial_file), signal.numpy(), sample_rate, subtype="PCM_16")
    except (OSError, soundfile.LibsndfileError) as error:
        raise OSError(
            f"{target}: cannot be written ({error}). What is converted stays; make room and start "
            "again"
        ) from error
    return "converted", ""
