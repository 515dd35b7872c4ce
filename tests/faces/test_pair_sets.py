"""Accuracy over folds, against the field's grid and a brute-force search."""

import numpy as np
import pytest
from examples import some
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from speechbrain_qmargin.faces.pair_sets import (
    check_folds,
    flip_fusion,
    pair_scores,
    ten_fold_accuracy,
    ten_fold_tar,
)


def lfw_sized(seed=0, pairs=600, distance=6.0):
    """Ten folds of genuine pairs, then as many impostor pairs, as LFW's are."""
    rng = np.random.default_rng(seed)
    is_same = np.tile(np.repeat([True, False], pairs // 20), 10)
    scores = 0.1 * rng.normal(size=pairs) + 0.1 * distance * is_same
    return np.clip(scores, -1, 1), is_same


def kfold(count, folds):
    """scikit-learn's contiguous folds, by their definition."""
    return np.array_split(np.arange(count), folds)


def grid_accuracy(scores, is_same, folds=10):
    """As the field's scripts read it: squared distances below a threshold of a 0.01 grid."""
    distances, found = 2 - 2 * scores, []
    for test in kfold(len(scores), folds):
        train = np.setdiff1d(np.arange(len(scores)), test)
        grid = np.arange(0, 4, 0.01)
        right = [np.mean((distances[train] < x) == is_same[train]) for x in grid]
        best = grid[int(np.argmax(right))]
        found.append(np.mean((distances[test] < best) == is_same[test]))
    return np.asarray(found)


def test_exact_thresholds_beside_the_fields_grid():
    exact, grid = [], []
    for seed in range(20):
        scores, is_same = lfw_sized(seed)
        exact.append(ten_fold_accuracy(scores, is_same).mean)
        grid.append(grid_accuracy(scores, is_same).mean())
    # both generalise alike: the grid is coarse, not biased
    assert np.abs(np.subtract(exact, grid)).max() < 0.005
    assert abs(np.mean(exact) - np.mean(grid)) < 0.001
    assert exact != grid


def test_crowded_scores_are_beyond_the_grid():
    """Scores of an untrained or collapsed network lie within one step of the grid."""
    scores, is_same = lfw_sized()
    crowded = 0.9925 + 0.001 * scores  # squared distances of 0.013 to 0.017
    assert ten_fold_accuracy(crowded, is_same).mean == ten_fold_accuracy(scores, is_same).mean
    assert ten_fold_accuracy(scores, is_same).mean > 0.99
    assert grid_accuracy(crowded, is_same).mean() == 0.5


@settings(max_examples=some(60), deadline=None)
@given(st.data())
def test_no_threshold_is_better_on_the_other_folds(data):
    count = data.draw(st.integers(6, 24))
    folds = data.draw(st.integers(2, 3))
    scores = np.asarray(data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count)))
    is_same = np.arange(count) % 2 == 0
    figure = ten_fold_accuracy(scores / 4, is_same, folds)
    for test, threshold, value in zip(
        kfold(count, folds), figure.thresholds, figure.values, strict=True
    ):
        train = np.setdiff1d(np.arange(count), test)

        def right(x, part):
            return np.mean((scores[part] / 4 >= x) == is_same[part])

        candidates = [-np.inf, *(np.arange(-4, 4) / 4 + 0.125), np.inf]
        assert right(threshold, train) == max(right(x, train) for x in candidates)
        assert value == pytest.approx(right(threshold, test))


def test_mean_std_and_interval():
    scores, is_same = lfw_sized(distance=3.0)
    figure = ten_fold_accuracy(scores, is_same)
    values = figure.values
    assert figure.mean == pytest.approx(values.mean())
    assert figure.std == pytest.approx(np.sqrt(np.mean((values - values.mean()) ** 2)))
    assert figure.errors == round((1 - values).sum() * 60) >= 30
    half = t.ppf(0.975, 9) * values.std(ddof=1) / np.sqrt(10)
    assert (figure.low, figure.high) == pytest.approx((figure.mean - half, figure.mean + half))
    assert "measured" in str(figure)


def test_no_errors_leave_an_interval():
    is_same = np.tile([True, False], 30)
    figure = ten_fold_accuracy(is_same.astype(float), is_same)
    assert (figure.mean, figure.high, figure.mark) == (1.0, 1.0, "unsupported")
    assert 0.9 < figure.low < 0.97  # Clopper-Pearson of 0 in 60


