r"""How far a figure can be trusted: intervals over speakers, paired differences, badges.

Trials that share a speaker are not independent, and an impostor trial has two speakers, so an
error rate is a mean of *dyadic* data: its variance is the sum of the covariances of all pairs of
trials that have a speaker in common. Everything here is closed form: no resampling, no seed.

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
degrees of freedom count the speakers that the figure rests on, not those on the list: with
:math:`R_i = T_i + I_i`,

.. math:: \nu = (\sum_i R_i^2)^2 / \sum_i R_i^4 - 1.

A figure whose errors come from three speakers of three hundred has few degrees of freedom. minDCF
is too low by the freedom of its threshold; what :math:`\min_t` gains when the contributions of all
speakers are multiplied by Gaussian noise estimates by how much, and moves the interval up.

**Differences** of two systems on the same trials subtract the contributions trial by trial (no
scale, the same V and degrees of freedom), which makes them paired.

**Few errors.** Below 30 the wider of this and Clopper-Pearson is given (see
:mod:`~speechbrain_qmargin.scoring.report`). A trial and its reverse are one trial: they fall into
one :math:`P_{ij}`, and errors are counted over distinct unordered pairs of recordings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from speechbrain_qmargin.scoring import metrics
from speechbrain_qmargin.scoring.metrics import OperatingPoints
from speechbrain_qmargin.trials import LabelledTrials

__all__ = [
    "FEWEST_ERRORS",
    "FEWEST_SPEAKERS",
    "Influence",
    "RatesAt",
    "Spread",
    "TrialStructure",
    "badge",
    "rate_interval",
]

FEWEST_ERRORS, FEWEST_SPEAKERS = 30, 8
Scale = Literal["plain", "log", "logit"]

_WIDEST = 1.2  # h of the slopes' secants: FAR over and below by at most this factor's exponent
_DRAWS, _GRID, _SPAN = 200, 48, 1.5  # of the optimism: noise draws, thresholds, reach in log FAR


def badge(errors: float, speakers: float | None = None) -> str:
    """Doddington's rule of 30 for a rate that rests on so many errors of so many speakers.

    Parameters
    ----------
    errors : int
        Of distinct trials.
    speakers : float, optional
        That contribute (:attr:`TrialStructure.contributing`). Below 8 nothing is called measured,
        below 4, where no interval can be given, everything is unsupported.

    Examples
    --------
    >>> badge(100), badge(12), badge(0)
    ('measured', 'indicative', 'unsupported')
    >>> badge(100, speakers=7), badge(100, speakers=2)
    ('indicative', 'unsupported')
    """
    if errors < 3 or (speakers is not None and round(speakers) < 4):
        return "unsupported"
    enough = speakers is None or round(speakers) >= FEWEST_SPEAKERS
    return "measured" if errors >= FEWEST_ERRORS and enough else "indicative"


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


@dataclass(frozen=True, eq=False)
class TrialStructure:
    """Who meets whom in a trial list, and how often; the same for every system scored on it.

    Attributes
    ----------
    targets, impostors : float arrays [S]
        Trials of every speaker; an impostor trial counts for both of its speakers.
    pair_keys : int64 array [G]
        Ascending ``low * S + high`` of every two speakers that meet in impostor trials.
    pair_counts : float array [G]
        How often.
    first : bool array [N] or None
        The trials that are the first of their unordered pair of recordings; None if all are.
    speakers_known : bool
        Whether these are speakers, not groups of recordings that target trials link. Two groups
        may be one person, so nothing is called measured.
    """

    targets: np.ndarray
    impostors: np.ndarray
    pair_keys: np.ndarray
    pair_counts: np.ndarray
    first: np.ndarray | None = None
    speakers_known: bool = True

    @classmethod
    def of(cls, trials: LabelledTrials) -> TrialStructure:
        """Raises ValueError where all trials are of one speaker."""
        if trials.is_target is None:
            raise ValueError("the trials have no labels: nothing can be measured on them")
        speakers = trials.speakers()
        count = int(speakers.max()) + 1
        if count < 2:
            raise ValueError("one speaker only: there is no spread over speakers")
        from scipy.sparse import coo_array

        pairs = coo_array(trials.impostor_pairs)
        low, high = pairs.coords
        counts = pairs.data.astype(np.float64)
        keys = low.astype(np.int64) * count + high
        if (keys[1:] < keys[:-1]).any():
            order = np.argsort(keys)
            keys, counts = keys[order], counts[order]
        impostors = np.bincount(keys // count, counts, count) + np.bincount(
            keys % count, counts, count
        )
        targets = np.bincount(speakers[trials.enrolment[trials.is_target]], minlength=count)
        return cls(
            targets.astype(float),
            impostors,
            keys,
            counts,
            _first_of_pairs(trials),
            trials.speakers_known,
        )

    @cached_property
    def num_targets(self) -> float:
        return float(self.targets.sum())

    @cached_property
    def num_impostors(self) -> float:
        return float(self.pair_counts.sum())

    @cached_property
    def squared_counts(self) -> float:
        """Sum of the squared pair counts."""
        return float(self.pair_counts @ self.pair_counts)

    @cached_property
    def apart(self) -> tuple[float, float, float]:
        """Shares of the pairs of trials without a common speaker.

        Of target and target, target and impostor, impostor and impostor trials; exactly 0 where
        there are none.
        """
        n_t, n_n = self.num_targets, self.num_impostors
        shares = (
            n_t**2 - self.targets @ self.targets,
            n_t * n_n - self.targets @ self.impostors,
            n_n**2 - (self.impostors @ self.impostors - self.squared_counts),
        )  # whole numbers, exact below 2 ** 53
        return (
            max(0.0, float(shares[0])) / n_t**2,
            max(0.0, float(shares[1])) / (n_t * n_n),
            max(0.0, float(shares[2])) / n_n**2,
        )

    def same_as(self, other: TrialStructure) -> bool:
        """Whether the same speakers meet as often: a necessary sign of the same trials."""
        return self is other or all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("targets", "pair_keys", "pair_counts")
        )

    @property
    def measurable(self) -> bool:
        """Whether there are trials apart, without which no variance over speakers exists."""
        return min(self.apart) > 1e-9

    @cached_property
    def contributing(self) -> float:
        """How many speakers of equal weight the trials amount to: Kish's effective number.

        The lower one of target and of impostor trials: a list of which one speaker has nearly all
        trials has one speaker, whoever else is on it.
        """
        numbers = (n.sum() ** 2 / (n @ n) for n in (self.targets, self.impostors) if n.any())
        number = float(min(numbers, default=0.0))
        return number if self.speakers_known else min(number, FEWEST_SPEAKERS - 1)


def _first_of_pairs(trials: LabelledTrials) -> np.ndarray | None:
    one, two = trials.enrolment, trials.test
    keys = np.minimum(one, two) * np.int64(len(trials.ids)) + np.maximum(one, two)
    ordered = np.sort(keys)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    first = np.zeros(len(keys), dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first


@dataclass(frozen=True, eq=False)
class _PairSums:
    """Contributions by pair of speakers: ``sums`` at ``index``, minus ``centre`` times the count.

    Sparse: at low FAR few pairs have an error, and every pair has the centring.
    """

    structure: TrialStructure
    index: np.ndarray
    sums: np.ndarray
    centre: float

    def dot(self, other: _PairSums) -> float:
        counts = self.structure.pair_counts
        if self.index is other.index or np.array_equal(self.index, other.index):
            both = self.sums @ other.sums
        else:
            few, many = sorted((self, other), key=lambda sums: len(sums.index))
            at = np.minimum(np.searchsorted(many.index, few.index), max(len(many.index) - 1, 0))
            found = many.index[at] == few.index if len(many.index) else np.zeros(0, bool)
            both = few.sums[found] @ many.sums[at[found]] if len(many.index) else 0.0
        crossed = other.centre * (self.sums @ counts[self.index])
        crossed += self.centre * (other.sums @ counts[other.index])
        return float(both - crossed + self.centre * other.centre * self.structure.squared_counts)


@dataclass(frozen=True, eq=False)
class Influence:
    """What every speaker contributes to a figure's error; figures add and subtract.

    Attributes
    ----------
    structure : TrialStructure
    targets, impostors : float arrays [S]
        :math:`T_i` and :math:`I_i` of the module's text.
    pairs : tuple of (factor, pair sums)
    scale : {"plain", "log", "logit"}
        On which the interval is symmetric.
    bias : float
        By how much the figure is expected to be above what it estimates.
    """

    structure: TrialStructure
    targets: np.ndarray
    impostors: np.ndarray
    pairs: tuple[tuple[float, _PairSums], ...]
    scale: Scale = "plain"
    bias: float = 0.0

    def on(self, scale: Scale) -> Influence:
        """The same on another scale: "logit" for what lies in (0, 1), "log" for what is positive.

        Sums and differences are "plain".
        """
        return replace(self, scale=scale)

    def __add__(self, other: Influence) -> Influence:
        if not self.structure.same_as(other.structure):
            raise ValueError("influences on different trials cannot be combined")
        return Influence(
            self.structure,
            self.targets + other.targets,
            self.impostors + other.impostors,
            self.pairs + other.pairs,
            "plain",
            self.bias + other.bias,
        )

    def __mul__(self, factor: float) -> Influence:
        return Influence(
            self.structure,
            factor * self.targets,
            factor * self.impostors,
            tuple((factor * weight, sums) for weight, sums in self.pairs),
            "plain",
            factor * self.bias,
        )

    __rmul__ = __mul__

    def __sub__(self, other: Influence) -> Influence:
        return self + (-1.0) * other

    @cached_property
    def variance(self) -> float:
        """The variance V over speakers; NaN where it cannot be estimated."""
        if not self.structure.measurable:
            return math.nan
        both, mixed, apart = self.structure.apart
        pairs = sum(
            one * two * first.dot(second) for one, first in self.pairs for two, second in self.pairs
        )
        rows = float(self.impostors @ self.impostors)
        others = float(self.targets @ self.targets) / both
        others += 2 * float(self.targets @ self.impostors) / mixed
        return max(others + (rows - pairs) / apart, (others + rows / apart) / 2, 0.0)

    @cached_property
    def degrees_of_freedom(self) -> float:
        """A third of the contributing speakers; see the module's text."""
        return max(1.0, self.structure.contributing / 3)

    def interval(self, value: float, confidence: float = 0.95) -> tuple[float, float] | None:
        """The interval of a figure that was found to be `value`.

        Returns
        -------
        (low, high) or None
            None where the variance cannot be estimated: fewer than 4 speakers.
        """
        from scipy.special import expit, logit
        from scipy.stats import t

        if math.isnan(self.variance):
            return None
        reach = float(t.ppf((1 + confidence) / 2, self.degrees_of_freedom))
        reach *= math.sqrt(self.variance)
        centre = value - self.bias
        if self.scale == "logit" and 0 < centre < 1:
            middle, half = logit(centre), reach / (centre * (1 - centre))
            return float(expit(middle - half)), float(expit(middle + half))
        if self.scale == "log" and centre > 0:
            return centre * math.exp(-reach / centre), centre * math.exp(reach / centre)
        low, high = centre - reach, centre + reach
        if self.scale != "plain":
            low = max(low, 0.0)
        return low, min(high, 1.0) if self.scale == "logit" else high


