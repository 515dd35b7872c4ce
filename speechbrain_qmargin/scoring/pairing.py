"""Trials from recordings: which pairs of a set of people are compared.

Two recordings of one person resemble each other by more than the person if they were made in one
go. They are a trial only if they are of different sessions, wherever the person has several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from speechbrain_qmargin.trials import LabelledTrials

__all__ = ["every_model", "every_pair", "session_in", "spread_over_sessions"]


def session_in(name: str) -> str:
    """What stands between an id's speaker and its file.

    Examples
    --------
    >>> session_in("id1/a/b/1.wav")
    'a/b'
    """
    return "/".join(name.split("/")[1:-1])


def spread_over_sessions(names: Sequence[str], count: int) -> list[str]:
    """At most `count` recordings, a session after the other in turn.

    Examples
    --------
    >>> spread_over_sessions(["x/a/1", "x/a/2", "x/a/3", "x/b/1"], 3)
    ['x/a/1', 'x/b/1', 'x/a/2']
    """
    sessions = defaultdict(list)
    for name in names:
        sessions[session_in(name)].append(name)
    turns = (
        (turn, n, name) for n, s in enumerate(sessions.values()) for turn, name in enumerate(s)
    )
    return [name for *_, name in sorted(turns)[:count]]


def every_pair(chosen: Mapping[str, Sequence[str]], source: str = "") -> LabelledTrials:
    """Every pair of recordings, but of one person only across sessions where there are several.

    Parameters
    ----------
    chosen : mapping from person to the ids of recordings
    source : str
        What the trials are called.

    Examples
    --------
    >>> trials = every_pair({"x": ["x/a/1", "x/a/2", "x/b/1"], "y": ["y/a/1"]})
    >>> [trials.pair(n) for n in np.flatnonzero(trials.is_target)]
    ['x/a/1 x/b/1', 'x/a/2 x/b/1']
    """
    ids = [name for names in chosen.values() for name in names]
    people, session, several = _told(chosen)
    left, right = np.triu_indices(len(ids), 1)
    same = people[left] == people[right]
    kept = ~same | ~several[left] | (session[left] != session[right])
    speaker = [one for one, names in chosen.items() for _ in names]
    return LabelledTrials(
        ids, left[kept], right[kept], same[kept], source=source, speaker_of=speaker
    )


def every_model(chosen: Mapping[str, Sequence[str]], size: int, source: str = "") -> LabelledTrials:
    """Enrolments of `size` recordings each against every recording that is in none of their parts.

    A person's recordings are enrolled in groups, session after session, none in two; of their own
    recordings those of other sessions are tried, where there are several.

    Parameters
    ----------
    chosen : mapping from person to the ids of recordings
    size : int
    source : str
        What the trials are called.

    Raises
    ------
    ValueError
        Nobody has more than `size` recordings.

    Examples
    --------
    >>> trials = every_model({"x": ["x/1", "x/2", "x/3"], "y": ["y/1"]}, 2)
    >>> [trials.pair(n) for n in range(len(trials))], trials.is_target.tolist()
    (['x#1 x/3', 'x#1 y/1'], [True, False])
    """
    recordings = [name for names in chosen.values() for name in names]
    people, session, several = _told(chosen)
    order = np.lexsort((np.arange(len(recordings)), session, people))
    models: dict[str, tuple[str, ...]] = {}
    enrolment, tests, owners, names = [], [], [], list(chosen)
    for person, name in enumerate(names):
        own = order[people[order] == person]
        if len(own) <= size:
            continue
        for start in range(0, len(own) - size + 1, size):
            group = own[start : start + size]
            free = people != person
            others = own[~np.isin(own, group)]
            apart = others[~np.isin(session[others], session[group])]
            free[apart if several[own[0]] and len(apart) else others] = True
            chosen_tests = np.flatnonzero(free)
            enrolment.append(np.full(len(chosen_tests), len(models)))
            tests.append(chosen_tests)
            owners.append(person)
            models[f"{name}#{start // size + 1}"] = tuple(recordings[n] for n in group.tolist())
    if not models:
        raise ValueError(f"nobody has more than {size} recordings; enrol with fewer")
    left, right = np.concatenate(enrolment), np.concatenate(tests)
    same = np.asarray(owners)[left] == people[right]
    trials = LabelledTrials(
        [*models, *recordings],
        left,
        right + len(models),
        same,
        source=source,
        speaker_of=[*(names[n] for n in owners), *(names[n] for n in people.tolist())],
    )
    return trials.with_models(models)


def _told(chosen: Mapping[str, Sequence[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every recording: its person, its session, and whether the person has several sessions."""
    people = np.repeat(np.arange(len(chosen)), [len(names) for names in chosen.values()])
    told = [f"{n}\t{session_in(one)}" for n, names in enumerate(chosen.values()) for one in names]
    session = np.unique(told, return_inverse=True)[1] if told else np.empty(0, dtype=np.int64)
    of_session = people[np.unique(session, return_index=True)[1]]  # a session is of one person
    several = np.bincount(of_session, minlength=len(chosen)) > 1
    return people, session, several[people]
