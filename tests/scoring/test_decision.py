"""The operating point that a service loads."""

import json
from dataclasses import replace

import numpy as np
import pytest

from speechbrain_qmargin.scoring.decision import (
    OperatingPoint,
    choose_operating_point,
    clear_threshold,
    recordings_enrolled,
)
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.scoring.report import evaluate
from speechbrain_qmargin.scoring.separation import refuse_shared, refuse_tested, speaker_digests
from speechbrain_qmargin.scoring.uncertainty import Spread
from speechbrain_qmargin.trials import LabelledTrials, Trials


def points_of(seed, count=5000):
    rng = np.random.default_rng(seed)
    is_target = rng.random(count) < 0.1
    scores = (rng.normal(size=count) + 3 * is_target).astype(np.float32)
    return operating_points(scores, is_target), scores, is_target


def test_it_decides_as_it_counted(tmp_path):
    points, scores, is_target = points_of(0)
    choose_operating_point("a", points, 0.01, measured_on="list sha256:0").save(tmp_path / "p.json")
    point = OperatingPoint.load(tmp_path / "p.json")
    accepted = np.array([point.accepts(score) for score in scores.tolist()])
    assert point.false_accepts == np.count_nonzero(accepted & ~is_target)
    assert point.misses == np.count_nonzero(~accepted & is_target)
    assert point.far <= 0.01
    assert point.accepts(point.threshold)
    assert point.optimistic
    assert point.chosen_on == point.measured_on == "list sha256:0"
    for bad in (float("nan"), float("inf"), -float("inf"), "0.5", None, True):
        with pytest.raises(ValueError, match="no decision can rest on it"):
            point.accepts(bad)


def test_a_threshold_of_development_scores_is_not_optimistic():
    (points, *_), (development, *_) = points_of(1), points_of(2)
    point = choose_operating_point("a", points, 0.01, development=development, chosen_on="dev")
    assert not point.optimistic
    assert point.chosen_on == "dev"
    assert point.far_interval is point.tar_interval is None
    misses, false_accepts = points.errors_at(point.threshold)
    assert (point.misses, point.false_accepts) == (misses, false_accepts)


def test_a_far_that_the_data_cannot_show_is_marked():
    assert choose_operating_point("a", points_of(3)[0], 1e-4).mark == "unsupported"


