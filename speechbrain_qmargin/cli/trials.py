"""The subcommand that makes trial lists of one's own people: trials."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from speechbrain_qmargin.cli.inputs import add_overwrite

__all__ = ["configure", "divided_trials"]

TRIALS = """
    qmargin trials recordings lists --dev 20 --test 20

SOURCE is a folder of <person>/<file> or <person>/<session>/<file>, directly or below its wav/ or
images/; or a table with a header, with a column of files (file, image, wav, path or recording), one
of people (person, identity, speaker, spk_id, name or label) and, if you like, one of sessions
(session).

The people are divided into three groups. OUTPUT gets two trial lists, dev.txt to choose a threshold
on and test.txt to measure it on; trial_files.txt, the files of both, and train_files.txt, those of
everybody else, for `qmargin extract`; and train_people.txt, who these others are. Every pair of
files is a trial, except two files of one session of a person who has several sessions.

With --all everybody is in one list, trials.txt. With --pairs your own list of pairs, two ids or two
files on a line, is labelled and written as trials.txt.

Existing lists with other contents are replaced only with --overwrite.
"""


def divided_trials(
    source: str | Path,
    out: str | Path,
    counts: dict[str, int],
    max_per_person: int,
    seed: int = 0,
    names: tuple[str, str] = ("people", "files"),
    overwrite: bool = False,
) -> None:
    """Write a trial list for each part of the people, and lists of the files.

    Parameters
    ----------
    source, out : path
        See :func:`~speechbrain_qmargin.data.people.read_people`; a folder.
    counts : dict from part to its number of people
    max_per_person : int
        Files of a person in trials, at most.
    seed : int
    names : (str, str)
        What people and their files are called.
    overwrite : bool
        Whether other lists may be replaced that are there.

    Raises
    ------
    FileExistsError
        Another list is there; named, and nothing is written.
    """
    from speechbrain_qmargin.data.people import draw_parts, read_people
    from speechbrain_qmargin.files import write_new
    from speechbrain_qmargin.scoring.pairing import every_pair, spread_over_sessions
    from speechbrain_qmargin.trials import trials_text

    _refuse_single_files(max_per_person)
    out, people = Path(out), read_people(source)
    parts, rest = draw_parts(people.ids, counts, seed)
    units, files = names
    listed: dict[str, list[str]] = {"trial": [], "train": []}
    texts: dict[Path, str] = {}
    lines = []
    drawn = [one for each in parts.values() for one in each]
    for part, chosen in parts.items():
        ids = {one: spread_over_sessions(people.ids[one], max_per_person) for one in chosen}
        listed["trial"] += [name for each in ids.values() for name in each]
        trials = every_pair(ids)
        texts[out / f"{part}.txt"] = trials_text(trials)
        lines.append(f"{out / part}.txt: {len(chosen):,} {units}, {_counted(trials)}")
    listed["train"] = [name for one in rest for name in people.ids[one]]
    for part, ids in listed.items():
        file = out / f"{part}_{files}.txt"
        texts[file] = people.listed(ids)
        whose = drawn if part == "trial" else rest
        lines.append(f"{file}: {len(ids):,} {files} of {len(whose):,} {units}")
    texts[out / f"train_{units}.txt"] = "".join(f"{one}\n" for one in sorted(rest))
    write_new(texts, overwrite)
    print("\n".join(lines))


def _refuse_single_files(max_per_person: int) -> None:
    if max_per_person < 2:
        raise ValueError(f"{max_per_person} files of a person: with fewer than 2 nobody has a pair")


def _counted(trials) -> str:
    targets = int(np.count_nonzero(trials.is_target))
    return f"{targets:,} target and {len(trials) - targets:,} impostor trials"


def _trials(args: argparse.Namespace) -> None:
    from speechbrain_qmargin.data.people import read_people
    from speechbrain_qmargin.files import refuse_overwriting, write_new
    from speechbrain_qmargin.scoring.pairing import every_pair, spread_over_sessions
    from speechbrain_qmargin.trials import trials_text

    out = Path(args.output)
    names = ["trials", "dev", "test", "trial_files", "train_files", "train_people"]
    files = [out / f"{name}.txt" for name in names]
    refuse_overwriting(files, [args.source, args.pairs], overwrite=True)  # others: write_new
    if not (args.all or args.pairs):
        counts = {"dev": args.dev, "test": args.test}
        divided_trials(
            args.source, out, counts, args.max_per_person, args.seed, overwrite=args.overwrite
        )
        return
    people = read_people(args.source)
    if args.pairs:
        trials = _labelled(args.pairs, people)
    else:
        _refuse_single_files(args.max_per_person)
        chosen = {
            one: spread_over_sessions(ids, args.max_per_person) for one, ids in people.ids.items()
        }
        trials = every_pair(chosen)
    texts = {
        out / "trials.txt": trials_text(trials),
        out / "trial_files.txt": people.listed(trials.ids),
    }
    write_new(texts, args.overwrite)
    print(f"{out / 'trials.txt'}: {_counted(trials)}")


def _labelled(pairs: str, people):
    """A list of two names a line, with ids in their place and the labels that the people say."""
    from speechbrain_qmargin.tables import some
    from speechbrain_qmargin.trials import read_unlabelled, speaker_in

    trials = read_unlabelled(pairs)
    by_file = {str(path): name for name, path in people.files.items()}
    ids: Sequence[str] = [
        name if name in people.files else by_file.get(name, "") for name in trials.ids
    ]
    lost = [name for name, found in zip(trials.ids, ids, strict=True) if not found]
    if lost:
        raise ValueError(
            f"{pairs}: {len(lost)} of the names are of no file: {some(lost)} (there is "
            f"{next(iter(people.files))})"
        )
    if len(set(ids)) < len(ids):
        raise ValueError(f"{pairs}: it names a file in two ways")
    who = np.unique([speaker_in(name) for name in ids], return_inverse=True)[1]
    same = who[trials.enrolment] == who[trials.test]
    if trials.is_target is not None and (trials.is_target != same).any():
        at = int(np.argmax(trials.is_target != same))
        raise ValueError(f"{pairs}: the label of {trials.pair(at)} is not what the people say")
    return replace(trials, ids=list(ids), is_target=same).labelled()


def configure(add) -> None:
    """The subcommand that makes trial lists; see :mod:`speechbrain_qmargin.cli`."""
    sub = add("trials", _trials, TRIALS)
    sub.add_argument("source", metavar="SOURCE", help="a folder or a table of people")
    sub.add_argument("output", metavar="OUTPUT", help="folder to write")
    sub.add_argument("--dev", type=int, default=20, help="number of people in dev.txt")
    sub.add_argument("--test", type=int, default=20, help="number of people in test.txt")
    sub.add_argument("--max_per_person", type=int, default=10, help="files taken of a person, "
                     "at most")  # fmt: skip
    sub.add_argument("--seed", type=int, default=0, help="seed of the division of the people")
    sub.add_argument("--all", action="store_true", help="put everybody into one list")
    sub.add_argument("--pairs", metavar="FILE", help="label this list of pairs")
    add_overwrite(sub)
