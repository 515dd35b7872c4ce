r"""Error rates of verification scores: exact, with ties, in O(N log N).

A trial is accepted when ``score >= threshold``. The best thresholds of every cost lie at target
scores, so one sort of each class and one search give all the operating points that matter
(:class:`OperatingPoints`); every metric reads them. Counts stay integers, or bootstrap weights.

Scores are called calibrated where they are natural-log likelihood ratios; :func:`act_dcf` and
:func:`cllr` ask for such scores, nothing else does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = [
    "EERS",
    "OperatingPoints",
    "act_dcf",
    "cllr",
    "eer",
    "frr_at_far",
    "min_cllr",
    "min_dcf",
    "operating_points",
    "tar_at_far",
]

EERS = ("rocch", "nist", "step")


@dataclass(frozen=True)
class OperatingPoints:
    """Misses and false accepts at every distinct target score, and beyond the last.

    Attributes
    ----------
    thresholds : float array [T + 1]
        Distinct target scores, ascending, then +inf.
    misses, false_accepts : arrays [T + 1]
        Targets below, impostors at or above, each threshold.
    above : array [T + 1]
        Impostors strictly above each threshold: fewer than `false_accepts` where scores tie.
    num_targets, num_impostors : numbers
    impostors : float array
        The impostor scores, ascending.
    """

    thresholds: np.ndarray
    misses: np.ndarray
    false_accepts: np.ndarray
    above: np.ndarray
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
    targets, impostors = scores[is_target], scores[~is_target]
    if not len(targets) or not len(impostors):
        raise ValueError(
            f"{len(targets)} target and {len(impostors)} impostor trials: both are needed"
        )
    targets.sort()
    impostors.sort()
    first = np.flatnonzero(np.append(True, targets[1:] > targets[:-1]))
    distinct = targets[first]
    return OperatingPoints(
        thresholds=np.append(distinct.astype(float), np.inf),
        misses=np.append(first, len(targets)),
        false_accepts=np.append(len(impostors) - np.searchsorted(impostors, distinct, "left"), 0),
        above=np.append(len(impostors) - np.searchsorted(impostors, distinct, "right"), 0),
        num_targets=len(targets),
        num_impostors=len(impostors),
        impostors=impostors,
    )


def eer(points: OperatingPoints, method: str = "rocch") -> float:
    """Equal error rate. The three definitions differ wherever the ROC has steps: name yours.

    Parameters
    ----------
    points : OperatingPoints
    method : {"rocch", "nist", "step"}
        ``rocch``: where the convex hull of the ROC meets FAR = FRR (Brummer & de Villiers 2013).
        ``nist``: where the ROC itself does, joined by straight lines, as NIST's scripts do.
        ``step``: mean of FAR and FRR at the threshold where they are nearest, as SpeechBrain does;
        of two such thresholds the smaller mean.

    Examples
    --------
    >>> points = operating_points(np.array([3.0, 1.0, 2.0, 0.0]), np.array([1, 1, 0, 0], bool))
    >>> [round(eer(points, method), 4) for method in ("rocch", "nist", "step")]
    [0.25, 0.5, 0.5]
    """
    if method == "rocch":
        targets, impostors = _pools(points)
        far = np.append(1, 1 - np.cumsum(impostors) / points.num_impostors)
        frr = np.append(0, np.cumsum(targets) / points.num_targets)
        end = int(np.argmax(frr >= far))
        return _crossing(far[end - 1], frr[end - 1], far[end], frr[end])
    if method not in EERS:
        raise ValueError(f"method must be one of {', '.join(EERS)}, got {method!r}")

    # The corner `end` is the first with FRR >= FAR. Its ROC arrives from the corner before by the
    # step of the targets there (a slope where impostors tie with them), then along equal FRR.
    targets, impostors = points.num_targets, points.num_impostors
    end = int(np.searchsorted(points.frr - points.far, 0, "left"))
    frr, far = points.misses[end] / targets, points.false_accepts[end] / impostors
    if end == 0:
        before = middle = (1.0, 0.0)
    else:
        before = (points.false_accepts[end - 1] / impostors, points.misses[end - 1] / targets)
        middle = (points.above[end - 1] / impostors, frr)
    if method == "nist":
        return _crossing(*before, *middle) if frr >= middle[0] else float(frr)
    candidates = [before, middle, (far, frr)]
    if middle[0] > frr:  # the thresholds at impostor scores between the two corners
        at = min(max(int(impostors - frr * impostors), 0), len(points.impostors) - 1)
        near = points.impostors[at]
        for side in ("left", "right"):
            rate = (impostors - np.searchsorted(points.impostors, near, side)) / impostors
            candidates.append((min(max(rate, far), middle[0]), frr))
    return float(min((round(abs(x - y), 15), (x + y) / 2) for x, y in candidates)[1])


def _crossing(x0: float, y0: float, x1: float, y1: float) -> float:
    """Where the line from (x0, y0) to (x1, y1) meets x = y."""
    fall = (x0 - y0) + (y1 - x1)
    return float(x0 + (x0 - y0) / fall * (x1 - x0)) if fall > 0 else float(x0)


def _pools(points: OperatingPoints) -> tuple[np.ndarray, np.ndarray]:
    """Targets and impostors in each block of pool adjacent violators: the edges of the ROC hull."""
    from scipy.optimize import isotonic_regression

    # One bin below the first target score, then one from each target score to the next: impostors
    # between two target scores are always pooled with the targets below them.
    targets = np.append(0, np.diff(points.misses)).astype(float)
    impostors = -np.diff(points.false_accepts, prepend=points.num_impostors).astype(float)
    weights = targets + impostors
    used = weights > 0
    targets, impostors, weights = targets[used], impostors[used], weights[used]
    start = isotonic_regression(targets / weights, weights=weights).blocks[:-1]
    return np.add.reduceat(targets, start), np.add.reduceat(impostors, start)


def _costs(p_target: float, c_miss: float, c_fa: float) -> tuple[float, float]:
    if not 0 < p_target < 1:
        raise ValueError(f"p_target must be in (0, 1), got {p_target}")
    if c_miss <= 0 or c_fa <= 0:
        raise ValueError(f"costs must be positive, got c_miss {c_miss}, c_fa {c_fa}")
    return c_miss * p_target, c_fa * (1 - p_target)


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
    miss, accept = _costs(p_target, c_miss, c_fa)
    cost = (miss * points.frr + accept * points.far).min()
    return float(min(cost, miss, accept) / min(miss, accept))


def bayes_threshold(p_target: float, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """The log likelihood ratio from which accepting is cheaper.

    Examples
    --------
    >>> round(bayes_threshold(0.01), 3)
    4.595
    """
    miss, accept = _costs(p_target, c_miss, c_fa)
    return math.log(accept / miss)


def act_dcf(
    points: OperatingPoints, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Actual detection cost of calibrated scores: at :func:`bayes_threshold`, not the best one.

    Normalised as :func:`min_dcf`; above 1 the scores decide worse than no scores at all.

    Examples
    --------
    >>> points = operating_points(np.array([5.0, 1.0, -6.0]), np.array([True, True, False]))
    >>> act_dcf(points), min_dcf(points)
    (0.5, 0.0)
    """
    miss, accept = _costs(p_target, c_miss, c_fa)
    threshold = bayes_threshold(p_target, c_miss, c_fa)
    missed = points.misses[np.searchsorted(points.thresholds, threshold, "left")]
    accepted = len(points.impostors) - np.searchsorted(points.impostors, threshold, "left")
    cost = miss * missed / points.num_targets + accept * accepted / points.num_impostors
    return float(cost / min(miss, accept))


