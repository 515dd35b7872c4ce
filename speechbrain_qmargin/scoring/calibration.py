"""Scores to log-likelihood ratios: logistic regression on development trials.

With quality measures of the recordings (duration, embedding norm, mean cohort score) it becomes
WeSpeaker's quality-aware calibration (QMF). Saved as JSON; never fitted on what it reports.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import json_digest, load_record, save_record
from speechbrain_qmargin.scoring.separation import (
    Origin,
    refuse_other_scores,
    refuse_shared,
    speaker_digests,
)
from speechbrain_qmargin.trials import LabelledTrials, Trials
from speechbrain_qmargin.trials.pairs import as_labels

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Calibration", "digest", "fit_calibration", "fit_log_odds", "in_words"]

Qualities = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Calibration:
    """``llr = offset + weights . features``, in natural log.

    Attributes
    ----------
    qualities : list of str
        Names of the quality measures that :meth:`apply` wants.
    weights : list of float
        Of the score, then two for each quality measure: the lower and the higher of both sides.
    offset : float
    p_target : float
        The prior at which the fit was weighted.
    fitted_on : str
        Digest of the development trials.
    num_trials : int
        Distinct ones.
    kind : str
        What the scores are that it was fitted on ("cosine", "as-norm", ...); empty if not known.
    speakers : list of str
        Digests of the development speakers (:func:`speaker_digests`).
    encoder, cohort, mean, enrolment, backend : str
        Of the scores it was fitted on (:class:`~speechbrain_qmargin.scoring.separation.Origin`);
        empty if not known.

    Raises
    ------
    ValueError
        Another number of weights than the measures want, numbers that are not finite, a weight of
        the score that is not positive.

    Examples
    --------
    >>> calibration = Calibration([], [10.0], -4.0, 0.01, "", 1000, kind="cosine")
    >>> trials = Trials(["a/1", "b/1"], np.array([0]), np.array([1]))
    >>> calibration.apply(np.array([0.5]), trials, kind="cosine")
    array([1.])
    """

    qualities: list[str]
    weights: list[float]
    offset: float
    p_target: float
    fitted_on: str
    num_trials: int
    kind: str = ""
    speakers: list[str] = field(default_factory=list)
    encoder: str = ""
    cohort: str = ""
    mean: str = ""
    enrolment: str = ""
    backend: str = ""

    def __post_init__(self) -> None:
        numbers = [*self.weights, self.offset, self.p_target]
        if len(self.weights) != 1 + 2 * len(self.qualities) or not np.isfinite(numbers).all():
            raise ValueError("its weights and measures disagree, or are not finite")
        if self.weights[0] <= 0:
            raise ValueError(
                "the weight of the score is not positive: higher scores would mean less alike. "
                "Negate scores that are distances"
            )

    @property
    def terms(self) -> list[tuple[str, float]]:
        """What each weight is of, in words, and the weight."""
        names = [f"{end} {name}" for name in self.qualities for end in ("lower", "higher")]
        return list(zip(["score", *names], self.weights, strict=True))

    def __str__(self) -> str:
        return in_words(self.terms, self.offset)

    @property
    def digest(self) -> str:
        """SHA-256 of all that its log-likelihood ratios depend on, their ``backend``."""
        return json_digest([self.qualities, self.weights, self.offset, self.backend])

    def apply(
        self,
        scores: np.ndarray,
        trials: Trials,
        qualities: Qualities | None = None,
        *,
        allow_same: bool = False,
        **origin: Unpack[Origin],
    ) -> np.ndarray:
        """Log-likelihood ratios of new scores: float64 [N].

        Parameters
        ----------
        scores : float array [N]
        trials : Trials
        qualities : mapping from measure to mapping from recording to float, optional
            Those that it was fitted with; others are left.
        allow_same : bool
            Also of the development speakers; figures on the result are optimistic.
        **origin
            What the scores are, and of what, as far as that is known
            (:class:`~speechbrain_qmargin.scoring.separation.Origin`).

        Raises
        ------
        ValueError
            The trials it was fitted on or others of their speakers (unless `allow_same`), scores
            of another origin, of another shape or not finite, a missing quality measure.
        """
        refuse_other_scores(origin, vars(self), "the calibration")
        if not allow_same:
            if digest(trials) == self.fitted_on:
                raise ValueError(
                    "these are the very trials the calibration was fitted on; figures on them "
                    "would be optimistic. Fit it on a development list"
                )
            note = refuse_shared(trials, self.speakers, "the calibration's development trials")
            if note:
                warnings.warn(note, stacklevel=2)
        available = dict(qualities or {})
        missing = [name for name in self.qualities if name not in available]
        if missing:
            raise ValueError(f"the calibration needs the quality measures {', '.join(missing)}")
        measures = {name: available[name] for name in self.qualities}
        features = _features(scores, trials, measures)
        if not np.isfinite(features[:, 0]).all():
            at = int(np.argmin(np.isfinite(features[:, 0])))
            raise ValueError(f"the score of {trials.pair(at)} is {features[at, 0]}")
        return features @ np.asarray(self.weights) + self.offset

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        save_record(path, "calibration", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file of :meth:`save`.

        Raises
        ------
        ValueError
            Another file, fields that are missing, weights that are not finite; with the file.
        """
        return load_record(path, "calibration", cls)


