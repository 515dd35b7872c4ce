"""Arguments that several subcommands take, and how the score files among them are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speechbrain_qmargin.scoring.score_files import ScoreFile, read_score_file
from speechbrain_qmargin.scoring.separation import refuse_other_scores
from speechbrain_qmargin.trials import LabelledTrials, Trials, read_unlabelled

if TYPE_CHECKING:
    from speechbrain_qmargin.extraction import Inputs

__all__ = [
    "add_cohort",
    "add_cohort_utt2spk",
    "add_dev_scores",
    "add_encoder",
    "add_overwrite",
    "add_scored",
    "add_tables",
    "both_classes",
    "columns_of",
    "files_of",
    "find_inputs",
    "read_development",
    "read_scored",
    "read_systems",
    "several",
    "share",
]


def share(text: str) -> float:
    """A rate, prior or confidence of the command line.

    Raises
    ------
    argparse.ArgumentTypeError
        No number between 0 and 1; 1 % is 0.01.

    Examples
    --------
    >>> share("1e-2")
    0.01
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if 0 < value < 1:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1; 1 % is 0.01")


def several(kind: Callable[[str], Any]) -> dict[str, Any]:
    """Of an argument that takes some values, side by side or between commas: ``0.1,0.01``.

    Examples
    --------
    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--sizes", **several(int))
    >>> parser.parse_args(["--sizes", "5,10", "20"]).sizes
    [5, 10, 20]
    """

    def parse(text: str) -> list[Any]:
        found = [kind(part) for part in text.split(",") if part]
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} holds no value")
        return found

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return {"type": parse, "nargs": "+", "action": _Joined}


class _Joined(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [one for part in values or () for one in part])


def add_overwrite(sub: argparse.ArgumentParser) -> None:
    """Whether what is there may be replaced."""
    sub.add_argument("--overwrite", action="store_true", help="replace existing output files")


def add_cohort(sub: argparse.ArgumentParser) -> None:
    """What is made of a file of cohort embeddings."""
    add_cohort_utt2spk(sub)
    sub.add_argument("--all_utterances", action="store_true", help="take every utterance of the "
                     "cohort, not the means of its speakers")  # fmt: skip
    sub.add_argument("--subtract_mean", action="store_true", help="subtract the cohort's mean "
                     "from all embeddings")  # fmt: skip


def add_cohort_utt2spk(sub: argparse.ArgumentParser) -> None:
    """Whose recordings the cohort's are."""
    sub.add_argument("--cohort_utt2spk", metavar="FILE", help="the speaker of each cohort "
                     "recording (default: the part of the id before the first slash)")  # fmt: skip


def add_encoder(sub: argparse.ArgumentParser) -> None:
    """The encoder, and whether its YAML may run code."""
    sub.add_argument("encoder", metavar="ENCODER", help="a run, an inference folder or a "
                     "published model")  # fmt: skip
    sub.add_argument("--trust", action="store_true", help="let the encoder's YAML run any code")


def add_tables(sub: argparse.ArgumentParser) -> None:
    """Whose recordings are whose."""
    sub.add_argument("--utt2spk", metavar="FILE", help="the speaker of each recording, where it "
                     "is not the part of the id before the first slash")  # fmt: skip
    sub.add_argument("--models", metavar="FILE", help="table of enrolment models and their "
                     "recordings")  # fmt: skip


def add_scored(sub: argparse.ArgumentParser) -> None:
    """How score files are read."""
    sub.add_argument("--trials", metavar="FILE", help="trial list, for score files without labels")
    sub.add_argument("--columns", action="append", default=[], metavar="[NAME=]ORDER",
                     help="order of the columns where neither a header nor the values show it, "
                     "such as 'enrolment test label score'; for one system or for all")  # fmt: skip
    add_tables(sub)


def add_dev_scores(sub: argparse.ArgumentParser, use: str) -> None:
    """Development scores of systems, and what belongs to them; `use` says what they serve for."""
    sub.add_argument("--dev_scores", action="append", default=[], metavar="[NAME=]SCORES", help=use)
    sub.add_argument("--dev_trials", metavar="FILE", help="trial list, for development "
                     "scores without labels")  # fmt: skip
    sub.add_argument("--dev_utt2spk", metavar="FILE", help="speakers of the development "
                     "recordings")  # fmt: skip
    sub.add_argument("--dev_models", metavar="FILE", help="table of the development list's "
                     "enrolment models")  # fmt: skip


def find_inputs(source: Path, *, speech: bool, quiet: bool) -> Inputs:
    """What an encoder of speech, or of faces, is to embed, with ids as trial lists write them."""
    if speech:
        from speechbrain_qmargin.export.recordings import find_recordings

        return find_recordings(source)
    from speechbrain_qmargin.export.images import find_images

    return find_images(source, progress=not quiet)


def columns_of(given: Sequence[str], system: str = "") -> str | None:
    """The order of columns of a system's file: its own, else the one of all."""
    order = None
    for item in given:
        name, equals, columns = item.partition("=")
        if not equals:
            order = order or item
        elif name == system:
            return columns
    return order


