"""Calibration: it calibrates, is the optimum, comes back from JSON, is never fitted on its test."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from speechbrain_qmargin.scoring.calibration import (
    Calibration,
    fit_calibration,
    fit_log_odds,
)
from speechbrain_qmargin.scoring.fusion import fit_fusion
from speechbrain_qmargin.scoring.metrics import cllr, eer, min_cllr, operating_points
from speechbrain_qmargin.trials import LabelledTrials


def simulated(seed, name="u", count=4000):
    """Gaussian cosines whose log likelihood ratio is known: 40 * score - 8."""
    rng = np.random.default_rng(seed)
    ids = [f"{name}{i}" for i in range(count + 1)]
    is_target = rng.random(count) < 0.3
    trials = LabelledTrials(ids, np.arange(count), np.full(count, count), is_target)
    return rng.normal(np.where(is_target, 0.3, 0.1), math.sqrt(0.005)), trials


@pytest.mark.filterwarnings("ignore:.*whether they share speakers is not known")
def test_it_finds_the_true_ratio_and_calibrates_new_scores():
    scores, trials = simulated(0)
    calibration = fit_calibration(scores, trials, p_target=0.3)
    assert calibration.weights[0] == pytest.approx(40, rel=0.1)
    assert calibration.offset == pytest.approx(-8, rel=0.15)
    new, new_trials = simulated(1, "v")
    points = operating_points(calibration.apply(new, new_trials), new_trials.is_target)
    assert cllr(points) < min_cllr(points) + 0.02
    assert eer(points) == eer(operating_points(new, new_trials.is_target))


def test_it_is_the_optimum_of_the_weighted_cost():
    scores, trials = simulated(2, count=500)
    calibration = fit_calibration(scores, trials, p_target=0.05)
    shift = math.log(0.05 / 0.95)

    def cost(parameters):
        llr = parameters[0] * scores + parameters[1] + shift
        return (
            0.05 * np.logaddexp(0, -llr[trials.is_target]).mean()
            + 0.95 * np.logaddexp(0, llr[~trials.is_target]).mean()
        )

    best = minimize(
        cost, [30.0, -5.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15}
    )
    found = cost([calibration.weights[0], calibration.offset])
    assert found <= best.fun + 1e-9
    weights, offset = fit_log_odds(scores[:, None], trials.is_target.astype(int), 0.05)
    assert [*weights, offset] == [*calibration.weights, calibration.offset]


@pytest.mark.parametrize("p_target", [1e-9, 1e-4, 0.5, 1 - 1e-6])
def test_it_converges_at_every_prior(p_target):
    """At the optimum both classes' pulls on the offset and on the weight are even."""
    scores, trials = simulated(3, count=600)
    calibration = fit_calibration(scores, trials, p_target=p_target)
    llr = calibration.weights[0] * scores + calibration.offset
    pulls = expit(np.where(trials.is_target, -1, 1) * (llr + math.log(p_target / (1 - p_target))))
    for values in (pulls, pulls * scores):
        targets = p_target * values[trials.is_target].mean()
        impostors = (1 - p_target) * values[~trials.is_target].mean()
        assert targets == pytest.approx(impostors, rel=1e-6)


@pytest.mark.filterwarnings("ignore:both. of")
def test_distinct_pairs_are_what_is_fitted():
    """A list of both orders, with every recording against itself, whose score is the highest."""
    scores, trials = of_speakers("abcdefgh", 4)
    itself = np.arange(len(trials.ids))
    both = LabelledTrials(
        trials.ids,
        np.concatenate((trials.enrolment, trials.test[:99], itself)),
        np.concatenate((trials.test, trials.enrolment[:99], itself)),
        np.concatenate((trials.is_target, trials.is_target[:99], itself >= 0)),
        "both",
    )
    again = np.concatenate((scores, scores[:99], np.full(len(itself), 9.0)))
    found, wanted = fit_calibration(again, both), fit_calibration(scores, trials)
    assert (found.weights, found.offset) == (wanted.weights, wanted.offset)
    assert found.num_trials == wanted.num_trials == len(trials)
    fused, alone = fit_fusion({"a": again}, both), fit_fusion({"a": scores}, trials)
    assert (fused.weights, fused.offset) == (alone.weights, alone.offset)
    with pytest.raises(ValueError, match=rf"{len(both)} trials and scores \({len(trials)},\)"):
        fit_calibration(scores, both)


@pytest.mark.filterwarnings("ignore:.*whether they share speakers is not known")
def test_quality_measures_help_where_they_matter():
    scores, trials = simulated(3)
    rng = np.random.default_rng(0)
    noise = {
        name: float(value) for name, value in zip(trials.ids, rng.normal(size=4001), strict=True)
    }
    worse = scores + 0.1 * np.array([noise[trials.ids[i]] for i in trials.enrolment])
    plain = fit_calibration(worse, trials)
    aware = fit_calibration(worse, trials, {"noise": noise})
    assert aware.qualities == ["noise"]
    costs = [
        min_cllr(operating_points(c.apply(worse, trials, q, allow_same=True), trials.is_target))
        for c, q in ((plain, None), (aware, {"noise": noise}))
    ]
    assert costs[1] < costs[0] - 0.05
    with pytest.raises(ValueError, match="needs the quality measures noise"):
        aware.apply(*simulated(4, "v"))
    with pytest.raises(ValueError, match="4001 recordings have no noise, the first: v0"):
        aware.apply(*simulated(4, "v"), {"noise": noise})


