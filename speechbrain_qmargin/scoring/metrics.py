r"""Error rates of verification scores: exact, with ties, in O(N log N) time and O(N) memory.

A trial is accepted when ``score >= threshold``. One sort of each class and two searches give the
error counts at every distinct target score (:class:`OperatingPoints`), which is where the optimum
of every cost lies; all metrics read that structure. Counts stay integers, so nothing depends on
the order of the trials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from speechbrain_qmargin.trials.pairs import as_labels

__all__ = [
    "EER_METHODS",
    "OperatingPoints",
    "TarAtFar",
    "act_dcf",
    "allowed_false_accepts",
    "bayes_threshold",
    "cllr",
    "eer",
    "eer_point",
    "log_likelihood_ratios",
    "min_cllr",
    "min_dcf",
    "operating_points",
    "refuse_cosines",
    "tar_at_far",
]

EER_METHODS = ("rocch", "step", "nist")


@dataclass(frozen=True)
class OperatingPoints:
    """Misses and false accepts at every distinct target score, and beyond the last.

    Attributes
    ----------
    targets, impostors : float arrays
        The scores of each class, ascending.
    thresholds : float array [T + 1]
        Distinct target scores, ascending, then +inf.
    misses, false_accepts : int arrays [T + 1]
        Targets below, impostors at or above, each threshold.
    above : int array [T]
        Impostors above each distinct target score: fewer than `false_accepts` where scores tie.

    Examples
    --------
    >>> points = operating_points(np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool))
    >>> points.thresholds, points.misses, points.false_accepts
    (array([0.4, 0.9, inf]), array([0, 1, 2]), array([1, 0, 0]))
    >>> points.errors_at(0.5)
    (1, 1)
    """

    targets: np.ndarray
    impostors: np.ndarray
    thresholds: np.ndarray
    misses: np.ndarray
    false_accepts: np.ndarray
    above: np.ndarray

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    @property
    def num_impostors(self) -> int:
        return len(self.impostors)

    @property
    def frr(self) -> np.ndarray:
        """False reject rate (1 - TAR) at `thresholds`."""
        return self.misses / self.num_targets

    @property
    def far(self) -> np.ndarray:
        """False accept rate at `thresholds`."""
        return self.false_accepts / self.num_impostors

    def errors_at(self, threshold: float) -> tuple[int, int]:
        """Misses and false accepts when accepting ``score >= threshold``.

        Raises
        ------
        ValueError
            A threshold that is NaN.
        """
        if math.isnan(threshold):
            raise ValueError("the threshold is NaN; no decision can rest on it")
        at = _least_at(threshold, self.targets.dtype)
        misses = int(np.searchsorted(self.targets, at, side="left"))
        below = int(np.searchsorted(self.impostors, at, side="left"))
        return misses, self.num_impostors - below

    @cached_property
    def _pav(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pool-adjacent-violators blocks, ascending: targets, impostors, lowest score of each.

        Impostors between two target scores never part, so they enter as one item of their weight;
        a target score and the impostors that tie with it are one item too.
        """
        from scipy.optimize import isotonic_regression

        at_score = np.diff(self.misses)
        lower = np.append(self.num_impostors, self.above)  # impostors above the score before
        between = lower - self.false_accepts
        targets = np.zeros(2 * len(at_score) + 1, dtype=np.int64)
        impostors = np.empty_like(targets)
        targets[1::2] = at_score
        impostors[0::2] = between
        impostors[1::2] = self.false_accepts[:-1] - self.above
        first = np.empty(len(targets))
        first[1::2] = self.thresholds[:-1]
        first[0::2] = self.impostors[
            np.minimum(self.num_impostors - lower, len(self.impostors) - 1)
        ]
        held = targets + impostors > 0
        targets, impostors, first = targets[held], impostors[held], first[held]
        weight = (targets + impostors).astype(float)
        starts = isotonic_regression(targets / weight, weights=weight).blocks[:-1]
        return (
            np.add.reduceat(targets, starts),
            np.add.reduceat(impostors, starts),
            first[starts],
        )


def _least_at(threshold: float, dtype: np.dtype) -> np.floating:
    """The least value of a dtype that is not below, as a search in wider ones copies all scores."""
    with np.errstate(over="ignore"):
        least = dtype.type(threshold)
    if float(least) < float(threshold):
        least = np.nextafter(least, dtype.type(np.inf))
    return least