def cllr(points: OperatingPoints) -> float:
    """Cost of calibrated scores in bits: 0 is perfect, 1 as good as no scores (Brummer 2006).

    Examples
    --------
    >>> cllr(operating_points(np.zeros(4), np.array([True, True, False, False])))
    1.0
    """
    targets = np.diff(points.misses)
    of_targets = np.logaddexp(0, -points.thresholds[:-1]) @ targets / points.num_targets
    of_impostors = 0.0
    for start in range(0, len(points.impostors), 1 << 20):  # bounded memory
        block = points.impostors[start : start + (1 << 20)].astype(float)
        of_impostors += np.logaddexp(0, block).sum()
    return float((of_targets + of_impostors / points.num_impostors) / (2 * math.log(2)))


def min_cllr(points: OperatingPoints) -> float:
    """Cllr after the best monotonic calibration, by pool adjacent violators.

    Examples
    --------
    >>> min_cllr(operating_points(np.array([1.0, 0.0]), np.array([True, False])))
    0.0
    """
    targets, impostors = _pools(points)
    p, q = targets / points.num_targets, impostors / points.num_impostors
    both = (p > 0) & (q > 0)
    p, q = p[both], q[both]
    return float((p * np.log2(1 + q / p) + q * np.log2(1 + p / q)).sum() / 2)


def tar_at_far(points: OperatingPoints, far: float) -> tuple[float, float, int]:
    """True accept rate at the largest false accept rate that does not exceed `far`.

    Returns
    -------
    (tar, threshold, false_accepts)
        The threshold is the lowest of those that allow at most ``floor(far * num_impostors)`` false
        accepts and accept any more targets than the next: never the nearest point, which may exceed
        `far`. It is +inf where not one target scores above the impostors to keep out.

    Examples
    --------
    >>> scores = np.concatenate([np.arange(100.0), np.array([98.5, 99.5])])
    >>> points = operating_points(scores, np.arange(102) >= 100)
    >>> tar_at_far(points, 0.01)
    (1.0, 98.5, 1)
    """
    allowed = allowed_false_accepts(points, far)
    best = int(np.searchsorted(-points.false_accepts, -allowed, "left"))
    tar = 1 - points.misses[best] / points.num_targets
    return float(tar), float(points.thresholds[best]), int(points.false_accepts[best])


def frr_at_far(points: OperatingPoints, far: float) -> float:
    """False reject rate at the largest false accept rate that does not exceed `far`.

    Examples
    --------
    >>> frr_at_far(operating_points(np.array([1.0, 0.0]), np.array([False, True])), 0.1)
    1.0
    """
    return 1 - tar_at_far(points, far)[0]


def allowed_false_accepts(points: OperatingPoints, far: float) -> float:
    """``floor(far * num_impostors)``, forgiving the rounding of ``0.1 * 30``."""
    if not 0 < far <= 1:
        raise ValueError(f"far must be in (0, 1], got {far}")
    return math.floor(far * points.num_impostors * (1 + 1e-12))
