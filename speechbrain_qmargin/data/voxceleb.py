"""VoxCeleb as it is published: where it lies and what of it is trained on.

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
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES
from speechbrain_qmargin.data.folders import audio_files
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.trials import speaker_in

__all__ = ["audio_roots", "read_voxceleb", "training_roots", "warn_of_too_many_speakers"]

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

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "vox1_dev_wav/wav").mkdir(parents=True)
    >>> [root.relative_to(folder).as_posix() for root in audio_roots(folder)]
    ['vox1_dev_wav/wav']
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
    """:func:`audio_roots` without VoxCeleb2's test part, which published systems do not train on.

    Where roots hold VoxCeleb2's speakers and some of them lie in a folder called ``dev`` or
    ``train``, or at least not in one called ``test``, the others are left out with a warning; but
    not those that share speakers with the former, as a converted copy does. VoxCeleb1's test
    speakers are kept: the trial lists hold them out.

    Raises
    ------
    FileNotFoundError
        As :func:`audio_roots`.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "vox2_dev_aac/dev/aac/id00012").mkdir(parents=True)
    >>> (folder / "vox2_test_aac/aac/id00017").mkdir(parents=True)
    >>> [root.relative_to(folder).as_posix() for root in training_roots(folder)]
    ['vox2_dev_aac/dev/aac']
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
    """Warn in the log where more of VoxCeleb2's speakers are trained on than its dev part has.

    Examples
    --------
    >>> warn_of_too_many_speakers(f"id{number:05}" for number in range(5995))
    >>> print(getfixture("caplog").messages[0])
    5,995 training speakers are VoxCeleb2's by their ids, and its development part has 5,994: ...
    """
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


def read_voxceleb(folder: Path, for_trials: bool = False) -> Manifest:
    """A folder in VoxCeleb's layouts: ids are paths from the speaker on.

    Each root is logged with what it holds. A recording that is there twice, as m4a and decoded, is
    taken from the first root, in the order of :func:`audio_roots`.

    Parameters
    ----------
    folder : path
    for_trials : bool
        VoxCeleb2's test part is left out of what is trained on, not of what trials are taken from.

    Raises
    ------
    FileNotFoundError
        No folder, no such layout, no audio.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "wav/id10001/1zcIwhmdeo4").mkdir(parents=True)
    >>> (folder / "wav/id10001/1zcIwhmdeo4/00001.wav").touch()
    >>> manifest = read_voxceleb(folder)
    >>> manifest[0].id, manifest[0].label
    ('id10001/1zcIwhmdeo4/00001.wav', 'id10001')
    """
    roots = audio_roots(folder) if for_trials else training_roots(folder)
    taken: dict[str, str] = {}
    doubles: list[str] = []
    faults: dict[str, str] = {}

    def items() -> Iterator[Item]:
        for number, root in enumerate(roots):
            count, speakers = 0, set()
            for found in audio_files(root):
                if found.fault:
                    faults[found.name] = found.fault
                    continue
                if len(roots) > 1:
                    stem = found.name.rsplit(".", 1)[0]
                    if stem in taken:
                        doubles.append(f"{found.path} is {taken[stem]} again")
                        continue
                    if number + 1 < len(roots):
                        taken[stem] = found.path
                count += 1
                speakers.add(speaker_in(found.name))
                yield Item(found.name, found.path, speaker_in(found.name))
            logger.info(
                f"{root}: {count:,} recordings of {len(speakers):,} speakers, "
                f"{'for trials alone' if for_trials else 'to train on or for trials'}"
            )

    manifest = replace(Manifest.of(items()), faults=faults)
    if not (len(manifest) or doubles or faults):
        raise FileNotFoundError(
            f"data_folder: no {', '.join(AUDIO_SUFFIXES)} file below {_listed(roots)}"
        )
    if doubles:
        logger.warning(f"{len(doubles)} recordings are there twice, used once: {doubles[0]}")
    return manifest
