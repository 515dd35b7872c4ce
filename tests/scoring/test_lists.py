"""Cohorts and the front end from files."""

import warnings

import numpy as np
import pytest

from speechbrain_qmargin.embeddings import Embeddings, cosine_scores, save_embeddings
from speechbrain_qmargin.scoring.lists import Cohort, score_files, score_lists
from speechbrain_qmargin.scoring.metrics import eer, operating_points
from speechbrain_qmargin.scoring.plots import det_figure, save_figure
from speechbrain_qmargin.trials import LabelledTrials, write_trials


def vectors(part, speakers, takes, seed=0):
    rng = np.random.default_rng(seed)
    voices = rng.normal(size=(speakers, 8))
    return {
        f"{part}{s}/{take}": voices[s] + 0.5 * rng.normal(size=8)
        for s in range(speakers)
        for take in range(takes)
    }


def test_the_mean_of_speakers_is_not_that_of_utterances():
    raw = vectors("c", 12, 3)
    whose = {name: name.split("/")[0] for name in raw}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cohort = Cohort.of(raw, whose)
    means = {
        one: np.mean([raw[name] for name in raw if whose[name] == one], axis=0)
        for one in cohort.speakers
    }
    itself = {name: name for name in means}
    with pytest.warns(UserWarning, match="one embedding a speaker: .*mean_vec"):
        Cohort.of(means, itself)
    given = Cohort.of(means, itself, mean=cohort.mean)
    assert given.entries.matrix == pytest.approx(cohort.entries.matrix, abs=1e-5)
    assert Cohort.of(means, itself, centre=False).mean is None
    utterances = Cohort.of(raw, whose, all_utterances=True)
    assert len(utterances.entries) == 36
    trials = LabelledTrials(["c3/0", "x/1"], np.array([0]), np.array([1]), np.array([False]))
    with pytest.raises(ValueError, match="1 speakers are in the cohort and in the trials: c3"):
        utterances.refuse_speakers_of([trials])


def test_a_cohort_is_told_by_all_that_its_scores_depend_on():
    raw = vectors("c", 12, 3)
    whose = {name: name.split("/")[0] for name in raw}
    rows = np.stack(list(raw.values()))

    def told(by="5e11", name="c.npz", speakers=whose, **options):
        cohort = Cohort.of(Embeddings(raw, rows, f"{name} sha256:{by}"), speakers, **options)
        assert cohort.source.startswith(f"{name} sha256:")
        return cohort.source.rpartition("sha256:")[2]

    variants: list[dict] = [{"by": "ac1d"}, {"speakers": whose | {"c0/0": "c1"}}, {"top_n": 5}]
    variants += [{"method": "s"}, {"centre": False}, {"all_utterances": True}]
    variants += [{"mean": mean} for mean in (np.zeros(8), np.ones(8))]
    assert len({told(), *(told(**one) for one in variants)}) == 1 + len(variants)
    assert told(name="elsewhere.npz") == told()
    assert told(method="s", top_n=5) == told(method="s")  # which takes all of them


def test_a_cohort_of_the_trials_own_recordings_is_refused_whatever_their_speakers_are_called():
    """Flat ids, an utt2spk for the trials and none for the cohort: no name of a speaker tells."""
    raw = {name.replace("/", "-"): row for name, row in vectors("c", 12, 3).items()}
    cohort = Cohort.of(raw, {name: name for name in raw}, centre=False)
    trials = LabelledTrials(["c3-0", "x-1"], np.array([0]), np.array([1]), np.array([False]))
    trials = trials.with_speakers({"c3-0": "c3", "x-1": "x"})
    with pytest.raises(ValueError, match="1 recordings are in the cohort and in the trials: c3-0"):
        cohort.scores(raw, trials)
    models = LabelledTrials(["m", "x-1"], np.array([0]), np.array([1]), np.array([False]))
    models = models.with_models({"m": ["c5-1"]}).with_speakers({"c5-1": "c5", "x-1": "x"})
    with pytest.raises(ValueError, match="1 recordings are in the cohort and in the trials: c5-1"):
        cohort.refuse_speakers_of([models])


