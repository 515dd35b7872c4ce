"""Training classes, speakers or identities: who trains, who is held out, which label."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from speechbrain_qmargin.data.manifest import Manifest
from speechbrain_qmargin.files import replacing
from speechbrain_qmargin.tables import composed_name, numbered_lines
from speechbrain_qmargin.trials import LabelledTrials

__all__ = [
    "all_pairs",
    "class_encoder",
    "held_out_for_validation",
    "training_classes",
    "warn_of_change",
]

logger = logging.getLogger(__name__)


def training_classes(
    items: Mapping[str, Sequence[Any] | np.ndarray],
    held_out: set[str],
    *,
    listed: str | Path | None = None,
    minimum: int = 1,
    names: tuple[str, str] = ("speakers", "utterances"),
) -> list[str]:
    """The classes to train on, sorted.

    Parameters
    ----------
    items : mapping from class to its usable items
    held_out : set
        Classes that trials name.
    listed : path, optional
        A file of classes to train on, one a line; otherwise all that are not held out.
    minimum : int
        Classes with fewer items are dropped, with a warning that names them.
    names : tuple
        What classes and items are called in messages.

    Raises
    ------
    ValueError
        The file names unknown classes or ones that trials name, or is not of UTF-8.

    Examples
    --------
    >>> training_classes({"ann": ["1", "2"], "bob": ["1", "2"], "eve": ["1", "2"]}, {"eve"})
    ['ann', 'bob']
    """
    classes, what = names
    chosen = sorted(set(items) - held_out)
    if listed is not None:
        # a name may have spaces in it
        chosen = sorted({composed_name(name.strip()) for _, name in numbered_lines(listed)})
        unknown = [name for name in chosen if name not in items]
        shared = sorted(set(chosen) & held_out)
        if unknown:
            raise ValueError(f"{listed}: no usable {what} of {', '.join(unknown[:5])}")
        if shared:
            raise ValueError(
                f"{listed}: {', '.join(shared[:5])} also appear in a trial list; training and "
                f"trials must not share {classes}"
            )
    few = {name for name in chosen if len(items[name]) < minimum}
    if few:
        logger.warning(
            f"{len(few)} {classes} with fewer than {minimum} usable {what} are not trained on: "
            f"{', '.join(sorted(few)[:10])}{' ...' if len(few) > 10 else ''}"
        )
    return [name for name in chosen if name not in few]


def held_out_for_validation(
    items: Mapping[str, Sequence[Any] | np.ndarray], classes: list[str], count: int
) -> tuple[list[str], set[Any]]:
    """The classes that stay, and up to ten items, evenly spread, of each of `count` others.

    Who is held out depends on the number of classes alone.

    Parameters
    ----------
    items : mapping from class to its items
    classes : list of str
    count : int
        Classes to hold out.

    Returns
    -------
    (classes, members)
        Those that stay, in their order; the set of the items of the others.

    Examples
    --------
    >>> items = {name: [f"{name}/{number}" for number in range(20)] for name in ("a", "b", "c")}
    >>> classes, members = held_out_for_validation(items, ["a", "b", "c"], 1)
    >>> classes, len(members), "c/0" in members, "c/1" in members
    (['a', 'b'], 10, True, False)
    """
    order = np.random.default_rng(0).permutation(len(classes))[:count]
    chosen = {classes[i] for i in order}
    members = {name for one in chosen for name in items[one][:: max(1, len(items[one]) // 10)][:10]}
    return [name for name in classes if name not in chosen], members


def all_pairs(class_of: Mapping[str, str]) -> LabelledTrials:
    """Trials of every pair of some ids.

    Parameters
    ----------
    class_of : mapping from id to class

    Examples
    --------
    >>> trials = all_pairs({"ann/1": "ann", "ann/2": "ann", "bob/1": "bob"})
    >>> trials.ids, trials.is_target.tolist()
    (['ann/1', 'ann/2', 'bob/1'], [True, False, False])
    """
    ids = sorted(class_of)
    classes = [class_of[name] for name in ids]
    enrolment, test = np.triu_indices(len(ids), 1)
    codes = np.unique(classes, return_inverse=True)[1]
    return LabelledTrials(ids, enrolment, test, codes[enrolment] == codes[test], "", classes)


def class_encoder(classes: Iterable[str], file: str | Path):
    """SpeechBrain's CategoricalEncoder over the classes in sorted order, kept in `file`.

    Raises
    ------
    ValueError
        `file` is of a run on other classes, whose classifier would not fit.

    Examples
    --------
    >>> class_encoder(["bob", "ann"], getfixture("tmp_path") / "label_encoder.txt").lab2ind
    {'ann': 0, 'bob': 1}
    """
    from speechbrain.dataio.encoder import CategoricalEncoder

    classes, file = sorted(set(classes)), Path(file)
    encoder = CategoricalEncoder()
    # not update_from_iterable: for each label it counts from 0 to the next free index, which takes
    # minutes for the 93,431 identities of MS1MV3 and a day for two million
    encoder.ind2lab = dict(enumerate(classes))
    encoder.lab2ind = {label: index for index, label in encoder.ind2lab.items()}
    encoder.expect_len(len(classes))
    if file.is_file():
        before = set(CategoricalEncoder.from_saved(file).lab2ind)
        changed = sorted(before ^ set(classes))
        if changed:
            raise ValueError(
                f"{file}: the training classes have changed since this run began "
                f"({len(before)} then, {len(classes)} now; {', '.join(changed[:5])}). "
                "Give a new --output_folder"
            )
    else:
        with replacing(file) as partial:
            encoder.save(partial)
    return encoder


def warn_of_change(
    kept: Path, now: Manifest, names: tuple[str, str] = ("speakers", "recordings")
) -> None:
    """Say that the folder's last start had other training data; files may have moved.

    Parameters
    ----------
    kept : path
        Where the last start kept its manifest, if there was one.
    now : Manifest
    names : tuple
        What classes and items are called in the message.

    Examples
    --------
    >>> from speechbrain_qmargin.data.manifest import Item
    >>> kept = getfixture("tmp_path") / "train.manifest"
    >>> manifest = Manifest.of([Item("ann/1", "a.wav", "ann")]).kept_in(kept)
    >>> warn_of_change(kept, manifest)
    """
    try:
        before = Manifest.load(kept)
    except (OSError, ValueError):
        return

    def columns(one: Manifest) -> tuple[np.ndarray, ...]:
        texts = (part for each in (one.ids, one.classes) for part in (each.content, each.offsets))
        return *texts, one.labels, one.start, one.duration

    same = partial(np.array_equal, equal_nan=True)  # images have no duration
    if all(map(same, columns(before), columns(now))):
        return
    classes, items = names
    logger.warning(
        f"{kept}: the training {items} or their {classes} have changed since the last "
        f"start in this folder ({len(before):,} of {len(before.classes):,} {classes} then, "
        f"{len(now):,} of {len(now.classes):,} now). A run that goes on here does not repeat what "
        "an uninterrupted one would be: for that give the earlier data, or a new --output_folder"
    )
