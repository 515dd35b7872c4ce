"""Trial lists in every form that is published, read and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.tables import LABELS, Table, could_be_header, read_table
from speechbrain_qmargin.trials.lfw_pairs import read_lfw_pairs
from speechbrain_qmargin.trials.pairs import LabelledTrials, Trials, index_pairs

__all__ = ["read_trials", "read_unlabelled", "trials_text", "write_trials"]


def read_trials(path: str | Path) -> LabelledTrials:
    """Read a trial list.

    ``label enrolment test`` (VoxCeleb), ``enrolment test label`` (Kaldi, CN-Celeb, VOiCES), with
    labels 1 and 0, target and nontarget, or tgt and imp; between blanks, tabs (then ids may hold
    spaces) or commas; with or without a header. Any other columns need a header that names the
    ``enrolment`` (or ``modelid``), ``test`` (``segmentid``) and ``label`` (``targettype``), as NIST
    SRE's. The label's column is found by its values. ``pairs.txt`` of Labeled Faces in the Wild is
    read as it is (:func:`~speechbrain_qmargin.trials.lfw_pairs.read_lfw_pairs`).

    Raises
    ------
    ValueError
        No trials, a line of another kind, no labels or several columns that could be them: with
        the file, and the line where there is one.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "trials.txt"
    >>> _ = file.write_text("anna/1 anna/2 tgt\\nanna/1 bert/1 imp\\n")
    >>> read_trials(file).is_target.tolist()
    [True, False]
    """
    pairs = read_lfw_pairs(path)
    if pairs is not None:
        return index_pairs(*pairs).labelled()
    table = read_table(path)
    width = len(table.columns)
    header = table.header or []
    found = [header.index("label")] if header.count("label") == 1 else table.label_columns()
    if len(found) > 1 and width == 3:  # an id may be called 0 or 1: words are labels, ids are not
        words = [n for n in found if not set(table.columns[n]) <= {"0", "1"}]
        found = words or found
    if len(found) != 1 or width < 3:
        raise ValueError(_no_label(table, found))
    (label,) = found
    if {"enrolment", "test"} <= set(header):
        sides = header.index("enrolment"), header.index("test")
    elif width == 3:
        first, second = (n for n in range(3) if n != label)
        sides = first, second
    else:
        raise ValueError(
            f"{table.row(0)}: {width} columns; a first line must name them, as 'enrolment test "
            "label'"
        )
    labels = table.labels(label)
    return index_pairs(*table.pairs(*sides), labels, table.source).labelled()


def read_unlabelled(path: str | Path) -> Trials:
    """Read a list with or without labels: of two columns they are ``enrolment test``.

    Raises
    ------
    ValueError
        As :func:`read_trials`.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "trials.txt"
    >>> _ = file.write_text("anna/1 anna/2\\nanna/1 bert/1\\n")
    >>> trials = read_unlabelled(file)
    >>> trials.pair(1), trials.is_target
    ('anna/1 bert/1', None)
    """
    pairs = read_lfw_pairs(path)
    if pairs is not None:
        return index_pairs(*pairs)
    table = read_table(path)
    header = table.header or []
    named = {"enrolment", "test"} <= set(header)
    if len(table.columns) > 2 and (not named or "label" in header):
        return read_trials(path)
    if not named and table.label_columns():
        raise ValueError(_no_label(table, table.label_columns()))
    at = (header.index("enrolment"), header.index("test")) if named else (0, 1)
    return index_pairs(*table.pairs(*at), None, table.source)


def _no_label(table: Table, found: list[int]) -> str:
    """Why no column is that of the labels."""
    if len(found) > 1 and len(table.columns) > 2:
        return f"{table.path}: {len(found)} columns hold labels; name them in a first line"
    if len(table.columns) < 3:
        return f"{table.row(0)}: expected 'label enrolment test' or 'enrolment test label'"
    counts = [sum(cell.lower() in LABELS for cell in column) for column in table.columns]
    likely = int(np.argmax(counts))
    if not counts[likely]:
        return (
            f"{table.row(0)}: expected 'label enrolment test' or 'enrolment test label'; no column "
            f"holds labels ({', '.join(LABELS)})"
        )
    bad = next(n for n, cell in enumerate(table.columns[likely]) if cell.lower() not in LABELS)
    wanted = "label enrolment test" if likely == 0 else "enrolment test label"
    return (
        f"{table.row(bad)}: expected '{wanted}', and {table.columns[likely][bad]!r} is none of "
        f"{', '.join(LABELS)}"
    )


def trials_text(trials: LabelledTrials) -> str:
    """Trials as ``label enrolment test`` lines, between tabs where an id holds a blank.

    A header is written where an id could be taken for a label or for a header.

    Raises
    ------
    ValueError
        An id with a tab or a line break; named.

    Examples
    --------
    >>> labels = np.array([True, False])
    >>> trials = index_pairs(["anna/1", "anna/1"], ["anna/2", "bert/1"], labels, "")
    >>> print(trials_text(trials.labelled()))
    1 anna/1 anna/2
    0 anna/1 bert/1
    """
    ids = trials.ids
    bad = [name for name in ids if any(letter in name for letter in "\t\n\r")]
    if bad:
        raise ValueError(f"{bad[0]!r}: an id in a trial list cannot hold a tab or a line break")
    header = any(could_be_header(name) for name in ids)
    blank = "\t" if header or any(len(name.split()) != 1 for name in ids) else " "
    rows = zip(
        trials.is_target.astype(int).tolist(),
        trials.enrolment.tolist(),
        trials.test.tolist(),
        strict=True,
    )
    lines = (f"{label}{blank}{ids[one]}{blank}{ids[two]}\n" for label, one, two in rows)
    head = "label\tenrolment\ttest\n" if header else ""
    return head + "".join(lines)


def write_trials(path: str | Path, trials: LabelledTrials) -> None:
    """Write a list, whole or not at all: :func:`trials_text`, whose errors it raises.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "trials.txt"
    >>> trials = index_pairs(["anna/1"], ["anna/2"], np.array([True]), "")
    >>> write_trials(file, trials.labelled())
    >>> read_trials(file).pair(0)
    'anna/1 anna/2'
    """
    write_text(path, trials_text(trials))
