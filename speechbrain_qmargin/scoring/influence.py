"""Who meets whom in a trial list, and what every speaker contributes to a figure's error.

The sums and the variance of :mod:`~speechbrain_qmargin.scoring.uncertainty`, whose text has the
mathematics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from speechbrain_qmargin.trials import LabelledTrials

__all__ = ["FEWEST_SPEAKERS", "Influence", "PairSums", "TrialStructure", "effective_number"]

FEWEST_SPEAKERS = 8  # below, nothing is called measured
Scale = Literal["plain", "log", "logit"]


def effective_number(counts: np.ndarray) -> float:
    """How many people of equal weight they amount to: Kish's effective number.

    Parameters
    ----------
    counts : array [people]
        Trials of each.

    Examples
    --------
    >>> effective_number(np.array([5, 5, 5])), round(effective_number(np.array([400, 5, 5])), 2)
    (3.0, 1.05)
    """
    counts = np.asarray(counts, dtype=float)
    return float(counts.sum() ** 2 / (counts @ counts)) if counts.any() else 0.0


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
    speakers_known : bool
        Whether these are speakers, not groups of recordings that target trials link. Two groups
        may be one person, so nothing is called measured.
    people : str array [S]
        Who they are (:attr:`~speechbrain_qmargin.trials.pairs.LabelledTrials.people`); empty if
        not known.

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2", "b/1"], np.array([0, 0]), np.array([1, 2]),
    ...                         np.array([True, False]))
    >>> structure = TrialStructure.of(trials)
    >>> structure.targets, structure.impostors
    (array([1., 0.]), array([1., 1.]))
    """

    targets: np.ndarray
    impostors: np.ndarray
    pair_keys: np.ndarray
    pair_counts: np.ndarray
    speakers_known: bool = True
    people: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=str), repr=False)

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
            targets.astype(float), impostors, keys, counts, trials.speakers_known, trials.people
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
            for name in ("targets", "pair_keys", "pair_counts", "people")
        )

    @property
    def measurable(self) -> bool:
        """Whether there are trials apart, without which no variance over speakers exists."""
        return min(self.apart) > 1e-9

    @cached_property
    def effective(self) -> float:
        """How many speakers of equal weight the trials amount to (:func:`effective_number`).

        The lower one of target and of impostor trials: a list of which one speaker has nearly all
        trials has one speaker, whoever else is on it.
        """
        numbers = (effective_number(n) for n in (self.targets, self.impostors) if n.any())
        return min(numbers, default=0.0)

    @property
    def contributing(self) -> float:
        """The effective number for marks: too few to be measured where speakers are not known."""
        return self.effective if self.speakers_known else min(self.effective, FEWEST_SPEAKERS - 1)


@dataclass(frozen=True, eq=False)
class PairSums:
    """Contributions by pair of speakers: ``sums`` at ``index``, minus ``centre`` times the count.

    Sparse: at low FAR few pairs have an error, and every pair has the centring.

    Attributes
    ----------
    structure : TrialStructure
    index : int array [H]
        Ascending, into the structure's pairs.
    sums : float array [H]
    centre : float

    Examples
    --------
    >>> trials = LabelledTrials(["a/1", "a/2", "b/1", "c/1"], np.array([0, 0, 0, 2]),
    ...                         np.array([1, 2, 3, 3]), np.array([True, False, False, False]))
    >>> sums = PairSums(TrialStructure.of(trials), np.array([0]), np.array([1 / 3]), 1 / 9)
    >>> round(sums.dot(sums), 4)  # FAR of 1/3, its error of a and b: (1/3 - 1/9) ** 2 + 2 / 9 ** 2
    0.0741
    """

    structure: TrialStructure
    index: np.ndarray
    sums: np.ndarray
    centre: float

    def dot(self, other: PairSums) -> float:
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

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> from speechbrain_qmargin.scoring.uncertainty import Spread
    >>> left, right = np.triu_indices(12, 1)
    >>> trials = LabelledTrials([f"{s}/{n}" for s in "abcdef" for n in "12"], left, right,
    ...                         left // 2 == right // 2)
    >>> scores = trials.is_target.astype(float)
    >>> scores[0] = 0  # the target trial of a is missed, those of b to f are not
    >>> moved = Spread(scores, trials, operating_points(scores, trials.is_target)).frr(0.5)
    >>> moved.targets.round(3)  # (1 - 1/6) / 6, and five times -1/36
    array([ 0.139, -0.028, -0.028, -0.028, -0.028, -0.028])
    >>> round(moved.variance, 4)  # as of six independent trials: 1/6 * 5/6 / 5
    0.0278
    """

    structure: TrialStructure
    targets: np.ndarray
    impostors: np.ndarray
    pairs: tuple[tuple[float, PairSums], ...]
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
        """At most a third of the contributing speakers; see the module's text. At least 1."""
        squares = (self.targets + self.impostors) ** 2
        total, fourth = float(squares.sum()), float(squares @ squares)
        few = 2 * total**2 / fourth if fourth > 0 else math.inf
        return max(1.0, min(self.structure.effective / 3, few))

    def interval(self, value: float, confidence: float = 0.95) -> tuple[float, float] | None:
        """The interval of a figure that was found to be `value`.

        Returns
        -------
        (low, high) or None
            None where the variance cannot be estimated: fewer than 4 speakers.
        """
        from scipy.special import expit, logit, stdtrit

        if math.isnan(self.variance):
            return None
        reach = float(stdtrit(self.degrees_of_freedom, (1 + confidence) / 2))
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