def operating_points(scores: ArrayLike, is_target: ArrayLike) -> OperatingPoints:
    """All operating points that any metric needs.

    Parameters
    ----------
    scores : float array [N]
        Higher is more alike. float32 stays float32.
    is_target : bool array [N]
        1 and 0 are taken as well.

    Raises
    ------
    ValueError
        Shapes that disagree, scores that are not finite, labels that are none, or one class
        missing.

    Examples
    --------
    >>> points = operating_points(np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool))
    >>> points.frr, points.far
    (array([0. , 0.5, 1. ]), array([0.5, 0. , 0. ]))
    """
    scores, is_target = np.asarray(scores), as_labels(is_target)
    if scores.shape != is_target.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {is_target.shape} must be equal, [N]")
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(float)
    targets, impostors = scores[is_target], scores[~is_target]
    targets.sort()
    impostors.sort()
    if not len(targets) or not len(impostors):
        raise ValueError(
            f"{len(targets)} target and {len(impostors)} impostor trials: both are needed"
        )
    # sorted: NaN and +inf are last, -inf is first
    if not np.isfinite([targets[0], targets[-1], impostors[0], impostors[-1]]).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(scores))} scores are NaN or infinite")
    first = np.flatnonzero(np.append(True, targets[1:] != targets[:-1]))
    distinct = targets[first]
    below = np.searchsorted(impostors, distinct, side="left")
    up_to = np.searchsorted(impostors, distinct, side="right")
    return OperatingPoints(
        targets=targets,
        impostors=impostors,
        thresholds=np.append(distinct.astype(float), np.inf),
        misses=np.append(first, len(targets)),
        false_accepts=np.append(len(impostors) - below, 0),
        above=len(impostors) - up_to,
    )


def _crossing(points: OperatingPoints) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (misses, false accepts) on each side of FRR = FAR, over every distinct threshold."""
    n_t, n_n = points.num_targets, points.num_impostors
    # FRR - FAR is not decreasing in the threshold: the first corner where it is not negative
    at = int(np.argmax(points.misses * n_n >= points.false_accepts * n_t))
    after = int(points.misses[at]), int(points.false_accepts[at])
    if at and after[0] * n_n >= int(points.above[at - 1]) * n_t:
        # passed already on the step over the target score before
        return (
            (int(points.misses[at - 1]), int(points.false_accepts[at - 1])),
            (after[0], int(points.above[at - 1])),
        )
    # passed among the impostors between two target scores; misses stay the same
    missed = after[0]
    most = missed * n_n // n_t
    value = points.impostors[n_n - most - 1]
    low = np.searchsorted(points.impostors, value, side="left")
    high = np.searchsorted(points.impostors, value, side="right")
    return (missed, n_n - int(low)), (missed, n_n - int(high))


def eer(points: OperatingPoints, method: str = "rocch") -> float:
    """Equal error rate.

    Parameters
    ----------
    points : OperatingPoints
    method : {"rocch", "step", "nist"}
        ``rocch``: where the convex hull of the ROC meets FAR = FRR (Brummer & de Villiers 2013,
        the BOSARIS toolkit); reached by randomising between two thresholds, so never above the
        others. ``step``: the mean of FAR and FRR at the threshold where they are nearest.
        ``nist``: linear between the two thresholds around FAR = FRR, as in the scoring scripts
        descended from NIST's.

    Raises
    ------
    ValueError
        An unknown method.

    Examples
    --------
    >>> points = operating_points(np.array([3.0, 1.0, 2.0, 0.0]), np.array([1, 1, 0, 0], bool))
    >>> round(eer(points), 4), eer(points, "step"), eer(points, "nist")
    (0.25, 0.5, 0.5)
    """
    if method not in EER_METHODS:
        raise ValueError(f"method must be one of {', '.join(EER_METHODS)}, got {method!r}")
    n_t, n_n = points.num_targets, points.num_impostors
    if method == "rocch":
        targets, impostors, _ = points._pav
        frr = np.append(0, np.cumsum(targets)) / n_t
        far = 1 - np.append(0, np.cumsum(impostors)) / n_n
        at = int(np.argmax(frr >= far))
        return _meet(far[at - 1], frr[at - 1], far[at], frr[at])
    (miss0, false0), (miss1, false1) = _crossing(points)
    if method == "nist":
        return _meet(false0 / n_n, miss0 / n_t, false1 / n_n, miss1 / n_t)
    sides = [(abs(m * n_n - f * n_t), m / n_t + f / n_n) for m, f in
             ((miss0, false0), (miss1, false1))]  # fmt: skip
    return float(min(sides)[1] / 2)


def _meet(far0: float, frr0: float, far1: float, frr1: float) -> float:
    """Where the segment from (far0, frr0) to (far1, frr1) meets FAR = FRR."""
    before, after = far0 - frr0, frr1 - far1
    return float(frr0 + (frr1 - frr0) * before / (before + after)) if before + after else frr0


def eer_point(points: OperatingPoints) -> tuple[float, int, int]:
    """Threshold nearest FAR = FRR among the target scores, with its misses and false accepts.

    Examples
    --------
    >>> scores = np.array([0.9, 0.7, 0.4, 0.8, 0.2, 0.1])
    >>> eer_point(operating_points(scores, np.array([1, 1, 1, 0, 0, 0], bool)))
    (0.7, 1, 1)
    """
    gap = np.abs(points.misses * points.num_impostors - points.false_accepts * points.num_targets)
    at = int(np.argmin(gap[:-1]))
    return float(points.thresholds[at]), int(points.misses[at]), int(points.false_accepts[at])


def _weights(p_target: float, c_miss: float, c_fa: float) -> tuple[float, float, float]:
    if not 0 < p_target < 1:
        raise ValueError(f"p_target must be in (0, 1), got {p_target}")
    if not (0 < c_miss < math.inf and 0 < c_fa < math.inf):
        raise ValueError(f"costs must be positive and finite, got c_miss {c_miss}, c_fa {c_fa}")
    miss, accept = c_miss * p_target, c_fa * (1 - p_target)
    return miss, accept, min(miss, accept)


def min_dcf(
    points: OperatingPoints, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Minimum detection cost, normalised by the better of accepting all and rejecting all.

    ``min_t [c_miss p_target FRR(t) + c_fa (1 - p_target) FAR(t)] / min(c_miss p_target,
    c_fa (1 - p_target))`` (NIST SRE).

    Raises
    ------
    ValueError
        A prior outside (0, 1), a cost that is not positive and finite.

    Examples
    --------
    >>> points = operating_points(np.array([1.0, 0.0]), np.array([True, False]))
    >>> min_dcf(points)
    0.0
    """
    miss, accept, least = _weights(p_target, c_miss, c_fa)
    cost = (miss * points.frr + accept * points.far).min()
    return float(cost / least)


