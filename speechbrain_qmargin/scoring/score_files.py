"""Score files, in and out: ours say what their scores are, those of other toolkits are read too.

Ours are tab-separated, in full precision: ``enrolment test score label`` below a comment line that
says how the scores were made (the `about` of :class:`ScoreFile`), so that a threshold of one kind
of score is not applied to another.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from speechbrain_qmargin.files import replacing
from speechbrain_qmargin.scoring.separation import Origin, origin_of
from speechbrain_qmargin.tables import Table, read_table
from speechbrain_qmargin.trials import Lost, Trials, index_pairs, match_ids

__all__ = ["ScoreFile", "read_score_file", "read_scores", "write_scores"]

_HEADER = ("enrolment", "test", "score", "label")
_MARK = "speechbrain_qmargin scores "
_BLOCK = 16384


@dataclass(frozen=True)
class ScoreFile:
    """What a score file holds.

    Attributes
    ----------
    trials : Trials
        Of the list given, else of the file itself.
    scores : float64 array [N]
    source : str
        The score file's name and SHA-256; `trials.source` is the list's.
    about : mapping
        What our commands write: "kind" ("cosine", "as-norm", "llr", ...), "trials" (the list's
        name and SHA-256), "embeddings", "cohort"
        (:attr:`~speechbrain_qmargin.scoring.lists.Cohort.source`), "lost" (failures to acquire) and
        more; empty for files of others.
    lost : Lost or None
        This system's own failures, whoever's list the trials are.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "cosine.tsv"
    >>> trials = Trials(["a/1", "a/2"], np.array([0]), np.array([1]), np.array([True]))
    >>> write_scores(file, trials, np.array([0.75]), {"kind": "cosine"})
    >>> read = read_score_file(file)
    >>> read.kind, read.scores, read.trials.pair(0)
    ('cosine', array([0.75]), 'a/1 a/2')
    >>> read.origin
    {'kind': 'cosine'}
    """

    trials: Trials
    scores: np.ndarray
    source: str
    about: Mapping[str, str] = field(default_factory=dict)
    lost: Lost | None = None

    @property
    def kind(self) -> str:
        """What the scores are, as far as the file says; empty where it does not."""
        return self.about.get("kind", "")

    @property
    def origin(self) -> Origin:
        """What a threshold is bound to, as far as the file says."""
        return origin_of(self.about)


def write_scores(
    path: str | Path,
    trials: Trials,
    scores: np.ndarray,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write scores with their trials, unrounded (the shortest text that reads back exactly).

    The label column is left out where the trials have no labels.

    Parameters
    ----------
    path : path
    trials : Trials
    scores : float array [N]
    about : mapping of str, optional
        See :class:`ScoreFile`; "trials" is added.

    Raises
    ------
    ValueError
        Another number of scores, or an id with a tab or a line break.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "cosine.tsv"
    >>> trials = Trials(["a/1", "a/2"], np.array([0]), np.array([1]), np.array([True]))
    >>> write_scores(file, trials, np.array([0.75]), {"kind": "cosine"})
    >>> print(file.read_text())
    # speechbrain_qmargin scores {"kind": "cosine"}
    enrolment test score label
    a/1 a/2 0.75 1
    """
    scores = np.asarray(scores)
    if scores.shape != (len(trials),):
        raise ValueError(f"{len(trials)} trials and scores {scores.shape}")
    bad = [name for name in trials.ids if any(c in name for c in "\t\n\r")]
    if bad:
        raise ValueError(f"{bad[0]!r}: an id in a score file cannot hold a tab or a line break")
    ids, labels = trials.ids, trials.is_target
    said = dict(about or {}) | ({"trials": trials.source} if trials.source else {})
    if trials.lost is not None:
        said["lost"] = json.dumps(asdict(trials.lost))
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as stream:
        if said:
            stream.write(f"# {_MARK}{json.dumps(said, ensure_ascii=False)}\n")
        stream.write("\t".join(_HEADER if labels is not None else _HEADER[:3]) + "\n")
        for start in range(0, len(trials), _BLOCK):
            block = slice(start, start + _BLOCK)
            columns = [trials.enrolment[block].tolist(), trials.test[block].tolist(), scores[block]]
            if labels is not None:
                columns.append(labels[block].tolist())
            stream.writelines(
                f"{ids[enrolment]}\t{ids[test]}\t{score!s}"
                + "".join(f"\t{x:d}" for x in label)
                + "\n"
                for enrolment, test, score, *label in zip(*columns, strict=True)
            )


