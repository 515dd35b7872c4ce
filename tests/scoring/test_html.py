"""The report page: self-contained, complete, escaped; the zoo counts right."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest

from speechbrain_qmargin.scoring.breakdown import breakdown
from speechbrain_qmargin.scoring.html import write_report
from speechbrain_qmargin.scoring.page import Provenance, in_points
from speechbrain_qmargin.scoring.report import Difference, compare, evaluate
from speechbrain_qmargin.scoring.worst import worst_speakers, worst_trials
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
    scores_dev, dev = simulated(5, source="dev")
    dev = replace(dev, ids=[f"dev{name}" for name in dev.ids])  # other speakers
    development = {"worse": (scores_dev, dev)}
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
    for text in ("Optimistic", "Chosen on dev", "unsupported", "points", "better"):
        assert text in page
    assert page.count("TAR@FAR=0.0001 to 1e-06") >= 2  # below the data's limit: one row
    assert '<th scope="row">TAR@FAR=1e-05' not in page
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


def test_every_system_has_its_own_file_and_hash(tmp_path):
    scores, trials = simulated()
    files = {"a": "a.tsv sha256:11", "b": "b.tsv sha256:22"}
    write_report(
        tmp_path,
        {"a": scores, "b": scores},
        trials,
        provenance=Provenance(
            command="qmargin report <x>",
            files=files,
            about={"b": {"encoder": "results/b"}},
            notes=["2 pairs are listed twice"],
        ),
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("<code>sha256:11</code>", "<code>sha256:22</code>", "list <code>sha256:0</code>",
                 "encoder: results/b", "qmargin report &lt;x&gt;", "2 pairs are listed twice",
                 "speechbrain_qmargin "):  # fmt: skip
        assert text in page
    made = json.loads((tmp_path / "report.json").read_text())["made"]
    assert made["files"] == files
    assert re.match(r"\d{4}-\d\d-\d\d ", made["date"])


def test_the_summary_says_what_the_intervals_allow(tmp_path):
    scores, trials = simulated(4, 40)
    worse = scores + 2 * np.random.default_rng(0).normal(size=len(scores))
    write_report(tmp_path, {"good": scores, "same": scores, "bad": worse}, trials)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    can, cannot = page.partition("What can be said")[2].partition("What cannot")[::2]
    cannot = cannot.partition("</div>")[0]
    assert "good is better than bad: EER by " in can
    assert "bad is better" not in page
    assert "Whether good and same differ in EER" in cannot
    assert "TAR@FAR=1e-05" in cannot
    assert "optimistic" in cannot


def test_why_a_threshold_is_optimistic_is_said_as_it_is(tmp_path):
    """Of development scores whose speakers nobody knows it is not that they are these scores."""
    scores, trials = simulated(1)
    other, dev = simulated(2, source="dev.txt sha256:1")
    dev = replace(dev, ids=[f"dev-{name.replace('/', '-')}" for name in dev.ids])
    write_report(tmp_path, {"a": scores, "b": scores}, trials, development={"a": (other, dev)})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    unknown = "chosen on dev.txt, whose speakers may be those that it is measured on"
    same = "chosen on the very scores that it is measured on"
    for name, doubt in (("a", unknown), ("b", same)):
        assert f"threshold of {name} would do on other trials: it is {doubt}" in page
        assert f"</span>: the threshold is {doubt}" in page
    points = json.loads((tmp_path / "report.json").read_text())["operating_points"]
    assert all(points[name]["optimistic"] for name in "ab")


def test_few_speakers_are_said(tmp_path):
    scores, trials = simulated(1, 6)
    write_report(tmp_path, {"a": scores}, trials)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The trials are of 6 speakers; with fewer than 8 nothing is called measured." in page


def test_groups_are_on_the_page(tmp_path):
    scores, trials = simulated(1)
    gender = {f"s{i:02}": "fm"[i % 2] for i in range(20)}
    write_report(tmp_path, {"a": scores}, trials, metadata={"gender": gender})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "a, by gender" in page
    assert "f × m" in page
    groups = json.loads((tmp_path / "report.json").read_text())["groups"]["a"][0]["groups"]
    assert [row["group"] for row in groups] == ["f", "f × m", "m"]


def test_every_interval_on_the_page_is_of_one_confidence_and_that_of_the_json(tmp_path):
    """The decision's and the groups' were 95 % whatever was asked for and said."""
    (scores, trials), (held_out, others) = simulated(1, 10), simulated(2, 10)
    others = replace(others, ids=[f"dev{name}" for name in others.ids], source="dev sha256:1")
    gender = {f"s{i:02}": "fm"[i % 2] for i in range(10)}
    systems = {"chosen elsewhere": scores, "chosen here": scores}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, systems, trials, metadata={"gender": gender}, confidence=0.8,
                     development={"chosen elsewhere": (held_out, others)})  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8").replace("&nbsp;", " ")
    content = json.loads((tmp_path / "report.json").read_text())
    assert "95 %" not in page
    assert "Bands are 80 % intervals" in page
    for name, point in content["operating_points"].items():
        assert point["confidence"] == 0.8
        low, high = (100 * end for end in point["tar_interval"])
        assert f"TAR {100 * point['tar']:.2f} % ({low:.2f} to {high:.2f} %)" in page
        if point["far_interval"]:
            low, high = (100 * end for end in point["far_interval"])
            assert f"FAR {100 * point['far']:.3g} % ({low:.3g} to {high:.3g} %)" in page
        else:
            assert name == "chosen here"
    point = content["operating_points"]["chosen here"]
    figure = content["systems"]["chosen here"]["figures"]["TAR@FAR=0.01"]
    assert point["tar_interval"] == [figure["low"], figure["high"]]
    table = content["groups"]["chosen here"][0]
    expected = breakdown(scores, trials, point["threshold"], gender, confidence=0.8)
    assert table["overall"]["fmr"]["high"] == expected.overall.fmr.high


def test_names_of_others_are_text_on_the_page(tmp_path):
    evil = '<script>alert("1")</script>\'"&'
    scores, trials = simulated(1, 10, f"{evil} sha256:0")
    ids = [f"{evil}{name}" for name in trials.ids]
    trials = replace(trials, ids=ids, speaker_of=trials.speaker_names())
    values = {name: evil + "ab"[n % 2] for n, name in enumerate(ids)}
    made = Provenance(command=evil, files={evil: evil}, about={evil: {evil: evil}}, notes=[evil])
    write_report(tmp_path, {evil: scores, "b": -scores}, trials, title=evil, provenance=made,
                 metadata={evil: values})  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert '"1"' not in page


def test_ratios_have_their_picture(tmp_path):
    scores, trials = simulated(1)
    write_report(tmp_path, {"a": 3 * scores - 4}, trials, llr=True)
    assert (tmp_path / "bayes_error.png").stat().st_size > 1000
    assert "over deciding without them" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_differences_are_in_points_with_their_direction():
    difference = Difference("tar_at_far", 0.01, "TAR@FAR=0.01", 0.012, 0.004, 0.02, "rate", True)
    assert in_points(difference) == "+1.20 points (+0.40 to +2.00)"
    assert in_points(Difference("min_dcf", 0.01, "x", 0.1, -0.1, 0.3, "cost")) == (
        "+0.100 (-0.100 to +0.300)"
    )
