"""Ids of recordings: the speaker that they name, and one recording's id in two files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from speechbrain_qmargin.tables import composed_name

__all__ = ["match_ids", "speaker_in"]


def speaker_in(name: str) -> str:
    """The speaker that a recording's id names: its part before the first slash.

    It is a name, in Unicode's normal form C (:func:`~speechbrain_qmargin.tables.composed_name`).

    Examples
    --------
    >>> speaker_in("id10270/5r0dWxy17C8/00001.wav")
    'id10270'
    """
    return composed_name(name.split("/", 1)[0])


def _without_suffix(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def _to_first_dot(name: str) -> str:
    return name.split(".", 1)[0] or name


def match_ids(wanted: Sequence[str], held: Sequence[str]) -> tuple[np.ndarray, str]:
    """Where each wanted id is among those held, suffixes aside where they differ.

    Toolkits write ids with the file's suffix, without it, or cut at the first dot (SpeechBrain),
    and file systems write an accent as a part of its letter or as a character of its own.
    The strictest of the rules is taken that finds every id, else that finds the most.

    Parameters
    ----------
    wanted, held : sequence of str

    Returns
    -------
    (places, how)
        Int array [len(wanted)], -1 where an id is not held; and the rule for a warning, empty
        where the ids are equal.

    Raises
    ------
    ValueError
        Two recordings become one under the rule that an id wants; both are named.

    Examples
    --------
    >>> match_ids(["a/1.wav", "a/2.wav"], ["a/2", "a/1"])
    (array([1, 0]), 'without their suffix')
    """
    best, said = _places(wanted, held, None), ""
    for rule, how in (
        (composed_name, "in Unicode's normal form C"),
        (_without_suffix, "without their suffix"),
        (_to_first_dot, "up to their first dot"),
    ):
        if not len(best) or best.min() >= 0:
            break
        found = _places(wanted, held, rule)
        if found is None:
            lost = {name for name, place in zip(wanted, best, strict=True) if place < 0}
            if not lost.isdisjoint(map(rule, held)):
                raise _ambiguous(wanted, held, lost, rule, how)
        elif np.count_nonzero(found >= 0) > np.count_nonzero(best >= 0):
            best, said = found, how
    return best, said


def _ambiguous(wanted, held, lost, rule, how) -> ValueError:
    """What is said of two ids that become one under a rule; of those that are lost by it first."""
    twice = []
    for names in (held, wanted):
        first: dict[str, str] = {}
        pairs = ((first.setdefault(rule(name), name), name) for name in names)
        twice += [pair for pair in pairs if pair[0] != pair[1]]
    one, other = min(twice, key=lambda pair: rule(pair[0]) not in lost)
    return ValueError(
        f"ids are ambiguous: two recordings, {one} and {other}, are {rule(one)} {how}; write ids "
        "in full, as they are there"
    )


def _places(wanted, held, rule) -> Any:
    """None where two ids become one under the rule."""
    if rule is not None:
        wanted, held = [rule(name) for name in wanted], [rule(name) for name in held]
    place = {name: n for n, name in enumerate(held)}
    if rule is not None and (len(place) < len(held) or len(set(wanted)) < len(wanted)):
        return None
    return np.fromiter((place.get(name, -1) for name in wanted), np.int64, len(wanted))
