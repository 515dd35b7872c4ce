"""PLDA: ratios of Gaussians, SpeechBrain's own scores, what is refused."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from speechbrain.processing.PLDA_LDA import Ndx, StatObject_SB, fast_PLDA_scoring

from speechbrain_qmargin.embeddings import Embeddings, cosine_scores
from speechbrain_qmargin.scoring.metrics import eer, operating_points
from speechbrain_qmargin.scoring.plda import PLDA, fit_plda
from speechbrain_qmargin.scoring.separation import name_digest
from speechbrain_qmargin.trials import LabelledTrials, Trials


def voices(seed=0, speakers=60, takes=6, size=5, first=0):
    """People differ in two directions, the noise is large in two others."""
    rng = np.random.default_rng(seed)
    loading = np.diag([1.0, 0.8, 0.3, 0.1, 0.1])
    noise = np.diag([0.3, 0.3, 0.5, 1.5, 1.5])
    people = rng.normal(size=(speakers, size)) @ loading
    rows = people.repeat(takes, axis=0) + rng.normal(size=(speakers * takes, size)) @ noise + 0.4
    ids = [f"s{first + n // takes}/{n % takes}" for n in range(len(rows))]
    return dict(zip(ids, rows, strict=True)), {name: name.split("/")[0] for name in ids}


def all_pairs(embeddings, speakers):
    ids = list(embeddings)
    left, right = np.triu_indices(len(ids), 1)
    who = np.array([speakers[name] for name in ids])
    return LabelledTrials(ids, left, right, who[left] == who[right])


def test_scores_are_the_ratio_of_gaussians_and_speechbrains():
    embeddings, speakers = voices()
    plda = fit_plda(embeddings, speakers, rank=3)
    other, of = voices(1, 4, 3, first=100)
    trials = all_pairs(other, of)
    found = plda.scores(other, trials)
    rows = np.stack(list(other.values())).astype(np.float32) - plda.centre.astype(np.float32)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(float) - plda.mean
    total = plda.between + plda.within
    joint = np.block([[total, plda.between], [plda.between, total]])
    alone = multivariate_normal(np.zeros(5), total)
    both = multivariate_normal(np.zeros(10), joint)
    for e, t, score in zip(trials.enrolment, trials.test, found, strict=True):
        wanted = both.logpdf(np.concatenate((rows[e], rows[t])))
        wanted -= alone.logpdf(rows[e]) + alone.logpdf(rows[t])
        assert score == pytest.approx(wanted, abs=1e-5)

    ids, none = np.array(list(other), dtype="O"), np.array([None] * len(other))
    one = StatObject_SB(ids, ids, none, none, np.ones((len(ids), 1)), rows + plda.mean)
    values, vectors = np.linalg.eigh(plda.between)
    loading = vectors * np.sqrt(np.maximum(values, 0))
    theirs = fast_PLDA_scoring(one, one, Ndx(models=ids, testsegs=ids), plda.mean, loading,
                               plda.within)  # fmt: skip
    place = {name: n for n, name in enumerate(theirs.modelset)}
    at = [(place[trials.ids[e]], place[trials.ids[t]]) for e, t in
          zip(trials.enrolment, trials.test, strict=True)]  # fmt: skip
    np.testing.assert_allclose(found, [theirs.scoremat[p] for p in at], atol=1e-5)


def test_the_mean_of_scores_is_that_of_the_recordings_scores():
    plda = fit_plda(*voices(), rank=3)
    other, _ = voices(1, 4, 3, first=100)
    ids = list(other)
    models = {"m0": tuple(ids[:2]), "m1": tuple(ids[3:4])}
    trials = Trials(
        ["m0", "m1", *ids[5:8]], np.array([0, 1, 0]), np.array([2, 3, 4]), models=models
    )
    found = plda.scores(other, trials, "score")
    for n, (model, test) in enumerate((("m0", ids[5]), ("m1", ids[6]), ("m0", ids[7]))):
        own = models[model]
        alone = Trials([*own, test], np.arange(len(own)), np.full(len(own), len(own)))
        assert found[n] == pytest.approx(plda.scores(other, alone).mean())


def test_it_beats_the_cosine_where_the_noise_has_a_direction():
    plda = fit_plda(*voices(0, 200))
    other, of = voices(1, 30, first=1000)
    trials = all_pairs(other, of)
    ours = eer(operating_points(plda.scores(other, trials), trials.is_target))
    cosine = eer(operating_points(cosine_scores(other, trials, plda.centre), trials.is_target))
    assert ours < 0.75 * cosine


def test_it_comes_back_from_its_file(tmp_path):
    embeddings, speakers = voices()
    plda = fit_plda(embeddings, speakers)
    plda.save(tmp_path / "plda.npz")
    trials = all_pairs(*voices(1, 3))
    loaded = PLDA.load(tmp_path / "plda.npz")
    np.testing.assert_array_equal(
        plda.scores(voices(1, 3)[0], trials), loaded.scores(voices(1, 3)[0], trials)
    )
    assert loaded.speakers == sorted({name_digest(name) for name in speakers.values()})
    old = {name: getattr(plda, name) for name in ("centre", "mean", "between", "within")}
    np.savez(tmp_path / "old.npz", **old)
    assert PLDA.load(tmp_path / "old.npz").encoder == ""
    for content, message in (
        ({"centre": np.zeros(2)}, "not a PLDA"),
        ({"centre": np.zeros(2), "mean": np.zeros(2), "between": np.eye(3), "within": np.eye(2)},
         r"between is float64 \(3, 3\)"),
        ({"centre": np.full(2, np.nan), "mean": np.zeros(2), "between": np.eye(2),
          "within": np.eye(2)}, "centre is not finite"),
    ):  # fmt: skip
        np.savez(tmp_path / "bad.npz", **content)
        with pytest.raises(ValueError, match=message):
            PLDA.load(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "plda.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"bad\.npz: damaged, or not a PLDA"):
        PLDA.load(tmp_path / "bad.npz")


def test_what_cannot_be_fitted_is_said():
    embeddings, speakers = voices()
    with pytest.raises(ValueError, match="1 embeddings have no speaker"):
        fit_plda(embeddings, dict(list(speakers.items())[1:]))
    with pytest.raises(ValueError, match="several speakers"):
        fit_plda(embeddings, dict.fromkeys(speakers, "one"))
    with pytest.raises(ValueError, match="several recordings of some"):
        fit_plda(embeddings, {name: name for name in speakers})
    for number in (4, 5):
        few = dict(list(embeddings.items())[8 - number : 8])
        with pytest.raises(ValueError, match=f"{number} recordings cannot tell a covariance of 5"):
            fit_plda(few, speakers)
    with pytest.raises(ValueError, match="rank of 6 must be from 1 to 5"):
        fit_plda(embeddings, speakers, rank=6)
    with pytest.raises(ValueError, match="rank of 3 must be from 1 to 2"):
        fit_plda(*voices(0, 3), rank=3)
    plda = fit_plda(embeddings, speakers)
    with pytest.raises(ValueError, match="embeddings have 3 dimensions, the PLDA 5"):
        plda.scores({name: row[:3] for name, row in embeddings.items()}, all_pairs(*voices(0, 3)))
    with pytest.raises(ValueError, match="enrolment must be one of embedding, score, got 'mean'"):
        plda.scores(embeddings, all_pairs(*voices(0, 3)), "mean")


def test_embeddings_of_another_encoder_are_refused(tmp_path):
    embeddings, speakers = voices()
    rows = np.stack(list(embeddings.values()))
    fit_plda(Embeddings(list(embeddings), rows, encoder="5e11"), speakers).save(tmp_path / "p.npz")
    plda, trials = PLDA.load(tmp_path / "p.npz"), all_pairs(embeddings, speakers)
    same, other = (Embeddings(list(embeddings), rows, encoder=one) for one in ("5e11", "ac1d"))
    np.testing.assert_array_equal(plda.scores(same, trials), plda.scores(embeddings, trials))
    with pytest.raises(ValueError, match=r"the PLDA is of the encoder 5e11, .* of ac1d"):
        plda.scores(other, trials)
