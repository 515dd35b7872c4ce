"""Several systems' scores as one log-likelihood ratio: logistic regression on development trials.

As BOSARIS and FoCal fuse (Brummer et al. 2007): one weight a system and an offset, the classes
weighted to a prior. Fitted on speakers that are not in the trials it is applied to: it refuses
others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from speechbrain_qmargin.files import json_digest, load_record, save_record
from speechbrain_qmargin.scoring.calibration import fit_log_odds, in_words
from speechbrain_qmargin.scoring.separation import (
    Origin,
    refuse_other_scores,
    refuse_shared,
    speaker_digests,
)
from speechbrain_qmargin.trials import Trials

__all__ = ["Fusion", "fit_fusion"]


@dataclass(frozen=True)
class Fusion:
    """``llr = offset + weights . scores``, in natural log.

    Attributes
    ----------
    systems : list of str
    weights : list of float
        One a system. A negative one says that the system is taken from the others' agreement,
        not that it is useless; it often means that two systems are nearly the same.
    offset : float
    p_target : float
        The prior at which the fit was weighted.
    speakers : list of str
        Digests of the development speakers' names, so that the file names nobody.
    num_trials : int
        Of development.
    fitted_on : str
        The development list, with its SHA-256, if it came from a file.
    origins : mapping from system to Origin
        What its scores are and of what, where that is known; see
        :attr:`~speechbrain_qmargin.scoring.score_files.ScoreFile.origin`.

    Examples
    --------
    >>> fusion = Fusion(["cosine", "plda"], [8.0, 0.5], -3.0, 0.01, [], 1000)
    >>> print(fusion)
    log-likelihood ratio = 8 * cosine + 0.5 * plda - 3
    >>> trials = Trials(["a/1", "b/1"], np.array([0]), np.array([1]))
    >>> fusion.apply({"cosine": np.array([0.5]), "plda": np.array([2.0])}, trials)
    array([2.])
    """

    systems: list[str]
    weights: list[float]
    offset: float
    p_target: float
    speakers: list[str]
    num_trials: int
    fitted_on: str = ""
    origins: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of all that its log-likelihood ratios depend on, their ``backend``."""
        backends = [self.origins.get(name, {}).get("backend", "") for name in self.systems]
        return json_digest([self.systems, self.weights, self.offset, backends])

    def apply(
        self,
        systems: Mapping[str, np.ndarray],
        trials: Trials,
        *,
        allow_shared_speakers: bool = False,
        origins: Mapping[str, Origin] | None = None,
    ) -> np.ndarray:
        """Log-likelihood ratios of the systems' scores: float64 [N].

        Parameters
        ----------
        systems : mapping from name to scores [N]
            The very systems that it was fitted on, by name.
        trials : Trials
        allow_shared_speakers : bool
            Figures on the result are optimistic.
        origins : mapping from system to Origin, optional
            What the scores are and of what.

        Raises
        ------
        ValueError
            Other systems, scores of another origin, of another shape or not finite, speakers of
            development in the trials (unless allowed).
        """
        if set(systems) != set(self.systems):
            raise ValueError(
                f"the fusion was fitted on {', '.join(self.systems)}; got {', '.join(systems)}"
            )
        for name, origin in (origins or {}).items():
            fitted = self.origins.get(name, {})
            refuse_other_scores(origin, fitted, f"the fusion's weight of {name}")
        if not allow_shared_speakers:
            note = refuse_shared(trials, self.speakers, "the fusion's development trials")
            if note:
                warnings.warn(note, stacklevel=2)
        scores = _matrix({name: systems[name] for name in self.systems}, trials)
        return scores @ np.asarray(self.weights) + self.offset

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        save_record(path, "fusion", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Fusion:
        """Read a file of :meth:`save`.

        Raises
        ------
        ValueError
            Another file, fields that are missing or disagree, a weight that is not finite; with
            the file.
        """
        fusion = load_record(path, "fusion", cls)
        numbers = [*fusion.weights, fusion.offset]
        if len(fusion.weights) != len(fusion.systems) or not np.isfinite(numbers).all():
            raise ValueError(f"{path}: not a fusion file (weights and systems disagree)")
        return fusion

    def __str__(self) -> str:
        return in_words(zip(self.systems, self.weights, strict=True), self.offset)


def _matrix(systems: Mapping[str, np.ndarray], trials: Trials) -> np.ndarray:
    columns = []
    for name, given in systems.items():
        scores = np.asarray(given, dtype=float)
        if scores.shape != (len(trials),):
            raise ValueError(f"{name}: {len(trials)} trials and scores {scores.shape}")
        if not np.isfinite(scores).all():
            at = int(np.argmin(np.isfinite(scores)))
            raise ValueError(
                f"{name}: the score of {trials.ids[trials.enrolment[at]]} "
                f"{trials.ids[trials.test[at]]} is {scores[at]}"
            )
        columns.append(scores)
    return np.column_stack(columns)


def fit_fusion(
    systems: Mapping[str, np.ndarray],
    trials: Trials,
    *,
    p_target: float = 0.01,
    origins: Mapping[str, Origin] | None = None,
) -> Fusion:
    """Fit on development trials, of which distinct pairs count, as in figures.

    Parameters
    ----------
    systems : mapping from name to scores [N]
    trials : Trials
        Of development, with labels; of other speakers than those to be reported.
    p_target : float
    origins : mapping from system to Origin, optional
        What the scores are and of what; the fusion is refused for others.

    Raises
    ------
    ValueError
        No system, scores of another shape or not finite, trials without labels; as
        :func:`~speechbrain_qmargin.scoring.calibration.fit_log_odds`.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> left, right = np.triu_indices(80, 1)
    >>> trials = Trials([str(i) for i in range(80)], left, right, left // 8 == right // 8)
    >>> noise = rng.normal(size=(2, len(trials)))
    >>> fusion = fit_fusion({"a": noise[0] + 2 * trials.is_target,
    ...                      "b": noise[1] + 2 * trials.is_target}, trials)
    >>> [round(weight) for weight in fusion.weights]
    [2, 2]
    """
    if not systems:
        raise ValueError("there are no systems to fuse")
    if trials.is_target is None:
        raise ValueError("the development trials have no labels: give the trial list")
    matrix, distinct = _matrix(systems, trials), trials.labelled().distinct
    columns = [distinct.scores(column) for column in matrix.T]
    counted = distinct.trials
    weights, offset = fit_log_odds(np.column_stack(columns), counted.is_target, p_target)
    return Fusion(
        list(systems),
        weights.tolist(),
        offset,
        p_target,
        speaker_digests(trials),
        len(counted),
        trials.source,
        dict(origins or {}),
    )
