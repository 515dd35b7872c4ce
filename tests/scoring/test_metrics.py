"""Every metric against a naive count at every threshold, with ties; and against scikit-learn."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from examples import some
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import det_curve

from speechbrain_qmargin.scoring.metrics import (
    EER_METHODS,
    act_dcf,
    cllr,
    eer,
    min_cllr,
    min_dcf,
    operating_points,
    tar_at_far,
)

# few distinct values: ties within and between the classes in nearly every example
grid = st.integers(-4, 4).map(lambda value: value / 2)
real = st.floats(-50, 50, allow_nan=False, width=32)
classes = st.one_of(
    st.tuples(st.lists(grid, min_size=1, max_size=25), st.lists(grid, min_size=1, max_size=25)),
    st.tuples(st.lists(real, min_size=1, max_size=25), st.lists(real, min_size=1, max_size=25)),
)


def trials(targets, impostors):
    scores = np.array([*targets, *impostors], dtype=float)
    return scores, np.arange(len(scores)) < len(targets)


def points_of(targets, impostors):
    return operating_points(*trials(targets, impostors))


def roc(targets, impostors):
    """(FAR, FRR) at every distinct score and beyond the last, by counting; (1, 0) first."""
    thresholds = [*sorted({*targets, *impostors}), math.inf]
    return [
        (
            sum(score >= threshold for score in impostors) / len(impostors),
            sum(score < threshold for score in targets) / len(targets),
        )
        for threshold in thresholds
    ]


def crossing_of(corners):
    """First point of a polyline with FAR = FRR."""
    for (x0, y0), (x1, y1) in pairwise(corners):
        if y1 >= x1:
            share = (x0 - y0) / ((x0 - y0) + (y1 - x1))
            return x0 + share * (x1 - x0)
    raise AssertionError


def hull_crossing(corners):
    """The largest, over priors, of the least error: Brummer's definition of the ROCCH-EER."""
    # the hull is where a line x + slope * y = const first touches; its maximum over weights is
    # attained at an edge between two corners, so all pairs are tried
    best = 0.0
    for x0, y0 in corners:
        for x1, y1 in corners:
            a, b = y0 - y1, x1 - x0  # normal of the line through both
            if a < 0 or b < 0 or a + b == 0:
                continue
            weight = a / (a + b)
            best = max(best, min(weight * x + (1 - weight) * y for x, y in corners))
    return best


@settings(max_examples=some(150), deadline=None)
@given(classes)
def test_equal_error_rates(both):
    corners = roc(*both)
    points = points_of(*both)
    assert eer(points, "nist") == pytest.approx(crossing_of(corners), abs=1e-12)
    gap = min(abs(far - frr) for far, frr in corners)
    means = [(far + frr) / 2 for far, frr in corners if abs(far - frr) <= gap + 1e-12]
    assert eer(points, "step") == pytest.approx(min(means), abs=1e-12)
    assert eer(points) == pytest.approx(hull_crossing(corners), abs=1e-9)
    assert eer(points) <= eer(points, "nist") + 1e-12


@settings(max_examples=some(100), deadline=None)
@given(classes, st.floats(1e-3, 0.999), st.floats(0.1, 10), st.floats(0.1, 10))
def test_detection_costs(both, p_target, c_miss, c_fa):
    miss, accept = c_miss * p_target, c_fa * (1 - p_target)
    costs = [(miss * frr + accept * far) / min(miss, accept) for far, frr in roc(*both)]
    points = points_of(*both)
    assert min_dcf(points, p_target, c_miss, c_fa) == pytest.approx(min(costs), rel=1e-12)
    threshold = math.log(accept / miss)
    targets, impostors = both
    actual = miss * sum(s < threshold for s in targets) / len(targets)
    actual += accept * sum(s >= threshold for s in impostors) / len(impostors)
    actual /= min(miss, accept)
    assert act_dcf(points, p_target, c_miss, c_fa, force=True) == pytest.approx(actual, rel=1e-12)
    assert actual >= min_dcf(points, p_target, c_miss, c_fa) - 1e-12


