"""Error rates by groups of people or recordings: gender, language, duration, same session.

At one threshold for all, as NIST's FRTE prints demographics (Grother et al. 2019, NISTIR 8280):
false matches (FMR) between groups and within them, false non-matches (FNMR) of each. A group of
trials is what a column of a metadata table says of both sides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from speechbrain_qmargin.scoring.shares import Share, share_of_trials
from speechbrain_qmargin.tables import composed_name, read_columns
from speechbrain_qmargin.trials import LabelledTrials

__all__ = [
    "Breakdown",
    "GroupRates",
    "breakdown",
    "read_metadata",
    "trial_groups",
]

_BOTH = " × "
_MANY = 12  # values of a column, which make up to 78 groups of two


@dataclass(frozen=True)
class GroupRates:
    """What a group of trials shows at the threshold; None where it has no such trials.

    Attributes
    ----------
    group : str
    fmr : Share or None
        False match rate: of the impostor trials, those that are accepted.
    fnmr : Share or None
        False non-match rate: of the target trials, those that are rejected.

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2", "b/1"], np.array([0, 0]), np.array([1, 2]),
    ...                         np.array([True, False]))
    >>> across = breakdown(np.array([0.9, 0.1]), trials, 0.5, {"a": "f", "b": "m"}).groups[1]
    >>> across.group, across.fmr.value, across.fnmr
    ('f × m', 0.0, None)
    """

    group: str
    fmr: Share | None
    fnmr: Share | None


@dataclass(frozen=True)
class Breakdown:
    """The groups of one column at one threshold.

    Attributes
    ----------
    column : str
    threshold : float
    overall : GroupRates
    groups : list of GroupRates
    units : str
        What people are called.
    confidence : float
        Of the intervals.
    speakers_known : bool
        Otherwise people are groups of recordings that target trials link, and nothing is called
        measured.

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2", "b/1"], np.array([0, 0]), np.array([1, 2]),
    ...                         np.array([True, False]))
    >>> found = breakdown(np.array([0.9, 0.1]), trials, 0.5, {"a": "f", "b": "m"}, column="gender")
    >>> found.column, [row.group for row in found.rows()]
    ('gender', ['all trials', 'f', 'f × m'])
    """

    column: str
    threshold: float
    overall: GroupRates
    groups: list[GroupRates]
    units: str = "speakers"
    confidence: float = 0.95
    speakers_known: bool = True

    def rows(self) -> list[GroupRates]:
        """All trials, then the groups."""
        return [self.overall, *self.groups]

    def table(self) -> str:
        """For people."""
        wide = max(len(self.column), *(len(row.group) for row in self.rows()))
        lines = [f"{self.column:{wide}}  {'FMR':42}  {'trials':>10}  {'FNMR':42}  {'trials':>10}"]
        for row in self.rows():
            cells = []
            for found in (row.fmr, row.fnmr):
                text, trials = ("-", "0") if found is None else (str(found), f"{found.trials:,}")
                cells += [f"{text:42}", f"{trials:>10}"]
            lines.append(f"{row.group:{wide}}  " + "  ".join(cells))
        over = self.units if self.speakers_known else f"linked groups ({self.units} not known)"
        lines.append(
            f"at the threshold {self.threshold:.6g} for all; {100 * self.confidence:g} % intervals "
            f"over {over}. A group's rate tells nothing of why: groups differ in their recordings "
            "too"
        )
        return "\n".join(line.rstrip() for line in lines)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def read_metadata(
    path: str | Path, columns: Sequence[str] = (), trials: LabelledTrials | None = None
) -> dict[str, dict[str, str]]:
    """Read a table with a header: the first column names recordings or speakers.

    Parameters
    ----------
    path : path
        See :func:`~speechbrain_qmargin.tables.read_columns`.
    columns : sequence of str
        Those that are wanted; by default all.
    trials : LabelledTrials, optional
        That the table is of: where its first line names a recording or speaker of theirs, it has no
        header.

    Returns
    -------
    dict from column to dict from id to value
        Values are text, stripped; empty ones are left out.

    Raises
    ------
    ValueError
        No header of two columns, a column twice, a line of another length, an id twice: with file
        and line. A column that is not there.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "people.csv"
    >>> _ = path.write_text("speaker,gender,city\\ns1,f,Bonn\\ns2,m,Graz\\n")
    >>> read_metadata(path, ["gender"])
    {'gender': {'s1': 'f', 's2': 'm'}}
    """
    header, rows = read_columns(path)
    first = header[0] if header else ""
    known = trials is not None and (
        first in trials.ids or composed_name(first) in trials.speaker_names()
    )
    if len(header) < 2 or not all(header) or known:
        raise ValueError(
            f"{path}:1: expected a header of names, an id's first and then columns, separated by "
            f"tabs, commas or semicolons, such as 'speaker,gender'; got {','.join(header)!r}"
        )
    table: dict[str, dict[str, str]] = {name: {} for name in header[1:]}
    seen: dict[str, int] = {}
    for number, (name, *values) in rows:
        before = seen.setdefault(name, number)
        if before != number:
            raise ValueError(f"{path}:{number}: {name} is listed in line {before} already")
        for column, value in zip(table.values(), values, strict=True):
            if value:
                column[name] = value
    if not seen:
        raise ValueError(f"{path}: a header and no lines")
    for name in columns:
        if name not in table:
            raise ValueError(f"{path}: no column {name}; there are {', '.join(table)}")
    return {name: table[name] for name in columns or table}


def trial_groups(
    trials: LabelledTrials,
    values: Mapping[str, str],
    *,
    relation: str = "both",
    edges: Sequence[float] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """The group of every trial, by what a column says of its two sides.

    Parameters
    ----------
    trials : LabelledTrials
    values : mapping from recording or speaker to value
        A recording's own value comes before its speaker's.
    relation : {"both", "same"}
        ``both``: the two values, whatever their order, as "f", or "f × m". ``same``: whether they
        are the same, as for sessions: "same", "other".
    edges : sequence of float, optional
        The values are numbers: bins between these, each with its lower edge. More than twelve
        numbers without edges are binned at the quartiles of the recordings.

    Returns
    -------
    (group, names) : int array [N], list of str
        -1 where a side has no value.

    Raises
    ------
    ValueError
        No recording has a value, a value that is not a number where there are edges, edges that
        are not finite or do not rise, more than twelve values that are words.

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2", "b/1"], np.array([0, 0]), np.array([1, 2]),
    ...                 np.array([True, False]))
    >>> group, names = trial_groups(trials, {"a": "f", "b": "m"})
    >>> [names[n] for n in group]
    ['f', 'f × m']
    """
    if relation not in ("both", "same"):
        raise ValueError(f"relation must be both or same, got {relation!r}")
    speakers = trials.speaker_names()
    people = {composed_name(name): value for name, value in values.items()}
    found = [values.get(name, people.get(who)) for name, who in zip(trials.ids, speakers,
                                                                    strict=True)]  # fmt: skip
    known = sorted({value for value in found if value is not None}, key=_natural)
    if not known:
        raise ValueError(
            "the metadata table names none of the trials' recordings or speakers, such as "
            f"{trials.ids[0]}"
        )
    if edges is None and relation == "both" and len(known) > _MANY:
        edges = _quartiles([value for value in found if value is not None], len(known))
    if edges is None:
        number = {value: n for n, value in enumerate(known)}
    else:
        number, known = _binned(known, edges)
    of_id = np.array([-1 if value is None else number[value] for value in found])
    one, two = of_id[trials.enrolment], of_id[trials.test]
    missing = (one < 0) | (two < 0)
    if relation == "same":
        group, names = (one != two).astype(np.int64), ["same", "other"]
    else:
        low, high = np.minimum(one, two), np.maximum(one, two)
        group = np.full(len(missing), -1)
        pairs, group[~missing] = np.unique((low * len(known) + high)[~missing], return_inverse=True)
        names = [
            known[p // len(known)]
            if p // len(known) == p % len(known)
            else _BOTH.join((known[p // len(known)], known[p % len(known)]))
            for p in pairs.tolist()
        ]
    return np.where(missing, -1, group), names


def _quartiles(values: Sequence[str], distinct: int) -> list[float]:
    try:
        sizes = [float(value) for value in values]
    except ValueError:
        raise ValueError(
            f"{distinct:,} different values are too many groups; give a column of at most {_MANY}, "
            "or of numbers"
        ) from None
    return np.unique(np.quantile(sizes, [0.25, 0.5, 0.75])).tolist()


def _natural(value: str) -> tuple[bool, float, str]:
    """Numbers by size, before words."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value


