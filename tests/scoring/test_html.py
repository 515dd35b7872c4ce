"""The report page: self-contained, complete, escaped; the zoo counts right."""

import json
import re

import numpy as np
import pytest

from speechbrain_qmargin.scoring.html import worst_speakers, worst_trials, write_report
from speechbrain_qmargin.scoring.report import compare, evaluate
from speechbrain_qmargin.trials import LabelledTrials


def simulated(seed=0, num_speakers=20, source="list sha256:0"):
    rng = np.random.default_rng(seed)
    speaker = np.repeat(np.arange(num_speakers), 4)
    left, right = np.triu_indices(len(speaker), 1)
    same = speaker[left] == speaker[right]
    effect = 0.3 * rng.normal(size=num_speakers)
    scores = effect[speaker[left]] + effect[speaker[right]] + rng.normal(size=len(left)) + 3 * same
    ids = [f"s{i:02}/u{j}" for j, i in enumerate(speaker)]
    return scores, LabelledTrials(ids, left, right, same, source)


def test_the_page_needs_no_network_and_holds_everything(tmp_path):
    scores, trials = simulated()
    rng = np.random.default_rng(1)
    systems = {"<b>cosine</b>": scores, "worse": scores + rng.normal(size=len(scores))}
    development = {"worse": simulated(5, source="dev")}
    done = []
    reports = write_report(
        tmp_path,
        systems,
        trials,
        title="A & B",
        development=development,
        progress=done.append,
    )
    assert sum(done) == 2
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "url(" not in page
    assert "A &amp; B" in page
    assert "<b>cosine</b>" not in page
    for name in ("det.png", "det.svg", "histogram_1.png", "histogram_2.png", "calibration.png"):
        assert (tmp_path / name).stat().st_size > 1000
    for text in ("Optimistic", "Chosen on dev", "unsupported", "TAR@FAR=1e-06", "trials alone"):
        assert text in page
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["systems"]["worse"]["figures"]["EER"]["value"] == reports["worse"]["eer"].value
    figures = {d["name"]: d for d in content["differences"][0]["figures"]}
    assert figures["EER"]["low"] > 0
    assert content["operating_points"]["worse"]["optimistic"] is False


def test_the_zoo_counts_every_speakers_errors():
    scores, trials = simulated(2)
    speakers, names = trials.speakers(), sorted({name.split("/")[0] for name in trials.ids})
    found = worst_speakers(scores, trials, 1.0, count=100)
    assert found
    for row in found:
        of = names.index(row["speaker"])
        sides = [speakers[trials.enrolment] == of, speakers[trials.test] == of]
        target = trials.is_target & sides[0]
        assert row["targets"] == target.sum()
        assert row["misses"] == (target & (scores < 1.0)).sum()
        impostor = ~trials.is_target & (sides[0] | sides[1])
        assert row["impostors"] == impostor.sum()
        assert row["false_accepts"] == (impostor & (scores >= 1.0)).sum()
    worst = worst_trials(scores, trials, 3)
    assert worst["impostors"][0]["score"] == scores[~trials.is_target].max()
    assert worst["targets"][0]["score"] == scores[trials.is_target].min()
    assert len(worst["targets"]) == 3


def test_differences_are_paired():
    scores, trials = simulated(3)
    first = evaluate(scores, trials)
    assert all(d.value == d.low == d.high == 0 for d in compare(first, first))
    # a strictly increasing map changes no error rate; apart, both intervals are wide
    other = evaluate(np.exp(scores), trials)
    assert all(abs(d.high - d.low) < 1e-6 for d in compare(first, other))
    fewer = trials.is_target | (np.arange(len(scores)) % 2 == 0)
    chosen = LabelledTrials(
        trials.ids, trials.enrolment[fewer], trials.test[fewer], trials.is_target[fewer]
    )
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(first, evaluate(scores[fewer], chosen))
    assert first["eer"].high - first["eer"].low > 0.005
