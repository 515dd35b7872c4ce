"""The console command from embeddings to the report, and its messages."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.embeddings import load_embeddings, save_embeddings
from speechbrain_qmargin.scoring.calibration import Calibration
from speechbrain_qmargin.scoring.decision import OperatingPoint
from speechbrain_qmargin.scoring.score_files import read_scores


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Embeddings of 8 test, 8 development and 12 cohort speakers; a list of all pairs of each."""
    folder = tmp_path_factory.mktemp("scoring")
    rng = np.random.default_rng(0)
    for part, count in (("test", 8), ("dev", 8), ("cohort", 12)):
        voices = rng.normal(size=(count, 16))
        ids = [f"{part}{speaker}/{take}" for speaker in range(count) for take in range(4)]
        rows = np.repeat(voices, 4, axis=0) + 0.8 * rng.normal(size=(4 * count, 16))
        save_embeddings(folder / f"{part}.npz", dict(zip(ids, rows, strict=True)))
        lines = [
            f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n"
            for i, a in enumerate(ids)
            for b in ids[:i]
        ]
        (folder / f"{part}.txt").write_text("".join(lines))
    return folder


def test_from_embeddings_to_a_report(files, tmp_path, capsys):
    for part in ("test", "dev"):
        embedded = [files / f"{part}.npz", files / f"{part}.txt"]
        for command, extra, options in (
            ("cosine", [], []),
            ("normalize", [files / "cohort.npz"], ["--top_n=6", "--subtract_mean"]),
        ):
            output = files / f"{part}_{command}.tsv"
            arguments = ["--quiet", command, *embedded, output, *extra, *options]
            assert main(list(map(str, arguments))) == 0
    calibration = ["calibrate", files / "dev_normalize.tsv", files / "calibration.json"]
    assert main(list(map(str, calibration))) == 0
    assert Calibration.load(files / "calibration.json").weights[0] > 0
    llrs = files / "llrs.tsv"
    apply = ["apply", files / "calibration.json", files / "test_normalize.tsv", llrs]
    assert main(list(map(str, apply))) == 0
    assert np.ptp(read_scores(llrs)[1]) > 5

    report = ["--quiet", "report", f"cosine={files / 'test_cosine.tsv'}"]
    report += [f"AS-norm={files / 'test_normalize.tsv'}", f"--output={files / 'report'}"]
    report += [f"--dev_scores=AS-norm={files / 'dev_normalize.tsv'}"]
    assert main(report) == 0
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert "report.html" in printed
    content = json.loads((files / "report" / "report.json").read_text())
    assert set(content["systems"]) == {"cosine", "AS-norm"}
    point = OperatingPoint.load(files / "report" / "operating_point_2.json")
    assert point.system == "AS-norm"
    assert not point.optimistic

    again = shutil.copytree(files / "report", tmp_path / "report")  # of one system now
    (again / "mine.txt").touch()
    report = ["--quiet", "report", f"cosine={files / 'test_cosine.tsv'}", f"--output={again}"]
    assert main([*report, "--fars=0.1,0.01"]) == 1  # what is there is not replaced unasked
    assert "report.html is there already" in capsys.readouterr().err
    gone = ["--quiet", "report", "gone.tsv", f"--output={again}"]
    assert main(gone) == 1  # and is said before anything is read
    assert "report.html is there already" in capsys.readouterr().err
    assert main([*report, "--fars=0.1,0.01", "--overwrite"]) == 0
    assert [file.name for file in again.glob("operating_point*")] == ["operating_point.json"]
    assert [file.name for file in again.glob("histogram*")] == ["histogram_1.png"]
    assert (again / "mine.txt").is_file()
    figures = json.loads((again / "report.json").read_text())["systems"]["cosine"]["figures"]
    assert sum(name.startswith("TAR@FAR") for name in figures) == 2


def test_errors_end_with_a_message(files, capsys, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("1 a\n")
    assert main(["cosine", str(files / "test.npz"), str(bad), str(tmp_path / "out")]) == 1
    assert "bad.txt:1: '1 a': expected" in capsys.readouterr().err
    arguments = ["normalize", files / "test.npz", files / "test.txt", tmp_path / "out"]
    assert main([*map(str, arguments), str(files / "test.npz")]) == 1
    assert "8 speakers are in the cohort and in the trials" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "gone.tsv")]) == 1
    assert "gone.tsv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