def in_words(terms: Iterable[tuple[str, float]], offset: float) -> str:
    """A log-likelihood ratio as the sum that it is.

    Parameters
    ----------
    terms : iterable of (str, float)
        What each weight is of, and the weight.
    offset : float

    Examples
    --------
    >>> in_words([("score", 10.0), ("lower duration", -2.0)], -4.0)
    'log-likelihood ratio = 10 * score - 2 * lower duration - 4'
    """
    parts = [*((weight, f" * {name}") for name, weight in terms), (offset, "")]
    signed = " ".join(f"{'-' if one < 0 else '+'} {abs(one):.4g}{of}" for one, of in parts)
    return f"log-likelihood ratio = {signed.removeprefix('+ ')}"


def digest(trials: Trials) -> str:
    """SHA-256 of the pairs of ids, in hexadecimal digits; whatever the order of the trials.

    Examples
    --------
    >>> trials = Trials(["a", "b", "c"], np.array([0, 1]), np.array([1, 2]))
    >>> digest(trials) == digest(trials.rows([1, 0]))
    True
    """
    pairs = [
        f"{trials.ids[e]}\t{trials.ids[t]}\n"
        for e, t in zip(trials.enrolment.tolist(), trials.test.tolist(), strict=True)
    ]
    return hashlib.sha256("".join(sorted(pairs)).encode()).hexdigest()


def _features(scores: np.ndarray, trials: Trials, qualities: Qualities) -> np.ndarray:
    columns = [np.asarray(scores, dtype=float)]
    if columns[0].shape != (len(trials),):
        raise ValueError(f"{len(trials)} trials and scores {columns[0].shape}")
    for name, values in qualities.items():
        missing = [recording for recording in trials.recordings if recording not in values]
        if missing:
            raise ValueError(f"{len(missing)} recordings have no {name}, the first: {missing[0]}")
        of_id = np.array(  # a model's: the mean of its recordings'
            [np.mean([values[one] for one in trials.models.get(each, (each,))])
             for each in trials.ids],
            dtype=float,
        )  # fmt: skip
        if not np.isfinite(of_id).all():
            at = int(np.argmin(np.isfinite(of_id)))
            raise ValueError(f"the {name} of {trials.ids[at]} is not finite")
        sides = of_id[trials.enrolment], of_id[trials.test]
        columns += [np.minimum(*sides), np.maximum(*sides)]
    return np.column_stack(columns)


