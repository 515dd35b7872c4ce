"""Trial lists, score files and embeddings: what is read, what is refused, nothing rounded."""

import kaldiio
import numpy as np
import pytest

from speechbrain_qmargin.embeddings import cosine_scores, load_embeddings, save_embeddings
from speechbrain_qmargin.trials import Trials, read_map, read_scores, read_trials, write_scores


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
        ("a b target\na c nontarget\n1 a d\n", r":3: expected 'enrolment test target.nontarget'"),
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


def test_a_kaldi_list_with_its_speakers(tmp_path):
    trials = read_trials(write(tmp_path / "trials", "b-1 b-2 target\nb-1 e-1 nontarget\n"))
    assert trials.ids == ["b-1", "b-2", "e-1"]
    assert trials.is_target.tolist() == [True, False]
    utt2spk = write(tmp_path / "utt2spk", "b-1 bob\nb-2 bob\ne-1 eve\n")
    assert trials.with_speakers(read_map(utt2spk)).speakers().tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="1 recordings have no speaker: e-1"):
        trials.with_speakers({"b-1": "bob", "b-2": "bob"})
    with pytest.raises(ValueError, match=r"utt2spk:2: b-1 is listed twice"):
        read_map(write(utt2spk, "b-1 bob\nb-1 eve\n"))
    with pytest.raises(ValueError, match=r"utt2spk:1: expected an id and one str"):
        read_map(write(utt2spk, "b-1\n"))


def test_scores_without_labels(tmp_path):
    path = tmp_path / "scores.tsv"
    trials = Trials(["a", "b"], np.array([0]), np.array([1]), None)
    write_scores(path, trials, np.float32([0.1]))
    again, scores = read_scores(path)
    assert again.is_target is None
    assert np.float32(scores[0]) == np.float32(0.1)


def test_score_files_of_others(tmp_path):
    trials = read_trials(write(tmp_path / "list", "1 a/1 a/2\n0 a/1 b/1\n"))
    bare = write(tmp_path / "bare", "a/1 b/1 -0.5\na/1 a/2 0.75\n")
    assert read_scores(bare, trials)[1].tolist() == [0.75, -0.5]
    words = write(tmp_path / "words", "a/1 a/2 0.75 target\na/1 b/1 -0.5 nontarget\n")
    assert read_scores(words)[0].is_target.tolist() == [True, False]
    speechbrain = write(tmp_path / "scores.txt", "a/1 a/2 1 0.750000\na/1 b/1 0 -0.500000\n")
    found, scores = read_scores(speechbrain, columns="enrolment test label score")
    assert found.is_target.tolist() == [True, False]
    assert scores.tolist() == [0.75, -0.5]
    with pytest.raises(ValueError, match=r"scores\.txt:1: 4 columns without the header"):
        read_scores(speechbrain)
    with pytest.raises(ValueError, match="must name enrolment"):
        read_scores(speechbrain, columns="a b c d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b 0.5\na c\n", r":2: expected 'enrolment test score', malformed line 'a c'"),
        ("a b 0.5\na c much\n", r":2: malformed line"),
        ("a b 0.5\na c nan\n", r":2: the score nan is not finite"),
        ("a b 0.5\n\na b 0.6\n", r":3: the trial of line 1 again"),
        ("", "no scores in it"),
    ],
)
def test_bad_score_files_are_named_with_their_line(tmp_path, text, message):
    path = write(tmp_path / "scores", text)
    with pytest.raises(ValueError, match=str(path) + ".*" + message):
        read_scores(path)


def test_scores_and_list_that_disagree(tmp_path):
    trials = read_trials(write(tmp_path / "list", "1 a/1 a/2\n0 a/1 b/1\n"))
    path = write(tmp_path / "few", "a/1 a/2 0.5\n")
    with pytest.raises(ValueError, match=r"few: 1 of 2 trials have no score, the first is a/1 b/1"):
        read_scores(path, trials)
    path = write(tmp_path / "wrong", "a/1 a/2 0.5 target\na/1 b/1 0.1 target\n")
    with pytest.raises(ValueError, match=r"wrong: the label of a/1 b/1 is not that"):
        read_scores(path, trials)
    path = write(tmp_path / "more", "a/1 a/2 0.5\na/1 b/1 0.1\na/1 c/1 0.2\n")
    with pytest.warns(UserWarning, match="more: 1 of 3 scores dropped"):
        assert read_scores(path, trials)[1].tolist() == [0.5, 0.1]


def test_npy_with_ids(tmp_path):
    np.save(tmp_path / "e.npy", np.float32([[1, 2], [3, 4]]))
    write(tmp_path / "e.txt", "a\nb\n")
    assert load_embeddings(tmp_path / "e.npy")["b"].tolist() == [3, 4]
    ids = write(tmp_path / "other", "a\nb\nc\n")
    with pytest.raises(ValueError, match=r"e\.npy: 3 ids and a matrix \(2, 2\)"):
        load_embeddings(tmp_path / "e.npy", ids)
    with pytest.raises(ValueError, match=r"e\.npy: 1 ids are listed twice: a"):
        load_embeddings(tmp_path / "e.npy", write(ids, "a\na\n"))


@pytest.mark.parametrize("text", [False, True])
def test_kaldi_archives(tmp_path, text):
    rows = {"a": np.float32([1, 2]), "b": np.float32([3, 4.5])}
    ark, scp = tmp_path / "e.ark", tmp_path / "e.scp"
    kaldiio.save_ark(str(ark), rows, scp=str(scp), text=text)
    for path in (ark, scp):
        again = load_embeddings(path)
        assert list(again) == ["a", "b"]
        assert all(np.array_equal(again[key], rows[key]) for key in rows)
    if not text:
        kaldiio.save_ark(str(ark), {"c": np.ones(2)}, append=True)
        assert load_embeddings(ark)["c"].tolist() == [1, 1]
        kaldiio.save_ark(str(ark), {"d": np.ones(3)}, append=True)
        with pytest.raises(ValueError, match="d has 3 values, those before 2"):
            load_embeddings(ark)


def test_kaldi_archives_never_run_code(tmp_path):
    ark = tmp_path / "e.ark"
    kaldiio.save_ark(str(ark), {"a": np.float32([1])}, write_function="pickle")
    with pytest.raises(ValueError, match=r"e\.ark: a is neither"):
        load_embeddings(ark)
    kaldiio.save_ark(str(ark), {"a": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"a is b'FM '"):
        load_embeddings(ark)
    pipe = write(tmp_path / "pipe.scp", f"a touch {tmp_path / 'ran'} |\n")
    with pytest.raises(ValueError, match=r"pipe\.scp:1: expected 'id file\.ark:offset'"):
        load_embeddings(pipe)
    kaldiio.save_ark(str(ark), {"a": np.float32([1, 2, 3])})
    ark.write_bytes(ark.read_bytes()[:-4])
    with pytest.raises(ValueError, match="ends after 8 of 12 bytes"):
        load_embeddings(ark)
