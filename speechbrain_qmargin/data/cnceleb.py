"""CN-Celeb as it is published (OpenSLR 82): CN-Celeb_flac and CN-Celeb2_flac.

- ``data/id00000/<genre>-01-001.flac``: all speakers' recordings
- ``dev/dev.lst``, in CN-Celeb 2 ``spk.lst``: the speakers that are trained on
- ``eval/enroll/id00800-enroll.flac``: of each test speaker, recordings in one piece
- ``eval/test/id00800-singing-01-001.flac``: what is tested
- ``eval/lists/trials.lst``: ``id00800-enroll test/id00800-singing-01-001.wav 1``
- ``eval/lists/enroll.lst``, ``enroll.map``: from a model (``id00800-enroll``) to its recording in
  ``enroll``, to its recordings in ``data``

Its ids look like VoxCeleb2's and mean other people.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.tables import numbered_lines
from speechbrain_qmargin.trials import speaker_in

__all__ = ["is_cnceleb", "read_cnceleb"]

logger = logging.getLogger(__name__)


def is_cnceleb(folder: str | Path) -> bool:
    """Whether a folder is CN-Celeb by its ``data`` and its lists.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "data").mkdir()
    >>> is_cnceleb(folder)
    False
    >>> (folder / "eval/lists").mkdir(parents=True)
    >>> is_cnceleb(folder)
    True
    """
    folder = Path(folder)
    return (folder / "data").is_dir() and (
        _training_list(folder) is not None or (folder / "eval" / "lists").is_dir()
    )


def read_cnceleb(folder: Path, for_trials: bool = False) -> Manifest:
    """CN-Celeb: ids are ``id00000/<file>``, ``enroll/<file>`` and ``test/<file>``.

    Trained on are the speakers of ``dev/dev.lst`` (of ``spk.lst`` in CN-Celeb 2), or those without
    test recordings where there is no list. For trials everything is there, the test speakers'
    recordings in ``data`` too, of which ``enroll.map`` makes models.

    Parameters
    ----------
    folder : path
    for_trials : bool
        Whether trials are taken from it and nobody in it is trained on.

    Raises
    ------
    FileNotFoundError
        No audio.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> for file in ("data/id00000/singing-01-001.flac", "data/id00800/vlog-01-001.flac",
    ...              "eval/test/id00800-vlog-01-001.flac"):
    ...     (folder / file).parent.mkdir(parents=True, exist_ok=True)
    ...     (folder / file).touch()
    >>> list(read_cnceleb(folder).ids)
    ['id00000/singing-01-001.flac']
    >>> sorted(read_cnceleb(folder, for_trials=True).ids)
    ['id00000/singing-01-001.flac', 'id00800/vlog-01-001.flac', 'test/id00800-vlog-01-001.flac']
    """
    test_speakers = {item.label for part in ("enroll", "test") for item in _tested(folder, part)}
    listing = _training_list(folder)
    listed = {name.strip() for _, name in numbered_lines(listing)} if listing else None
    faults: dict[str, str] = {}
    left_out = 0

    def items() -> Iterator[Item]:
        nonlocal left_out
        for found in audio_files(folder / "data"):
            speaker = speaker_in(found.name)
            trained = speaker not in test_speakers if listed is None else speaker in listed
            if not for_trials and not trained:
                left_out += 1
            elif found.fault:
                faults[found.name] = found.fault
            else:
                yield Item(found.name, found.path, speaker)
        if for_trials:
            for part in ("enroll", "test"):
                yield from _tested(folder, part)

    manifest = replace(Manifest.of(items()), faults=faults)
    if not len(manifest):
        raise FileNotFoundError(
            f"data_folder: no {', '.join(AUDIO_SUFFIXES)} file of a training speaker below "
            f"{folder / 'data'}"
        )
    logger.info(
        f"{folder}: CN-Celeb, {len(manifest):,} recordings of {len(manifest.classes):,} speakers, "
        + ("for trials alone" if for_trials else "to train on")
    )
    if left_out:
        logger.info(f"{folder}: {left_out:,} recordings of other speakers are not trained on")
    return manifest


def _training_list(folder: Path) -> Path | None:
    for name in ("dev/dev.lst", "spk.lst"):
        if (folder / name).is_file():
            return folder / name
    return None


def _tested(folder: Path, part: str) -> Iterator[Item]:
    """``enroll`` or ``test``: a file's name begins with its speaker."""
    below = folder / "eval" / part
    for found in audio_files(below) if below.is_dir() else ():
        if not found.fault:
            speaker = found.name.rsplit("/", 1)[-1].split("-", 1)[0]
            yield Item(f"{part}/{found.name}", found.path, speaker)