def read_scores(
    path: str | Path, trials: Trials | None = None, columns: str | None = None
) -> tuple[Trials, np.ndarray]:
    """The trials and the float64 scores [N] of :func:`read_score_file`, whose errors it raises.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "scores.txt"
    >>> _ = file.write_text("a/1 a/2 0.75\\na/1 b/1 0.1\\n")
    >>> trials, scores = read_scores(file)
    >>> trials.pair(1), scores, trials.is_target
    ('a/1 b/1', array([0.75, 0.1 ]), None)
    """
    read = read_score_file(path, trials, columns)
    return read.trials, read.scores


def read_score_file(
    path: str | Path, trials: Trials | None = None, columns: str | None = None
) -> ScoreFile:
    """Read scores of ours or of another toolkit.

    The columns are those that a header names; else `columns`; else they are found by their values:
    two of ids, one of labels (1 and 0, target and nontarget, tgt and imp), one of numbers. More
    numbers may follow (WeSpeaker's AS-norm files): the first is the score.

    Parameters
    ----------
    path : path
    trials : Trials, optional
        Where the labels come from if the file has none; the scores are returned in its order.
        Ids may differ by their suffix, or be cut at their first dot, which is warned of. Scores of
        trials that it does not list are dropped with a warning that counts them.
    columns : str, optional
        The order of the columns of a file without a header, as "enrolment test label score".

    Raises
    ------
    ValueError
        Columns that cannot be told apart, a malformed line, a score that is not a finite number, a
        trial with two scores: with file and line. Trials without a score, labels that contradict
        the list's.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "wespeaker.score"
    >>> _ = file.write_text("a/1 a/2 0.75 target\\na/1 b/1 0.1 nontarget\\n")
    >>> read = read_score_file(file)
    >>> read.scores, read.trials.is_target
    (array([0.75, 0.1 ]), array([ True, False]))
    """
    table = read_table(path, fewest=3)
    order = _order(table, columns)
    enrolment, test = table.pairs(order["enrolment"], order["test"])
    labels = table.labels(order["label"]) if "label" in order else None
    scores = _numbers(table, order["score"])
    own = index_pairs(enrolment, test, labels, table.source)
    _refuse_two_scores(table, own, scores)
    about = _about(table)
    lost = _lost(table, about)
    if trials is None:
        return ScoreFile(replace(own, lost=lost), scores, table.source, about, lost)
    return ScoreFile(trials, _in_order_of(trials, own, scores, path), table.source, about, lost)


def _lost(table: Table, about: Mapping[str, str]) -> Lost | None:
    if "lost" not in about:
        return None
    try:
        return Lost(**json.loads(about["lost"]))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{table.path}:1: malformed failures {about['lost']!r:.200}") from None


def _about(table: Table) -> dict[str, str]:
    if not table.comment.startswith(_MARK):
        return {}
    try:
        said = json.loads(table.comment.removeprefix(_MARK))
        return {str(key): str(value) for key, value in said.items()}
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{table.path}:1: malformed comment {table.comment!r:.200}") from None


def _order(table: Table, columns: str | None) -> dict[str, int]:
    """Where enrolment, test, score and perhaps label stand."""
    header = table.header
    if header is not None and {"enrolment", "test", "score"} <= set(header):
        twice = [name for name in _HEADER if header.count(name) > 1]
        if twice:
            raise ValueError(
                f"{table.path}: {header.count(twice[0])} columns are called {twice[0]}, or another "
                "word for it: rename those that are not meant"
            )
        return {name: header.index(name) for name in _HEADER if name in header}
    width = len(table.columns)
    if columns is not None:
        order = columns.split()
        if not {"enrolment", "test", "score"} <= set(order) or len(set(order)) < len(order):
            raise ValueError(f"columns={columns!r} must name enrolment, test and score, each once")
        if len(order) > width:
            raise ValueError(f"{table.row(0)}: {width} columns, expected {columns!r}")
        return {name: order.index(name) for name in _HEADER if name in order}
    labels = table.label_columns()
    words = [n for n in labels if not set(table.columns[n]) <= {"0", "1"}]
    if width == 3:
        if words:
            raise ValueError(f"{table.row(0)}: a trial list, without scores")
        _refuse_scores_as_ids(table, (0, 1))
        return {"enrolment": 0, "test": 1, "score": 2}
    labels = words or labels
    one, two, *rest = (n for n in range(width) if n not in labels[:1])
    numbers = [n for n in rest if _is_number(table.columns[n][0])]
    if len(labels) != 1 or not numbers or (len(numbers) > 1 and not words):
        raise ValueError(
            f"{table.row(0)}: {width} columns, and which is the score and which the label cannot "
            "be told by their values. Say it: columns='enrolment test label score' (SpeechBrain), "
            "'enrolment test score label' (WeSpeaker), or another order"
        )
    # a,b,0,5: the label 0 and the score 5, or 0.5? And a,b,-3,21,target: -3, or -3.21?
    whole = (cell.lstrip("+-").isdigit() for cell in table.columns[numbers[0]])
    if table.separator == "," and (not words or len(numbers) > 1) and all(whole):
        raise ValueError(
            f"{table.row(0)}: the scores are whole numbers, or have commas as decimal points; "
            "write points, or name the columns in a first line"
        )
    _refuse_scores_as_ids(table, (one, two))
    return {"enrolment": one, "test": two, "score": numbers[0], "label": labels[0]}


