"""Bayes decisions and error rates against a loop over thresholds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from speechbrain_qmargin.scoring.bayes import LOG_ODDS, bayes_decisions, bayes_error
from speechbrain_qmargin.scoring.metrics import act_dcf, min_dcf, operating_points

llrs = st.lists(st.sampled_from([-20.0, -3.0, -1.0, 0.0, 0.5, 2.0, 8.0, 30.0]), min_size=1)


@given(llrs, llrs, st.lists(st.floats(-12, 12), min_size=1, max_size=4))
def test_rates_are_those_of_a_loop(targets, impostors, odds):
    scores = np.array(targets + impostors)
    same = np.arange(len(scores)) < len(targets)
    found = bayes_error(operating_points(scores, same), np.array(odds), force=True)
    for k, log_odds in enumerate(odds):
        prior = 1 / (1 + np.exp(-log_odds))
        least = min(prior, 1 / (1 + np.exp(log_odds)))

        def cost(threshold, prior=prior, log_odds=log_odds, least=least):
            miss = np.mean(scores[same] < threshold)
            accept = np.mean(scores[~same] >= threshold)
            return (prior * miss + accept / (1 + np.exp(log_odds))) / least

        assert found.actual[k] == pytest.approx(cost(-log_odds))
        thresholds = [*scores, np.inf, -np.inf]
        assert found.minimum[k] == pytest.approx(min(map(cost, thresholds)))
        assert found.minimum[k] <= min(found.actual[k], 1) + 1e-12


def test_it_is_the_dcf_at_each_prior():
    rng = np.random.default_rng(0)
    same = np.arange(4000) < 400
    scores = rng.normal(np.where(same, 2, -2), 2).astype(np.float32)
    points = operating_points(scores, same)
    found = bayes_error(points)
    assert len(found.actual) == len(LOG_ODDS)
    for at in (0, 30, 50, 80):
        prior = 1 / (1 + np.exp(-found.log_odds[at]))
        assert found.actual[at] == pytest.approx(act_dcf(points, prior))
        assert found.minimum[at] == pytest.approx(min_dcf(points, prior))
        accepted = bayes_decisions(scores, prior)
        assert np.count_nonzero(same & ~accepted) == found.misses[at]
        assert np.count_nonzero(~same & accepted) == found.false_accepts[at]


def test_bad_input_is_named():
    points = operating_points(np.array([0.5, 0.1]), np.array([True, False]))
    with pytest.raises(ValueError, match="look like cosines"):
        bayes_error(points)
    for bad in (np.inf, np.nan, -701):
        with pytest.raises(ValueError, match="must be finite, from -700 to 700"):
            bayes_error(points, np.array([bad]), force=True)
    assert bayes_error(points, np.array([-700, 700]), force=True).minimum.tolist() == [0, 0]
    with pytest.raises(ValueError, match="ratio of trial 1 is NaN"):
        bayes_decisions(np.array([0.0, np.nan]), 0.5)
    with pytest.raises(ValueError, match="p_target"):
        bayes_decisions(np.array([0.0]), 1.0)