IDS = [f"id1000{s}/v{k}/0000{n}" for s in range(4) for k in range(2) for n in range(2)]
PAIRS = [(p, q, p[:7] == q[:7]) for j, p in enumerate(IDS) for q in IDS[j + 1 :]]


def written(path, lines, head=""):
    path.write_text(head + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def run(*arguments):
    return main(["--quiet", *map(str, arguments)])


@pytest.fixture
def peers(tmp_path):
    """One list, and the same scores as five toolkits write them."""
    rng = np.random.default_rng(0)
    rows = [(p, q, same, float(rng.normal() + 2 * same)) for p, q, same in PAIRS]
    word = {True: "target", False: "nontarget"}
    written(tmp_path / "list.txt", [f"{y:d} {p}.wav {q}.wav" for p, q, y, _ in rows])
    forms = {
        "we.score": [f"{p}.wav {q}.wav {v:.5f} {word[y]}" for p, q, y, v in rows],
        "asnorm.score": [
            f"{p}.wav {q}.wav {v:.5f} {word[y]} {v / 3:.4f} 1 {v / 5:.4f} 1" for p, q, y, v in rows
        ],
        "3d.score": [f"{p} {q} {v:.5f}" for p, q, _, v in reversed(rows)],
        "sb.txt": [f"{p} {q} {y:d} {v:.5f}" for p, q, y, v in rows],
    }
    for name, lines in forms.items():
        written(tmp_path / name, lines)
    head = "enrolment\ttest\tscore\tlabel\n"
    lines = [f"{p}.wav\t{q}.wav\t{v:.5f}\t{y:d}" for p, q, y, v in rows]
    written(tmp_path / "ours.tsv", lines, head)
    return tmp_path


def figures(folder):
    systems = json.loads((folder / "report.json").read_text())["systems"]
    return {name: system["figures"] for name, system in systems.items()}


def test_systems_of_five_toolkits_in_one_report(peers, capsys):
    systems = [f"{name}={peers / name}" for name in ("we.score", "asnorm.score", "3d.score")]
    systems += [f"sb={peers / 'sb.txt'}", f"ours={peers / 'ours.tsv'}"]
    assert run("report", *systems, f"--trials={peers / 'list.txt'}", f"--output={peers / 'o'}") == 0
    found = figures(peers / "o")
    assert len(found) == 5
    assert all(one == found["ours"] for one in found.values())
    said = capsys.readouterr().err
    assert "3d.score: ids are those of list.txt without their suffix" in said
    assert "warnings.warn" not in said
    # the labels of any system do for all
    order = [f"3d={peers / '3d.score'}", f"sb={peers / 'sb.txt'}"]
    assert run("report", *order, f"--output={peers / 'o'}", "--overwrite") == 0
    assert figures(peers / "o")["3d"] == found["ours"]
    assert run("report", peers / "3d.score", f"--output={peers / 'p'}") == 1
    assert "no file says which trials are targets" in capsys.readouterr().err


def test_columns_of_one_system(peers, capsys):
    written(peers / "odd", [f"{q} {p} {0.5 * y} {y:d} 1" for p, q, y in PAIRS])
    systems = [f"ours={peers / 'ours.tsv'}", f"odd={peers / 'odd'}", f"--output={peers / 'o'}"]
    assert run("report", *systems) == 1
    assert "which is the score and which the label cannot" in capsys.readouterr().err
    assert run("report", *systems, "--columns=odd=test enrolment score label other") == 0
    assert figures(peers / "o")["odd"]["EER"]["value"] == 0
    strange = "--columns=strange=test enrolment score label other"
    assert run("report", *systems, strange, "--overwrite") == 1
    assert "no system is called strange" in capsys.readouterr().err


def test_both_orders_are_one_list(peers, capsys):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=len(PAIRS)) + 2 * np.array([y for *_, y in PAIRS])
    plain = [f"{p}\t{q}\t{v!r}\t{y:d}" for (p, q, y), v in zip(PAIRS, scores.tolist(), strict=True)]
    both = [
        x for line in plain for x in (line, "\t".join(np.array(line.split("\t"))[[1, 0, 2, 3]]))
    ]
    head = "enrolment\ttest\tscore\tlabel\n"
    written(peers / "plain.tsv", plain, head)
    written(peers / "both.tsv", both, head)
    for name in ("plain", "both"):
        assert run("report", f"s={peers / name}.tsv", f"--output={peers / name}") == 0
    said = capsys.readouterr().err
    assert "both.tsv: of 240 trials 120 trials are the same pair as another" in said
    assert figures(peers / "both") == figures(peers / "plain")


