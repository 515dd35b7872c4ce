"""Score files of ours and of others: nothing rounded, columns told by their values."""

import numpy as np
import pytest

from speechbrain_qmargin.scoring.score_files import read_score_file, read_scores, write_scores
from speechbrain_qmargin.trials import LabelledTrials, Trials, read_trials


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_come_back_bit_for_bit(tmp_path, dtype):
    rng = np.random.default_rng(0)
    scores = np.append(rng.normal(size=300), [0.1, 1e-30, -1e30, 5e-324, 0.0]).astype(dtype)
    n = len(scores)
    trials = LabelledTrials(
        [f"s{i}/u" for i in range(n + 1)], np.arange(n), np.full(n, n), rng.random(n) < 0.5
    )
    write_scores(tmp_path / "scores.tsv", trials, scores)
    again, read = read_scores(tmp_path / "scores.tsv")
    assert np.array_equal(read.astype(dtype).view(np.uint8), scores.view(np.uint8))
    assert np.array_equal(again.is_target, trials.is_target)
    for side in ("enrolment", "test"):
        names = [trials.ids[i] for i in getattr(trials, side)]
        assert [again.ids[i] for i in getattr(again, side)] == names


def test_scores_without_labels(tmp_path):
    path = tmp_path / "scores.tsv"
    trials = Trials(["a", "b"], np.array([0]), np.array([1]))
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
    assert read_scores(speechbrain)[1].tolist() == [0.75, -0.5]
    with pytest.raises(ValueError, match="must name enrolment"):
        read_scores(speechbrain, columns="a b c d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b 0.5\na c\n", r":2: expected 3 columns as in the first line, got 'a c'"),
        (
            "a b 0.5\na c much\n",
            r":2: 'a c much': malformed line: the score 'much' is not a number",
        ),
        ("a b 0.5\na c nan\n", r":2: 'a c nan': the score nan is not finite"),
        ("a b 0,5\na c 0,25\n", r":1: 'a b 0,5': malformed line: the score '0,5' is not a number"),
        ("a b 0.5\na c 1_0\n", r":2: 'a c 1_0': malformed line: the score '1_0' is not a number"),
        ("a b 0.5 0.7 1\na c 0.2 0.1 0\n", r":1: 'a b 0.5 0.7 1': 5 columns, and which is the sc"),
        # a label of 0 and a score of 5, or a score of 0.5?
        ("a,b,0,5\na,c,0,25\n", r":1: 'a b 0 5': the scores are whole numbers, or have commas as"),
        ("a,b,1,5\na,c,0,25\n", r":1: 'a b 1 5': the scores are whole numbers, or have commas as"),
        (
            "a,b,-3,21,target\na,c,-7,02,nontarget\n",
            r":1: 'a b -3 21 target': the scores are whole numbers, or have commas as",
        ),
        ("a,b,+3,21,target\na,c,-7,02,nontarget\n", r":1: .*have commas as decimal points"),
        ("a;b;0,5;1\na;c;0,2;0\n", r":1: .*between semicolons: save it with commas or tabs"),
        ("model,test,score,label\na,b,0.5,1\na,,0.4,0\n", r":3: 'a  0.4 0': an id is empty"),
        ("a\tb\t0.5\n\tc\t0.4\n", r":2: .*an id is empty"),
        ("model,test,score,llr\na,b,0.5,3.2\n", "2 columns are called score, or another word"),
        ("model,utt1,test,score\nm,a,b,0.5\n", "2 columns are called enrolment, or another word"),
        ("# speechbrain_qmargin scores " + "[" * 20_000 + "\na b 1\n", r":1: malformed comment"),
        (
            '# speechbrain_qmargin scores {"lost": "{\\"recordings\\": \\"1\\", \\"tried\\": 1, '
            '\\"targets\\": 1, \\"impostors\\": 1}"}\na b 1\n',
            r":1: malformed failures",
        ),
        ('{"a":"' + "x" * 200_000 + '",1}\n', r":1: expected 3 columns as in the first line, got"),
        ("a b 0.5\n\na b 0.6\n", r":3: the trial of line 1 again, with another score: a b"),
        ("", "there is nothing in it"),
    ],
)
def test_bad_score_files_are_named_with_their_line(tmp_path, text, message):
    path = write(tmp_path / "scores", text)
    with pytest.raises(ValueError, match=str(path) + ".*" + message) as error:
        read_scores(path)
    assert len(str(error.value)) < 500 + len(str(path))


def test_commas_and_points_are_read_with_a_header_or_a_fraction(tmp_path):
    for text in (
        "a,b,0,0.5\na,c,1,25\n",
        "a, b, 0, 0.5\na, c, 1, 25\n",
        "enrol,test,label,score\na,b,0,5\na,c,1,25\n",
    ):
        found, scores = read_scores(write(tmp_path / "scores.csv", text))
        assert found.is_target.tolist() == [False, True]
        assert scores[1] == 25


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


