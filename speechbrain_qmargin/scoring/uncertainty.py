"""How far a figure can be trusted: intervals of a rate, a bootstrap over speakers, rule of 30.

Trials that share a speaker are not independent, so intervals resample speakers: each replicate
draws speakers with replacement and weighs an impostor trial by the product of its two speakers'
counts, a target trial by its one speaker's. Systems scored on the same trials get the same draws,
which makes their differences paired.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from speechbrain_qmargin.scoring.metrics import OperatingPoints, bayes_threshold, eer
from speechbrain_qmargin.trials import Trials

__all__ = ["Resampled", "badge", "rate_interval", "resample_speakers"]

# One threshold for each of the highest impostor scores, then FAR in steps of this ratio
_EXACT_RANKS, _RATIO = 100, 1.01
_FULL_DEPTH = 1_000_000_000  # impostors x replicates up to which the whole range is resampled


def badge(errors: float) -> str:
    """Doddington's rule of 30 for a rate that rests on so many errors.

    Examples
    --------
    >>> badge(100), badge(12), badge(0)
    ('measured', 'indicative', 'unsupported')
    """
    return "measured" if errors >= 30 else "indicative" if errors >= 3 else "unsupported"


def rate_interval(
    errors: int, trials: int, confidence: float = 0.95, method: str = "clopper-pearson"
) -> tuple[float, float]:
    """Interval of a rate, for trials that are independent of each other.

    Parameters
    ----------
    errors, trials : int
    confidence : float
    method : {"clopper-pearson", "wilson"}

    Examples
    --------
    >>> low, high = rate_interval(0, 300)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.0122)
    """
    from scipy.stats import binomtest

    names = {"clopper-pearson": "exact", "wilson": "wilson"}
    if method not in names:
        raise ValueError(f"method must be one of {', '.join(names)}, got {method!r}")
    interval = binomtest(int(errors), int(trials)).proportion_ci(confidence, names[method])
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Resampled:
    """Error counts of every replicate on a grid of thresholds.

    The grid has one threshold for each of the highest impostor scores and then steps of 1 % in
    FAR; a replicate's figure is read off it, which is far finer than its spread.

    Attributes
    ----------
    thresholds : float array [G]
        Ascending.
    misses, false_accepts : float32 arrays [G, R]
    num_targets, num_impostors : float arrays [R]
    whole : bool
        Whether the grid reaches down to the lowest score, as :meth:`min_cllr` needs.
    cllr : float array [R] or None
        Cllr of every replicate, where the scores were said to be log-likelihood ratios.
    """

    thresholds: np.ndarray
    misses: np.ndarray
    false_accepts: np.ndarray
    num_targets: np.ndarray
    num_impostors: np.ndarray
    whole: bool
    cllr: np.ndarray | None = None

    @cached_property
    def frr(self) -> np.ndarray:
        return self.misses / self.num_targets

    @cached_property
    def far(self) -> np.ndarray:
        return self.false_accepts / self.num_impostors

    def eer(self) -> np.ndarray:
        """Equal error rates [R], linear between thresholds."""
        gap = self.frr - self.far
        after = np.argmax(gap >= 0, axis=0)
        before = np.maximum(after - 1, 0)
        each = np.arange(gap.shape[1])
        lower, upper = -gap[before, each], gap[after, each]
        share = np.divide(lower, lower + upper, out=np.ones_like(lower), where=lower + upper > 0)
        share[(after == 0) | (lower < 0)] = 1.0
        frr = self.frr
        return frr[before, each] + share * (frr[after, each] - frr[before, each])

    def min_dcf(self, p_target: float, c_miss: float = 1.0, c_fa: float = 1.0) -> np.ndarray:
        """Normalised minimum detection costs [R]."""
        miss, accept = c_miss * p_target, c_fa * (1 - p_target)
        least = min(miss, accept)
        return np.minimum((miss * self.frr + accept * self.far).min(axis=0), least) / least

    def act_dcf(self, p_target: float, c_miss: float = 1.0, c_fa: float = 1.0):
        """Normalised costs [R] of log-likelihood ratios; None if the grid ends above the threshold.

        Read at the grid's next threshold, at most 1 % of FAR away.
        """
        miss, accept = c_miss * p_target, c_fa * (1 - p_target)
        threshold = bayes_threshold(p_target, c_miss, c_fa)
        if threshold < self.thresholds[0] and not self.whole:
            return None
        at = min(int(np.searchsorted(self.thresholds, threshold)), len(self.thresholds) - 1)
        return (miss * self.frr[at] + accept * self.far[at]) / min(miss, accept)

    def tar_at_far(self, far: float) -> np.ndarray:
        """True accept rates [R] at the largest FAR on the grid that is not above `far`."""
        at = np.argmax(self.false_accepts <= far * self.num_impostors * (1 + 1e-6), axis=0)
        return 1 - self.frr[at, np.arange(len(at))]

    def frr_at(self, far: Sequence[float]) -> np.ndarray:
        """False reject rates [len(far), R] at each FAR, for a band around a DET curve."""
        return np.stack([1 - self.tar_at_far(rate) for rate in far])

    def min_cllr(self) -> np.ndarray | None:
        """Minimum Cllr [R]; None where only the tail was resampled."""
        if not self.whole:
            return None
        from scipy.optimize import isotonic_regression

        values = np.empty(len(self.num_targets))
        for r in range(len(values)):
            targets = np.diff(np.append(self.misses[:, r], self.num_targets[r]), prepend=0)
            accepted = np.concatenate(([self.num_impostors[r]], self.false_accepts[:, r], [0]))
            impostors = -np.diff(accepted)
            targets = np.concatenate((targets[:1], targets[1:]))
            weight = targets + impostors
            held = weight > 0
            share = isotonic_regression(targets[held] / weight[held], weights=weight[held]).x
            prior = self.num_targets[r] / self.num_impostors[r]
            with np.errstate(divide="ignore"):
                llr = np.log(share) - np.log1p(-share) - math.log(prior)
            loss_t = np.where(targets[held] > 0, np.logaddexp(0, -llr), 0) @ targets[held]
            loss_n = np.where(impostors[held] > 0, np.logaddexp(0, llr), 0) @ impostors[held]
            values[r] = loss_t / self.num_targets[r] + loss_n / self.num_impostors[r]
        return values / (2 * math.log(2))


def resample_speakers(
    scores: np.ndarray,
    trials: Trials,
    points: OperatingPoints,
    *,
    max_far: float = 0.1,
    replicates: int = 1000,
    seed: int = 0,
    llr: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Resampled:
    """Bootstrap over speakers.

    Parameters
    ----------
    scores : float array [N]
    trials : Trials
    points : OperatingPoints
        Of these scores.
    max_far : float
        The largest FAR of interest; of large sets only the impostor scores that can matter for it
        and for the EER are resampled.
    replicates, seed : int
        The same seed and the same speakers give the same draws: differences are paired.
    llr : bool
        The scores are log-likelihood ratios: resample Cllr too, over all trials.
    progress : callable, optional
        Called with the number of replicates just done.

    Returns
    -------
    Resampled
        Replicates in which a class vanished are left out.

    Raises
    ------
    ValueError
        Fewer than two speakers, or none left in any replicate.
    """
    from scipy.sparse import coo_array

    scores = np.asarray(scores)
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(float)
    speakers = trials.speakers().astype(np.int32)
    count = int(speakers.max()) + 1
    if count < 2:
        raise ValueError("one speaker only: there is nothing to resample")
    rng = np.random.default_rng(seed)
    n_n = points.num_impostors

    whole = n_n * replicates <= _FULL_DEPTH
    reach = 1.0 if whole else min(1.0, max(1.3 * max_far, 1.5 * eer(points, "step")))
    thresholds = _grid(points, math.ceil(n_n * reach))

    # targets: how often each speaker falls between two thresholds
    first = speakers[trials.enrolment[trials.is_target]]
    bins = np.searchsorted(thresholds, scores[trials.is_target], side="right")
    shape = (len(thresholds) + 1, count)
    target_counts = coo_array((np.ones(len(first), np.float32), (bins, first)), shape).tocsr()

    # impostors: the tail bin by bin, and the pairs of all
    pairs = trials.impostor_pairs
    if pairs.nnz > 0.1 * count**2:
        pairs = pairs.toarray()
    tail = np.flatnonzero(~trials.is_target & (scores >= (-np.inf if whole else thresholds[0])))
    bins = np.searchsorted(thresholds, scores[tail], side="right").astype(np.uint16)
    order = np.argsort(bins, kind="stable")
    edges = np.searchsorted(bins[order], np.arange(len(thresholds) + 2))
    tail = tail[order]
    one, two = speakers[trials.enrolment[tail]], speakers[trials.test[tail]]

    if llr:  # Cllr is a mean: one cost a speaker for targets, one a pair for impostors
        cost = np.logaddexp(0, np.where(trials.is_target, -scores, scores).astype(float))
        target_cost = np.bincount(first, cost[trials.is_target], minlength=count)
        sides = speakers[trials.enrolment], speakers[trials.test]
        other = ~trials.is_target
        pair_cost = coo_array(
            (cost[other], (sides[0][other], sides[1][other])), (count, count)
        ).tocsr()

    parts, cllrs = [], []
    block = max(8, min(replicates, 64_000_000 // (4 * count)))
    for start in range(0, replicates, block):
        number = min(block, replicates - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=number)
        weights = np.ascontiguousarray(drawn.T, dtype=np.float32)
        below = np.cumsum(target_counts @ weights, axis=0, dtype=np.float64)
        inside = _bin_sums(weights, one, two, edges)
        accepted = np.cumsum(inside[::-1], axis=0, dtype=np.float64)[::-1]
        total = np.einsum("sr,sr->r", pairs @ weights, weights, dtype=np.float64)
        parts.append((below[:-1], accepted[1:], below[-1], total))
        if llr:
            impostor_cost = np.einsum("sr,sr->r", pair_cost @ weights, weights)
            with np.errstate(invalid="ignore", divide="ignore"):
                bits = target_cost @ weights / below[-1] + impostor_cost / total
            cllrs.append(bits / (2 * math.log(2)))
        if progress:
            progress(number)
    misses, false_accepts, num_targets, num_impostors = (
        np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)
    )
    held = (num_targets > 0) & (num_impostors > 0)
    if not held.any():
        raise ValueError("no replicate held targets and impostors: too few speakers to resample")
    return Resampled(
        thresholds,
        misses[:, held],
        false_accepts[:, held],
        num_targets[held],
        num_impostors[held],
        whole,
        np.concatenate(cllrs)[held] if llr else None,
    )


def _grid(points: OperatingPoints, depth: int) -> np.ndarray:
    """Thresholds just above impostor scores, ascending, ending above all of them."""
    n_n = points.num_impostors
    ranks = np.arange(min(depth, _EXACT_RANKS) + 1)
    if depth > _EXACT_RANKS:
        steps = math.ceil(math.log(depth / _EXACT_RANKS) / math.log(_RATIO))
        later = _EXACT_RANKS * _RATIO ** np.arange(1, steps)
        ranks = np.concatenate((ranks, np.unique(later.astype(np.int64)), [depth]))
    rejected = points.impostors[n_n - 1 - ranks[ranks < n_n]]
    above = np.nextafter(rejected, np.inf, dtype=rejected.dtype)
    if depth >= n_n:
        above = np.append(above, min(points.targets[0], points.impostors[0]))
    return np.unique(above)


def _bin_sums(weights: np.ndarray, one: np.ndarray, two: np.ndarray, edges: np.ndarray):
    """Sum of the products of both speakers' weights, in every bin: [bins, R]."""
    from scipy.sparse import coo_array

    count, replicates = weights.shape
    sums = np.zeros((len(edges) - 1, replicates), dtype=np.float32)
    chunk = max(64, 60_000 // replicates)  # of trials, whose weights fit the processor's cache

    def fill(index: int) -> None:
        start, stop = edges[index], edges[index + 1]
        if stop - start > count:  # one row of weights a trial, then one product a speaker
            pair = one[start:stop], two[start:stop]
            counts = np.ones(stop - start, dtype=np.float32)
            linked = coo_array((counts, pair), (count, count)).tocsr() @ weights
            np.einsum("sr,sr->r", linked, weights, out=sums[index])
            return
        for at in range(start, stop, chunk):
            part = slice(at, min(at + chunk, stop))
            sums[index] += np.einsum("tr,tr->r", weights[one[part]], weights[two[part]])

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(len(sums))))
    return sums
