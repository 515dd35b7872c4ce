"""A speech corpus divided into training, validation and test.

The corpus comes as a manifest (:mod:`~speechbrain_qmargin.data.readers`). Speakers that a trial
list names are never trained on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, MIN_SECONDS
from speechbrain_qmargin.data.classes import (
    all_pairs,
    held_out_for_validation,
    training_classes,
    warn_of_change,
)
from speechbrain_qmargin.data.cnceleb import read_cnceleb
from speechbrain_qmargin.data.durations import check_recordings, durations
from speechbrain_qmargin.data.manifest import Item, Manifest, Texts
from speechbrain_qmargin.data.readers import Read, read_corpus, reader_of
from speechbrain_qmargin.data.skipped import write_listing
from speechbrain_qmargin.data.voxceleb import warn_of_too_many_speakers
from speechbrain_qmargin.files import named_file, write_text
from speechbrain_qmargin.tables import numbered_lines, read_models, some
from speechbrain_qmargin.trials import (
    LabelledTrials,
    Trials,
    read_trials,
    speaker_in,
    write_trials,
)

__all__ = ["SKIPPED", "SpeechCorpus", "prepare_speech"]

logger = logging.getLogger(__name__)

SKIPPED = "skipped_audio.txt"
"""In a run's save folder: the recordings that cannot be used."""

_SAME_SECONDS = 0.25  # between the lengths of a recording in two formats
_CNCELEB = "cnceleb-"


@dataclass(frozen=True)
class SpeechCorpus:
    """What :func:`prepare_speech` found.

    Attributes
    ----------
    train, valid, test : Manifest
    valid_trials : LabelledTrials or None
        Its ids are those of the manifests; its speakers are given.
    test_trials : dict from name to such Trials
    skipped : Path
        Lists the recordings that cannot be used.

    Examples
    --------
    >>> from speechbrain_qmargin.data.manifest import Item
    >>> train = Manifest.of([Item("ann/1.wav", "/data/ann/1.wav", "ann", duration=4.0)])
    >>> nothing = Manifest.of([])
    >>> SpeechCorpus(train, nothing, nothing, None).speakers
    ['ann']
    """

    train: Manifest
    valid: Manifest
    test: Manifest
    valid_trials: LabelledTrials | None
    test_trials: dict[str, LabelledTrials] = field(default_factory=dict)
    skipped: Path = Path(SKIPPED)

    @property
    def speakers(self) -> list[str]:
        """Training speakers, sorted."""
        return list(self.train.classes)


# ------------------------------------------------------------------------- what there is


def _read(
    sources: list[Path], trials_sources: list[Path], reader: Read | None, progress: bool
) -> tuple[Manifest, set[str]]:
    """All recordings, with their durations, and the speakers that appear in trials alone."""
    every = [*sources, *trials_sources]
    parts = []
    for number, source in enumerate(every):
        part = _measured(read_corpus(source, number >= len(sources), reader), source, progress)
        if part.faults and not len(part):
            name, fault = next(iter(part.faults.items()))
            raise OSError(
                f"{source}: none of its {len(part.faults):,} recordings can be used; the first is "
                f"{name}: {fault}"
            )
        parts.append(part)
    if len(parts) > 1:
        parts = _each_once(parts)
        if reader is None:
            parts = _cnceleb_apart(parts, [reader_of(source) is read_cnceleb for source in every])
        _warn_of_shared_speakers(parts, every)
    held_out: set[str] = set()
    for part in parts[len(sources) :]:
        held_out |= set(part.classes) | {speaker_in(name) for name in part.faults}
    return Manifest.joined(parts), held_out


def _each_once(parts: list[Manifest]) -> list[Manifest]:
    """The corpora without the recordings that one before has, by their ids without suffix.

    Raises
    ------
    ValueError
        One id for two recordings: they differ in speaker or length.
    """
    # which may be there twice: numbers for the ids of all corpora, whose strings would not fit
    stems = np.concatenate(
        [np.fromiter((hash(_stem(name)) for name in one.ids), np.int64, len(one)) for one in parts]
    )
    order = np.argsort(stems, kind="stable")
    equal = np.flatnonzero(stems[order[1:]] == stems[order[:-1]])
    twice = np.zeros(len(stems), bool)
    twice[order[equal]] = twice[order[equal + 1]] = True
    taken: dict[str, Item] = {}
    left, doubles = [], []
    for part, candidates in zip(
        parts, np.split(twice, np.cumsum([len(one) for one in parts])[:-1]), strict=True
    ):
        own, again = {}, np.zeros(len(part), bool)
        for row in np.flatnonzero(candidates).tolist():
            item = part[row]
            before = taken.get(_stem(item.id))
            if before is None:
                own[_stem(item.id)] = item
                continue
            again[row] = True
            _refuse_another(before, item)
            if before.file != item.file:
                doubles.append(f"{item.file} is {before.file} again")
        taken |= own
        left.append(replace(part.take(~again), faults=part.faults) if again.any() else part)
    if doubles:
        logger.warning(f"{len(doubles)} recordings are there twice, used once: {doubles[0]}")
    return left