@settings(max_examples=some(100), deadline=None)
@given(classes, st.sampled_from([1.0, 0.5, 0.1, 0.04, 1e-2, 1e-6]))
def test_true_accepts_at_the_largest_far_that_is_not_above(both, far):
    targets, impostors = both
    points = points_of(*both)
    tar, threshold, accepted, missed = tar_at_far(points, far)
    allowed = [frr for rate, frr in roc(*both) if rate <= far + 1e-15]
    assert tar == pytest.approx(1 - min(allowed), abs=1e-12)
    assert missed == sum(score < threshold for score in targets)
    assert accepted == sum(score >= threshold for score in impostors)
    assert accepted <= far * len(impostors) + 1e-9
    assert tar == pytest.approx(sum(s >= threshold for s in targets) / len(targets))


@settings(max_examples=some(100), deadline=None)
@given(classes)
def test_log_likelihood_ratio_costs(both):
    targets, impostors = both
    naive = np.mean([math.log1p(math.exp(-s)) for s in targets])
    naive += np.mean([math.log1p(math.exp(s)) for s in impostors])
    assert cllr(points_of(*both), force=True) == pytest.approx(naive / 2 / math.log(2), rel=1e-12)

    scores, is_target = trials(*both)
    ranks = np.unique(scores, return_inverse=True)[1]  # scikit-learn joins scores 1e-16 apart
    posterior = IsotonicRegression().fit(ranks, is_target).predict(ranks)
    with np.errstate(divide="ignore"):
        odds = posterior / (1 - posterior) * len(impostors) / len(targets)
        best = np.log2(1 + 1 / odds[is_target]).mean() + np.log2(1 + odds[~is_target]).mean()
    assert min_cllr(points_of(*both)) == pytest.approx(best / 2, abs=1e-9)
    assert min_cllr(points_of(*both)) <= cllr(points_of(*both), force=True) + 1e-12


def test_the_rocch_is_the_lower_hull_of_scikit_learns_det_curve():
    rng = np.random.default_rng(0)
    for digits in (1, 8):
        targets, impostors = rng.normal(1.5, 1, 300).round(digits), rng.normal(0, 1, 900)
        impostors = impostors.round(digits)
        scores, is_target = trials(targets, impostors)
        far, frr, _ = det_curve(is_target, scores)
        corners = [(1.0, 0.0), *zip(far, frr, strict=True), (0.0, 1.0)]
        hull = []
        for x, y in sorted({*corners}, key=lambda corner: (-corner[0], corner[1])):
            while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (y - hull[-2][1]) >= (
                hull[-1][1] - hull[-2][1]
            ) * (x - hull[-2][0]):
                hull.pop()
            hull.append((x, y))
        assert eer(points_of(targets, impostors)) == pytest.approx(crossing_of(hull), abs=1e-9)


def test_the_order_of_tied_trials_does_not_matter():
    rng = np.random.default_rng(1)
    scores, is_target = rng.integers(0, 6, 400) - 3.0, rng.random(400) < 0.3
    scores += 0.5 * is_target
    metrics = (
        *(lambda p, method=method: eer(p, method) for method in EER_METHODS),
        min_dcf,
        act_dcf,
        cllr,
        min_cllr,
        lambda p: tar_at_far(p, 0.1),
    )
    expected = [metric(operating_points(scores, is_target)) for metric in metrics]
    for _ in range(5):
        order = rng.permutation(400)
        again = operating_points(scores[order], is_target[order])
        assert [metric(again) for metric in metrics] == expected


def test_separated_scores_have_no_errors_and_tied_ones_are_worth_nothing():
    separated, tied = points_of([1, 2, 3], [-1, 0]), points_of([1.0] * 3, [1.0] * 5)
    for method in EER_METHODS:
        assert eer(separated, method) == 0
        assert eer(tied, method) == 0.5
    assert min_dcf(separated) == min_cllr(separated) == 0
    assert tar_at_far(separated, 1e-6)[0] == 1.0
    assert min_dcf(tied) == min_cllr(tied) == 1
    assert tar_at_far(tied, 0.1)[0] == 0.0


