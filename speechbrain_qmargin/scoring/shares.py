r"""A share of trials or probes with an interval over people, and what it rests on.

Trials that share a person are not independent. At a fixed threshold a rate is a mean over trials,
whose variance over people follows from sums of what each person's trials, and each pair's, deviate
by (Fafchamps and Gubert 2007; Aronow, Samii and Assenova 2015). The method is that of
:mod:`~speechbrain_qmargin.scoring.uncertainty`, for a part of a list, which may have one class of
trials only, or few people.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from speechbrain_qmargin.scoring.influence import FEWEST_SPEAKERS, effective_number
from speechbrain_qmargin.scoring.uncertainty import mark_of, rate_interval, widened

__all__ = ["Share", "share", "share_of_trials"]


@dataclass(frozen=True)
class Share:
    """A rate with its interval.

    Attributes
    ----------
    value, low, high : float
    errors : float
        What it rests on: the fewer of the two outcomes; an expectation where the rate is one.
    trials, people : int
        Trials (or probes) that it is of, and their people.
    mark : str
        Its :func:`~speechbrain_qmargin.scoring.uncertainty.mark_of`, by the effective number of
        people.

    Examples
    --------
    >>> found = Share(0.1, 0.07, 0.15, errors=100, trials=1000, people=50, mark="measured")
    >>> print(found)
    10 % (7 to 15 %) measured
    >>> print(found.complement)
    90 % (85 to 93 %) measured
    """

    value: float
    low: float
    high: float
    errors: float
    trials: int
    people: int
    mark: str

    @property
    def complement(self) -> Share:
        """One minus it."""
        return Share(1 - self.value, 1 - self.high, 1 - self.low, self.errors, self.trials,
                     self.people, self.mark)  # fmt: skip

    def __str__(self) -> str:
        shown = f"{100 * self.value:.3g} % ({100 * self.low:.3g} to {100 * self.high:.3g} %)"
        return f"{shown} {self.mark}"


def share(
    rate: float,
    variance: float,
    trials: int,
    people: int,
    confidence: float = 0.95,
    effective: float | None = None,
) -> Share:
    """A rate and its variance over people as a :class:`Share`.

    The interval is Student's t on the logit scale, with one degree of freedom less than there are
    people of effect; where fewer than 30 errors carry the rate, the wider of that and
    Clopper-Pearson.

    Parameters
    ----------
    rate : float
        In [0, 1].
    variance : float
        Of the rate, over people.
    trials, people : int
    confidence : float
    effective : float, optional
        The :func:`~speechbrain_qmargin.scoring.influence.effective_number` of people; all of them
        by default.

    Examples
    --------
    >>> print(share(0.1, 0.02**2, 1000, 50))
    10 % (6.64 to 14.8 %) measured
    """
    from scipy.special import expit, logit
    from scipy.stats import t

    errors = trials * min(rate, 1 - rate)
    effective = people if effective is None else effective
    low, high = rate, rate
    if 0 < rate < 1:
        reach = (
            t.ppf(0.5 + confidence / 2, max(effective - 1, 1))
            * np.sqrt(variance)
            / (rate * (1 - rate))
        )
        low, high = expit(logit(rate) - reach), expit(logit(rate) + reach)
    if people < 2:
        low, high = 0.0, 1.0
    few = partial(rate_interval, round(rate * trials), trials, confidence)
    low, high = widened((low, high), errors, few)
    mark = mark_of(errors, effective)
    return Share(rate, float(low), float(high), float(errors), trials, people, mark)


def share_of_trials(
    outcome: np.ndarray,
    one: np.ndarray,
    two: np.ndarray,
    confidence: float = 0.95,
    known: bool = True,
) -> Share:
    """The share of trials with an outcome, with an interval over their people.

    Parameters
    ----------
    outcome : bool array [N]
    one, two : int arrays [N]
        The people of each side; the same person twice in a target trial.
    confidence : float
    known : bool
        Whether they are people, not groups of recordings of which two may be one person: these are
        never called measured.

    Raises
    ------
    ValueError
        No trials.

    Notes
    -----
    With d the outcomes minus their mean, S the sum of d over each person's n trials and D that
    over each pair's, the variance of the mean is (I - 1) / I times the sum of (S / (N - n))^2 over
    I people, the jackknife, less the sum of (D / N)^2 over pairs of two, which it counts twice;
    and at least the pairs' own, the sum of (D / N)^2 over all pairs.

    Examples
    --------
    >>> one, two = np.triu_indices(12, 1)
    >>> share_of_trials((one + two) % 4 == 0, one, two).people
    12
    """
    outcome = np.asarray(outcome, dtype=float)
    if not len(outcome):
        raise ValueError("a share of no trials")
    people, sides = np.unique(np.concatenate((one, two)), return_inverse=True)
    first, second = sides.reshape(2, -1)
    count, rate, number = len(people), float(outcome.mean()), len(outcome)
    apart = outcome - rate
    crossed = first != second
    total = np.bincount(first, apart, minlength=count)
    total += np.bincount(second, np.where(crossed, apart, 0), minlength=count)
    held = np.bincount(first, minlength=count) + np.bincount(second, crossed, minlength=count)
    pair, of_trial = np.unique(
        np.minimum(first, second) * count + np.maximum(first, second), return_inverse=True
    )
    in_pair = (np.bincount(of_trial, apart) / number) ** 2
    twice = in_pair[pair // count != pair % count].sum()
    left_out = total / np.maximum(number - held, 1)
    variance = max((count - 1) / count * np.sum(left_out**2) - twice, in_pair.sum())
    found = share(rate, float(variance), number, count, confidence, effective_number(held))
    if known:
        return found
    few = min(effective_number(held), FEWEST_SPEAKERS - 1)
    return replace(found, mark=mark_of(found.errors, few))
