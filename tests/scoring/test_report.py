"""Intervals, marks and the DET plot."""

import json

import numpy as np
import pytest
from scipy.stats import beta

from speechbrain_qmargin.scoring.metrics import (
    act_dcf,
    eer,
    min_dcf,
    operating_points,
    tar_at_far,
)
from speechbrain_qmargin.scoring.plots import det_figure, save_figure
from speechbrain_qmargin.scoring.report import evaluate
from speechbrain_qmargin.scoring.uncertainty import mark_of, rate_interval
from speechbrain_qmargin.trials import LabelledTrials


def simulated(num_speakers=30, per_speaker=4, seed=0, distance=3.0):
    """Every pair of utterances, scores with an effect of each speaker."""
    rng = np.random.default_rng(seed)
    speaker = np.repeat(np.arange(num_speakers), per_speaker)
    enrolment, test = np.triu_indices(len(speaker), 1)
    is_target = speaker[enrolment] == speaker[test]
    effect = 0.3 * rng.normal(size=num_speakers)
    scores = effect[speaker[enrolment]] + effect[speaker[test]] + rng.normal(size=len(test))
    ids = [f"s{i:02}/u{j}" for j, i in enumerate(speaker)]
    return scores + distance * is_target, LabelledTrials(ids, enrolment, test, is_target)


def test_badges_follow_the_rule_of_30():
    assert [mark_of(n) for n in (30, 29, 3, 2, 0)] == [
        "measured",
        "indicative",
        "indicative",
        "unsupported",
        "unsupported",
    ]


def test_a_report_gives_the_plain_metrics_within_their_intervals():
    scores, trials = simulated()
    report = evaluate(scores, trials)
    points = operating_points(scores, trials.is_target)
    assert report["eer"].value == eer(points)
    assert report["min_dcf"].value == min_dcf(points)
    assert report["tar_at_far", 0.01].value == tar_at_far(points, 0.01)[0]
    assert report["tar_at_far", 0.01].threshold == tar_at_far(points, 0.01)[1]
    for figure in report.figures:
        assert figure.low <= figure.value <= figure.high
        assert figure.low < figure.high
    assert (report.num_targets, report.num_speakers) == (30 * 6, 30)
    assert json.loads(json.dumps(report.to_dict()))["figures"]["EER"]["mark"]
    assert "95 % interval" in report.table()
    all_eers = evaluate(scores, trials, all_eers=True).table()  # which of the three is which
    assert "(step: at the nearest threshold, as SpeechBrain; nist: by the ROC" in all_eers


def test_the_same_scores_give_the_same_intervals():
    scores, trials = simulated()
    first, again = (evaluate(scores, trials) for _ in range(2))
    assert first.to_dict() == again.to_dict()


def test_intervals_of_a_rate():
    assert rate_interval(3, 50) == pytest.approx(
        (beta.ppf(0.025, 3, 48), beta.ppf(0.975, 4, 47)), abs=1e-9
    )


def test_calibrated_costs_have_their_interval_and_badge():
    scores, trials = simulated()
    report = evaluate(3 * scores - 4.5, trials, p_target=0.1, llr=True)
    figure = report["act_dcf"]
    assert figure.value == act_dcf(report.points, 0.1)
    assert figure.low < figure.value < figure.high
    assert figure.mark == mark_of(min(report.points.errors_at(figure.threshold)))
    assert report["cllr"].value >= report["min_cllr"].value
    assert report["cllr"].low < report["cllr"].value < report["cllr"].high


@pytest.mark.parametrize(("p_target", "c_miss"), [(0.5, 1e17), (1 - 1e-12, 1.0), (1e-100, 1.0)])
def test_costs_far_apart_have_their_figures(p_target, c_miss):
    """Also where the prior that would give them with costs of 1 rounds to 1."""
    scores, trials = simulated()
    report = evaluate(3 * scores - 4.5, trials, p_target=p_target, c_miss=c_miss, llr=True)
    points = report.points
    for kind in ("min_dcf", "act_dcf"):
        figure = report[kind]
        weights = (c_miss * p_target, 1 - p_target)
        rates = figure.misses / points.num_targets, figure.false_accepts / points.num_impostors
        cost = sum(w * rate for w, rate in zip(weights, rates, strict=True)) / min(weights)
        assert figure.value == pytest.approx(cost)
        assert np.isfinite([figure.low, figure.high]).all()


def test_few_errors_widen_the_interval_and_are_marked():
    scores, trials = simulated(num_speakers=6, distance=20.0)
    report = evaluate(scores, trials, fars=(1e-1, 1e-3))
    figure = report["tar_at_far", 0.001]
    assert figure.mark == "unsupported"
    targets = report.num_targets
    assert figure.value == figure.high == 1
    # no false accept is allowed, so nothing bounds the FAR of the threshold from below
    assert figure.low == 0
    assert report["eer"].mark == "unsupported"
    assert beta.ppf(0.025, targets, 1) < 1


def test_det_plots_are_written_whole(tmp_path):
    report = evaluate(*simulated())
    systems = {"cosine": (report.points, None), "better": (report.points, report.spread)}
    save_figure(det_figure(systems, title="a title"), tmp_path / "a" / "det.png")
    save_figure(det_figure(systems), tmp_path / "det.svg")
    assert (tmp_path / "a" / "det.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "det.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "det.svg"]


def test_systems_without_errors_can_be_drawn(tmp_path):
    scores = np.arange(8.0)
    perfect = operating_points(scores, scores > 3)
    save_figure(det_figure({"perfect": (perfect, None)}), tmp_path / "det.png")
    assert (tmp_path / "det.png").stat().st_size > 1000