def act_dcf(
    points: OperatingPoints,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    *,
    force: bool = False,
) -> float:
    """Detection cost at the Bayes threshold of scores that are log-likelihood ratios; normalised.

    Raises
    ------
    ValueError
        Scores that cannot be natural-log likelihood ratios (all within [-1, 1], as cosines are),
        unless `force`.

    Examples
    --------
    >>> points = operating_points(np.array([9.0, -9.0]), np.array([True, False]))
    >>> act_dcf(points)
    0.0
    """
    refuse_cosines(points, force)
    miss, accept, least = _weights(p_target, c_miss, c_fa)
    misses, false_accepts = points.errors_at(bayes_threshold(p_target, c_miss, c_fa))
    cost = miss * misses / points.num_targets + accept * false_accepts / points.num_impostors
    return cost / least


def bayes_threshold(p_target: float, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """The log-likelihood ratio from which accepting is cheaper.

    Examples
    --------
    >>> round(bayes_threshold(0.01), 3)
    4.595
    """
    miss, accept, _ = _weights(p_target, c_miss, c_fa)
    return math.log(accept / miss)


def refuse_cosines(points: OperatingPoints, force: bool = False) -> None:
    """Scores that cannot be natural-log likelihood ratios are refused: all within [-1, 1].

    Raises
    ------
    ValueError
        Such scores, unless `force`.

    Examples
    --------
    >>> refuse_cosines(operating_points(np.array([0.9, 0.1]), np.array([True, False])))
    Traceback (most recent call last):
    ValueError: the largest |score| is 0.9: these look like cosines, not log-likelihood ratios...
    """
    largest = max(abs(float(s[i])) for s in (points.targets, points.impostors) for i in (0, -1))
    if largest <= 1 + 1e-6 and not force:
        raise ValueError(
            f"the largest |score| is {largest:.3g}: these look like cosines, not log-likelihood "
            "ratios. Calibrate them first (`qmargin calibrate`, or in Python fit_calibration; "
            "force=True takes them as they are)"
        )


def cllr(points: OperatingPoints, *, force: bool = False) -> float:
    """Cost of log-likelihood ratios in bits (Brummer & du Preez 2006); 1 is no information.

    Raises
    ------
    ValueError
        As :func:`act_dcf`.

    Examples
    --------
    >>> points = operating_points(np.array([0.0, 0.0]), np.array([True, False]))
    >>> cllr(points, force=True)
    1.0
    """
    refuse_cosines(points, force)
    half = np.logaddexp(0, -points.targets.astype(float)).mean()
    half += np.logaddexp(0, points.impostors.astype(float)).mean()
    return float(half / (2 * math.log(2)))


def log_likelihood_ratios(points: OperatingPoints) -> tuple[np.ndarray, np.ndarray]:
    """The best monotone map to log-likelihood ratios, by pooling adjacent violators.

    Returns
    -------
    (scores, llrs) : arrays [B]
        Scores at or above ``scores[b]`` and below the next have ``llrs[b]`` (natural log, +-inf
        at the ends of separable scores).

    Examples
    --------
    >>> points = operating_points(np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool))
    >>> log_likelihood_ratios(points)  # one target and one impostor from 0.4 up to 0.9
    (array([0.1, 0.4, 0.9]), array([-inf,   0.,  inf]))
    """
    targets, impostors, first = points._pav
    with np.errstate(divide="ignore"):
        odds = np.log(targets / points.num_targets) - np.log(impostors / points.num_impostors)
    return first, odds


def min_cllr(points: OperatingPoints) -> float:
    """:func:`cllr` after the best monotone calibration of these very scores.

    Examples
    --------
    >>> points = operating_points(np.array([2.0, 1.0]), np.array([True, False]))
    >>> min_cllr(points)
    0.0
    """
    targets, impostors, _ = points._pav
    _, llrs = log_likelihood_ratios(points)
    misses, accepts = targets > 0, impostors > 0
    half = targets[misses] @ np.logaddexp(0, -llrs[misses]) / points.num_targets
    half += impostors[accepts] @ np.logaddexp(0, llrs[accepts]) / points.num_impostors
    return float(half / (2 * math.log(2)))


class TarAtFar(NamedTuple):
    """An operating point: accept ``score >= threshold``.

    Examples
    --------
    >>> points = operating_points(np.array([0.9, 0.4, 0.6, 0.1]), np.array([1, 1, 0, 0], bool))
    >>> tar, threshold, false_accepts, misses = tar_at_far(points, 0.1)
    >>> tar, 0.6 < threshold < 0.9, false_accepts, misses
    (0.5, True, 0, 1)
    """

    tar: float
    threshold: float
    false_accepts: int
    misses: int


def allowed_false_accepts(far: float, num_impostors: int) -> int:
    """The largest count of false accepts whose rate is not above `far`.

    Parameters
    ----------
    far : float
        In [0, 1].
    num_impostors : int

    Examples
    --------
    >>> allowed_false_accepts(0.01, 250), allowed_false_accepts(0.29, 100)
    (2, 29)
    """
    count = math.floor(far * num_impostors)
    if (count + 1) / num_impostors <= far:
        count += 1
    return count - (count / num_impostors > far)


def tar_at_far(points: OperatingPoints, far: float) -> TarAtFar:
    """True accept rate at the largest false accept rate that does not exceed `far`.

    The threshold lies just above the (k + 1)-th largest impostor score, k being the largest count
    allowed; where impostor scores tie, fewer than k are accepted. Never the nearest point, which
    may exceed `far`.

    Raises
    ------
    ValueError
        `far` outside (0, 1].

    Examples
    --------
    >>> scores = np.concatenate([np.arange(100.0), np.array([98.5, 97.5])])
    >>> points = operating_points(scores, np.arange(102) >= 100)
    >>> tar_at_far(points, 0.01).tar, tar_at_far(points, 0.02).tar
    (0.5, 1.0)
    """
    if not 0 < far <= 1:
        raise ValueError(f"far must be in (0, 1], got {far}")
    allowed = allowed_false_accepts(far, points.num_impostors)
    if allowed >= points.num_impostors:
        threshold = min(points.targets[0], points.impostors[0])
    else:
        rejected = points.impostors[points.num_impostors - allowed - 1]
        threshold = np.nextafter(rejected, np.inf, dtype=points.impostors.dtype)
    misses, false_accepts = points.errors_at(threshold)
    tar = 1 - misses / points.num_targets
    return TarAtFar(tar, float(threshold), false_accepts, misses)
