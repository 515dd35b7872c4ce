"""A folder of face images divided into training, validation and test.

The folder holds ``<identity>/<image>.{jpg,png,...}``, itself or below ``images/``. An image's id is
its path below that, as pair lists write it. Identities that a pair list names are never trained on.
Test images that cannot be decoded are found before training. In training another image takes the
place of such a one, which is listed (:class:`~speechbrain_qmargin.data.skipped.Skipped`).
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechbrain_qmargin.data.classes import (
    all_pairs,
    held_out_for_validation,
    training_classes,
    warn_of_change,
)
from speechbrain_qmargin.data.folders import found_file, say_unread
from speechbrain_qmargin.data.images import IMAGE_SUFFIXES, UNREAD_IMAGES
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.files import named_file
from speechbrain_qmargin.trials import LabelledTrials, match_ids, read_trials, speaker_in

__all__ = ["FaceCorpus", "prepare_faces"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FaceCorpus:
    """What :func:`prepare_faces` found.

    Attributes
    ----------
    root : Path
    train, valid, test : Manifest
    valid_trials : LabelledTrials or None
    test_trials : dict from name to LabelledTrials
        Pairs, ids as in the manifests.

    Examples
    --------
    >>> train = Manifest.of([Item("ann/1.png", "/faces/ann/1.png", "ann")])
    >>> nothing = Manifest.of([])
    >>> FaceCorpus(Path("/faces"), train, nothing, nothing, None, {}).identities
    ['ann']
    """

    root: Path
    train: Manifest
    valid: Manifest
    test: Manifest
    valid_trials: LabelledTrials | None
    test_trials: dict[str, LabelledTrials]

    @property
    def identities(self) -> list[str]:
        """Training identities, sorted."""
        return list(self.train.classes)


def prepare_faces(
    data_folder: str | Path,
    save_folder: str | Path,
    *,
    verification_file: str | Path | None = None,
    valid_file: str | Path | None = None,
    num_valid_identities: int = 0,
    train_identities: str | Path | None = None,
    min_images: int = 2,
) -> FaceCorpus:
    """Divide a folder of images into training, validation and test.

    Parameters
    ----------
    data_folder : path
        Holds ``<identity>/<image>``, itself or below ``images/``; hidden files are left out.
    save_folder : path
        Where the manifests are written.
    verification_file, valid_file : path, optional
        Pairs, ``label image image`` per line, or LFW's ``pairs.txt``.
    num_valid_identities : int
        Without a `valid_file`: how many training identities to hold out; all pairs of up to ten
        of their images become the validation pairs. 0: no validation.
    train_identities : path, optional
        A file of identities to train on, one a line; otherwise all that no pair list names.
    min_images : int
        Identities with fewer are dropped, with a warning that names them.

    Raises
    ------
    FileNotFoundError, ValueError
        A missing folder or list, a file in the folder's place, images deeper than
        ``<identity>/<image>``, a pair whose image is missing, a training list that shares
        identities with the pairs or names unknown ones: each is named.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> for name in ("ann", "bob", "cyd", "dan"):
    ...     (folder / "images" / name).mkdir(parents=True)
    ...     for number in (1, 2):
    ...         (folder / "images" / name / f"{number}.png").touch()
    >>> pairs = folder / "pairs.txt"
    >>> _ = pairs.write_text("1 ann/1.png ann/2.png\\n0 ann/1.png bob/1.png\\n")
    >>> corpus = prepare_faces(folder, folder / "save", verification_file=pairs)
    >>> corpus.identities, len(corpus.train), list(corpus.test.ids)
    (['cyd', 'dan'], 4, ['ann/1.png', 'ann/2.png', 'bob/1.png'])
    """
    root = Path(data_folder)
    if root.is_file():
        raise ValueError(
            f"data_folder: {root} is a file; give the folder of <identity>/<image>, a .rec, or the "
            "folder of a .rec or of .tar shards"
        )
    if not root.is_dir():
        raise FileNotFoundError(f"data_folder: {root} does not exist")
    root = root / "images" if (root / "images").is_dir() else root
    everything = _images_below(root)
    faults = everything.faults
    if faults:
        name, fault = next(iter(faults.items()))
        logger.warning(f"{len(faults)} images are left out, the first is {name}: {fault}")
    trials: dict[str, LabelledTrials] = {}
    if verification_file is not None:
        path = named_file("verification_file", verification_file)
        trials[path.stem] = _pairs(path, everything, root)
    valid_trials = None
    if valid_file is not None:
        valid_trials = _pairs(named_file("valid_file", valid_file), everything, root)
    if train_identities is not None:
        named_file("train_identities", train_identities)
    used = [*trials.values()] + ([] if valid_trials is None else [valid_trials])
    held_out = {speaker_in(name) for each in used for name in each.ids}

    by_identity = everything.rows_by_class()
    candidates = training_classes(
        by_identity,
        held_out,
        listed=train_identities,
        minimum=min_images,
        names=("identities", "images"),
    )
    able = len(candidates)
    if valid_file is None and num_valid_identities > 0:
        if num_valid_identities == 1:
            raise ValueError("num_valid_identities: 1 has no impostor pairs; 0, or 2 and more")
        candidates, rows = held_out_for_validation(by_identity, candidates, num_valid_identities)
        valid_trials = all_pairs(everything.take(_ascending(rows)).class_of_id)
    if len(candidates) < 2:
        tested = len(held_out.intersection(by_identity))
        raise ValueError(
            f"{root}: {len(candidates)} identities left to train on, at least 2 are needed. Of "
            f"{len(by_identity)} the pair lists hold out {tested}, "
            f"validation {able - len(candidates)} (num_valid_identities)"
        )

    def part(name: str, rows: Iterable[int] | np.ndarray) -> Manifest:
        chosen = everything.take(_ascending(rows))
        kept = Path(save_folder) / "manifests" / f"{name}.manifest"
        if name == "train":
            warn_of_change(kept, chosen, ("identities", "images"))
        return chosen.kept_in(kept)

    def named(names: Iterable[str]) -> set[int]:
        return {everything.row(name) for name in names}

    return FaceCorpus(
        root=root,
        train=part("train", np.concatenate([by_identity[identity] for identity in candidates])),
        valid=part("valid", named(valid_trials.ids if valid_trials else ())),
        test=part("test", named(name for each in trials.values() for name in each.ids)),
        valid_trials=valid_trials,
        test_trials=trials,
    )


def _ascending(rows: Iterable[int] | np.ndarray) -> np.ndarray:
    array = rows if isinstance(rows, np.ndarray) else np.array(list(rows), np.int64)
    return np.sort(array)


def _images_below(root: Path) -> Manifest:
    """Every ``<identity>/<image>``; those that cannot be used by their names are its faults."""
    faults: dict[str, str] = {}
    images = Manifest.of(_scanned(root, faults), faults)
    if not len(images):
        raise FileNotFoundError(
            f"data_folder: no <identity>/<image> with {', '.join(IMAGE_SUFFIXES)} below {root}"
        )
    return images


def _scanned(root: Path, faults: dict[str, str]) -> Iterator[Item]:
    """In the order of their ids, so that a list of millions need not be made to be sorted."""

    def entries(folder: str | Path, end: str = "") -> list[os.DirEntry]:
        with os.scandir(folder) as found:
            shown = [entry for entry in found if not entry.name.startswith(".")]
        return sorted(shown, key=lambda entry: entry.name + end)

    def is_image(name: str) -> bool:
        return name.lower().endswith(IMAGE_SUFFIXES)

    left_out: Counter[str] = Counter()
    for identity in entries(root, "/"):
        for entry in entries(identity.path) if identity.is_dir() else ():
            if is_image(entry.name):
                image = found_file(f"{identity.name}/{entry.name}", entry.path)
                fault = image.fault
                if entry.is_symlink() and not os.path.exists(entry.path):
                    fault = fault or "a link to nothing"
                if fault:
                    faults[image.name] = fault
                else:
                    yield Item(image.name, image.path, identity.name)
            elif entry.is_dir():
                for folder, _, names in os.walk(entry.path):
                    if deeper := sorted(filter(is_image, names)):
                        raise ValueError(
                            f"data_folder: {Path(folder, deeper[0])} is deeper than "
                            f"<identity>/<image> below {root}: give the folder that holds the "
                            f"folders of the identities, such as {Path(folder).parent}; several "
                            "of them have to become one first (links will do)"
                        )
            elif (name := entry.name.lower()).endswith(UNREAD_IMAGES):
                left_out[os.path.splitext(name)[1]] += 1
    say_unread(root, left_out, IMAGE_SUFFIXES)


def _pairs(pair_list: Path, images: Manifest, root: Path) -> LabelledTrials:
    """The pairs of a list, of both kinds; all their images must be there."""
    trials = read_trials(pair_list)
    known = images.class_of_id
    missing = [name for name in trials.ids if name not in known]
    if missing:  # perhaps by their suffix alone
        held = list(known)
        places, how = match_ids(trials.ids, held)
        missing = [name for name, at in zip(trials.ids, places, strict=True) if at < 0]
        if not missing:
            found = zip(trials.ids, places.tolist(), strict=True)
            trials = trials.renamed({name: held[at] for name, at in found})
            logger.warning(f"{pair_list}: its images are found below {root} {how}")
    if missing:
        raise FileNotFoundError(
            f"{pair_list}: {len(missing)} of the images it names are not below {root}, the first: "
            f"{', '.join(missing[:5])}"
        )
    if len(np.unique(trials.is_target)) < 2:
        raise ValueError(f"{pair_list}: it has no target or no impostor pairs")
    trials.speakers()  # a label that contradicts its identities stops the run before it trains
    return trials