def _refuse_scores_as_ids(table: Table, ids: Sequence[int]) -> None:
    """Where ids are numbers, a score before them would be taken for one of them."""
    for n in ids:
        cells = set(table.columns[n]) if _is_number(table.columns[n][0]) else set()
        broken = sorted(cell for cell in cells if not cell.isdigit())
        if broken and all(map(_is_number, broken)):
            raise ValueError(
                f"{table.row(0)}: column {n + 1} holds numbers such as {broken[0]}, which would be "
                "read as ids. Say the order: columns='score enrolment test', or another"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # which Python allows between digits


def _numbers(table: Table, column: int) -> np.ndarray:
    cells = table.columns[column]
    try:
        scores = np.array(list(map(float, cells)))
        if any("_" in cell for cell in cells):
            raise ValueError
    except ValueError:
        at = next(n for n, cell in enumerate(cells) if not _is_number(cell))
        raise ValueError(
            f"{table.row(at)}: malformed line: the score {cells[at]!r} is not a number"
        ) from None
    if not np.isfinite(scores).all():
        at = int(np.argmin(np.isfinite(scores)))
        raise ValueError(f"{table.row(at)}: the score {cells[at]} is not finite")
    return scores


def _refuse_two_scores(table: Table, trials: Trials, scores: np.ndarray) -> None:
    """A trial may be there twice, with one score."""
    keys = trials.enrolment * len(trials.ids) + trials.test
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    against = scores != scores[first[place]]
    if against.any():
        at = int(np.argmax(against))
        before = table.numbers[first[place[at]]]
        raise ValueError(
            f"{table.path}:{table.numbers[at]}: the trial of line {before} again, with another "
            f"score: {trials.pair(at)}"
        )


def _in_order_of(wanted: Trials, own: Trials, scores: np.ndarray, path: str | Path) -> np.ndarray:
    """The file's scores in the order of the list's trials."""
    places, how = match_ids(wanted.ids, own.ids)
    if how:
        warnings.warn(f"{path}: ids are those of {wanted.name} {how}", stacklevel=4)
    keys = own.enrolment * len(own.ids) + own.test
    order = np.argsort(keys, kind="stable")
    one, two = places[wanted.enrolment], places[wanted.test]
    asked = np.where((one < 0) | (two < 0), -1, one * len(own.ids) + two)
    at = np.searchsorted(keys[order], asked)
    at = order[np.minimum(at, len(keys) - 1)]
    missing = keys[at] != asked
    if missing.any():
        raise ValueError(
            f"{path}: {np.count_nonzero(missing)} of {len(wanted)} trials have no score, the "
            f"first is {wanted.pair(int(np.argmax(missing)))} (there is one of {own.pair(0)})"
        )
    if own.is_target is not None and wanted.is_target is not None:
        against = own.is_target[at] != wanted.is_target
        if against.any():
            raise ValueError(
                f"{path}: the label of {wanted.pair(int(np.argmax(against)))} is not that of the "
                "trial list"
            )
    dropped = len(np.setdiff1d(keys, asked))
    if dropped:
        warnings.warn(
            f"{path}: {dropped} of {len(np.unique(keys))} scores dropped: not in the trial list",
            stacklevel=4,
        )
    return scores[at]
