"""Fusion: the optimum of the weighted cost, apart from development speakers, back from JSON."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from speechbrain_qmargin.scoring.fusion import Fusion, fit_fusion
from speechbrain_qmargin.scoring.metrics import eer, operating_points
from speechbrain_qmargin.trials import LabelledTrials, Trials


def simulated(seed=0, name="s", speakers=20):
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(speakers), 4)
    left, right = np.triu_indices(len(of), 1)
    same = of[left] == of[right]
    trials = LabelledTrials([f"{name}{i}/{j}" for j, i in enumerate(of)], left, right, same, "list")
    noise = rng.normal(size=(2, len(left)))
    return {"one": 0.1 * (noise[0] + 2 * same), "two": 5 * (noise[1] + 1.5 * same)}, trials


def test_it_is_the_optimum_of_the_weighted_cost():
    systems, trials = simulated()
    fusion = fit_fusion(systems, trials, p_target=0.05)
    matrix, same = np.stack([systems["one"], systems["two"]], axis=1), trials.is_target

    def cost(parameters):
        llr = matrix @ parameters[:2] + parameters[2] + math.log(0.05 / 0.95)
        return 0.05 * np.logaddexp(0, -llr[same]).mean() + 0.95 * np.logaddexp(0, llr[~same]).mean()

    found = np.array([*fusion.weights, fusion.offset])
    assert cost(found) <= minimize(cost, found, method="Nelder-Mead",
                                   options={"xatol": 1e-10, "fatol": 1e-16}).fun + 1e-9  # fmt: skip
    assert found == pytest.approx([20, 0.3, -3.1], rel=0.2)  # of Gaussians: difference / variance


def test_it_beats_each_system_on_other_speakers(tmp_path):
    fusion = fit_fusion(*simulated())
    fusion.save(tmp_path / "fusion.json")
    loaded = Fusion.load(tmp_path / "fusion.json")
    assert loaded == fusion
    systems, trials = simulated(1, "t")
    fused = loaded.apply(dict(reversed(systems.items())), trials)
    errors = [eer(operating_points(x, trials.is_target)) for x in (fused, *systems.values())]
    assert errors[0] < min(errors[1:])
    assert "s3" not in (tmp_path / "fusion.json").read_text()
    one = Fusion(["a", "b"], [2.0, -0.5], 1.0, 0.01, [], 100)
    other = replace(one, origins={"b": {"backend": "another"}})
    assert one.digest != other.digest
    assert str(one) == "log-likelihood ratio = 2 * a - 0.5 * b + 1"


def test_a_system_that_tells_nothing_adds_nothing():
    systems, trials = simulated()
    alone = fit_fusion({"one": systems["one"]}, trials)
    for value in (0.5, 0.7):  # whose mean over a list is itself, and is not
        same = np.full(len(trials), value)
        still = fit_fusion({"none": same, "one": systems["one"]}, trials)
        assert still.weights == [0, pytest.approx(alone.weights[0])]
        assert still.offset == pytest.approx(alone.offset)


def test_systems_that_separate_only_together_are_refused():
    systems, trials = simulated()
    both = {"one": systems["one"], "two": 3 * trials.is_target - systems["one"]}
    with pytest.raises(ValueError, match="separate targets and impostors entirely"):
        fit_fusion(both, trials)


def test_speakers_of_development_are_refused():
    systems, trials = simulated()
    fusion = fit_fusion(systems, trials)
    ids = [f"new{i}" for i in range(79)] + ["s4/1"]
    other = replace(trials, ids=[i if "/" in i else f"{i}/1" for i in ids])
    with pytest.raises(ValueError, match=r"fusion's development trials: 1 speakers .* too: s4\."):
        fusion.apply(systems, other)
    assert len(fusion.apply(systems, other, allow_shared_speakers=True)) == len(trials)


def test_recordings_of_development_in_any_model_are_refused():
    """Where nobody names the speakers, the second recording of a model is a recording too."""
    systems, trials = simulated()
    plain = replace(trials, ids=[name.replace("/", "-") for name in trials.ids])
    fusion = fit_fusion(systems, plain)
    given = ["m", "new"], np.array([0]), np.array([1])
    alone, held = (
        Trials(*given, models={"m": ("other", second)}) for second in ("another", plain.ids[5])
    )
    scores = {"one": np.zeros(1), "two": np.zeros(1)}
    with pytest.raises(ValueError, match="1 recordings are in trials too: s1-5"):
        fusion.apply(scores, held)
    with pytest.warns(UserWarning, match="whether they share speakers is not known"):
        fusion.apply(scores, alone)


def test_scores_of_another_origin_are_refused(tmp_path):
    systems, trials = simulated()
    cosine = {"kind": "cosine", "encoder": "5e11", "cohort": ""}
    fit_fusion(systems, trials, origins={"one": cosine, "two": {}}).save(tmp_path / "f.json")
    fusion, (others, unseen) = Fusion.load(tmp_path / "f.json"), simulated(1, "t")
    for origins in (None, {"one": cosine, "two": {"kind": "as-norm"}}, {"one": {}}):
        assert len(fusion.apply(others, unseen, origins=origins)) == len(unseen)
    with pytest.raises(ValueError, match="weight of one is for cosine scores, and these are as-no"):
        fusion.apply(others, unseen, origins={"one": {"kind": "as-norm"}})
    with pytest.raises(ValueError, match="of one is of the encoder 5e11, and this is ac1d"):
        fusion.apply(others, unseen, origins={"one": cosine | {"encoder": "ac1d"}})


def test_bad_input_is_named(tmp_path):
    systems, trials = simulated()
    fusion = fit_fusion(systems, trials)
    with pytest.raises(ValueError, match="fitted on one, two; got one"):
        fusion.apply({"one": systems["one"]}, trials)
    for broken in (replace(fusion, offset=math.nan), replace(fusion, weights=[1.0])):
        broken.save(tmp_path / "broken.json")
        with pytest.raises(ValueError, match=r"broken\.json: not a fusion file"):
            Fusion.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="no systems"):
        fit_fusion({}, trials)
    with pytest.raises(ValueError, match="no labels"):
        fit_fusion(systems, Trials(trials.ids, trials.enrolment, trials.test))
    with pytest.raises(ValueError, match=r"two: 3160 trials and scores \(2,\)"):
        fit_fusion(systems | {"two": np.zeros(2)}, trials)
    broken = systems["two"].copy()
    broken[1] = np.nan
    with pytest.raises(ValueError, match="two: the score of s0/0 s0/2 is nan"):
        fit_fusion(systems | {"two": broken}, trials)
    # together they tell all apart, neither does alone
    apart = {"one": systems["one"], "two": systems["one"] - 0.9 * trials.is_target}
    with pytest.raises(ValueError, match="separate targets and impostors entirely"):
        fit_fusion(apart, trials)
    record = json.loads(json.dumps({"format": "speechbrain_qmargin fusion 1"}))
    (tmp_path / "f.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="not a fusion file"):
        Fusion.load(tmp_path / "f.json")
    replace(fusion, weights=[1.0]).save(tmp_path / "f.json")
    with pytest.raises(ValueError, match="weights and systems disagree"):
        Fusion.load(tmp_path / "f.json")
