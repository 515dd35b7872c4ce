"""Intervals, badges and the DET plot."""

import json

import numpy as np
import pytest
from scipy.stats import beta

from speechbrain_qmargin.scoring.metrics import eer, min_dcf, operating_points, tar_at_far
from speechbrain_qmargin.scoring.report import badge, evaluate, plot_det
from speechbrain_qmargin.scoring.trials import Trials


def simulated(num_speakers=30, per_speaker=4, seed=0, distance=3.0):
    """Every pair of utterances, scores with an effect of each speaker."""
    rng = np.random.default_rng(seed)
    speaker = np.repeat(np.arange(num_speakers), per_speaker)
    enrolment, test = np.triu_indices(len(speaker), 1)
    is_target = speaker[enrolment] == speaker[test]
    effect = 0.3 * rng.normal(size=num_speakers)
    scores = effect[speaker[enrolment]] + effect[speaker[test]] + rng.normal(size=len(test))
    ids = [f"s{i:02}/u{j}" for j, i in enumerate(speaker)]
    return scores + distance * is_target, Trials(ids, enrolment, test, is_target)


def test_badges_follow_the_rule_of_30():
    assert [badge(n) for n in (30, 29, 3, 2, 0)] == [
        "measured",
        "indicative",
        "indicative",
        "unsupported",
        "unsupported",
    ]


def test_a_report_gives_the_plain_metrics_within_their_intervals():
    scores, trials = simulated()
    report = evaluate(scores, trials, replicates=200)
    points = operating_points(scores, trials.is_target)
    assert report["EER"].value == eer(points)
    assert report["minDCF(p=0.01)"].value == min_dcf(points)
    assert report["TAR@FAR=0.01"].value == tar_at_far(points, 0.01)[0]
    assert report["TAR@FAR=0.01"].threshold == tar_at_far(points, 0.01)[1]
    for figure in report.figures:
        assert figure.low <= figure.value <= figure.high
        assert figure.low < figure.high
    assert (report.num_targets, report.num_speakers) == (30 * 6, 30)
    assert json.loads(json.dumps(report.to_dict()))["figures"]["EER"]["support"]
    assert "95 % interval" in report.table()


def test_the_same_seed_gives_the_same_intervals():
    scores, trials = simulated()
    first, again = (evaluate(scores, trials, replicates=50, seed=3) for _ in range(2))
    assert first == again


def test_few_errors_widen_the_interval_and_are_marked():
    scores, trials = simulated(num_speakers=6, distance=20.0)
    report = evaluate(scores, trials, fars=(1e-1, 1e-3), replicates=50)
    figure = report["TAR@FAR=0.001"]
    assert figure.support == "unsupported"
    targets = report.num_targets
    assert figure.value == figure.high == 1
    # no false accept is allowed, so nothing bounds the FAR of the threshold from below
    assert figure.low == 0
    assert report["EER"].support == "unsupported"
    assert beta.ppf(0.025, targets, 1) < 1


def test_det_plots_are_written_whole(tmp_path):
    scores, trials = simulated()
    systems = {"cosine": (scores, trials.is_target), "better": (scores, trials.is_target)}
    plot_det(systems, tmp_path / "a" / "det.png", title="a title")
    plot_det(systems, tmp_path / "det.svg")
    assert (tmp_path / "a" / "det.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "det.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "det.svg"]


def test_systems_without_errors_can_be_drawn(tmp_path):
    scores = np.arange(8.0)
    plot_det({"perfect": (scores, scores > 3)}, tmp_path / "det.png")
    with pytest.raises(ValueError, match="both are needed"):
        plot_det({"none": (scores, scores > 9)}, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()
