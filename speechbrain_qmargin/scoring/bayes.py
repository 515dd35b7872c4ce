"""Bayes decisions of log-likelihood ratios, and what they cost over all priors.

The normalised Bayes error rate at a prior (Brummer and de Villiers 2013, the BOSARIS toolkit): the
cost of deciding at the threshold that the prior asks for, over that of deciding without scores.
Above 1 the scores do harm there; where it meets the minimum, calibration is perfect.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from speechbrain_qmargin.scoring.metrics import OperatingPoints, bayes_threshold, refuse_cosines

__all__ = ["LOG_ODDS", "BayesError", "bayes_decisions", "bayes_error"]

LOG_ODDS = np.linspace(-10.0, 6.0, 81)  # of the prior, from 4.5e-5 to 0.998


class BayesError(NamedTuple):
    """Normalised Bayes error rates over priors.

    Attributes
    ----------
    log_odds : float array [K]
        Of the priors, natural.
    actual : float array [K]
        At the thresholds that the priors ask for.
    minimum : float array [K]
        At the best threshold for each, or without scores; the normalised minDCF.
    misses, false_accepts : int arrays [K]
        Behind `actual`.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([3.0, -0.5, 0.5, -3]), np.array([1, 1, 0, 0], bool))
    >>> found = bayes_error(points, np.array([0.0]))  # even odds: ratios above 0 are accepted
    >>> found.misses, found.false_accepts
    (array([1]), array([1]))
    """

    log_odds: np.ndarray
    actual: np.ndarray
    minimum: np.ndarray
    misses: np.ndarray
    false_accepts: np.ndarray


def bayes_decisions(
    llrs: np.ndarray, p_target: float, c_miss: float = 1.0, c_fa: float = 1.0
) -> np.ndarray:
    """Which trials to accept so that the expected cost is least: bool [N].

    Parameters
    ----------
    llrs : float array [N]
        Natural log-likelihood ratios.
    p_target, c_miss, c_fa : float

    Raises
    ------
    ValueError
        A prior outside (0, 1), a cost that is not positive, a ratio that is NaN.

    Examples
    --------
    >>> bayes_decisions(np.array([4.0, 5.0]), 0.01)
    array([False,  True])
    """
    llrs = np.asarray(llrs, dtype=float)
    if np.isnan(llrs).any():
        raise ValueError(f"the log-likelihood ratio of trial {int(np.argmax(np.isnan(llrs)))} "
                         "is NaN; no decision can rest on it")  # fmt: skip
    return llrs >= bayes_threshold(p_target, c_miss, c_fa)


def bayes_error(
    points: OperatingPoints, log_odds: np.ndarray = LOG_ODDS, *, force: bool = False
) -> BayesError:
    """Normalised Bayes error rates of log-likelihood ratios over priors.

    Parameters
    ----------
    points : OperatingPoints
        Of natural log-likelihood ratios.
    log_odds : float array [K]
        Natural log odds of the priors; with costs, those of the effective prior.
    force : bool
        Also of scores that look like cosines.

    Raises
    ------
    ValueError
        Scores that cannot be log-likelihood ratios, unless `force`; log odds that are not finite,
        or beyond 700, where the prior is no number any more.

    Examples
    --------
    >>> from speechbrain_qmargin.scoring.metrics import operating_points
    >>> points = operating_points(np.array([3.0, -0.5, 0.5, -3]), np.array([1, 1, 0, 0], bool))
    >>> found = bayes_error(points, np.array([0.0]))
    >>> found.actual, found.minimum
    (array([1.]), array([0.5]))
    """
    refuse_cosines(points, force)
    log_odds = np.atleast_1d(np.asarray(log_odds, dtype=float))
    if not (np.abs(log_odds) <= 700).all():
        raise ValueError("log odds of priors must be finite, from -700 to 700")
    prior, other = 1 / (1 + np.exp(-log_odds)), 1 / (1 + np.exp(log_odds))
    least = np.minimum(prior, other)
    misses = np.searchsorted(points.targets, -log_odds, side="left")
    false_accepts = points.num_impostors - np.searchsorted(points.impostors, -log_odds, side="left")
    actual = prior * misses / points.num_targets + other * false_accepts / points.num_impostors
    frr, far = points.frr, points.far
    best = np.array([(p * frr + o * far).min() for p, o in zip(prior, other, strict=True)])
    return BayesError(log_odds, actual / least, best / least, misses, false_accepts)