def test_calibrated_costs_of_cosines_are_refused():
    cosines = points_of([0.5, 1.0], [-1.0, 0.2])
    for metric in (act_dcf, cllr):
        with pytest.raises(ValueError, match=r"look like cosines.*force=True"):
            metric(cosines)
        assert metric(cosines, force=True) > 0
    rounded = points_of(np.float32([1 + 1e-7]), np.float32([0.5]))  # a cosine in float32
    assert rounded.targets[0] > 1
    with pytest.raises(ValueError, match="look like cosines"):
        cllr(rounded)
    assert (
        cllr(points_of([0.5], [-5.0, 0.2])) > 0
    )  # one that is beyond, at either end, and none are


def test_single_precision_scores_are_counted_as_they_are():
    scores = np.float32([0.1, 0.1, 0.3])
    tar, threshold, accepted, _ = tar_at_far(
        operating_points(scores, np.array([True, False, False])), 1.0
    )
    assert (tar, accepted) == (1.0, 2)
    assert np.float32(threshold) == scores[0]


def test_bad_input_is_named():
    yes, no = np.array([True]), np.array([False])
    with pytest.raises(ValueError, match=r"scores \(2,\) and labels \(1,\)"):
        operating_points(np.zeros(2), yes)
    with pytest.raises(ValueError, match="1 scores are NaN or infinite"):
        operating_points(np.array([np.nan, 0]), np.array([True, False]))
    with pytest.raises(ValueError, match="0 target and 1 impostor"):
        operating_points(np.zeros(1), no)
    # to numpy all of these are true: an ignored trial would count as a target
    for last in (-1, np.nan, 0.3, 2):
        with pytest.raises(ValueError, match=f"neither True nor False, 1 nor 0: {last}"):
            operating_points(np.array([3.0, 1.0, 2.0]), np.array([1, 0, last]))
    for words in (["1", "0"], ["target", "nontarget"]):
        with pytest.raises(ValueError, match=f"1 nor 0: {words[0]}"):
            operating_points([1.0, 0.0], words)
    good = points_of([1], [0])
    with pytest.raises(ValueError, match="rocch, step, nist, got 'mean'"):
        eer(good, "mean")
    with pytest.raises(ValueError, match=r"p_target must be in \(0, 1\), got 1"):
        min_dcf(good, 1)
    with pytest.raises(ValueError, match="c_miss 0"):
        act_dcf(good, c_miss=0, force=True)
    for cost in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"positive and finite, got c_miss 1.0, c_fa {cost}"):
            min_dcf(good, c_fa=cost)
    with pytest.raises(ValueError, match="threshold is NaN"):
        good.errors_at(math.nan)
    with pytest.raises(ValueError, match="far must be in"):
        tar_at_far(good, 0)


def test_whatever_is_an_array_is_taken():
    """Lists and torch's tensors too, with labels of any number type."""
    scores, labels = [0.75, 0.5, 0.625, 0.125], [1, 1, 0, 0]
    wanted = operating_points(np.array(scores), np.array(labels, dtype=bool))
    for kind in (list, np.array, torch.tensor, lambda x: np.array(x, np.float16)):
        found = operating_points(kind(scores), kind(labels))
        assert (eer(found), min_dcf(found)) == (eer(wanted), min_dcf(wanted)) == (0.25, 0.5)
        assert tar_at_far(found, 0.5)[:1] + tar_at_far(found, 0.5)[2:] == (1.0, 1, 0)


def test_errors_at_a_threshold_between_two_float32_are_exact():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=1000).astype(np.float32)
    label = np.arange(1000) < 300
    points = operating_points(scores, label)
    wide = scores.astype(float)
    at = [*wide[:50], *rng.normal(size=50), np.inf, -np.inf, 1e300, -1e300]
    at += [np.nextafter(wide[3], way) for way in (9, -9)]
    for threshold in map(float, at):
        wanted = (wide[label] < threshold).sum(), (wide[~label] >= threshold).sum()
        assert points.errors_at(threshold) == wanted
