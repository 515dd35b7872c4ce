"""The threshold that a service applies, with what it is of and what is known of it."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from speechbrain_qmargin.files import load_record, save_record
from speechbrain_qmargin.scoring.metrics import (
    OperatingPoints,
    allowed_false_accepts,
    tar_at_far,
)
from speechbrain_qmargin.scoring.separation import refuse_other_kind
from speechbrain_qmargin.scoring.uncertainty import badge

__all__ = ["OperatingPoint", "choose_operating_point", "clear_threshold"]


@dataclass(frozen=True)
class OperatingPoint:
    """Accept a trial when ``score >= threshold``.

    Attributes
    ----------
    system : str
    threshold : float
        Finite.
    far_target : float
        The FAR that was asked for; on the scores the threshold was chosen on, it is not exceeded.
    far, tar : float
        Measured at the threshold, on the trials of `measured_on`.
    false_accepts, misses, num_impostors, num_targets : int
    support : str
        "measured", "indicative" or "unsupported" (errors and speakers).
    optimistic : bool
        The threshold was chosen on the very scores that `far` and `tar` are measured on, or it is
        not known that the speakers of the two are apart.
    chosen_on, measured_on : str
        The trial lists, with their SHA-256.
    kind : str
        What the scores are ("cosine", "as-norm", "llr", ...); empty if not known.
    embeddings : str
        What they were computed from: the file by name and SHA-256; empty if not known.
    scores : str
        The score file that the threshold was chosen on, by name and SHA-256.

    Raises
    ------
    ValueError
        A threshold that is no finite number, rates or counts that are no numbers.
    """

    system: str
    threshold: float
    far_target: float
    far: float
    tar: float
    false_accepts: int
    misses: int
    num_impostors: int
    num_targets: int
    support: str
    optimistic: bool
    chosen_on: str
    measured_on: str
    kind: str = ""
    embeddings: str = ""
    scores: str = ""

    def __post_init__(self) -> None:
        for name in ("threshold", "far_target", "far", "tar"):
            value = getattr(self, name)
            if not _is_number(value) or not math.isfinite(value):
                raise ValueError(f"the {name} is {value!r}, not a finite number")
        for name in ("false_accepts", "misses", "num_impostors", "num_targets"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}, not a count")

    def accepts(self, score: float, kind: str = "") -> bool:
        """Whether to accept.

        Parameters
        ----------
        score : float
        kind : str
            What the score is; another kind than the threshold's is refused.

        Raises
        ------
        ValueError
            A score that is not a finite number, or of another kind: neither accepted nor rejected
            in silence.
        """
        refuse_other_kind(kind, self.kind, "the threshold")
        if not _is_number(score) or not math.isfinite(score):
            raise ValueError(f"the score is {score!r}; no decision can rest on it")
        return bool(score >= self.threshold)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        save_record(path, "operating point", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> OperatingPoint:
        """Read a file of :meth:`save`.

        Raises
        ------
        ValueError
            Another file, or a threshold that is not a finite number; with the file.
        """
        return load_record(path, "operating point", cls)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def clear_threshold(points: OperatingPoints, threshold: float) -> float:
    """A threshold that decides the same trials, whatever way their scores were rounded.

    A service may compute in float32 what a file holds as the text of a float32: the same score is
    0.100000001 here and 0.1 there. Midway between the highest score that is rejected and the
    lowest that is accepted, both fall on their side; where the two are one in float32, on the side
    that rejects.

    Parameters
    ----------
    points : OperatingPoints
    threshold : float

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([0.1, 0.3, 0.9]), np.array([False, True, True]))
    >>> round(clear_threshold(points, 0.25), 3)
    0.2
    """
    rejected, accepted = [], []
    for scores in (points.targets, points.impostors):
        at = int(np.searchsorted(scores, threshold, side="left"))
        rejected += scores[at - 1 : at].tolist() if at else []
        accepted += scores[at : at + 1].tolist()
    if not rejected:
        return float(min(accepted))
    low = max(max(score, float(np.float32(score))) for score in rejected)
    if not accepted:
        return float(np.nextafter(np.float32(low), np.float32(np.inf), dtype=np.float32))
    high = min(min(score, float(np.float32(score))) for score in accepted)
    if high <= low:  # one score in float32
        return float(np.nextafter(np.float32(low), np.float32(np.inf), dtype=np.float32))
    middle = low + (high - low) / 2
    return middle if low < middle < high else high


def choose_operating_point(
    system: str,
    points: OperatingPoints,
    far: float,
    *,
    development: OperatingPoints | None = None,
    measured_on: str = "",
    chosen_on: str = "",
    speakers: float | None = None,
    kind: str = "",
    embeddings: str = "",
    scores: str = "",
    apart: bool = True,
) -> OperatingPoint:
    """The threshold for a FAR, chosen on development scores if given.

    It lies clear of the scores on both its sides, see :func:`clear_threshold`. That development
    and test are apart is for the caller to see to
    (:func:`~speechbrain_qmargin.scoring.separation.refuse_shared`).

    Parameters
    ----------
    system : str
    points : OperatingPoints
        Of the scores it is measured on.
    far : float
    development : OperatingPoints, optional
        Of the scores the threshold is chosen on; without it the result is marked optimistic.
    measured_on, chosen_on : str
        The sources of the trial lists.
    speakers : float, optional
        That contribute to the trials it is measured on, for the badge.
    kind, embeddings, scores : str
        Of :class:`OperatingPoint`.
    apart : bool
        Whether development and test are known to share no speaker; otherwise it is optimistic.

    Raises
    ------
    ValueError
        As :func:`~speechbrain_qmargin.scoring.metrics.tar_at_far`.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.arange(100.0), np.arange(100) >= 90)
    >>> point = choose_operating_point("a", points, 0.1)
    >>> point.accepts(81.0), point.accepts(80.0), point.false_accepts, point.support
    (True, False, 9, 'indicative')
    """
    chosen = development or points
    threshold = clear_threshold(chosen, tar_at_far(chosen, far).threshold)
    allowed = allowed_false_accepts(far, chosen.num_impostors)
    misses, false_accepts = points.errors_at(threshold)
    errors = allowed if development is None else min(allowed, false_accepts)
    return OperatingPoint(
        system=system,
        threshold=threshold,
        far_target=float(far),
        far=false_accepts / points.num_impostors,
        tar=1 - misses / points.num_targets,
        false_accepts=false_accepts,
        misses=misses,
        num_impostors=points.num_impostors,
        num_targets=points.num_targets,
        support=badge(errors, speakers),
        optimistic=development is None or not apart,
        chosen_on=chosen_on if development else measured_on,
        measured_on=measured_on,
        kind=kind,
        embeddings=embeddings,
        scores=scores,
    )