def read_scored(path: str, args, columns: str | None = None) -> ScoreFile:
    """A score file with the list's labels, if a list is given, and with its tables."""
    from speechbrain_qmargin.scoring.lists import with_tables

    trials = read_unlabelled(args.trials) if args.trials else None
    read = read_score_file(path, trials, columns)
    trials = with_tables(read.trials, args.utt2spk, args.models)
    if not args.trials and "trials" in read.about:  # the user's list, not its copy with scores
        trials = replace(trials, source=read.about["trials"])
    return replace(read, trials=trials)


def both_classes(trials: Trials) -> LabelledTrials:
    """The trials with their labels, of which there are two: figures need both.

    Raises
    ------
    ValueError
        No labels, no target or no impostor trials; with the list's name.

    Examples
    --------
    >>> both_classes(Trials(["a/1", "a/2"], np.array([0]), np.array([1]), np.array([True])))
    Traceback (most recent call last):
    ValueError: trials: it has no impostor trials (targets: 1); figures need both
    """
    labelled = trials.labelled()
    targets = np.count_nonzero(labelled.is_target)
    if targets in (0, len(labelled)):
        lack, there = ("impostor", "targets") if targets else ("target", "impostors")
        raise ValueError(
            f"{trials.name}: it has no {lack} trials ({there}: {len(labelled):,}); figures need "
            "both"
        )
    return labelled


def files_of(systems: Sequence[str]) -> list[str]:
    """The files of ``[NAME=]FILE`` systems.

    Examples
    --------
    >>> files_of(["ours=ours.tsv", "theirs.tsv"])
    ['ours.tsv', 'theirs.tsv']
    """
    return [given.rpartition("=")[2] for given in systems]


def read_systems(
    systems: Sequence[str], args, *, labelled: bool = True
) -> tuple[Trials, dict[str, ScoreFile]]:
    """The scores of ``[NAME=]FILE`` systems in the order of one list: that given, or their own.

    Without labels anywhere it is an error, unless they are not wanted.
    """
    paths: dict[str, str] = {}
    for given in systems:
        name, _, path = given.rpartition("=")
        name = name or Path(path).stem
        if name in paths:
            raise ValueError(f"two systems are called {name}: write NAME=FILE")
        paths[name] = path
    strange = {item.partition("=")[0] for item in args.columns if "=" in item} - set(paths)
    if strange:
        raise ValueError(f"--columns: no system is called {', '.join(sorted(strange))}")
    trials, files = _in_one_order(paths, args)
    if labelled and trials.is_target is None:
        raise _no_labels(paths, "--trials")
    return trials, files


def read_development(
    args, systems: Mapping[str, ScoreFile]
) -> tuple[LabelledTrials, dict[str, ScoreFile]]:
    """The ``--dev_scores`` of systems in the order of one development list, which has its labels.

    A file that names no system is that of the system called like it, else that of the first.

    Raises
    ------
    ValueError
        No such system, two files of one, scores that are made otherwise than the system's; no
        labels; as :func:`both_classes`.
    """
    paths: dict[str, str] = {}
    for given in args.dev_scores:
        name, _, path = given.rpartition("=")
        like = Path(path).stem
        name = name or (like if like in systems else next(iter(systems)))
        if name not in systems:
            raise ValueError(f"--dev_scores {given!r}: no system is called {name}")
        if name in paths:
            raise ValueError(
                f"--dev_scores: both {paths[name]} and {path} are of {name}: write NAME=FILE"
            )
        paths[name] = path
    tables = {"utt2spk": args.dev_utt2spk, "models": args.dev_models}
    own = argparse.Namespace(trials=args.dev_trials, columns=args.columns, **tables)
    trials, files = _in_one_order(paths, own)
    for name, read in files.items():
        what = f"{name} ({systems[name].source.split()[0]})"
        refuse_other_scores(read.origin, systems[name].origin, what)
    if trials.is_target is None:
        raise _no_labels(paths, "--dev_trials")
    return both_classes(trials), files


def _in_one_order(paths: Mapping[str, str], args) -> tuple[Trials, dict[str, ScoreFile]]:
    """Systems' scores in the order of the list given, else of the first file that has labels."""
    files: dict[str, ScoreFile] = {}
    reference: Trials | None = None
    for name, path in paths.items():
        files[name] = read_scored(path, args, columns_of(args.columns, name))
        if files[name].trials.is_target is not None:
            reference = files[name].trials
            break
    if reference is None:
        reference = next(iter(files.values())).trials
    for name, path in paths.items():
        if name not in files or files[name].trials is not reference:
            files[name] = read_score_file(path, reference, columns_of(args.columns, name))
    return reference, {name: files[name] for name in paths}


def _no_labels(paths: Mapping[str, str], option: str) -> ValueError:
    return ValueError(
        f"{', '.join(paths.values())}: no file says which trials are targets; give the trial list "
        f"({option})"
    )