@dataclass(frozen=True)
class RatesAt:
    """FAR (FMR) and FRR (FNMR) at a threshold that was fixed beforehand.

    Attributes
    ----------
    threshold, far, frr : float
    far_interval, frr_interval : (low, high) or None
        Over speakers; below 30 errors the wider of that and Clopper-Pearson.
    false_accepts, misses : int
        Of distinct unordered pairs of recordings.
    far_support, frr_support : str
        Their badges.
    """

    threshold: float
    far: float
    frr: float
    far_interval: tuple[float, float] | None
    frr_interval: tuple[float, float] | None
    false_accepts: int
    misses: int
    far_support: str
    frr_support: str


class Spread:
    """How one system's figures vary over speakers.

    Parameters
    ----------
    scores : float array [N]
    trials : LabelledTrials
    points : OperatingPoints
        Of these scores.
    structure : TrialStructure, optional
        Of these trials, where several systems share it.

    Raises
    ------
    ValueError
        One speaker only, trials without labels.

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
        scores = np.asarray(scores)
        if not np.issubdtype(scores.dtype, np.floating):
            scores = scores.astype(float)
        self._scores, self._trials = scores, trials
        self._speakers = trials.speakers()
        self._is_target = np.asarray(trials.is_target, dtype=bool)
        chosen = np.flatnonzero(self._is_target)
        chosen = chosen[np.argsort(scores[chosen], kind="stable")]
        self._target_trials, self._target_scores = chosen, scores[chosen]
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
        structure, count = self.structure, self.points.num_targets
        of = self._speakers[self._trials.enrolment[self._target_trials[:misses]]]
        sums = np.bincount(of, minlength=len(structure.targets))
        sums = (sums - misses / count * structure.targets) / count
        return Influence(structure, sums, np.zeros(len(sums)), (), "logit")

    def _accepts(self, accepts: int) -> Influence:
        structure, count = self.structure, self.points.num_impostors
        size = len(structure.targets)
        self._reach(accepts)
        rows = np.bincount(self._one[:accepts], minlength=size)
        rows = rows + np.bincount(self._two[:accepts], minlength=size)
        rate = accepts / count
        sums = np.bincount(self._pair[:accepts], minlength=len(self._pair_index))
        held = np.flatnonzero(sums)
        pairs = _PairSums(structure, self._pair_index[held], sums[held] / count, rate / count)
        centred = (rows - rate * structure.impostors) / count
        return Influence(structure, np.zeros(size), centred, ((1.0, pairs),), "logit")

    def _reach(self, accepts: int) -> None:
        """Sort the impostor trials down to so many accepted."""
        if accepts <= len(self._tail):
            return
        impostors = self.points.impostors
        depth = min(len(impostors), max(accepts + accepts // 4, 1000))
        lowest = impostors[len(impostors) - depth]
        tail = np.flatnonzero(~self._is_target & (self._scores >= lowest))
        tail = tail[np.argsort(-self._scores[tail], kind="stable")]
        one = self._speakers[self._trials.enrolment[tail]]
        two = self._speakers[self._trials.test[tail]]
        keys = np.minimum(one, two) * len(self.structure.targets) + np.maximum(one, two)
        self._tail, self._one, self._two = tail, one, two
        keys, self._pair = np.unique(keys, return_inverse=True)
        self._pair_index = np.searchsorted(self.structure.pair_keys, keys)

    @cached_property
    def distinct(self) -> OperatingPoints:
        """Operating points with every unordered pair of recordings once, to count errors by."""
        first = self.structure.first
        if first is None:
            return self.points
        return metrics.operating_points(self._scores[first], self._is_target[first])

    def rates_at(self, threshold: float, confidence: float = 0.95) -> RatesAt:
        """FAR and FRR at a threshold that was not chosen on these scores, with intervals.

        A threshold that was chosen on them is not fixed: give the figure that chose it, as
        :meth:`tar_at_far`.
        """
        found = []
        counted = zip(
            self.points.errors_at(threshold),
            (self.points.num_targets, self.points.num_impostors),
            self.distinct.errors_at(threshold),
            (self.distinct.num_targets, self.distinct.num_impostors),
            self._at(threshold),
            strict=True,
        )
        for errors, trials, distinct, of, influence in counted:
            interval = influence.interval(errors / trials, confidence)
            if interval is not None and distinct < FEWEST_ERRORS:
                few = rate_interval(distinct, of, confidence)
                interval = min(interval[0], few[0]), max(interval[1], few[1])
            support = badge(distinct, self.structure.contributing)
            found.append((errors / trials, interval, distinct, support))
        (frr, frr_range, misses, frr_support), (far, far_range, accepts, far_support) = found
        return RatesAt(
            float(threshold),
            far,
            frr,
            far_range,
            frr_range,
            accepts,
            misses,
            far_support,
            frr_support,
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
        ranks = np.geomspace(max(accepts * math.exp(-_SPAN), 0.3), reach, _GRID)
        ranks = np.unique(np.append(ranks.astype(np.int64), points.errors_at(threshold)[1]))
        thresholds = [_accepting(points, int(rank)) for rank in ranks]
        miss, accept = c_miss * p_target, c_fa * (1 - p_target)
        least = min(miss, accept)
        costs, moves = [], []
        for each in [*thresholds, threshold]:
            misses, accepted = points.errors_at(each)
            costs.append(
                miss * misses / points.num_targets + accept * accepted / points.num_impostors
            )
            moves.append(miss * self.frr(each).targets + accept * self.far(each).impostors)
        drawn = np.random.default_rng(0).standard_normal((_DRAWS, len(moves[0])))
        noisy = (np.array(costs) + drawn @ np.array(moves).T) / least
        return float((noisy[:, -1] - noisy.min(axis=1)).mean())

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

        return self._mean_cost(
            np.logaddexp(0, -llr(self._target_scores)),
            lambda scores: np.logaddexp(0, llr(scores)),
        )

    def _mean_cost(self, target_costs: np.ndarray, impostor_cost) -> Influence:
        """Of the mean of both classes' mean costs, in bits."""
        structure, size = self.structure, len(self.structure.targets)
        bits = 0.5 / math.log(2)
        of = self._speakers[self._trials.enrolment[self._target_trials]]
        sums = np.bincount(of, target_costs, size)
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
        sums = _PairSums(structure, np.arange(len(pairs)), factor * pairs, factor * mean)
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
