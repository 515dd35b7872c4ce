r"""How far a figure can be trusted: intervals over speakers, paired differences, marks.

Trials that share a speaker are not independent, and an impostor trial has two speakers, so an
error rate is a mean of *dyadic* data: its variance is the sum of the covariances of all pairs of
trials that have a speaker in common. No speaker is resampled, and no seed is to be chosen.

**Influence.** To first order a figure moves by the sum of what its trials contribute. With
misses :math:`m_k` and false accepts :math:`a_k` in {0, 1} at a threshold, the contributions are
:math:`(m_k - FRR)/N_t` to FRR and :math:`(a_k - FAR)/N_n` to FAR, and

- a cost at a fixed threshold, and minDCF (its optimal threshold moves it to second order only), is
  :math:`c_m\,dFRR + c_a\,dFAR`;
- TAR at a FAR is :math:`-dFRR - s\,dFAR`: the threshold moves with FAR, and :math:`s` is the slope
  of TAR over FAR;
- EER is :math:`(n\,dFRR + t\,dFAR)/(n + t)` with the densities :math:`t, n` of target and impostor
  scores at the threshold;
- Cllr is a mean of costs; minCllr as well, at its own calibration.

Slopes are secants over the threshold's own uncertainty: from FAR times exp(h) down to FAR times
exp(-h), h being FAR's relative standard error.

**Variance** (Fafchamps & Gubert 2007; Aronow, Samii & Assenova 2015, dyadic cluster-robust). Let
:math:`T_i` be the contributions of speaker i's target trials, :math:`P_{ij}` those of the impostor
trials of speakers i and j, :math:`I_i = \sum_j P_{ij}`. A pair is in the sums of both its
speakers, so its square is taken off once:

.. math:: V = \sum_i T_i^2 / c_{tt} + 2 \sum_i T_i I_i / c_{tn}
              + \bigl(\sum_i I_i^2 - \sum_{i<j} P_{ij}^2\bigr) / c_{nn}

The divisors are what makes it hold for few speakers: :math:`c` is the share of the pairs of trials
(target and target, target and impostor, impostor and impostor) that have *no* speaker in common.
Contributions are taken about the estimate, which follows the speakers at hand, and that loses just
this share. For a list of all pairs of S speakers :math:`c_{nn} = (S-2)(S-3)/(S(S-1))`, and V is
then unbiased for every balanced list (docs/intervals.md has the proof): with 8 speakers the plain
sum has 0.54 of the variance. Where there are no two impostor trials without a common speaker (2 or
3 speakers), nothing can be estimated and no interval is given. V never falls below half of itself
without the subtraction, its value for independent pairs.

**Interval.** Student's t on the logit scale (rates, minDCF) or the log scale (actDCF, Cllr). The
degrees of freedom are those of a variance estimated from K contributions of kurtosis
:math:`\kappa`, :math:`\nu = 2K/(\kappa - 1)`; K is Kish's effective number of speakers. Errors are
few speakers' and many speakers have none, so the contributions are far from Gaussian:
:math:`\kappa = 7`, hence :math:`\nu = K/3`, or the kurtosis that is found if it is larger still,
with :math:`R_i = T_i + I_i`

.. math:: \nu = \min\bigl(K/3,\ 2 (\sum_i R_i^2)^2 / \sum_i R_i^4\bigr).

A figure whose errors come from three speakers of three hundred has six degrees of freedom. minDCF
is too low by the freedom of its threshold; what :math:`\min_t` gains when the contributions of all
speakers are multiplied by Gaussian noise (fixed draws) estimates by how much, and moves the
interval up.

**Differences** of two systems on the same trials subtract the contributions trial by trial (no
scale, the same V and degrees of freedom), which makes them paired.

**Few errors.** Below 30 the wider of this and Clopper-Pearson is given (:func:`widened`). A trial
and its reverse are one trial: they fall into one :math:`P_{ij}`, and
:func:`~speechbrain_qmargin.scoring.report.evaluate` counts every unordered pair of recordings once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from speechbrain_qmargin.scoring import metrics
from speechbrain_qmargin.scoring.influence import (
    FEWEST_SPEAKERS,
    Influence,
    PairSums,
    TrialStructure,
)
from speechbrain_qmargin.scoring.metrics import OperatingPoints
from speechbrain_qmargin.trials import LabelledTrials

__all__ = [
    "FEWEST_ERRORS",
    "RatesAt",
    "Spread",
    "mark_of",
    "rate_interval",
    "scarcer",
    "widened",
]

FEWEST_ERRORS = 30  # below, their number is luck

_WIDEST = 1.2  # h of the slopes' secants: FAR over and below by at most this factor's exponent
_DRAWS, _GRID, _SPAN = 200, 48, 1.5  # of the optimism: noise draws, thresholds, reach in log FAR


def mark_of(errors: float, speakers: float | None = None) -> str:
    """Doddington's rule of 30 for a rate that rests on so many errors of so many speakers.

    Parameters
    ----------
    errors : int
        Of distinct trials: of a rate, its :func:`scarcer` outcome.
    speakers : float, optional
        That contribute (:attr:`TrialStructure.contributing`). Below 8 nothing is called measured,
        below 4, where no interval can be given, everything is unsupported.

    Examples
    --------
    >>> mark_of(100), mark_of(12), mark_of(0)
    ('measured', 'indicative', 'unsupported')
    >>> mark_of(100, speakers=7), mark_of(100, speakers=2)
    ('indicative', 'unsupported')
    """
    if errors < 3 or (speakers is not None and round(speakers) < 4):
        return "unsupported"
    enough = speakers is None or round(speakers) >= FEWEST_SPEAKERS
    return "measured" if errors >= FEWEST_ERRORS and enough else "indicative"


def scarcer(errors: int, trials: int) -> int:
    """What a rate rests on: the fewer of its two outcomes.

    A rate of 99 % of 200 trials is known as badly as one of 1 %, from two trials.

    Examples
    --------
    >>> scarcer(3, 200), scarcer(198, 200)
    (3, 2)
    """
    return min(errors, trials - errors)


def rate_interval(errors: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a rate by Clopper and Pearson (1934), for trials that are independent.

    Parameters
    ----------
    errors, trials : int
    confidence : float

    Raises
    ------
    ValueError
        Errors that are not from 0 to `trials`, no trials.

    Examples
    --------
    >>> low, high = rate_interval(0, 300)
    >>> round(low, 4), round(high, 4)
    (0.0, 0.0122)
    """
    from scipy.special import betaincinv

    if not 0 <= errors <= trials or not trials:
        raise ValueError(f"{errors} errors of {trials} trials: no rate")
    tail, right = (1 - confidence) / 2, trials - errors
    low = float(betaincinv(errors, right + 1, tail)) if errors else 0.0
    return low, float(betaincinv(errors + 1, right, 1 - tail)) if right else 1.0