def test_what_cannot_be_concluded_is_said(peers, capsys):
    lines = [f"{p}\t{q}\t{-float(y)}\t{y:d}" for p, q, y in PAIRS]
    written(peers / "d.tsv", lines, "enrolment\ttest\tscore\tlabel\n")
    assert run("report", peers / "d.tsv", f"--output={peers / 'o'}") == 0
    assert "scores seem inverted" in capsys.readouterr().err
    lines = [f"{p} {q} {float(y)} {y:d}".replace("/", "-") for p, q, y in PAIRS]
    written(peers / "noslash", lines)
    assert run("report", peers / "noslash", f"--output={peers / 'o'}", "--overwrite") == 0
    assert "the speakers are not known" in capsys.readouterr().out
    system = json.loads((peers / "o" / "report.json").read_text())["systems"]["noslash"]
    assert "speakers" not in system["trials"]
    marks = {figure["mark"] for figure in system["figures"].values()}
    assert "measured" not in marks


def test_a_threshold_must_not_have_seen_what_it_is_measured_on(files, tmp_path, capsys):
    for part in ("test", "dev"):
        embedded = (files / f"{part}.npz", files / f"{part}.txt")
        assert run("cosine", *embedded, tmp_path / f"{part}.tsv") == 0
    normalised = (files / "test.npz", files / "test.txt", tmp_path / "as.tsv", files / "cohort.npz")
    assert run("normalize", *normalised, "--top_n=6") == 0
    report = ("report", f"a={tmp_path / 'test.tsv'}", f"--output={tmp_path / 'o'}")
    assert run(*report, f"--dev_scores={tmp_path / 'test.tsv'}") == 1
    assert "8 speakers are in test.txt too" in capsys.readouterr().err
    assert run(*report, f"--dev_scores={tmp_path / 'as.tsv'}") == 1
    assert "a (test.tsv) is for cosine scores, and these are as-norm" in capsys.readouterr().err
    assert run(*report, f"--dev_scores={tmp_path / 'dev.tsv'}") == 0
    point = OperatingPoint.load(tmp_path / "o" / "operating_point.json")
    assert not point.optimistic
    assert point.kind == "cosine"
    assert point.embeddings.startswith("test.npz sha256:")
    assert run(*report, "--llr", "--overwrite") == 1
    assert "the scores of a are cosine scores" in capsys.readouterr().err
    assert run("calibrate", tmp_path / "dev.tsv", tmp_path / "c.json") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path / 'c.json'}: log-likelihood ratio = ")
    assert " * score - " in told
    assert run("apply", tmp_path / "c.json", tmp_path / "as.tsv", tmp_path / "llr.tsv") == 1
    assert "for cosine scores, and these are as-norm scores" in capsys.readouterr().err
    assert run("apply", tmp_path / "c.json", tmp_path / "test.tsv", tmp_path / "llr.tsv") == 0
    options = ("--p_target=0.5", "--fars", "0.2", "--confidence=0.9", "--c_miss=10", "--overwrite")
    assert run("report", tmp_path / "llr.tsv", f"--output={tmp_path / 'o'}", *options) == 0
    printed = capsys.readouterr().out
    assert "actDCF(p=0.5, c_miss=10, c_fa=1)" in printed
    assert "90 % interval" in printed
    assert run("report", tmp_path / "llr.tsv", f"--output={tmp_path / 'p'}", "--c_fa=0") == 1
    assert "costs must" in capsys.readouterr().err
    list_hash = hashlib.sha256((files / "test.txt").read_bytes()).hexdigest()
    assert f"trials: test.txt sha256:{list_hash}" in printed  # the user's list, not the copy


