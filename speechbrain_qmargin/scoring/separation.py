"""What must be apart for a figure to be honest: development and test, kinds of scores.

A threshold or a calibration that has seen the test's speakers is optimistic; one of another kind
of score (AS-norm against cosine) is wrong. Both are refused where they can be seen, and said where
they cannot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, cast

import numpy as np

from speechbrain_qmargin.tables import some
from speechbrain_qmargin.trials import Trials
from speechbrain_qmargin.trials.ids import match_ids

__all__ = [
    "ORIGIN",
    "Origin",
    "name_digest",
    "origin_of",
    "refuse_other_scores",
    "refuse_shared",
    "refuse_tested",
    "speaker_digests",
]


class Origin(TypedDict, total=False):
    """What scores are made of and how; empty or left out where it is not known.

    A threshold, a calibration or a fusion is for scores of the same origin.

    Attributes
    ----------
    kind : str
        What they are: "cosine", "centred cosine", "as-norm", "plda", "llr", ...
    encoder : str
        Digest of the encoder whose embeddings were scored.
    cohort : str
        What they were normalised with, by name or digest; empty without a cohort.
    mean : str
        What was subtracted from the embeddings, by name and SHA-256.
    enrolment : str
        How the recordings of an enrolment model were put together; empty without models.
    backend : str
        Digest of the PLDA, the calibration or the fusion that they come from; empty for cosines.
    """

    kind: str
    encoder: str
    cohort: str
    mean: str
    enrolment: str
    backend: str


ORIGIN = tuple(Origin.__annotations__)
_DIGESTS = {  # what is told by its digest, and a word on what makes it another
    "encoder": "",
    "cohort": " (its file, speakers, mean, or the number of nearest entries)",
    "mean": "",
    "backend": " (a PLDA, a calibration or a fusion)",
}


def origin_of(about: Mapping[str, str]) -> Origin:
    """What the line at the head of a score file says of the scores' origin.

    Examples
    --------
    >>> origin_of({"kind": "cosine", "encoder": "5e11", "trials": "list.txt"})
    {'kind': 'cosine', 'encoder': '5e11'}
    """
    return cast("Origin", {name: about[name] for name in ORIGIN if about.get(name)})


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
        Speakers in both; recordings where the speakers are not known (by
        :func:`~speechbrain_qmargin.trials.ids.match_ids`). They are named.

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
        if known:
            shared = sorted({*development.speaker_names()} & {*trials.speaker_names()})
        else:
            places, _ = match_ids(trials.recordings, development.recordings)
            shared = [one for one, at in zip(trials.recordings, places, strict=True) if at >= 0]
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


def refuse_tested(trials: Trials, validation: Trials, what: str = "valid_file") -> str:
    """Refuse to validate on what is tested: epochs and settings would be chosen on the test.

    Trials are compared, whatever their lists are called, in whatever order and direction.

    Parameters
    ----------
    trials : Trials
        Those of the test.
    validation : Trials
    what : str
        What messages call the validation trials.

    Returns
    -------
    str
        What the two share short of that, trials or speakers, for a warning; empty if nothing.

    Raises
    ------
    ValueError
        One of the lists is in the other.

    Examples
    --------
    >>> ids, is_target = ["a/1", "a/2", "b/1"], np.array([True, False])
    >>> test = Trials(ids, np.array([0, 0]), np.array([1, 2]), is_target)
    >>> refuse_tested(test, Trials(ids, np.array([2, 1]), np.array([0, 0]), is_target[::-1]))
    Traceback (most recent call last):
    ValueError: valid_file: its 2 trials are those of ...
    """
    number = {name: n for n, name in enumerate(dict.fromkeys([*trials.ids, *validation.ids]))}

    def pairs(of: Trials) -> np.ndarray:
        ids = np.array([number[name] for name in of.ids], np.int64)
        sides = np.sort(np.stack((ids[of.enrolment], ids[of.test])), axis=0)
        return np.unique(sides[0] * len(number) + sides[1])

    tested, validated = pairs(trials), pairs(validation)
    both = int(np.isin(validated, tested, assume_unique=True).sum())
    if both and both in (len(tested), len(validated)):
        same = len(tested) == len(validated)
        how = "those of" if same else "all in" if both == len(validated) else "more than all of"
        raise ValueError(
            f"{what}: its {len(validated):,} trials are {how} {trials.name}, which is tested on: "
            "settings and epochs would be chosen on the test; take other speakers, or leave it out"
        )
    if both:
        shared = f"{both:,} of its {len(validated):,} trials"
    else:
        people = sorted({*validation.speaker_names()} & {*trials.speaker_names()})
        if not people:
            return ""
        shared = f"{len(people)} speakers ({some(people)})"
    return (
        f"{what}: {shared} are in {trials.name} too: what is chosen by validation is chosen on "
        "people who are tested"
    )


def refuse_other_scores(given: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Refuse scores that are not made as those that `what` is for.

    Where either side does not say nothing is compared.

    Parameters
    ----------
    given, wanted : mapping with what is known of :class:`Origin`
        As :attr:`~speechbrain_qmargin.scoring.score_files.ScoreFile.origin` says them; digests are
        compared, not the names of files before them.
    what : str
        What messages call it.

    Raises
    ------
    ValueError
        Another kind of score, encoder, cohort, mean, enrolment of models or back end.
    TypeError
        A name in `given` that is none of these.

    Examples
    --------
    >>> refuse_other_scores({"kind": "cosine"}, {"encoder": "5e11"}, "the threshold")
    >>> refuse_other_scores({"encoder": "ac1d"}, {"encoder": "5e11"}, "the threshold")
    Traceback (most recent call last):
    ValueError: the threshold is of the encoder 5e11, and this is ac1d: it wants one of its own
    """
    if unknown := given.keys() - set(ORIGIN):
        raise TypeError(f"{min(unknown)!r} tells no origin of scores; {', '.join(ORIGIN)} do")
    kind, own = given.get("kind", ""), wanted.get("kind", "")
    if kind and own and kind != own:
        raise ValueError(f"{what} is for {own} scores, and these are {kind} scores")
    one, own = given.get("enrolment", ""), wanted.get("enrolment", "")
    if one and own and one != own:
        raise ValueError(f"{what} is for enrolment by {own}, and these scores are by {one}")
    for name, note in _DIGESTS.items():
        one, own = given.get(name, ""), wanted.get(name, "")
        if one and own and _digest_in(one) != _digest_in(own):
            raise ValueError(
                f"{what} is of the {name} {_digest_in(own)[:16]}, and this is "
                f"{_digest_in(one)[:16]}{note}: it wants one of its own"
            )


def _digest_in(source: str) -> str:
    """The digest in a file's name with its SHA-256; what is a digest already stays."""
    return source.rpartition("sha256:")[2]