def _refuse_another(one: Item, other: Item) -> None:
    """Of one id: a recording may be there as m4a and decoded, which differ by some frames."""
    lengths = abs(one.duration - other.duration) <= _SAME_SECONDS
    starts = one.file != other.file or abs(one.start - other.start) <= _SAME_SECONDS
    if one.label == other.label and lengths and starts:
        return
    said = [
        f"{item.file}, {item.duration:.2f} s from {item.start:.2f} s, of {item.label}"
        for item in (one, other)
    ]
    raise ValueError(
        f"{other.id} is the id of two recordings: {said[0]}; {said[1]}. Give the ids and speakers "
        "of one corpus a prefix: in wav.scp, segments and utt2spk, in the columns ID and spk_id, "
        "or in the names of the speakers' folders"
    )


def _cnceleb_apart(parts: list[Manifest], is_cnceleb: list[bool]) -> list[Manifest]:
    """CN-Celeb's speakers with a prefix where others have their names: they are other people."""
    names = {kind: set() for kind in (True, False)}
    for part, kind in zip(parts, is_cnceleb, strict=True):
        names[kind] |= set(part.classes)
    shared = names[True] & names[False]
    if not shared:
        return parts
    logger.warning(
        f"{len(shared):,} of CN-Celeb's speakers have the names of others ({some(sorted(shared))}) "
        f"and are other people: all of CN-Celeb's are called {_CNCELEB}id00000 and so on"
    )
    return [
        replace(part, classes=Texts.of(_CNCELEB + name for name in part.classes)) if kind else part
        for part, kind in zip(parts, is_cnceleb, strict=True)
    ]


def _warn_of_shared_speakers(parts: list[Manifest], sources: list[Path]) -> None:
    """A name in two sources is one speaker, which nobody but the user can tell."""
    first: dict[str, Path] = {}
    for part, source in zip(parts, sources, strict=True):
        shared = [name for name in part.classes if first.setdefault(name, source) != source]
        if shared:
            logger.warning(
                f"{len(shared):,} speakers of {source} are in another source too, as {shared[0]} "
                f"in {first[shared[0]]}, and count as the same people. If they are others, give "
                "the speakers of one corpus a prefix: in utt2spk, in the column spk_id, or in the "
                "names of their folders"
            )


def _stem(name: str) -> str:
    """An id without the suffix of an audio file."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in AUDIO_SUFFIXES else name


def _measured(manifest: Manifest, source: Path, progress: bool) -> Manifest:
    """The manifest with durations; what cannot be read or is too short is among its faults."""
    unknown = np.isnan(manifest.duration)
    seconds, faults = manifest.duration.copy(), dict(manifest.faults)
    if unknown.any():
        rows = np.flatnonzero(unknown)
        folder = os.path.join(source, "")
        files = Texts.of(file.removeprefix(folder) for file in manifest.files.take(rows))
        seconds[rows], broken = durations(source, files, progress=progress)
        faults |= {manifest.ids[int(rows[at])]: fault for at, fault in broken.items()}
        seconds[rows] -= manifest.start[rows]
    for row in np.flatnonzero(seconds < MIN_SECONDS).tolist():
        faults[manifest.ids[row]] = f"shorter than {MIN_SECONDS} s"
    good = seconds >= MIN_SECONDS  # NaN is not
    measured = replace(manifest, duration=seconds, path=None)
    return replace(measured.take(good), faults=faults)


# ------------------------------------------------------------------------- what is tested on


def _named_lists(source: str | Path | Sequence | Mapping | None) -> dict[str, Path]:
    """Trial lists by name: given names, or the files' own."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        lists = {str(name): Path(path) for name, path in source.items()}
    else:
        paths = [source] if isinstance(source, str | Path) else list(source)
        lists = {}
        for path in map(Path, paths):
            if path.stem in lists:
                raise ValueError(
                    f"verification_file: {lists[path.stem]} and {path} have the same name, "
                    "which their results would share; rename one of them"
                )
            lists[path.stem] = path
    for name, path in lists.items():
        named_file("verification_file", path)
        if "/" in name:
            raise ValueError(f"verification_file: a list cannot be called {name!r}")
    return lists