def test_scores_of_two_encoders_are_kept_apart(files, tmp_path, capsys):
    """Of one kind and one length: only the digests in the files tell them apart."""
    for part in ("test", "dev", "cohort"):
        held = load_embeddings(files / f"{part}.npz")
        for encoder in ("5e11", "ac1d"):
            save_embeddings(tmp_path / f"{part}_{encoder}.npz", held, encoder)
    for part in ("test", "dev"):
        for encoder in ("5e11", "ac1d"):
            given = tmp_path / f"{part}_{encoder}.npz", files / f"{part}.txt"
            assert run("cosine", *given, tmp_path / f"{part}_{encoder}.tsv") == 0
    test, dev = tmp_path / "test_5e11.tsv", tmp_path / "dev_5e11.tsv"
    other, cohort = tmp_path / "test_ac1d.tsv", tmp_path / "cohort_5e11.npz"
    assert run("calibrate", dev, tmp_path / "c.json") == 0
    assert run("report", test, f"--dev_scores={dev}", f"--output={tmp_path / 'o'}") == 0
    (tmp_path / "people.csv").write_text("speaker,side\ntest0,a\ntest1,b\n")
    metadata = f"--metadata={tmp_path / 'people.csv'}"
    point = f"--operating_point={tmp_path / 'o' / 'operating_point.json'}"
    vectors = tmp_path / "test_ac1d.npz", files / "test.txt"
    development = (
        f"--dev_trials={files / 'dev.txt'}",
        f"--dev_embeddings={tmp_path / 'dev_5e11.npz'}",
    )
    capsys.readouterr()
    for words, message in (
        (("apply", tmp_path / "c.json", other, tmp_path / "out"), "the calibration is of the enc"),
        (("report", other, f"--dev_scores={dev}", f"--output={tmp_path / 'p'}"), "tsv) is of the"),
        (("breakdown", other, metadata, point), "the threshold is of the encoder 5e11,"),
        (("fuse", f"a={other}", f"--dev_scores=a={dev}", f"--output={tmp_path / 'out'}"),
         "a (test_ac1d.tsv) is of the encoder ac1d, and this is 5e11"),
        (("normalize", *vectors, tmp_path / "out", cohort, "--top_n=6"),
         "cohort_5e11.npz is of the encoder 5e11, the trials' embeddings are of ac1d"),
        (("quality", vectors[0], cohort, tmp_path / "out"), "cohort_5e11.npz is of the encoder"),
        (("plda", *vectors, tmp_path / "out", f"--train={cohort}"), "cohort_5e11.npz is of the"),
        (("score", *vectors, f"--cohort={cohort}", f"--output={tmp_path / 's'}"),
         "cohort_5e11.npz is of the encoder"),
        (("score", *vectors, *development, f"--output={tmp_path / 's'}"),
         "dev_5e11.npz is of the encoder"),
    ):  # fmt: skip
        assert run(*words) == 1, words
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for words in (
        ("apply", tmp_path / "c.json", test, tmp_path / "llr.tsv"),
        ("breakdown", test, metadata, point),
        ("apply", tmp_path / "c.json", peer(test, tmp_path), tmp_path / "unknown.tsv"),
    ):
        assert run(*words) == 0, words


def test_normalised_scores_of_other_settings_are_kept_apart(files, tmp_path, capsys):
    """Of one cohort file: another number of nearest speakers, or other entries, shifts scores."""
    cohort, settings = files / "cohort.npz", {"six": ("--top_n=6",), "four": ("--top_n=4",)}
    settings |= {"all": ("--top_n=6", "--all_utterances"), "again": ("--top_n=6",)}
    for name, options in settings.items():
        for part in ("test", "dev"):
            given = files / f"{part}.npz", files / f"{part}.txt", tmp_path / f"{part}_{name}.tsv"
            assert run("normalize", *given, cohort, *options) == 0
    assert run("calibrate", tmp_path / "dev_six.tsv", tmp_path / "c.json") == 0
    dev = f"--dev_scores=a={tmp_path / 'dev_six.tsv'}"
    report = tmp_path / "o"
    assert run("report", f"a={tmp_path / 'test_again.tsv'}", dev, f"--output={report}") == 0
    point = f"--operating_point={report / 'operating_point.json'}"
    (tmp_path / "people.csv").write_text("speaker,side\ntest0,a\ntest1,b\n")
    capsys.readouterr()
    for name in ("four", "all"):
        test = tmp_path / f"test_{name}.tsv"
        for words in (
            ("apply", tmp_path / "c.json", test, tmp_path / "out"),
            ("report", f"a={test}", dev, f"--output={tmp_path / 'p'}"),
            ("fuse", f"a={test}", dev, f"--output={tmp_path / 'out'}"),
            ("breakdown", test, f"--metadata={tmp_path / 'people.csv'}", point),
        ):
            assert run(*words) == 1, words
            said = capsys.readouterr().err
            assert "is of the cohort" in said
            assert "or the number of nearest entries): it wants one of its own" in said
    again = tmp_path / "test_again.tsv"
    assert run("apply", tmp_path / "c.json", again, tmp_path / "out") == 0
    # the front end centres; what it writes goes with the steps that centre
    both = f"--cohort={cohort}", "--top_n=6", f"--output={tmp_path / 's'}"
    assert run("score", files / "test.npz", files / "test.txt", *both) == 0
    centred = files / "dev.npz", files / "dev.txt", tmp_path / "centred.tsv", cohort
    assert run("normalize", *centred, "--top_n=6", "--subtract_mean") == 0
    assert run("calibrate", tmp_path / "centred.tsv", tmp_path / "centred.json") == 0
    front = tmp_path / "s/test/as-norm.tsv"
    assert run("apply", tmp_path / "centred.json", front, tmp_path / "2") == 0
    assert run("apply", tmp_path / "c.json", front, tmp_path / "3") == 1


