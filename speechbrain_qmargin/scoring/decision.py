"""The threshold that a service applies, with what is known of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from speechbrain_qmargin.files import load_record, save_record
from speechbrain_qmargin.scoring.metrics import (
    OperatingPoints,
    allowed_false_accepts,
    tar_at_far,
)
from speechbrain_qmargin.scoring.uncertainty import badge

__all__ = ["OperatingPoint", "choose_operating_point"]


@dataclass(frozen=True)
class OperatingPoint:
    """Accept a trial when ``score >= threshold``.

    Attributes
    ----------
    system : str
    threshold : float
    far_target : float
        The FAR that was asked for; on the scores the threshold was chosen on, it is not exceeded.
    far, tar : float
        Measured at the threshold, on the trials of `measured_on`.
    false_accepts, misses, num_impostors, num_targets : int
    support : str
        "measured", "indicative" or "unsupported" (the rule of 30).
    optimistic : bool
        The threshold was chosen on the very scores that `far` and `tar` are measured on.
    chosen_on, measured_on : str
        The trial lists, with their SHA-256.
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

    def accepts(self, score: float) -> bool:
        """Whether to accept.

        Raises
        ------
        ValueError
            A score that is NaN: neither accepted nor rejected in silence.
        """
        if math.isnan(score):
            raise ValueError("the score is NaN; no decision can rest on it")
        return score >= self.threshold

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        save_record(path, "operating point", asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> OperatingPoint:
        """Read a file of :meth:`save`.

        Raises
        ------
        ValueError
            Another file, or a threshold that is not finite; with the file.
        """
        point = load_record(path, "operating point", cls)
        if not math.isfinite(point.threshold):
            raise ValueError(f"{path}: not an operating point (the threshold is not finite)")
        return point


def choose_operating_point(
    system: str,
    points: OperatingPoints,
    far: float,
    *,
    development: OperatingPoints | None = None,
    measured_on: str = "",
    chosen_on: str = "",
) -> OperatingPoint:
    """The threshold for a FAR, chosen on development scores if given.

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

    Examples
    --------
    >>> import numpy as np
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.arange(100.0), np.arange(100) >= 90)
    >>> point = choose_operating_point("a", points, 0.1)
    >>> point.accepts(81.0), point.accepts(80.0), point.false_accepts, point.support
    (True, False, 9, 'indicative')
    """
    chosen = development or points
    threshold = tar_at_far(chosen, far).threshold
    allowed = allowed_false_accepts(far, chosen.num_impostors)
    misses, false_accepts = points.errors_at(threshold)
    return OperatingPoint(
        system=system,
        threshold=threshold,
        far_target=far,
        far=false_accepts / points.num_impostors,
        tar=1 - misses / points.num_targets,
        false_accepts=false_accepts,
        misses=misses,
        num_impostors=points.num_impostors,
        num_targets=points.num_targets,
        support=badge(allowed if development is None else min(allowed, false_accepts)),
        optimistic=development is None,
        chosen_on=chosen_on if development else measured_on,
        measured_on=measured_on,
    )