def test_models_are_normalised_by_either_rule():
    raw = vectors("t", 4, 4)
    models = {f"m{s}": [f"t{s}/0", f"t{s}/1"] for s in range(4)}
    ids = [*models, *(f"t{s}/{take}" for s in range(4) for take in (2, 3))]
    one, two = (side.ravel() for side in np.meshgrid(np.arange(4), np.arange(4, 12)))
    trials = LabelledTrials(ids, one, two, one == (two - 4) // 2).with_models(models)
    cohort = Cohort.of(
        vectors("c", 12, 3, seed=1),
        {f"c{s}/{t}": f"c{s}" for s in range(12) for t in range(3)},
        top_n=6,
    )
    each = []
    for take in (0, 1):  # every model's recordings, one at a time
        single = {f"m{s}": [f"t{s}/{take}"] for s in range(4)}
        each.append(cohort.scores(raw, trials.with_models(single)))
    by_score = cohort.scores(raw, trials, "score")
    assert by_score == pytest.approx(np.mean(each, axis=0), abs=1e-6)
    unit = {name: (v - cohort.mean) / np.linalg.norm(v - cohort.mean) for name, v in raw.items()}
    mean = {f"m{s}": unit[f"t{s}/0"] + unit[f"t{s}/1"] for s in range(4)}
    pooled = {name: v + cohort.mean for name, v in (unit | mean).items()}
    plain = LabelledTrials(ids, one, two, trials.is_target)
    assert cohort.scores(raw, trials) == pytest.approx(cohort.scores(pooled, plain), abs=1e-5)


def test_a_list_read_from_a_file_is_scored_as_in_memory(tmp_path):
    raw = vectors("speaker 0", 6, 3)
    ids = list(raw)
    left, right = np.triu_indices(len(ids), 1)
    same = np.array(
        [ids[a].split("/")[0] == ids[b].split("/")[0] for a, b in zip(left, right, strict=True)]
    )
    trials = LabelledTrials(ids, left, right, same)
    write_trials(tmp_path / "list.txt", trials)
    save_embeddings(tmp_path / "e.npz", raw)
    said = []
    reports = score_files(
        embeddings=tmp_path / "e.npz",
        trials=tmp_path / "list.txt",
        output_folder=tmp_path / "out",
        say=said.append,
    )
    points = reports["list"]["cosine"].points
    scores = cosine_scores({name: v.astype(np.float32) for name, v in raw.items()}, trials)
    assert np.array_equal(points.targets, np.sort(scores[same]))
    for method in ("rocch", "nist"):  # both stand in the table
        value = eer(operating_points(scores, same), method)
        assert reports["list"]["cosine"]["eer", method].value == value
    assert "EER(nist)" in said[0]
    assert "(nist: by the ROC, as most papers)" in said[0]
    assert "trials: list.txt sha256:" in said[0]
    with pytest.raises(ValueError, match="the output is an input too"):
        score_files(
            embeddings=tmp_path / "e.npz",
            trials=tmp_path / "list.txt",
            output_folder=tmp_path / "out",
            utt2spk=tmp_path / "out" / "results.txt",
        )


def test_the_det_picture_has_the_bands_of_the_confidence_asked_for(tmp_path):
    raw = vectors("t", 8, 3)
    names, (one, two) = list(raw), np.triu_indices(len(raw), 1)
    trials = LabelledTrials(names, one, two, one // 3 == two // 3)
    reports, _ = score_lists(tmp_path, {"mine": trials}, raw, confidence=0.5)
    curves = {name: (report.points, report.spread) for name, report in reports["mine"].items()}
    for confidence in (0.5, 0.95):
        save_figure(det_figure(curves, "mine", confidence), tmp_path / f"{confidence}.png")
    drawn = (tmp_path / "mine" / "det.png").read_bytes()
    assert drawn == (tmp_path / "0.5.png").read_bytes()
    assert drawn != (tmp_path / "0.95.png").read_bytes()