def test_folds_of_uneven_sizes():
    rng = np.random.default_rng(0)
    scores, is_same = rng.normal(size=47), np.arange(47) % 2 == 0
    values = ten_fold_accuracy(scores, is_same).values
    sizes = [len(part) for part in kfold(47, 10)]
    assert np.allclose(values * sizes, np.round(values * sizes))


def test_labels_may_be_a_list_of_ones_and_zeros():
    labels, scores = [1, 0] * 20, np.arange(40.0)
    check_folds(labels)
    found, wanted = (ten_fold_accuracy(scores, one) for one in (labels, np.array(labels, bool)))
    assert found.values.tolist() == wanted.values.tolist()
    labels[-1] = -1
    for call in (lambda: check_folds(labels), lambda: ten_fold_accuracy(scores, labels)):
        with pytest.raises(ValueError, match="neither True nor False, 1 nor 0: -1"):
            call()


def test_tar_over_folds():
    scores, is_same = lfw_sized(pairs=2000, distance=3.0)
    figure = ten_fold_tar(scores, is_same, 0.01)
    for fold, test in enumerate(kfold(2000, 10)):
        train = np.setdiff1d(np.arange(2000), test)
        impostors = np.sort(scores[train][~is_same[train]])
        accepted = scores[test] > impostors[-10]  # 9 of 900 are allowed
        assert figure.values[fold] == accepted[is_same[test]].mean()
        assert figure.far[fold] == accepted[~is_same[test]].mean()
    assert figure.errors == round((1 - figure.values).sum() * 100)
    assert figure.rests_on == 10  # false accepts that 1 % of 1,000 impostor pairs allow
    assert figure.mark == "indicative"
    assert "FAR realised" in str(figure)
    narrow = ten_fold_tar(scores, is_same, 0.1)
    assert (narrow.rests_on, narrow.mark) == (min(100, narrow.errors), "measured")
    half = t.ppf(0.975, 9) * narrow.values.std(ddof=1) / np.sqrt(10)
    assert narrow.high - narrow.low == pytest.approx(2 * half)


def test_a_tar_of_few_false_accepts_is_as_uncertain_as_its_threshold():
    scores, is_same = lfw_sized(pairs=6000, distance=4.0)
    figure = ten_fold_tar(scores, is_same)
    assert (figure.rests_on, figure.mark) == (3, "indicative")
    impostors = np.sort(scores[~is_same])[::-1]
    # 3 false accepts of 3,000 may be 0.6 or 8.8 (Clopper-Pearson)
    assert figure.low == 0.0
    assert figure.high > (scores[is_same] > impostors[8]).mean()


def test_flip_fusion_moves_the_result():
    rng = np.random.default_rng(0)
    plain, mirrored = rng.normal(size=(2, 20, 8))
    scores = {how: pair_scores(plain, mirrored, how) for how in ("none", "sum", "concat")}
    for how, fused in (
        ("none", plain),
        ("sum", plain + mirrored),
        ("concat", np.hstack([plain, mirrored])),
    ):
        unit = fused / np.linalg.norm(fused, axis=1, keepdims=True)
        np.testing.assert_allclose(scores[how], (unit[0::2] * unit[1::2]).sum(1), atol=1e-6)
        assert scores[how].dtype == np.float32
    assert np.abs(scores["sum"] - scores["concat"]).max() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ten_fold_accuracy(np.zeros(3), np.zeros(4, bool)), "must be equal"),
        (lambda: ten_fold_accuracy(np.zeros(3), np.zeros(3, bool)), "10 folds of 3 pairs"),
        (lambda: ten_fold_accuracy(np.full(10, np.nan), np.ones(10, bool)), "pair 0 is nan"),
        (lambda: ten_fold_accuracy(np.zeros(10), np.ones(10, bool)), "both are needed"),
        (lambda: ten_fold_tar(np.arange(10.0), np.arange(10) < 5), "of one kind"),
        (lambda: flip_fusion(np.ones((2, 2)), how="F1"), "none, concat, sum"),
        (lambda: flip_fusion(np.ones((2, 2))), "mirrored"),
        (lambda: flip_fusion(np.ones((2, 2)), np.ones((2, 3))), "(2, 3)"),
        (lambda: pair_scores(np.ones((3, 2)), flip="none"), "do not make pairs"),
        (lambda: pair_scores(np.zeros((2, 2)), flip="none"), "row 0"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        call()