TRIALS = "1 a/1.wav a/2.wav\n0 a/1.wav b/1.wav\n0 a/2.wav b/1.wav\n"
PEERS = {
    "ours": "enrolment\ttest\tscore\tlabel\na/1.wav\ta/2.wav\t0.9\t1\n"
    "a/1.wav\tb/1.wav\t0.1\t0\na/2.wav\tb/1.wav\t0.2\t0\n",
    "wespeaker": "a/1.wav a/2.wav 0.9 target\na/1.wav b/1.wav 0.1 nontarget\n"
    "a/2.wav b/1.wav 0.2 nontarget\n",
    "wespeaker as-norm": "a/1.wav a/2.wav 0.9 target 1 2 3 4\n"
    "a/1.wav b/1.wav 0.1 nontarget 1 2 3 4\na/2.wav b/1.wav 0.2 nontarget 0 0 0 0\n",
    "3d-speaker, other order": "a/2 b/1 0.2\na/1 b/1 0.1\na/1 a/2 0.9\n",
    "speechbrain": "a/1 a/2 1 0.9000\na/1 b/1 0 0.1000\na/2 b/1 0 0.2000\n",
    "label first": "1 a/1 a/2 0.9\n0 a/1 b/1 0.1\n0 a/2 b/1 0.2\n",
    "sre": "modelid\tsegmentid\tside\tLLR\na/1\ta/2\ta\t0.9\na/1\tb/1\ta\t0.1\na/2\tb/1\ta\t0.2\n",
    "csv": "test,enrol,score\na/2.wav,a/1.wav,0.9\nb/1.wav,a/1.wav,0.1\nb/1.wav,a/2.wav,0.2\n",
    "bom": "\ufeffa/1.wav a/2.wav 0.9\na/1.wav b/1.wav 0.1\na/2.wav b/1.wav 0.2\n",
}


@pytest.mark.filterwarnings("ignore:.*ids are those of")
@pytest.mark.parametrize("peer", PEERS)
def test_the_columns_of_every_toolkit_are_found(tmp_path, peer):
    trials = read_trials(write(tmp_path / "list", TRIALS))
    path = write(tmp_path / "scores", PEERS[peer])
    # a header wins over columns that were said of all files
    columns = "enrolment test label score" if peer in ("ours", "sre", "csv") else None
    read = read_score_file(path, trials, columns)
    assert read.scores.tolist() == [0.9, 0.1, 0.2]
    assert read.trials is trials
    alone = read_score_file(path)
    labelled = alone.trials.is_target is not None
    assert labelled == (peer not in ("3d-speaker, other order", "sre", "csv", "bom"))


def test_other_ids_are_warned_of(tmp_path):
    trials = read_trials(write(tmp_path / "list", TRIALS))
    path = write(tmp_path / "scores", PEERS["speechbrain"])
    with pytest.warns(UserWarning, match="scores: ids are those of list without their suffix"):
        read_scores(path, trials)
    with pytest.raises(ValueError, match=r"3 of 3 trials have no score, .*\(there is one of x y"):
        read_scores(write(path, "x y 0.5\n"), trials)


def test_ids_cut_at_their_first_dot_are_matched_unless_two_become_one(tmp_path):
    trials = read_trials(write(tmp_path / "list", "1 a/1.x.wav a/2.x.wav\n0 a/1.x.wav b/1.x.wav\n"))
    path = write(tmp_path / "scores", "a/1 a/2 1 0.9\na/1 b/1 0 0.25\n")
    with pytest.warns(UserWarning, match="ids are those of list up to their first dot"):
        assert read_scores(path, trials)[1].tolist() == [0.9, 0.25]
    trials = read_trials(write(tmp_path / "list", "1 a/1.x.wav a/1.y.wav\n0 a/1.x.wav b/1.x.wav\n"))
    with pytest.raises(
        ValueError, match=r"2 of 2 trials have no score, .*\(there is one of a/1 a/2"
    ):
        read_scores(path, trials)


def test_a_file_says_what_its_scores_are(tmp_path):
    trials = read_trials(write(tmp_path / "list", TRIALS))
    about = {"kind": "as-norm", "embeddings": "é sha256:1"}
    write_scores(tmp_path / "s.tsv", trials, np.arange(3.0), about)
    read = read_score_file(tmp_path / "s.tsv")
    assert read.kind == "as-norm"
    assert read.about == about | {"trials": trials.source}
    assert read.scores.tolist() == [0, 1, 2]
    assert read_score_file(write(tmp_path / "t", PEERS["wespeaker"])).kind == ""


def test_columns_that_cannot_be_told_apart_are_refused(tmp_path):
    path = write(tmp_path / "s", "a b 1 0\nc d 0 0\n")
    with pytest.raises(ValueError, match=r"s:1: .* which is the score and which the label cannot"):
        read_scores(path)
    assert read_scores(path, columns="enrolment test score label")[1].tolist() == [1, 0]
    path = write(tmp_path / "s", "a b 0.1 0.5 0.6\n")
    with pytest.raises(ValueError, match="5 columns, and which is the score"):
        read_scores(path)
    for text in ("0.7 1001 1002\n-1 1001 1003\n", "0.7 1001 1002 1\n-1 1001 1003 0\n"):
        path = write(tmp_path / "s", text)  # the score first, of ids that are numbers
        with pytest.raises(ValueError, match=r"s:1: .*column 1 holds numbers such as -1, which"):
            read_scores(path)
    order = "score enrolment test label"
    assert read_scores(path, columns=order)[1].tolist() == [0.7, -1]
    found, scores = read_scores(write(tmp_path / "s", "1001 1002 0.7 1\n1001 1003 -1 0\n"))
    assert (found.pair(0), scores.tolist()) == ("1001 1002", [0.7, -1])
    with pytest.raises(ValueError, match="a trial list, without scores"):
        read_scores(write(tmp_path / "s", "a b target\nc d nontarget\n"))


def test_ids_with_spaces_come_back_and_tabs_are_refused(tmp_path):
    trials = Trials(["s 1/u 1", "s 2/u 1"], np.array([0]), np.array([1]), np.array([False]))
    write_scores(tmp_path / "s.tsv", trials, np.array([0.5]))
    assert read_scores(tmp_path / "s.tsv")[0].ids == trials.ids
    with pytest.raises(ValueError, match="cannot hold a tab"):
        write_scores(tmp_path / "s.tsv", Trials(["a\tb", "c"], *np.eye(2, dtype=int)), np.ones(2))
