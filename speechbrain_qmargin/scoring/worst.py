"""The trials and the speakers that go wrong most."""

from __future__ import annotations

import numpy as np

from speechbrain_qmargin.trials import LabelledTrials

__all__ = ["worst_speakers", "worst_trials"]


def worst_trials(
    scores: np.ndarray, trials: LabelledTrials, count: int = 10
) -> dict[str, list[dict]]:
    """The impostor trials with the highest scores and the target trials with the lowest.

    Parameters
    ----------
    scores : float array [N]
    trials : LabelledTrials
    count : int
        Of each kind, at most.

    Returns
    -------
    dict with "impostors" and "targets": lists of {"score", "enrolment", "test"}

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2", "b/1"], np.array([0, 0, 1]), np.array([1, 2, 2]),
    ...                         np.array([True, False, False]))
    >>> worst_trials(np.array([0.9, 0.1, 0.7]), trials, count=1)["impostors"]
    [{'score': 0.7, 'enrolment': 'a/2', 'test': 'b/1'}]
    """
    worst = {}
    for kind, sign, chosen in (
        ("impostors", -1, np.flatnonzero(~trials.is_target)),
        ("targets", 1, np.flatnonzero(trials.is_target)),
    ):
        order = chosen[np.argsort(sign * np.asarray(scores)[chosen], kind="stable")[:count]]
        worst[kind] = [
            {
                "score": float(scores[n]),
                "enrolment": trials.ids[trials.enrolment[n]],
                "test": trials.ids[trials.test[n]],
            }
            for n in order.tolist()
        ]
    return worst


def worst_speakers(
    scores: np.ndarray, trials: LabelledTrials, threshold: float, count: int = 10
) -> list[dict]:
    """The speakers with the most errors at a threshold: Doddington's goats and lambs.

    In the order of their share of all misses plus their share of all false accepts; those without
    an error are left out.

    Parameters
    ----------
    scores : float array [N]
    trials : LabelledTrials
    threshold : float
        Accepted is ``score >= threshold``.
    count : int
        At most.

    Raises
    ------
    ValueError
        As :meth:`~speechbrain_qmargin.trials.pairs.LabelledTrials.speakers`.

    Returns
    -------
    list of {"speaker", "misses", "targets", "false_accepts", "impostors"}
        A false accept counts for both its speakers.

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2", "b/1"], np.array([0, 0, 1]), np.array([1, 2, 2]),
    ...                         np.array([True, False, False]))
    >>> worst_speakers(np.array([0.4, 0.1, 0.7]), trials, 0.5)[0]
    {'speaker': 'a', 'misses': 1, 'targets': 1, 'false_accepts': 1, 'impostors': 2}
    """
    speakers = trials.speakers()
    size = int(speakers.max()) + 1
    accepted = np.asarray(scores) >= threshold
    target, sides = trials.is_target, (speakers[trials.enrolment], speakers[trials.test])
    targets = np.bincount(sides[0][target], minlength=size)
    misses = np.bincount(sides[0][target & ~accepted], minlength=size)
    both = np.concatenate(sides)
    impostors = np.bincount(both[np.tile(~target, 2)], minlength=size)
    accepts = np.bincount(both[np.tile(~target & accepted, 2)], minlength=size)
    share = misses / max(misses.sum(), 1) + accepts / max(accepts.sum(), 1)
    order = np.argsort(-share, kind="stable")[:count]
    return [
        {
            "speaker": str(trials.people[speaker]),
            "misses": int(misses[speaker]),
            "targets": int(targets[speaker]),
            "false_accepts": int(accepts[speaker]),
            "impostors": int(impostors[speaker]),
        }
        for speaker in order.tolist()
        if share[speaker] > 0
    ]
