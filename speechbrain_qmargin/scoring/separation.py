"""What must be apart for a figure to be honest: development and test, kinds of scores.

A threshold or a calibration that has seen the test's speakers is optimistic; one of another kind
of score (AS-norm against cosine) is wrong. Both are refused where they can be seen, and said where
they cannot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from speechbrain_qmargin.tables import some
from speechbrain_qmargin.trials import Trials

__all__ = ["name_digest", "refuse_other_kind", "refuse_shared", "speaker_digests"]


def name_digest(name: str) -> str:
    """What stands for a speaker in a file that does not name people.

    Examples
    --------
    >>> name_digest("anna")
    '55579b557896d0ce'
    """
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def speaker_digests(trials: Trials) -> list[str]:
    """The digests of all speakers, sorted; of the recordings where the speakers are not known.

    Examples
    --------
    >>> import numpy as np
    >>> trials = Trials(["anna/1", "anna/2"], np.array([0]), np.array([1]))
    >>> speaker_digests(trials)
    ['55579b557896d0ce']
    """
    names = trials.speaker_names() if trials.speakers_known else trials.recordings
    return sorted({name_digest(name) for name in names})


def refuse_shared(
    trials: Trials, development: Trials | Iterable[str], what: str = "the development trials"
) -> str:
    """Refuse development data that share speakers with the trials to be reported.

    Parameters
    ----------
    trials : Trials
    development : Trials, or digests of :func:`speaker_digests`
    what : str
        What messages call them.

    Returns
    -------
    str
        Why it could not be seen, for the reader; empty where it could.

    Raises
    ------
    ValueError
        Speakers (where they are not known: recordings) in both; named.

    Examples
    --------
    >>> import numpy as np
    >>> test = Trials(["anna/1", "bert/1"], np.array([0]), np.array([1]))
    >>> refuse_shared(test, Trials(["cleo/1", "dora/1"], np.array([0]), np.array([1])))
    ''
    >>> refuse_shared(test, Trials(["anna/2", "dora/1"], np.array([0]), np.array([1])))
    Traceback (most recent call last):
    ValueError: the development trials: 1 speakers are in trials too: anna. ...
    """
    known = trials.speakers_known
    if isinstance(development, Trials):
        known = known and development.speakers_known
        seen = set(development.speaker_names() if known else development.recordings)
        own = set(trials.speaker_names() if known else trials.recordings)
        shared = sorted(seen & own)
    else:
        digests = set(development)
        shared = sorted(
            name
            for name in {*trials.speaker_names(), *trials.recordings}
            if name_digest(name) in digests
        )
    if shared:
        whose = "speakers" if known else "recordings"
        raise ValueError(
            f"{what}: {len(shared)} {whose} are in {trials.name} too: {some(shared)}. Figures on "
            f"{trials.name} would be optimistic; take other speakers for development"
        )
    return "" if known else (
        f"{what} share no recording with {trials.name}; whether they share speakers is not known "
        "(give utt2spk)"
    )  # fmt: skip


def refuse_other_kind(kind: str, wanted: str, what: str) -> None:
    """Refuse scores of another kind than `what` is for; where either is unknown nothing is said.

    Raises
    ------
    ValueError
        Both are known and differ.

    Examples
    --------
    >>> refuse_other_kind("cosine", "", "the threshold")
    """
    if kind and wanted and kind != wanted:
        raise ValueError(f"{what} is for {wanted} scores, and these are {kind} scores")