def test_scores_of_another_mean_are_kept_apart(files, tmp_path, capsys):
    for n in range(2):
        np.save(tmp_path / f"{n}.npy", 0.1 * np.random.default_rng(n).normal(size=16))
        for part in ("test", "dev"):
            given = files / f"{part}.npz", files / f"{part}.txt", tmp_path / f"{part}{n}.tsv"
            assert run("cosine", *given, f"--mean={tmp_path / f'{n}.npy'}") == 0
    assert run("calibrate", tmp_path / "dev0.tsv", tmp_path / "c.json") == 0
    assert run("apply", tmp_path / "c.json", tmp_path / "test0.tsv", tmp_path / "llr") == 0
    assert run("apply", tmp_path / "c.json", tmp_path / "test1.tsv", tmp_path / "llr1") == 1
    assert "the calibration is of the mean" in capsys.readouterr().err
    dev, output = f"--dev_scores={tmp_path / 'dev0.tsv'}", f"--output={tmp_path / 'o'}"
    assert run("report", tmp_path / "test1.tsv", dev, output) == 1
    assert "is of the mean" in capsys.readouterr().err


def peer(scores, folder):
    """The same scores as another toolkit's file, which says nothing of their origin."""
    lines = scores.read_text().splitlines()
    return written(folder / "peer.tsv", [line for line in lines if not line.startswith("#")])


def test_recordings_that_failed_are_reported(files, tmp_path, capsys):
    ids, rows = np.load(files / "test.npz")["ids"], np.load(files / "test.npz")["embeddings"]
    save_embeddings(tmp_path / "few.npz", dict(zip(ids[1:].tolist(), rows[1:], strict=True)))
    given = ("cosine", tmp_path / "few.npz", files / "test.txt", tmp_path / "s.tsv")
    assert run(*given) == 1
    assert "1 of 32 recordings in the trials have no embedding: test0/0 (there is test0/1)" in (
        capsys.readouterr().err
    )
    assert run(*given, "--missing=leave_out") == 0
    assert run("report", tmp_path / "s.tsv", f"--output={tmp_path / 'o'}") == 0
    printed = capsys.readouterr().out
    said = (
        "failure to acquire 1 of 32 recordings (3.12 %): 3 target and 28 impostor trials are lost"
    )
    assert said in printed
    system = json.loads((tmp_path / "o" / "report.json").read_text())["systems"]["s"]
    figure = system["figures"]["TAR@FAR=0.1"]
    share = 1 - (figure["misses"] + 3) / (45 + 3)
    assert f"counted as rejections: TAR@FAR=0.1 {100 * share:.2f} %" in printed
    # beside a system that lost nothing: each has its own failures
    assert run("cosine", files / "test.npz", files / "test.txt", tmp_path / "all.tsv") == 0
    both = f"few={tmp_path / 's.tsv'}", f"all={tmp_path / 'all.tsv'}"
    assert run("report", *both, f"--output={tmp_path / 'p'}") == 0
    systems = json.loads((tmp_path / "p" / "report.json").read_text())["systems"]
    assert systems["few"]["trials"]["lost"] == system["trials"]["lost"]
    assert systems["all"]["trials"]["lost"] is None