class _Names:
    """Which recording a trial list means: its id, with or without suffix, or how its file ends.

    A manifest may call ``id10270--x--00001`` what a list calls ``id10270/x/00001.wav``: then the
    last parts of the files' paths decide, where they are of one recording only.
    """

    def __init__(self, manifest: Manifest, wanted: Iterable[str]) -> None:
        self.manifest = manifest
        stems = {_stem(name) for name in wanted}
        self.rows: dict[str, int] = {}
        for row, name in enumerate(manifest.ids):
            stem = _stem(name)
            if stem in stems:
                self.rows[stem] = row
        self.faults = {_stem(name): fault for name, fault in manifest.faults.items()}
        left = {
            stem: len(stem.split("/"))
            for stem in stems
            if stem not in self.rows and stem not in self.faults
        }
        for depth in sorted(set(left.values())):
            ends: dict[str, int] = {}
            for row, file in enumerate(manifest.files):
                end = "/".join(_stem(file).split("/")[-depth:])
                if left.get(end) == depth:
                    ends[end] = -1 if end in ends else row
            self.rows |= {end: row for end, row in ends.items() if row >= 0}

    def row(self, name: str) -> int | None:
        return self.rows.get(_stem(name))

    def fault(self, name: str) -> str:
        """Why a recording that has no row cannot be used."""
        return self.faults.get(_stem(name), "not found")


def _read_lists(lists: dict[str, Path], enrolment_file: Path | None) -> dict[str, LabelledTrials]:
    """The lists; where enrolment ids are models of the table, with those models."""
    read = {name: read_trials(path) for name, path in lists.items()}
    if enrolment_file is None:
        return read
    models = read_models(enrolment_file)
    enrolled = {
        name: trials.with_models(models)
        for name, trials in read.items()
        if models.keys() & {trials.ids[n] for n in np.unique(trials.enrolment).tolist()}
    }
    if not enrolled:
        raise ValueError(f"{enrolment_file}: no trial list enrols any of its models")
    return read | enrolled


def _resolve_lists(
    lists: dict[str, Path],
    enrolment_file: Path | None,
    manifest: Manifest,
    folders: str,
    save_folder: Path,
    allow_missing: bool,
) -> tuple[dict[str, LabelledTrials], set[str]]:
    """The lists with the manifest's ids, without what is missing if that is allowed; all speakers.

    Each must have target and impostor trials.
    """
    read = _read_lists(lists, enrolment_file)
    names = _Names(manifest, {one for trials in read.values() for one in trials.recordings})
    resolved, report, summaries, speakers = {}, [], [], set()
    for name, trials in read.items():
        path = lists[name]
        rows = {one: names.row(one) for one in trials.recordings}
        lost = [one for one, row in rows.items() if row is None]
        kept = trials.without(lost) if lost else trials
        if lost:
            lines = _first_lines(path, lost)
            report += [f"{name}\t{one}\t{lines[one]}\t{names.fault(one)}\n" for one in lost]
            absent = [one for one in lost if names.fault(one) == "not found"]
            broken = [one for one in lost if names.fault(one) != "not found"]
            parts = [
                f"{len(some)} are {what} ("
                + "; ".join(f"{one} ({lines[one]})" for one in some[:5])
                + ")"
                for some, what in ((absent, "not found"), (broken, "found but unreadable"))
                if some
            ]
            summaries.append(
                f"{path}: of the {len(rows):,} utterances it names, {' and '.join(parts)}; "
                f"{len(kept):,} of its {len(trials):,} trials have both"
            )
        if len(np.unique(kept.is_target)) < 2 and (allow_missing or not lost):
            raise ValueError(
                f"{path}: "
                + (f"without what is missing below {folders} " if lost else "")
                + "it has no target or no impostor trials left"
            )
        found = {one: manifest[row] for one, row in rows.items() if row is not None}
        who = {item.id: item.label for item in found.values()}
        who |= {
            one: speaker_in(one) for one in [*lost, *(trials.models.keys() - kept.models.keys())]
        }
        speakers |= set(who.values())
        renamed = kept.renamed({one: item.id for one, item in found.items()})
        resolved[name] = renamed.with_speakers(who)
    missing = save_folder / "missing.txt"
    if report:
        write_text(missing, "".join(report))
        what = "\n".join(summaries)
        if not allow_missing:
            raise FileNotFoundError(
                f"Recordings are missing below {folders}.\n{what}\nAll are listed in {missing}. "
                "Complete the data, use a list that matches it, or set allow_missing to leave "
                "these trials out"
            )
        logger.warning(f"Trials are left out; results are on reduced lists.\n{what}\nSee {missing}")
    else:
        missing.unlink(missing_ok=True)
    for trials in resolved.values():
        trials.speakers()  # a label that contradicts its speakers stops the run before it trains
    return resolved, speakers