def widened(
    interval: tuple[float, float],
    errors: float,
    few_errors: Callable[[], tuple[float, float] | None],
) -> tuple[float, float]:
    """An interval over people; below 30 errors joined with the one for independent trials.

    Few errors are few people's, so that an interval over people is too narrow: at none it has no
    width.

    Parameters
    ----------
    interval : (low, high)
        Over people.
    errors : float
        What the figure rests on.
    few_errors : callable
        Gives the other interval, by Clopper-Pearson (:func:`rate_interval`), or None where there
        is none; called below 30 errors only.

    Examples
    --------
    >>> widened((0.01, 0.03), 4, lambda: (0.005, 0.02)), widened((0.01, 0.03), 30, lambda: (0, 1))
    ((0.005, 0.03), (0.01, 0.03))
    """
    few = few_errors() if errors < FEWEST_ERRORS else None
    return interval if few is None else (min(interval[0], few[0]), max(interval[1], few[1]))


@dataclass(frozen=True)
class RatesAt:
    """FAR (FMR) and FRR (FNMR) at a threshold that was fixed beforehand.

    Attributes
    ----------
    threshold, far, frr : float
    far_interval, frr_interval : (low, high) or None
        Over speakers; below 30 of the scarcer outcome the wider of that and Clopper-Pearson.
    false_accepts, misses : int
    far_mark, frr_mark : str
        Their marks, by the scarcer outcome (:func:`scarcer`).

    Examples
    --------
    >>> ids = [f"{speaker}/{take}" for speaker in "abcdef" for take in "12"]
    >>> left, right = np.triu_indices(12, 1)
    >>> trials = LabelledTrials(ids, left, right, left // 2 == right // 2)
    >>> scores = trials.is_target.astype(float)
    >>> scores[0] = 0  # of the six target trials one is missed
    >>> points = metrics.operating_points(scores, trials.is_target)
    >>> rates = Spread(scores, trials, points).rates_at(0.5)
    >>> rates.misses, rates.frr, rates.false_accepts, rates.frr_mark
    (1, 0.16666666666666666, 0, 'unsupported')
    """

    threshold: float
    far: float
    frr: float
    far_interval: tuple[float, float] | None
    frr_interval: tuple[float, float] | None
    false_accepts: int
    misses: int
    far_mark: str
    frr_mark: str


