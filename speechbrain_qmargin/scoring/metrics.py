r"""Error rates of verification scores: exact, with ties, in O(N log N).

A trial is accepted when ``score >= threshold``. The best thresholds of every cost lie at target
scores, so one sort of each class and one search give all the operating points that matter
(:class:`OperatingPoints`); every metric reads them. Counts stay integers, or bootstrap weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["OperatingPoints", "eer", "min_dcf", "operating_points", "tar_at_far"]


@dataclass(frozen=True)
class OperatingPoints:
    """Misses and false accepts at every distinct target score, and beyond the last.

    Attributes
    ----------
    thresholds : float array [T + 1]
        Distinct target scores, ascending, then +inf.
    misses, false_accepts : arrays [T + 1]
        Targets below, impostors at or above, each threshold.
    num_targets, num_impostors : numbers
    impostors : float array
        The impostor scores, ascending.
    """

    thresholds: np.ndarray
    misses: np.ndarray
    false_accepts: np.ndarray
    num_targets: float
    num_impostors: float
    impostors: np.ndarray

    @property
    def frr(self) -> np.ndarray:
        return self.misses / self.num_targets

    @property
    def far(self) -> np.ndarray:
        return self.false_accepts / self.num_impostors


def operating_points(scores: np.ndarray, is_target: np.ndarray) -> OperatingPoints:
    """All operating points that any metric needs.

    Parameters
    ----------
    scores : float array [N]
    is_target : bool array [N]

    Raises
    ------
    ValueError
        Shapes that disagree, scores that are not finite, or one class missing.
    """
    scores, is_target = np.asarray(scores), np.asarray(is_target, dtype=bool)
    if scores.shape != is_target.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {is_target.shape} must be equal, [N]")
    if not np.isfinite(scores).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} scores are NaN or infinite")
    targets, impostors = np.sort(scores[is_target]), np.sort(scores[~is_target])
    if not len(targets) or not len(impostors):
        raise ValueError(
            f"{len(targets)} target and {len(impostors)} impostor trials: both are needed"
        )
    distinct, first = np.unique(targets, return_index=True)
    accepted = len(impostors) - np.searchsorted(impostors, distinct, side="left")
    return OperatingPoints(
        thresholds=np.append(distinct.astype(float), np.inf),
        misses=np.append(first, len(targets)),
        false_accepts=np.append(accepted, 0),
        num_targets=len(targets),
        num_impostors=len(impostors),
        impostors=impostors,
    )


def eer(points: OperatingPoints, method: str = "rocch") -> float:
    """Equal error rate.

    Parameters
    ----------
    points : OperatingPoints
    method : {"rocch", "step"}
        ``rocch``: where the convex hull of the ROC meets FAR = FRR (Brummer & de Villiers 2013).
        ``step``: mean of FAR and FRR at the threshold where they are nearest.

    Examples
    --------
    >>> points = operating_points(np.array([3.0, 1.0, 2.0, 0.0]), np.array([1, 1, 0, 0], bool))
    >>> round(eer(points), 4), eer(points, "step")
    (0.25, 0.25)
    """
    far, frr = points.far, points.frr
    if method == "step":
        gap = np.abs(far - frr)
        nearest = gap == gap.min()
        return float(((far + frr) / 2)[nearest].min())
    if method != "rocch":
        raise ValueError(f"method must be 'rocch' or 'step', got {method!r}")
    # Lower convex hull of (far, frr), from (1, 0) to (0, 1); then its crossing of the diagonal.
    hull = [(1.0, 0.0)]
    corner = np.ones(len(far), dtype=bool)
    corner[1:] = far[1:] < far[:-1]  # of equal FAR the first has the fewest misses
    for x, y in zip(far[corner].tolist(), frr[corner].tolist(), strict=True):
        while len(hull) > 1 and _turns_out(hull[-2], hull[-1], (x, y)):
            hull.pop()
        if (x, y) != hull[-1]:
            hull.append((x, y))
    for (x0, y0), (x1, y1) in pairwise(hull):
        if y1 >= x1:
            share = (x0 - y0) / ((x0 - y0) + (y1 - x1)) if x0 - y0 + y1 - x1 > 0 else 0.0
            return x0 + share * (x1 - x0)
    return 0.0


def _turns_out(a, b, c) -> bool:
    """Whether b lies on or above the line from a to c, walking towards smaller FAR."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) >= 0


def min_dcf(
    points: OperatingPoints, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Minimum detection cost, normalised by the better of accepting all and rejecting all.

    ``min_t [c_miss p_target FRR(t) + c_fa (1 - p_target) FAR(t)] / min(c_miss p_target,
    c_fa (1 - p_target))`` (NIST SRE).

    Examples
    --------
    >>> points = operating_points(np.array([1.0, 0.0]), np.array([True, False]))
    >>> min_dcf(points)
    0.0
    """
    if not 0 < p_target < 1:
        raise ValueError(f"p_target must be in (0, 1), got {p_target}")
    miss, accept = c_miss * p_target, c_fa * (1 - p_target)
    cost = (miss * points.frr + accept * points.far).min()
    return float(min(cost, miss, accept) / min(miss, accept))


def tar_at_far(points: OperatingPoints, far: float) -> tuple[float, float, int]:
    """True accept rate at the largest false accept rate that does not exceed `far`.

    Returns
    -------
    (tar, threshold, false_accepts)
        The threshold is the lowest of those that allow at most ``floor(far * num_impostors)`` false
        accepts and accept any more targets than the next: never the nearest point, which may exceed
        `far`.

    Examples
    --------
    >>> scores = np.concatenate([np.arange(100.0), np.array([98.5, 99.5])])
    >>> points = operating_points(scores, np.arange(102) >= 100)
    >>> tar_at_far(points, 0.01)
    (1.0, 98.5, 1)
    """
    if not 0 < far <= 1:
        raise ValueError(f"far must be in (0, 1], got {far}")
    allowed = np.floor(far * points.num_impostors * (1 + 1e-12))
    best = int(np.argmax(points.false_accepts <= allowed))
    tar = 1 - points.misses[best] / points.num_targets
    return float(tar), float(points.thresholds[best]), int(points.false_accepts[best])