def test_models_in_a_report(files, tmp_path, capsys):
    lines = [f"m{s} test{s}/{take}" for s in range(8) for take in (0, 1)]
    models = written(tmp_path / "models", lines)
    lines = [
        f"m{s} test{t}/{take} {('nontarget', 'target')[s == t]}"
        for s in range(8)
        for t in range(8)
        for take in (2, 3)
    ]
    trials = written(tmp_path / "trials", lines)
    for rule in ("embedding", "score"):
        given = ("cosine", files / "test.npz", trials, tmp_path / f"{rule}.tsv")
        assert run(*given, f"--models={models}", f"--enrolment={rule}") == 0
        normalised = (files / "test.npz", trials, tmp_path / "as.tsv", files / "cohort.npz")
        options = (f"--models={models}", f"--enrolment={rule}", "--top_n=6", "--overwrite")
        assert run("normalize", *normalised, *options) == 0
    systems = (tmp_path / "embedding.tsv", tmp_path / "score.tsv")
    assert run("report", *systems, f"--models={models}", f"--output={tmp_path / 'o'}") == 0
    assert "16 target and 112 impostor trials of 8 speakers" in capsys.readouterr().out
    assert run("score", files / "test.npz", trials, f"--models={models}",
               f"--output={tmp_path / 'scores'}") == 0  # fmt: skip
    found = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert found["trials"]["cosine"]["trials"]["targets"] == 16
    # a threshold for one way to put an enrolment's recordings together is not for the other
    assert run("report", systems[0], f"--models={models}", f"--output={tmp_path / 'one'}") == 0
    (tmp_path / "people.csv").write_text("speaker,side\ntest0,a\ntest1,b\n")
    metadata = f"--metadata={tmp_path / 'people.csv'}", f"--models={models}"
    point = f"--operating_point={tmp_path / 'one' / 'operating_point.json'}"
    assert run("breakdown", systems[1], *metadata, point) == 1
    said = capsys.readouterr().err
    assert "the threshold is for enrolment by embedding, and these scores are by score" in said
    front = tmp_path / "scores/trials/cosine.tsv"
    assert run("breakdown", front, *metadata, point) == 0


def test_outputs_never_overwrite_inputs(files, tmp_path, capsys):
    before = (files / "test.txt").read_bytes()
    assert run("cosine", files / "test.npz", files / "test.txt", files / "test.txt") == 1
    assert "test.txt: the output is an input too" in capsys.readouterr().err
    assert (files / "test.txt").read_bytes() == before
    given = (files / "test.npz", files / "test.txt", files / "cohort.npz", files / "cohort.npz")
    assert run("normalize", *given) == 1
    assert "cohort.npz: the output is an input too" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["report", "gone.tsv"], ["bayes", "gone.tsv"], ["score", "gone.npz", "gone.txt"]]
)
def test_without_matplotlib_nothing_is_computed(tmp_path, words):
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        f"from speechbrain_qmargin.cli import main\nsys.exit(main({words}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 1
    assert "matplotlib" in found.stderr
    assert "Traceback" not in found.stderr
    assert "gone" not in found.stderr


def test_scoring_costs_numpy_alone():
    code = """
import sys
import speechbrain_qmargin.cli.score
import speechbrain_qmargin.faces.pair_sets
import speechbrain_qmargin.scoring.calibration
import speechbrain_qmargin.scoring.html
import speechbrain_qmargin.scoring.lists
heavy = {"torch", "scipy", "sklearn", "matplotlib", "speechbrain", "pandas", "kaldiio"}
print(sorted(heavy & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("report", "--far=1"),
        ("report", "--far=1%"),
        ("report", "--far=0,01"),
        ("report", "--fars=0.1,1"),
        ("report", "--confidence=95"),
        ("report", "--p_target=0"),
        ("bayes", "--p_target=0.5,1"),
        ("threshold", "--far=1"),
    ],
)
def test_rates_priors_and_confidences_are_shares(capsys, command, option):
    with pytest.raises(SystemExit):
        main([command, "one", "other", option])
    assert "is not between 0 and 1; 1 % is 0.01" in capsys.readouterr().err


def test_quiet_shows_no_progress_bar(files, tmp_path, capsys):
    shutil.copy(files / "test.txt", tmp_path / "again.txt")
    words = ["score", files / "test.npz", files / "test.txt", tmp_path / "again.txt", "--top_n=6"]
    words += [f"--cohort={files / 'cohort.npz'}", f"--dev_trials={files / 'dev.txt'}"]
    words += [f"--dev_embeddings={files / 'dev.npz'}"]
    shown = {}
    for quiet in ([], ["--quiet"]):
        assert main([*quiet, *map(str, words), f"--output={tmp_path / str(len(quiet))}"]) == 0
        shown[bool(quiet)] = capsys.readouterr().err
    assert "lists: 100%" in shown[False]
    assert shown[True] == ""
