"""The operating point that a service loads."""

import json

import numpy as np
import pytest

from speechbrain_qmargin.scoring.decision import OperatingPoint, choose_operating_point
from speechbrain_qmargin.scoring.metrics import operating_points


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
    assert point.optimistic
    assert point.chosen_on == point.measured_on == "list sha256:0"
    with pytest.raises(ValueError, match="NaN"):
        point.accepts(float("nan"))


def test_a_threshold_of_development_scores_is_not_optimistic():
    (points, *_), (development, *_) = points_of(1), points_of(2)
    point = choose_operating_point("a", points, 0.01, development=development, chosen_on="dev")
    assert not point.optimistic
    assert point.chosen_on == "dev"
    misses, false_accepts = points.errors_at(point.threshold)
    assert (point.misses, point.false_accepts) == (misses, false_accepts)


def test_a_far_that_the_data_cannot_show_is_marked():
    assert choose_operating_point("a", points_of(3)[0], 1e-4).support == "unsupported"


def test_another_file_is_refused(tmp_path):
    choose_operating_point("a", points_of(4)[0], 0.01).save(tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    broken = [{}, content | {"format": "x"}, content | {"threshold": float("nan")}]
    for value in [*broken, content | {"more": 1}]:
        (tmp_path / "bad.json").write_text(json.dumps(value))
        with pytest.raises(ValueError, match=r"bad\.json: not an operating point"):
            OperatingPoint.load(tmp_path / "bad.json")
