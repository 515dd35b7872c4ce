"""Score normalisation against a loop over trials; the shape of the cohort; guards."""

import numpy as np
import pytest

from speechbrain_qmargin.embeddings import Embeddings
from speechbrain_qmargin.scoring import normalisation
from speechbrain_qmargin.scoring.normalisation import (
    METHODS,
    class_means,
    cohort_statistics,
    make_cohort,
    normalize,
    refuse_shared_speakers,
)
from speechbrain_qmargin.trials import LabelledTrials


def unit(rows):
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    ids = [f"u{i}" for i in range(40)]
    matrix = rng.normal(size=(40, 8)).astype(np.float32)
    enrolment, test = rng.integers(40, size=(2, 300))
    trials = LabelledTrials(ids, enrolment, test, np.zeros(300, bool))
    return Embeddings(ids, matrix), trials, rng.normal(size=(60, 8)).astype(np.float32)


def naive(a, b, cohort, method, top_n):
    """One trial, in float64, by the definitions of Matejka et al. 2017."""
    a, b, cohort = (np.asarray(x, dtype=float) for x in (a, b, cohort))
    score, of_a, of_b = a @ b, cohort @ a, cohort @ b

    def z(chosen):
        return (score - chosen.mean()) / chosen.std()

    nearest_a, nearest_b = np.argsort(-of_a)[:top_n], np.argsort(-of_b)[:top_n]
    return {
        "z": z(of_a),
        "t": z(of_b),
        "s": (z(of_a) + z(of_b)) / 2,
        "as": (z(of_a[nearest_a]) + z(of_b[nearest_b])) / 2,
        "as-cross": (z(of_a[nearest_b]) + z(of_b[nearest_a])) / 2,
    }[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("blocks", [(512, 8192), (7, 13)])
def test_every_method_equals_a_loop_over_trials(data, method, blocks, monkeypatch):
    monkeypatch.setattr(normalisation, "_ROWS", blocks[0])
    monkeypatch.setattr(normalisation, "_COLUMNS", blocks[1])
    embeddings, trials, others = data
    mean = others.mean(0)
    cohort = make_cohort(dict(zip(map(str, range(60)), others, strict=True)), mean=mean)
    done = []
    scores = normalize(
        embeddings, trials, cohort, method=method, top_n=10, mean=mean, progress=done.append
    )
    rows, entries = unit(embeddings.matrix - mean), unit(others - mean)
    expected = [
        naive(rows[e], rows[t], entries, method, 10)
        for e, t in zip(trials.enrolment, trials.test, strict=True)
    ]
    assert scores == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert 0 < sum(done) <= 40  # a recording once, however many trials name it


def test_both_sides_keep_their_own_cohort_in_a_list_of_thousands_of_trials():
    """As-cross goes through blocks of recordings, and of the trials of a block."""
    rng = np.random.default_rng(2)
    rows, entries = (unit(rng.normal(size=(count, 8))).astype(np.float32) for count in (1100, 60))
    ids = [f"u{i}" for i in range(len(rows))]
    one, two = rng.integers(len(rows), size=(2, 10_000))
    trials = LabelledTrials(ids, one, two, np.zeros(len(one), bool))
    cohort = Embeddings([str(i) for i in range(60)], entries)
    found = normalize(Embeddings(ids, rows), trials, cohort, method="as-cross", top_n=10)
    table = rows.astype(float) @ entries.astype(float).T
    nearest = np.argsort(-table)[:, :10]
    score = np.einsum("nd,nd->n", rows[one].astype(float), rows[two].astype(float))
    wanted = np.zeros(len(one))
    for own, other in ((one, two), (two, one)):
        chosen = np.take_along_axis(table[own], nearest[other], 1)
        wanted += (score - chosen.mean(1)) / chosen.std(1) / 2
    assert found == pytest.approx(wanted, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("columns", [8192, 13])
def test_statistics_agree_to_1e_6(data, columns, monkeypatch):
    monkeypatch.setattr(normalisation, "_COLUMNS", columns)
    _, _, others = data
    rng = np.random.default_rng(1)
    matrix = unit(rng.normal(size=(50, 8))).astype(np.float32)
    entries = unit(others).astype(np.float32)
    for top_n in (2, 10, 59, 60, None):
        mean, std = cohort_statistics(matrix, entries, top_n)
        table = np.sort(matrix.astype(float) @ entries.astype(float).T)[:, -(top_n or 60) :]
        assert mean == pytest.approx(table.mean(1), abs=1e-6)
        assert std == pytest.approx(table.std(1), abs=1e-6)


def test_a_cohort_without_spread_divides_nothing():
    with pytest.raises(ValueError, match=r"do not differ \(deviation 0\)"):
        cohort_statistics(np.eye(2, dtype="f"), np.ones((3, 2), "f"), 2)
    rounded = np.array([[1.0, 0.0], [np.nextafter(np.float32(1), 0), 0.0]], "f")
    with pytest.raises(ValueError, match=r"do not differ \(deviation 3e-08\)"):
        cohort_statistics(np.eye(2, dtype="f")[:1], rounded)


def test_speaker_means_are_of_raw_embeddings(data):
    _, _, others = data
    ids = [f"u{i}" for i in range(60)]
    speakers = {name: f"s{i % 4}" for i, name in enumerate(ids)}
    mean = np.ones(8)
    cohort = make_cohort(dict(zip(ids, others, strict=True)), speakers, mean=mean)
    assert cohort.ids == ["s0", "s1", "s2", "s3"]
    assert cohort["s1"] == pytest.approx(unit(others[1::4].mean(0) - mean), abs=1e-6)
    assert class_means(others, np.arange(60) % 4)[1] == pytest.approx(
        others[1::4].mean(0), abs=1e-6
    )


def test_bad_cohorts_are_refused(data):
    embeddings, trials, others = data
    cohort = make_cohort(dict(zip(map(str, range(60)), others, strict=True)))
    for top_n in (61, 1):
        with pytest.raises(ValueError, match=rf"top_n is {top_n}; it must be from 2 to .* 60"):
            normalize(embeddings, trials, cohort, top_n=top_n)
    with pytest.raises(ValueError, match="as, as-cross, s, z, t, got 'x'"):
        normalize(embeddings, trials, cohort, method="x")
    with pytest.raises(ValueError, match="8 dimensions, the cohort 2"):
        normalize(embeddings, trials, Embeddings(["a", "b"], np.eye(2)))
    with pytest.raises(ValueError, match="1 speakers are in the cohort and in the trials: bob"):
        refuse_shared_speakers(["ann", "bob"], ["bob", "eve"])
    with pytest.raises(ValueError, match="1 cohort ids have no speaker, the first: b"):
        make_cohort({"a": np.ones(2), "b": np.ones(2)}, {"a": "s"})
    same = Embeddings(list("abcd"), np.repeat(others[:1], 4, axis=0))
    for method in ("as", "as-cross", "s", "z"):
        with pytest.raises(ValueError, match="cohort's scores of a recording do not differ"):
            normalize(embeddings, trials, same, top_n=3, method=method)
    with pytest.raises(ValueError, match="class 1 has no rows"):
        class_means(np.ones((2, 2)), np.array([0, 2]))