def _binned(known: Sequence[str], edges: Sequence[float]) -> tuple[dict[str, int], list[str]]:
    rising = all(a < b for a, b in itertools.pairwise(edges))
    if not len(edges) or not np.isfinite(edges).all() or not rising:
        raise ValueError(f"edges of bins must be finite and rise, got {list(edges)}")
    number = {}
    for value in known:
        try:
            size = float(value)
        except ValueError:
            size = math.nan
        if math.isnan(size):
            raise ValueError(f"{value!r} is not a number, so it has no bin")
        number[value] = int(np.searchsorted(edges, size, side="right"))
    names = [f"below {edges[0]:g}"]
    names += [f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)]
    return number, [*names, f"{edges[-1]:g} and more"]


def breakdown(
    scores: np.ndarray,
    trials: LabelledTrials,
    threshold: float,
    values: Mapping[str, str],
    *,
    column: str = "group",
    relation: str = "both",
    edges: Sequence[float] | None = None,
    confidence: float = 0.95,
    units: str = "speakers",
) -> Breakdown:
    """FMR and FNMR of every group of trials at one threshold.

    Parameters
    ----------
    scores : float array [N]
    trials : LabelledTrials
        With labels.
    threshold : float
        Accepted is ``score >= threshold``.
    values, relation, edges
        Of :func:`trial_groups`.
    column : str
        Its name, for the table.
    confidence : float
        Of the intervals, which are over people: see
        :func:`~speechbrain_qmargin.scoring.shares.share_of_trials`.
    units : str
        What the table calls people.

    Raises
    ------
    ValueError
        As :func:`trial_groups`; trials without labels; scores of another shape or not finite; a
        threshold that is NaN.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> ids = [f"{speaker}/{take}" for speaker in range(40) for take in range(4)]
    >>> left, right = np.triu_indices(160, 1)
    >>> trials = LabelledTrials(ids, left, right, left // 4 == right // 4)
    >>> scores = rng.normal(size=len(trials)) + 3 * trials.is_target
    >>> gender = {str(speaker): "fm"[speaker % 2] for speaker in range(40)}
    >>> found = breakdown(scores, trials, 1.5, gender)
    >>> [(row.group, row.fnmr is None) for row in found.groups]
    [('f', False), ('f × m', True), ('m', False)]
    """
    scores = np.asarray(scores)
    if trials.is_target is None:
        raise ValueError("the trials have no labels: give the trial list")
    if scores.shape != (len(trials),) or not np.isfinite(scores).all():
        raise ValueError(f"{len(trials)} trials want as many finite scores, got {scores.shape}")
    if math.isnan(threshold):
        raise ValueError("the threshold is NaN; no decision can rest on it")
    distinct = trials.distinct  # a trial and its reverse are one
    scores, trials = distinct.scores(scores), distinct.trials
    try:
        group, names = trial_groups(trials, values, relation=relation, edges=edges)
    except ValueError as error:
        raise ValueError(f"the column {column}: {error}" if column else str(error)) from None
    accepted, target, people = scores >= threshold, trials.is_target, trials.speakers()
    one, two = people[trials.enrolment], people[trials.test]

    def rates(name: str, chosen: np.ndarray) -> GroupRates:
        found: list[Share | None] = []
        for kind, wrong in ((~target, accepted), (target, ~accepted)):
            rows = np.flatnonzero(chosen & kind)
            found.append(
                share_of_trials(
                    wrong[rows], one[rows], two[rows], confidence, trials.speakers_known
                )
                if len(rows)
                else None
            )
        return GroupRates(name, *found)

    parts = [rates(name, group == n) for n, name in enumerate(names)]
    if (group < 0).any():
        parts.append(rates("not in the table", group < 0))
    parts = [row for row in parts if row.fmr or row.fnmr]
    whole = rates("all trials", np.ones(len(trials), dtype=bool))
    known = trials.speakers_known
    return Breakdown(column, float(threshold), whole, parts, units, confidence, known)