def test_a_measure_counts_by_the_lower_and_the_higher_of_both_sides():
    """That of an enrolment model is the mean over its recordings."""
    sides = np.array([0, 0, 3]), np.array([1, 2, 1])
    trials = LabelledTrials(["m", "a", "b", "c"], *sides, np.zeros(3, bool))
    trials = trials.with_models({"m": ("d", "e"), "c": ("c",)})
    noise = {"a": 1.0, "b": 9.0, "c": 5.0, "d": 2.0, "e": 4.0}
    calibration = Calibration(["noise"], [2.0, 10.0, 100.0], 0.5, 0.01, "", 9)
    assert calibration.terms == [("score", 2.0), ("lower noise", 10.0), ("higher noise", 100.0)]
    found = calibration.apply(np.array([0.1, 0.2, 0.3]), trials, {"noise": noise}, allow_same=True)
    assert found == pytest.approx(
        [0.2 + 10 + 300 + 0.5, 0.4 + 30 + 900 + 0.5, 0.6 + 10 + 500 + 0.5]
    )


def test_what_its_ratios_come_from_is_in_its_digest():
    one = Calibration([], [2.0], 0.5, 0.01, "", 9)
    others = [replace(one, **x) for x in ({"weights": [3.0]}, {"offset": 0.6}, {"backend": "b"})]
    assert len({each.digest for each in (one, *others)}) == 4
    assert replace(one, fitted_on="elsewhere").digest == one.digest


def test_it_comes_back_from_json(tmp_path):
    scores, trials = simulated(5)
    calibration = fit_calibration(scores, trials)
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    content = json.loads((tmp_path / "c.json").read_text())
    for broken in ({}, content | {"format": "x"}, content | {"weights": []}):
        (tmp_path / "bad.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=r"bad\.json: not a calibration file"):
            Calibration.load(tmp_path / "bad.json")


def test_what_cannot_be_calibrated_is_refused():
    scores, trials = simulated(6)
    calibration = fit_calibration(scores, trials)
    order = np.random.default_rng(0).permutation(len(scores))
    shuffled = LabelledTrials(
        trials.ids, trials.enrolment[order], trials.test[order], trials.is_target[order]
    )
    with pytest.raises(ValueError, match="very trials the calibration was fitted on"):
        calibration.apply(scores[order], shuffled)
    with pytest.raises(ValueError, match="separate targets and impostors entirely"):
        fit_calibration(scores + 9 * trials.is_target, trials)
    # no target is below an impostor, and one value is of both: the weight still has no maximum
    touching = np.where(trials.is_target, np.maximum(scores, 0.2), np.minimum(scores, 0.2))
    assert np.count_nonzero(touching[trials.is_target] == 0.2) > 9
    with pytest.raises(ValueError, match="but for ties"):
        fit_calibration(touching, trials)
    with pytest.raises(ValueError, match="negate scores that are distances: these are lower"):
        fit_calibration(-scores - 9 * trials.is_target, trials)
    with pytest.raises(ValueError, match="all equal: they tell nothing"):
        fit_calibration(np.full(len(scores), 0.5), trials)
    with pytest.raises(ValueError, match=r"p_target must be in \(0, 1\), got 0"):
        fit_calibration(scores, trials, p_target=0)
    none = LabelledTrials(trials.ids, trials.enrolment, trials.test, np.zeros(4000, bool))
    with pytest.raises(ValueError, match="needs target and impostor trials"):
        fit_calibration(scores, none)


def of_speakers(letters, seed, sign=1):
    ids = [f"{name}/{take}" for name in letters for take in range(4)]
    left, right = np.triu_indices(len(ids), 1)
    trials = LabelledTrials(ids, left, right, left // 4 == right // 4, letters)
    noise = np.random.default_rng(seed).normal(size=len(trials))
    return sign * (noise + 1.5 * trials.is_target), trials


def test_speakers_and_kinds_are_kept_apart():
    scores, trials = of_speakers("abcdef", 0)
    calibration = fit_calibration(scores, trials, kind="as-norm")
    other, others = of_speakers("ghijkl", 1)
    assert np.isfinite(calibration.apply(other, others, kind="as-norm")).all()
    with pytest.raises(ValueError, match="for as-norm scores, and these are cosine scores"):
        calibration.apply(other, others, kind="cosine")
    some, mixed = of_speakers("fghijk", 2)
    with pytest.raises(ValueError, match=r"1 speakers are in fghijk too: f\. Figures on fghijk"):
        calibration.apply(some, mixed)
    assert len(calibration.apply(some, mixed, allow_same=True)) == len(mixed)
    assert "a" not in calibration.speakers


def test_distances_and_broken_calibrations_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Negate scores that are distances"):
        fit_calibration(*of_speakers("abcdef", 0, sign=-1))
    scores, trials = of_speakers("abcdef", 0)
    calibration = fit_calibration(scores, trials)
    calibration.save(tmp_path / "c.json")
    broken = [("weights", [value]) for value in (float("inf"), -1.0, 0.0)]
    for key, value in (("offset", float("nan")), *broken):
        content = json.loads((tmp_path / "c.json").read_text()) | {key: value}
        (tmp_path / "bad.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"bad\.json: not a calibration file"):
            Calibration.load(tmp_path / "bad.json")
    other, others = of_speakers("ghijkl", 1)
    other[3] = np.nan
    with pytest.raises(ValueError, match=r"the score of g/0 h/0 is nan"):
        calibration.apply(other, others)
    with pytest.raises(ValueError, match=r"\d+ trials and scores \(\d+,\)"):
        calibration.apply(np.append(other[4:], [0.0] * 5 + [np.nan]), others)