def _first_lines(list_file: Path, names: list[str]) -> dict[str, str]:
    """The first line of a trial list that has each of the recordings, suffixes aside."""
    stems = {_stem(name): name for name in names}
    found: dict[str, str] = {}
    for number, line in numbered_lines(list_file):
        for word in {*line.split(), *line.split("\t"), *line.split(",")}:
            name = stems.get(_stem(word.strip()))
            if name is not None:
                found.setdefault(name, f"line {number}")
    return {name: found.get(name, "of a model") for name in names}


def _paths(folder: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if folder is None:
        return []
    return [Path(folder)] if isinstance(folder, str | Path) else [Path(one) for one in folder]


def prepare_speech(
    data_folder: str | Path | Sequence[str | Path],
    save_folder: str | Path,
    *,
    trials_folder: str | Path | Sequence[str | Path] | None = None,
    verification_file: str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None = None,
    enrolment_file: str | Path | None = None,
    valid_file: str | Path | None = None,
    num_valid_speakers: int = 0,
    train_speakers: str | Path | None = None,
    min_utterances: int = 2,
    allow_missing: bool = False,
    reader: Read | None = None,
    progress: bool = True,
) -> SpeechCorpus:
    """Read corpora and divide them into training, validation and test.

    Parameters
    ----------
    data_folder : path or list of paths
        What is trained on, less the speakers of the trials: tables
        (:mod:`~speechbrain_qmargin.data.tables`) or folders in a layout that a reader knows, as
        ``wav/<speaker>/.../<utterance>.{wav,flac}`` or ``dev/aac/<speaker>/.../<utterance>.m4a``,
        see :func:`~speechbrain_qmargin.data.voxceleb.training_roots`: VoxCeleb2's test part is
        left out.
    save_folder : path
        Where the manifests, the validation trials, ``missing.txt`` (of the trials) and
        ``skipped_audio.txt`` are written. What the scan found is kept for all runs, see
        :func:`~speechbrain_qmargin.data.durations.durations`.
    trials_folder : path or list of paths, optional
        Corpora from which only trials are taken: nobody in them is trained on, whether in a list or
        not. For VoxCeleb1 beside training on VoxCeleb2. A source that `data_folder` names too
        stands for its parts that are not trained on.
    verification_file : path, list of paths, or mapping from name to path, optional
        Test trials; a list's name is its file's unless given. A suffix that differs from the file
        on disk (``.wav`` in the list, ``.flac`` in the folder) is accepted, and so are the last
        parts of the files' paths in place of a table's ids. The recordings are decoded once.
    enrolment_file : path, optional
        Models and their recordings (:func:`~speechbrain_qmargin.tables.read_models`), for lists
        whose enrolment ids name models; without it they name recordings.
    valid_file : path, optional
        Validation trials, likewise.
    num_valid_speakers : int
        Without a `valid_file`: how many training speakers to hold out, at least 2; all pairs of up
        to ten of their utterances each become the validation trials. 0: no validation.
    train_speakers : path, optional
        A file of speaker names, one a line, to train on; otherwise all that no trial list names.
    min_utterances : int
        Training speakers with fewer usable utterances are dropped, with a warning that names them.
    allow_missing : bool
        Leave out trials whose recordings are missing or unreadable, and say so, instead of
        stopping.
    reader : callable, optional
        See :class:`~speechbrain_qmargin.data.readers.Read`; by default chosen by what lies there.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        A missing folder or list, a trial that names a missing or broken file, a list without target
        or without impostor trials, a training list that shares speakers with the trials or names
        unknown ones: each is named.

    Examples
    --------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> for name in ("ann", "bob", "cyd", "dan"):
    ...     (folder / "wav" / name).mkdir(parents=True)
    ...     for number in (1, 2):
    ...         soundfile.write(folder / "wav" / name / f"{number}.wav", np.zeros(8000), 16000)
    >>> trials = folder / "trials.txt"
    >>> _ = trials.write_text("1 ann/1.wav ann/2.wav\\n0 ann/1.wav bob/1.wav\\n")
    >>> corpus = prepare_speech(folder, folder / "save", verification_file=trials, progress=False)
    >>> corpus.speakers, len(corpus.train), list(corpus.test.ids)
    (['cyd', 'dan'], 4, ['ann/1.wav', 'ann/2.wav', 'bob/1.wav'])
    """
    sources, trials_sources = _paths(data_folder), _paths(trials_folder)
    save_folder = Path(save_folder)
    where = ", ".join(map(str, [*sources, *trials_sources]))
    lists = _named_lists(verification_file)
    valid_list = {} if valid_file is None else {"valid": named_file("valid_file", valid_file)}
    if train_speakers is not None:
        named_file("train_speakers", train_speakers)
    if "valid" in lists and valid_list:
        raise ValueError("verification_file: the name 'valid' is that of the validation trials")
    if valid_file is None and num_valid_speakers == 1:
        raise ValueError("num_valid_speakers: 1 speaker has no impostor trials; 0, or 2 and more")
    manifest, held_out = _read(sources, trials_sources, reader, progress)

    enrolment = None if enrolment_file is None else named_file("enrolment_file", enrolment_file)
    trials, named = _resolve_lists(
        lists | valid_list, enrolment, manifest, where, save_folder, allow_missing
    )
    valid_trials = trials.pop("valid") if valid_list else None
    held_out |= named

    skipped = save_folder / SKIPPED
    write_listing(skipped, manifest.faults)
    if manifest.faults:
        first = "; ".join(f"{name}: {fault}" for name, fault in list(manifest.faults.items())[:3])
        logger.warning(
            f"{len(manifest.faults)} audio files are left out, all listed in {skipped}: {first}"
        )

    by_speaker = manifest.rows_by_class()
    candidates = training_classes(
        by_speaker, held_out, listed=train_speakers, minimum=min_utterances
    )
    warn_of_too_many_speakers(candidates)
    able = len(candidates)
    if valid_file is None and num_valid_speakers > 0:
        candidates, rows = held_out_for_validation(by_speaker, candidates, num_valid_speakers)
        chosen = manifest.take(np.array(sorted(rows), np.int64))
        valid_trials = all_pairs(chosen.class_of_id)
        write_trials(save_folder / "trials" / "valid.txt", valid_trials)
    if len(candidates) < 2:
        raise ValueError(
            f"{where}: {len(candidates)} speakers left to train on, at least 2 are needed. Of "
            f"{len(by_speaker)} the trials hold out {len(held_out.intersection(by_speaker))}, "
            f"validation {able - len(candidates)} (num_valid_speakers)"
        )

    def part(name: str, rows: np.ndarray | set[int]) -> Manifest:
        chosen = manifest.take(np.sort(np.fromiter(rows, np.int64, len(rows))))
        kept = save_folder / "manifests" / f"{name}.manifest"
        if name == "train":
            warn_of_change(kept, chosen)
        return chosen.kept_in(kept)

    train = part("train", np.concatenate([by_speaker[speaker] for speaker in candidates]))
    test = part("test", {manifest.row(one) for each in trials.values() for one in _used(each)})
    valid = part("valid", {manifest.row(one) for one in _used(valid_trials)})
    for tested in (valid, test):
        for whole in (True, False):
            files = tested.files.take(np.flatnonzero(tested.part != whole))
            check_recordings(sources[0], files, whole=whole, progress=progress)
    return SpeechCorpus(train, valid, test, valid_trials, trials, skipped)


def _used(trials: Trials | None) -> set[str]:
    """The recordings of the trials; ids of trials that were left out are not among them."""
    if trials is None:
        return set()
    ids = {trials.ids[i] for i in np.unique([trials.enrolment, trials.test]).tolist()}
    return {one for name in ids for one in trials.models.get(name, (name,))}