def test_another_file_is_refused(tmp_path):
    choose_operating_point("a", points_of(4)[0], 0.01).save(tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    broken = [{}, content | {"format": "x"}, content | {"threshold": float("nan")}]
    broken += [content | {"threshold": x} for x in ("0.5", None, True, float("inf"))]
    broken += [content | {"misses": -1}, content | {"far": "0"}]
    for value in [*broken, content | {"more": 1}, "[" * 20_000]:
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json: not an operating point"):
            OperatingPoint.load(tmp_path / "bad.json")


@pytest.mark.parametrize("seed", range(20))
def test_a_threshold_keeps_its_far_however_scores_are_rounded(seed):
    """Float32 scores, their shortest text, and what that reads as: three numbers, one decision."""
    rng = np.random.default_rng(seed)
    for far in (0.1, 0.01, 0.002):
        is_target = rng.random(1000) < 0.2
        scores = (0.2 * rng.normal(size=1000) + 0.5 * is_target).astype(np.float32)
        if seed % 2:
            scores = scores.round(2)  # ties
        read = np.array([float(str(score)) for score in scores])
        for given, other in ((read, scores), (scores, read)):
            points = operating_points(given, is_target)
            point = choose_operating_point("a", points, far)
            for applied in (given, other, other.astype(float), given.astype(np.float32)):
                accepted = np.array([point.accepts(score) for score in applied])
                assert (accepted & ~is_target).sum() <= far * (~is_target).sum()
                assert (accepted & ~is_target).sum() == point.false_accepts
                assert (~accepted & is_target).sum() == point.misses


def test_scores_that_float32_makes_one_are_rejected_together():
    scores = np.array([0.1, float(np.float32(0.1)), 0.5])  # the second is higher by 1.5e-9
    points = operating_points(scores, np.array([False, True, True]))
    threshold = clear_threshold(points, scores[1])
    assert scores[1] < threshold < 0.1000001
    assert clear_threshold(points, np.inf) > 0.5
    scores = np.array([float(np.float32(0.1)), float(np.float32(0.1)) + 3e-9, 0.5])
    threshold = clear_threshold(operating_points(scores, np.array([False, True, True])), scores[1])
    assert scores[1] < threshold < 0.1000001


def test_a_threshold_between_neighbouring_numbers_parts_them():
    """Half-way between two of float32, which makes these two of them; nothing is between."""
    low = 1 + 2.0**-24
    high = np.nextafter(low, 2)
    assert np.float32(low) < np.float32(high)
    points = operating_points(np.array([low, high]), np.array([False, True]))
    threshold = clear_threshold(points, high)
    assert low < threshold <= high
    assert np.float32(low) < threshold <= np.float32(high)


def test_a_model_is_of_as_many_recordings_as_the_median():
    models = {"a": ("1", "2", "3"), "b": ("4",), "c": ("5", "6", "7", "8", "9")}
    ids = [*models, "t"]
    trials = Trials(ids, np.array([0, 1, 1, 1, 2]), np.full(5, 3), models=models)
    assert recordings_enrolled(trials) == 3
    assert recordings_enrolled(Trials(["x", "y"], np.array([0]), np.array([1]))) == 1


def test_another_kind_of_score_is_refused():
    point = choose_operating_point("a", points_of(0)[0], 0.01, kind="cosine")
    assert point.accepts(5.0, kind="cosine")
    assert point.accepts(5.0)
    with pytest.raises(ValueError, match="the threshold is for cosine scores, and these are as-n"):
        point.accepts(5.0, kind="as-norm")


def test_what_it_promises_has_the_intervals_of_its_list():
    test, development = list_of("abcdefgh"), list_of("ijklmnop")
    rng = np.random.default_rng(0)
    scores, dev = (rng.normal(size=len(x)) + 2 * x.is_target for x in (test, development))
    points = operating_points(scores, test.is_target)
    spread = Spread(scores, test, points)
    known = {"spread": spread, "encoder": "e", "cohort": "c", "kind": "as-norm"}
    point = choose_operating_point(
        "a", points, 0.1, development=operating_points(dev, development.is_target), **known
    )
    rates = spread.rates_at(point.threshold)
    low, high = rates.frr_interval
    assert point.far_interval == rates.far_interval
    assert point.tar_interval == (1 - high, 1 - low)
    assert "interval" in point.promise()
    same = choose_operating_point("a", points, 0.1, **known)
    assert same.far_interval is None
    assert same.tar_interval == spread.tar_at_far(0.1).interval(same.tar)
    assert "optimistic" in same.promise()


def test_another_encoder_or_cohort_is_refused():
    point = choose_operating_point("a", points_of(0)[0], 0.01, encoder="e" * 64, cohort="c")
    assert point.accepts(5.0, encoder="e" * 64)
    with pytest.raises(ValueError, match="of the encoder eeeeeeeeeeeeeeee, and this is f"):
        point.accepts(5.0, encoder="f")
    with pytest.raises(ValueError, match="of the cohort c, and this is d"):
        point.refuse_other(cohort="d")
    with pytest.raises(TypeError, match="'encodr' tells no origin of scores; kind, encoder, "):
        point.accepts(5.0, encodr="f")


@pytest.mark.parametrize("bad", ["0.5", None, True, float("nan"), float("inf"), [0.5]])
def test_a_threshold_is_a_finite_number(bad):
    with pytest.raises(ValueError, match=r"the threshold is .*, not a finite number"):
        replace(choose_operating_point("a", points_of(0)[0], 0.01), threshold=bad)


def list_of(names, source="list"):
    ids = [f"{name}/{take}" for name in names for take in range(2)]
    left, right = np.triu_indices(len(ids), 1)
    return LabelledTrials(ids, left, right, left // 2 == right // 2, source)


def test_development_that_has_seen_the_test_speakers_is_refused():
    test = list_of("abc", "test sha256:0")
    assert refuse_shared(test, list_of("def")) == ""
    with pytest.raises(ValueError, match="development trials: 1 speakers are in test too: c"):
        refuse_shared(test, list_of("cde"))
    with pytest.raises(ValueError, match="3 speakers are in test too: a, b, c"):
        refuse_shared(test, speaker_digests(test))
    unknown = LabelledTrials(["x", "y"], np.array([0]), np.array([1]), np.array([True]), "dev")
    assert "whether they share speakers is not known" in refuse_shared(test, unknown)
    with pytest.raises(ValueError, match="2 recordings are in dev too: x, y"):
        refuse_shared(unknown, unknown)
    with pytest.raises(ValueError, match="2 recordings are in dev too: x, y"):
        refuse_shared(unknown, replace(unknown, ids=["x.wav", "y.wav"]))
    point = choose_operating_point(
        "a", points_of(0)[0], 0.01, development=points_of(1)[0], apart=False
    )
    assert point.optimistic


@pytest.mark.filterwarnings("ignore:the EER of")
@pytest.mark.parametrize(("distance", "tar"), [(20, 1), (-20, 0)])
def test_no_misses_or_no_hits_do_not_make_an_interval_without_width(distance, tar):
    """Nor a rate that rests on them anything but unsupported, as in the table of figures."""
    trials = list_of([f"s{n}" for n in range(12)])
    rng = np.random.default_rng(0)
    scores = rng.normal(size=len(trials)) + distance * trials.is_target
    report = evaluate(scores, trials, fars=[0.05])
    point = choose_operating_point("a", report.points, 0.05, spread=report.spread, speakers=12)
    figure = report["tar_at_far", 0.05]
    assert point.tar == tar
    assert point.tar_interval == (figure.low, figure.high)
    end = 0.025 ** (1 / 12)  # Clopper-Pearson of none of 12
    assert point.tar_interval == pytest.approx((end, 1) if tar else (0, 1 - end))
    assert point.mark == figure.mark == "unsupported"


def test_a_threshold_that_accepts_next_to_nobody_is_not_measured():
    points, scores, is_target = points_of(5)
    scores[is_target] = -20
    scores[np.flatnonzero(is_target)[:2]] = 20
    few = operating_points(scores, is_target)
    for development in (None, points):
        point = choose_operating_point("a", few, 0.05, development=development, speakers=100)
        assert few.num_targets - point.misses == 2
        assert point.mark == "unsupported"


def test_few_false_accepts_of_the_test_do_not_measure_a_threshold_of_development():
    points, scores, is_target = points_of(5)
    scores[~is_target] -= 20
    scores[np.flatnonzero(~is_target)[:2]] += 25
    few = operating_points(scores, is_target)
    point = choose_operating_point("a", few, 0.05, development=points, speakers=100)
    assert (point.false_accepts, point.mark) == (2, "unsupported")
    assert point.misses >= 30
    assert choose_operating_point("a", points, 0.05, development=points, speakers=100).mark == (
        "measured"
    )


def test_validation_on_the_test_is_seen_by_its_trials():
    def listed(*pairs, source="test.txt"):
        ids = sorted({name for pair in pairs for name in pair})
        sides = np.array([[ids.index(name) for name in pair] for pair in pairs])
        return Trials(ids, sides[:, 0], sides[:, 1], source=source)

    test = listed(("a/1", "a/2"), ("a/1", "b/1"), ("b/1", "c/1"))
    again = listed(("c/1", "b/1"), ("a/2", "a/1"), ("a/1", "b/1"), ("b/1", "a/1"))
    for validation, said in (
        (again, r"its 3 trials are those of test\.txt, which is tested on"),
        (listed(("a/2", "a/1")), r"its 1 trials are all in test\.txt"),
        (listed(*[(f"{n}/1", f"{n}/2") for n in "abc"], ("a/1", "b/1"), ("b/1", "c/1")),
         r"its 5 trials are more than all of test\.txt"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            refuse_tested(test, validation)
    some = refuse_tested(test, listed(("a/1", "a/2"), ("d/1", "e/1")))
    assert "valid_file: 1 of its 2 trials are in test.txt too" in some
    people = refuse_tested(test, listed(("b/7", "d/1"), ("c/8", "e/1")))
    assert "valid_file: 2 speakers (b, c) are in test.txt too" in people
    assert refuse_tested(test, listed(("d/1", "e/1"))) == ""
