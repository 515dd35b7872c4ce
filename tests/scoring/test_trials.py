"""Trial lists, score files and embeddings: what is read, what is refused, nothing rounded."""

import numpy as np
import pytest

from speechbrain_qmargin.scoring.trials import (
    Trials,
    cosine_scores,
    load_embeddings,
    read_scores,
    read_trials,
    save_embeddings,
    write_scores,
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_a_voxceleb_list(tmp_path):
    path = write(tmp_path / "trials.txt", "1 a/1/x.wav a/2/y.wav\n\n0 a/1/x.wav b/1/z.wav\n")
    trials = read_trials(path)
    assert trials.ids == ["a/1/x.wav", "a/2/y.wav", "b/1/z.wav"]
    assert trials.enrolment.tolist() == [0, 0]
    assert trials.test.tolist() == [1, 2]
    assert trials.is_target.tolist() == [True, False]
    assert trials.speakers().tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a b\n1 a\n", r":2: .*'1 a'"),
        ("1 a b\n2 a c\n", r":2: .*'2 a c'"),
        ("1 a b\n0 c d\n1 a b\n", r":3: the trial of line 1 again"),
        ("\n", "no trials in it"),
    ],
)
def test_bad_lists_are_named_with_their_line(tmp_path, text, message):
    path = write(tmp_path / "trials.txt", text)
    with pytest.raises(ValueError, match=str(path) + ".*" + message):
        read_trials(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_come_back_bit_for_bit(tmp_path, dtype):
    rng = np.random.default_rng(0)
    scores = np.append(rng.normal(size=300), [0.1, 1e-30, -1e30, 5e-324, 0.0]).astype(dtype)
    n = len(scores)
    trials = Trials(
        [f"s{i}/u" for i in range(n + 1)], np.arange(n), np.full(n, n), rng.random(n) < 0.5
    )
    write_scores(tmp_path / "scores.tsv", trials, scores)
    again, read = read_scores(tmp_path / "scores.tsv")
    assert np.array_equal(read.astype(dtype).view(np.uint8), scores.view(np.uint8))
    assert np.array_equal(again.is_target, trials.is_target)
    for side in ("enrolment", "test"):
        names = [trials.ids[i] for i in getattr(trials, side)]
        assert [again.ids[i] for i in getattr(again, side)] == names


def test_embeddings_come_back_and_never_run_code(tmp_path):
    embeddings = {"a": np.float32([1, 2]), "b": np.float32([3, 1 / 3])}
    save_embeddings(tmp_path / "e.npz", embeddings)
    again = load_embeddings(tmp_path / "e.npz")
    assert list(again) == ["a", "b"]
    assert all(np.array_equal(again[key], embeddings[key]) for key in again)
    np.savez(tmp_path / "bad.npz", ids=np.array([{}], dtype=object), embeddings=np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"bad\.npz"):
        load_embeddings(tmp_path / "bad.npz")


def test_cosines_equal_one_pair_at_a_time():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(50, 8))
    ids = [f"u{i}" for i in range(50)]
    enrolment, test = rng.integers(50, size=(2, 70000))
    trials = Trials(ids, enrolment, test, np.zeros(70000, bool))
    mean = rng.normal(size=8)
    scores = cosine_scores(dict(zip(ids, matrix, strict=True)), trials, mean)
    for i in range(0, 70000, 997):
        a, b = matrix[enrolment[i]] - mean, matrix[test[i]] - mean
        assert scores[i] == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)), abs=1e-6)


def test_embeddings_that_cannot_be_scored_are_named():
    trials = Trials(["a", "b"], np.array([0]), np.array([1]), np.array([True]))
    with pytest.raises(ValueError, match=r"1 of 2 recordings .* no embedding: b"):
        cosine_scores({"a": np.ones(2)}, trials)
    with pytest.raises(ValueError, match=r"1 embeddings are zero or not finite: b"):
        cosine_scores({"a": np.ones(2), "b": np.array([np.nan, 1])}, trials)