class Spread:
    """How one system's figures vary over speakers.

    Parameters
    ----------
    scores : float array [N]
    trials : LabelledTrials
        Every unordered pair once (`trials.distinct`), or repeated trials count as errors again.
    points : OperatingPoints
        Of these scores.
    structure : TrialStructure, optional
        Of these trials, where several systems share it.

    Raises
    ------
    ValueError
        One speaker only, a structure of other trials.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> ids = [f"{speaker}/{take}" for speaker in range(20) for take in range(4)]
    >>> left, right = np.triu_indices(80, 1)
    >>> trials = LabelledTrials(ids, left, right, left // 4 == right // 4)
    >>> scores = rng.normal(size=len(trials)) + 2 * trials.is_target
    >>> points = metrics.operating_points(scores, trials.is_target)
    >>> spread = Spread(scores, trials, points)
    >>> low, high = spread.tar_at_far(0.1).interval(metrics.tar_at_far(points, 0.1).tar)
    >>> low < metrics.tar_at_far(points, 0.1).tar < high
    True
    """

    def __init__(
        self,
        scores: np.ndarray,
        trials: LabelledTrials,
        points: OperatingPoints,
        structure: TrialStructure | None = None,
    ):
        self.structure = TrialStructure.of(trials) if structure is None else structure
        self.points = points
        held = self.structure.num_targets, self.structure.num_impostors
        people = self.structure.people
        other = len(people) and not np.array_equal(people, trials.people)
        if other or held != (points.num_targets, points.num_impostors):
            raise ValueError("the structure is not of these trials")
        scores = np.asarray(scores)
        if not np.issubdtype(scores.dtype, np.floating):
            scores = scores.astype(float)
        self._scores, self._trials = scores, trials
        self._speakers = trials.speakers()
        self._is_target = np.asarray(trials.is_target, dtype=bool)
        chosen = np.flatnonzero(self._is_target)
        chosen = chosen[np.argsort(scores[chosen])]
        self._target_scores = scores[chosen]
        self._of_target = self._speakers[trials.enrolment[chosen]]
        self._tail = self._one = self._two = self._pair = np.empty(0, dtype=np.int64)
        self._pair_index = np.empty(0, dtype=np.int64)
        self._rates: dict[float, tuple[Influence, Influence]] = {}

    # -- rates

    def frr(self, threshold: float) -> Influence:
        """FRR at a fixed threshold."""
        return self._at(threshold)[0]

    def far(self, threshold: float) -> Influence:
        """FAR at a fixed threshold."""
        return self._at(threshold)[1]

    def _at(self, threshold: float) -> tuple[Influence, Influence]:
        if threshold not in self._rates:
            misses, accepts = self.points.errors_at(threshold)
            self._rates[threshold] = self._misses(misses), self._accepts(accepts)
        return self._rates[threshold]

    def _misses(self, misses: int) -> Influence:
        (sums,) = self._missed(np.array([misses]))
        return Influence(self.structure, sums, np.zeros(len(sums)), (), "logit")

    def _missed(self, misses: np.ndarray) -> np.ndarray:
        """Every speaker's contributions to FRR at ascending numbers of misses [len(misses), S]."""
        targets = self.structure.targets
        sums = _first_counts(misses, len(targets), self._of_target)
        count = self.points.num_targets
        return (sums - misses[:, None] / count * targets) / count

    def _accepts(self, accepts: int) -> Influence:
        structure, count = self.structure, self.points.num_impostors
        (rows,) = self._accepted(np.array([accepts]))
        sums = np.bincount(self._pair[:accepts], minlength=len(self._pair_index))
        held = np.flatnonzero(sums)
        centre = accepts / count / count
        pairs = PairSums(structure, self._pair_index[held], sums[held] / count, centre)
        return Influence(structure, np.zeros(len(rows)), rows, ((1.0, pairs),), "logit")

    def _accepted(self, accepts: np.ndarray) -> np.ndarray:
        """Every speaker's contributions to FAR at ascending numbers [len(accepts), S]."""
        impostors, count = self.structure.impostors, self.points.num_impostors
        self._reach(int(accepts.max(initial=0)))
        sums = _first_counts(accepts, len(impostors), self._one, self._two)
        return (sums - accepts[:, None] / count * impostors) / count

    def _reach(self, accepts: int) -> None:
        """Sort the impostor trials down to so many accepted."""
        if accepts <= len(self._tail):
            return
        impostors = self.points.impostors
        depth = min(len(impostors), max(accepts + accepts // 4, 1000))
        lowest = impostors[len(impostors) - depth]
        tail = np.flatnonzero(~self._is_target & (self._scores >= lowest))
        tail = tail[np.argsort(-self._scores[tail])]  # thresholds never part ties
        one = self._speakers[self._trials.enrolment[tail]]
        two = self._speakers[self._trials.test[tail]]
        keys = np.minimum(one, two) * len(self.structure.targets) + np.maximum(one, two)
        self._tail, self._one, self._two = tail, one, two
        keys, self._pair = np.unique(keys, return_inverse=True)
        self._pair_index = np.searchsorted(self.structure.pair_keys, keys)

    def rates_at(self, threshold: float, confidence: float = 0.95) -> RatesAt:
        """FAR and FRR at a threshold that was not chosen on these scores, with intervals.

        A threshold that was chosen on them is not fixed: give the figure that chose it, as
        :meth:`tar_at_far`.
        """
        found = []
        counted = zip(
            self.points.errors_at(threshold),
            (self.points.num_targets, self.points.num_impostors),
            self._at(threshold),
            strict=True,
        )
        for errors, trials, influence in counted:
            interval = influence.interval(errors / trials, confidence)
            rests_on = scarcer(errors, trials)
            if interval is not None:
                few = partial(rate_interval, errors, trials, confidence)
                interval = widened(interval, rests_on, few)
            mark = mark_of(rests_on, self.structure.contributing)
            found.append((errors / trials, interval, errors, mark))
        (frr, frr_range, misses, frr_mark), (far, far_range, accepts, far_mark) = found
        return RatesAt(
            float(threshold),
            far,
            frr,
            far_range,
            frr_range,
            accepts,
            misses,
            far_mark,
            frr_mark,
        )

    # -- figures

    def _secant(self, threshold: float) -> tuple[float, float]:
        """How much FAR and FRR change between thresholds around this one, as far as it varies."""
        points = self.points
        n_n = points.num_impostors
        accepts = max(1, points.errors_at(threshold)[1])
        rate = accepts / n_n
        h = math.sqrt(3 / accepts)
        variance = self.far(threshold).variance
        if not math.isnan(variance):
            h = max(h, math.sqrt(variance) / rate)
        h = min(h, _WIDEST)
        low, high = (
            points.errors_at(_accepting(points, round(accepts * math.exp(way * h))))
            for way in (1, -1)
        )
        return (low[1] - high[1]) / n_n, (high[0] - low[0]) / points.num_targets

    def tar_at_far(self, far: float) -> Influence:
        """TAR at the largest FAR that does not exceed `far`."""
        threshold = metrics.tar_at_far(self.points, far).threshold
        accepts, misses = self._secant(threshold)
        slope = misses / accepts if accepts > 0 else 0.0
        moved = (-1.0) * self.frr(threshold) - slope * self.far(threshold)
        return moved.on("logit")

    def eer(self) -> Influence:
        """EER; its variants differ by less than an error and share it."""
        threshold = metrics.eer_point(self.points)[0]
        accepts, misses = self._secant(threshold)
        share = accepts / (accepts + misses) if accepts + misses > 0 else 0.5
        moved = share * self.frr(threshold) + (1 - share) * self.far(threshold)
        return moved.on("logit")

    def cost(self, threshold: float, p_target: float, c_miss: float = 1.0, c_fa: float = 1.0):
        """Normalised detection cost at a fixed threshold."""
        miss, accept = c_miss * p_target, c_fa * (1 - p_target)
        least = min(miss, accept)
        moved = (miss / least) * self.frr(threshold) + (accept / least) * self.far(threshold)
        return moved.on("log")

    def act_dcf(self, p_target: float, c_miss: float = 1.0, c_fa: float = 1.0) -> Influence:
        """actDCF: the cost at the Bayes threshold."""
        return self.cost(metrics.bayes_threshold(p_target, c_miss, c_fa), p_target, c_miss, c_fa)

    def min_dcf(self, p_target: float, c_miss: float = 1.0, c_fa: float = 1.0) -> Influence:
        """minDCF: the cost at its optimal threshold, with its optimism as bias."""
        points = self.points
        cost = c_miss * p_target * points.frr + c_fa * (1 - p_target) * points.far
        threshold = float(points.thresholds[int(np.argmin(cost))])
        moved = self.cost(threshold, p_target, c_miss, c_fa).on("logit")
        return replace(moved, bias=-self._optimism(threshold, p_target, c_miss, c_fa))

    def _optimism(self, threshold: float, p_target: float, c_miss: float, c_fa: float) -> float:
        """By how much the minimum over thresholds is expected to be too low."""
        points = self.points
        accepts = max(1, points.errors_at(threshold)[1])
        reach = min(points.num_impostors - 1, math.ceil(accepts * math.exp(_SPAN)))
        fewest = 0.3  # rank 0 after rounding
        ranks = np.geomspace(max(accepts * math.exp(-_SPAN), fewest), max(reach, fewest), _GRID)
        thresholds = {_accepting(points, rank) for rank in np.unique(ranks.astype(int)).tolist()}
        order = sorted(thresholds | {threshold})
        misses, accepted = np.array([points.errors_at(each) for each in order]).T
        miss, accept = c_miss * p_target, c_fa * (1 - p_target)
        costs = miss * misses / points.num_targets + accept * accepted / points.num_impostors
        moves = miss * self._missed(misses) + accept * self._accepted(accepted[::-1])[::-1]
        drawn = np.random.default_rng(0).standard_normal((_DRAWS, moves.shape[1]))
        noisy = costs + drawn @ moves.T
        gained = noisy[:, order.index(threshold)] - noisy.min(axis=1)
        return float(gained.mean()) / min(miss, accept)

    def cllr(self) -> Influence:
        """Cllr of log-likelihood ratios."""
        return self._mean_cost(
            np.logaddexp(0, -self._target_scores.astype(float)),
            lambda scores: np.logaddexp(0, scores.astype(float)),
        )

    def min_cllr(self) -> Influence:
        """minCllr, at the calibration that is best for these scores."""
        lowest, llrs = metrics.log_likelihood_ratios(self.points)

        def llr(scores: np.ndarray) -> np.ndarray:
            return llrs[np.maximum(np.searchsorted(lowest, scores, side="right") - 1, 0)]

        influence = self._mean_cost(
            np.logaddexp(0, -llr(self._target_scores)),
            lambda scores: np.logaddexp(0, llr(scores)),
        )
        return replace(influence, scale="logit")  # it never exceeds one bit

    def _mean_cost(self, target_costs: np.ndarray, impostor_cost) -> Influence:
        """Of the mean of both classes' mean costs, in bits."""
        structure, size = self.structure, len(self.structure.targets)
        bits = 0.5 / math.log(2)
        sums = np.bincount(self._of_target, target_costs, size)
        targets = bits * (sums - target_costs.mean() * structure.targets) / len(target_costs)
        pairs = np.zeros(len(structure.pair_keys))
        total, count = 0.0, self.points.num_impostors
        for start in range(0, len(self._trials), 2**21):
            block = slice(start, start + 2**21)
            chosen = ~self._is_target[block]
            one = self._speakers[self._trials.enrolment[block][chosen]]
            two = self._speakers[self._trials.test[block][chosen]]
            keys = np.minimum(one, two) * size + np.maximum(one, two)
            costs = impostor_cost(self._scores[block][chosen])
            at = np.searchsorted(structure.pair_keys, keys)
            pairs += np.bincount(at, costs, len(pairs))
            total += float(costs.sum())
        mean, factor = total / count, bits / count
        centred = factor * (pairs - mean * structure.pair_counts)
        rows = np.bincount(structure.pair_keys // size, centred, size)
        rows += np.bincount(structure.pair_keys % size, centred, size)
        sums = PairSums(structure, np.arange(len(pairs)), factor * pairs, factor * mean)
        return Influence(structure, targets, rows, ((1.0, sums),), "log")

    def band(
        self, fars: Sequence[float], confidence: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Low and high FRR [len(fars)] at every FAR, for a band around a DET curve.

        Below 30 errors it is only as wide as the speakers make it. None where no variance can be
        estimated.
        """
        if not self.structure.measurable:
            return None
        ends = []
        for far in fars:
            value = metrics.tar_at_far(self.points, far).tar
            interval = self.tar_at_far(far).interval(value, confidence)
            assert interval is not None
            ends.append(interval)
        low, high = np.array(ends).T
        return 1 - high, 1 - low


def _accepting(points: OperatingPoints, accepts: int) -> float:
    """The lowest threshold that accepts at most so many impostor trials."""
    if accepts >= points.num_impostors:
        return float(min(points.targets[0], points.impostors[0]))
    rejected = points.impostors[points.num_impostors - accepts - 1]
    return float(np.nextafter(rejected, np.inf, dtype=rejected.dtype))


def _first_counts(numbers: np.ndarray, size: int, *sides: np.ndarray) -> np.ndarray:
    """How often each of `size` speakers is in the first trials, for ascending numbers of trials."""
    last = int(numbers.max(initial=0))
    step = np.searchsorted(numbers, np.arange(last), side="right") * size
    total = np.zeros(len(numbers) * size, dtype=np.int64)
    for side in sides:
        total += np.bincount(step + side[:last], minlength=len(total))
    return np.cumsum(total.reshape(len(numbers), size), axis=0)