def fit_log_odds(
    features: np.ndarray, is_target: np.ndarray, p_target: float
) -> tuple[np.ndarray, float]:
    """Weights and offset of ``llr = features @ weights + offset``.

    Unregularised logistic regression (scikit-learn), the classes weighted to a prior of
    `p_target`, run to convergence; the prior's log odds are taken out. A feature of one value for
    all trials has the weight 0.

    Parameters
    ----------
    features : float array [N, F]
    is_target : bool array [N]
    p_target : float

    Raises
    ------
    ValueError
        One class missing, a prior outside (0, 1), features that are all equal, or that separate
        the classes but for ties at one value (the best log-likelihood ratio would be infinite).

    Examples
    --------
    >>> scores = np.array([[2.0], [0.0], [1.0], [-1.0]])
    >>> weights, offset = fit_log_odds(scores, np.array([True, True, False, False]), 0.5)
    >>> weights.round(2), round(offset, 2)
    (array([0.91]), -0.45)
    """
    require("sklearn", why="calibration", extra="report")
    from sklearn.linear_model import LogisticRegression

    if not 0 < p_target < 1:
        raise ValueError(f"p_target must be in (0, 1), got {p_target}")
    is_target = as_labels(is_target)
    number = np.count_nonzero(is_target)
    if number in (0, len(is_target)):
        raise ValueError("calibration needs target and impostor trials")
    tells = features.min(0) < features.max(0)  # rounded, the deviation of one value may be 1e-16
    if not tells.any():
        raise ValueError("the development scores are all equal: they tell nothing")
    told, weights = features[:, tells], np.zeros(len(tells))
    centre, spread = told.mean(0), told.std(0)
    weight = np.where(is_target, p_target / number, (1 - p_target) / (len(is_target) - number))
    # the gradient is a mean in which the rarer class has its prior's weight
    tolerance = 1e-10 * min(p_target, 1 - p_target)
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=tolerance, max_iter=1000)
    falling = _apart(-features[:, 0], is_target)
    apart = falling or _apart(features[:, 0], is_target)
    if not apart:
        with warnings.catch_warnings():  # scikit-learn's words for classes that are apart
            warnings.simplefilter("ignore")
            model.fit((told - centre) / spread, is_target, sample_weight=weight * len(weight))
        weights[tells] = model.coef_[0] / spread
        apart = _apart(features @ weights, is_target)
    if apart:
        raise ValueError(
            "the development scores separate targets and impostors entirely, but for ties perhaps: "
            "their best log-likelihood ratios are infinite. Use a harder or larger list"
            + (", and negate scores that are distances: these are lower for targets" * falling)
        )
    intercept = np.asarray(model.intercept_)[0] - weights[tells] @ centre
    return weights, float(intercept - math.log(p_target / (1 - p_target)))


def _apart(values: np.ndarray, is_target: np.ndarray) -> bool:
    """Whether no target is below an impostor: then the likelihood has no maximum.

    Ties at the one value where the classes touch do not change that.
    """
    return bool(values[is_target].min() >= values[~is_target].max() and values.min() < values.max())


def fit_calibration(
    scores: np.ndarray,
    trials: LabelledTrials,
    qualities: Qualities | None = None,
    *,
    p_target: float = 0.01,
    **origin: Unpack[Origin],
) -> Calibration:
    """Fit on development trials, of other speakers than those to be reported.

    Unregularised logistic regression (scikit-learn), the classes weighted to a prior of
    `p_target`, run to convergence. Distinct pairs count, as in figures: a pair once, whatever its
    order, and no recording with itself.

    Parameters
    ----------
    scores : float array [N]
    trials : LabelledTrials
    qualities : mapping from a measure's name to its value for every id
        Durations are best given as logarithms.
    p_target : float
    **origin
        What the scores are, and of what
        (:class:`~speechbrain_qmargin.scoring.separation.Origin`); the calibration is refused for
        others.

    Raises
    ------
    ValueError
        One class missing, a recording without a quality, a prior outside (0, 1), scores that
        separate the classes (the best log-likelihood ratio would be infinite) or fall where they
        should rise.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> left, right = np.triu_indices(80, 1)
    >>> trials = LabelledTrials([str(i) for i in range(80)], left, right, left // 8 == right // 8)
    >>> scores = rng.normal(size=len(trials)) * 0.1 + 0.2 * trials.is_target
    >>> calibration = fit_calibration(scores, trials)
    >>> [name for name, _ in calibration.terms], 10 < calibration.weights[0] < 30
    (['score'], True)
    """
    qualities = dict(qualities or {})
    distinct = trials.distinct
    counted = distinct.trials
    features = _features(distinct.scores(np.asarray(scores)), counted, qualities)
    if not np.isfinite(features[:, 0]).all():
        raise ValueError("scores must be finite")
    weights, offset = fit_log_odds(features, counted.is_target, p_target)
    return Calibration(
        list(qualities),
        weights.tolist(),
        offset,
        p_target,
        digest(trials),
        len(counted),
        speakers=speaker_digests(trials),
        **origin,
    )
