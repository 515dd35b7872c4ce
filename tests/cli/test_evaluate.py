"""The commands that evaluate further, from files to files, and their messages."""

import json

import numpy as np
import pytest

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.embeddings import save_embeddings
from speechbrain_qmargin.scoring.decision import OperatingPoint
from speechbrain_qmargin.scoring.fusion import Fusion
from speechbrain_qmargin.scoring.html import report_files
from speechbrain_qmargin.scoring.metrics import eer, operating_points
from speechbrain_qmargin.scoring.score_files import read_scores
from speechbrain_qmargin.tables import read_map


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Embeddings of test, development and cohort speakers, lists of all pairs, two systems."""
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    for part, count in (("test", 12), ("dev", 12), ("cohort", 12)):
        voices = rng.normal(size=(count, 16))
        ids = [f"{part}{speaker}/{take}" for speaker in range(count) for take in range(4)]
        for system, noise in (("one", 1.3), ("two", 1.5)):
            rows = np.repeat(voices, 4, axis=0) + noise * rng.normal(size=(4 * count, 16))
            save_embeddings(folder / f"{part}_{system}.npz", dict(zip(ids, rows, strict=True)))
        lines = [
            f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n"
            for i, a in enumerate(ids)
            for b in ids[:i]
        ]
        (folder / f"{part}.txt").write_text("".join(lines))
        for system in ("one", "two"):
            given = [folder / f"{part}_{system}.npz", folder / f"{part}.txt"]
            assert run("cosine", *given, folder / f"{part}_{system}.tsv") == 0
    (folder / "people.csv").write_text(
        "speaker,gender\n" + "".join(f"test{i},{'fm'[i % 2]}\n" for i in range(12))
    )
    return folder


def run(*words) -> int:
    return main(["--quiet", *map(str, words)])


def test_breakdown(files, capsys):
    arguments = ["breakdown", files / "test_one.tsv", f"--metadata={files / 'people.csv'}"]
    assert run(*arguments, "--by=gender", f"--output={files / 'by.json'}") == 0
    assert "f × m" in capsys.readouterr().out
    found = json.loads((files / "by.json").read_text())
    assert [row["group"] for row in found["columns"][0]["groups"]] == ["f", "f × m", "m"]
    assert found["columns"][0]["overall"]["fmr"]["value"] <= 0.01
    assert "test_one.tsv sha256:" in found["scores"]
    assert run(*arguments, "--by=age") == 1
    assert "no column age; there are gender" in capsys.readouterr().err
    headless = files / "headless.csv"
    headless.write_text((files / "people.csv").read_text().partition("\n")[2])
    for command in (["breakdown"], ["report", f"--output={files / 'none'}"]):
        assert run(*command, files / "test_one.tsv", f"--metadata={headless}") == 1
        assert "headless.csv:1: expected a header of names" in capsys.readouterr().err


def test_distinct_pairs_count_for_every_command(files, tmp_path, capsys):
    """Some pairs in both orders, and every recording with itself, change no figure."""
    trials, scores = read_scores(files / "test_one.tsv")
    head = "enrolment\ttest\tscore\tlabel\n"
    rows = [
        (trials.ids[e], trials.ids[t], repr(20 * score), f"{label:d}")
        for e, t, score, label in zip(
            trials.enrolment, trials.test, scores.tolist(), trials.is_target, strict=True
        )
    ]
    more = [(t, e, *rest) for e, t, *rest in rows[::3]] + [(n, n, "25", "1") for n in trials.ids]
    for name, listed in (("plain", rows), ("both", [*rows, *more])):
        text = head + "".join("\t".join(row) + "\n" for row in listed)
        (tmp_path / f"{name}.tsv").write_text(text)
    printed = {}
    for name in ("plain", "both"):
        one = f"one={tmp_path / name}.tsv"
        assert run("bayes", one, f"--output={tmp_path / name}.png") == 0
        by = [tmp_path / f"{name}.tsv", f"--metadata={files / 'people.csv'}", "--far=0.1"]
        assert run("breakdown", *by) == 0
        printed[name] = capsys.readouterr().out.replace(name, "it")
    assert printed["both"] == printed["plain"]


def test_a_report_that_fails_leaves_nothing(files, tmp_path, capsys):
    """Nor does a report take the place of a picture of something else."""
    people, out = tmp_path / "people.csv", tmp_path / "page"
    people.write_text("speaker,gender\nnobody,f\n")
    report = ["report", files / "test_one.tsv", f"--output={out}"]
    assert run(*report, f"--metadata={people}") == 1
    assert "names none of the trials' recordings or speakers" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "det.png").write_text("by hand\n")
    assert run(*report) == 1
    assert "det.png is there already" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["det.png"]
    assert run(*report, "--overwrite") == 0
    assert {file.name for file in out.iterdir()} <= set(report_files(1))


def test_groups_on_the_report(files):
    metadata = [f"--metadata={files / 'people.csv'}", "--by=gender"]
    assert run("report", files / "test_one.tsv", *metadata, f"--output={files / 'page'}") == 0
    assert "test_one, by gender" in (files / "page" / "report.html").read_text(encoding="utf-8")


def test_fuse(files, capsys):
    systems = [f"{name}={files / f'test_{name}.tsv'}" for name in ("one", "two")]
    development = [f"--dev_scores={name}={files / f'dev_{name}.tsv'}" for name in ("one", "two")]
    output, saved = files / "fused.tsv", files / "fusion.json"
    assert run("fuse", *systems, *development, f"--output={output}", f"--save={saved}") == 0
    trials, llrs = read_scores(output)
    single = read_scores(files / "test_one.tsv")[1]
    assert eer(operating_points(llrs, trials.is_target)) < eer(
        operating_points(single, trials.is_target)
    )
    assert Fusion.load(saved).systems == ["one", "two"]
    again = files / "again.tsv"
    assert run("fuse", *systems, f"--fusion={saved}", f"--output={again}") == 0
    assert again.read_text() == output.read_text()
    capsys.readouterr()
    own = [f"--dev_scores={system}" for system in systems]
    assert run("fuse", *systems, *own, f"--output={files / 'no.tsv'}") == 1
    assert "development trials: 12 speakers are in test.txt too" in capsys.readouterr().err
    assert run("fuse", *systems, f"--output={files / 'no.tsv'}") == 1
    assert "give --dev_scores" in capsys.readouterr().err
    both = [*development, f"--fusion={saved}"]
    assert run("fuse", *systems, *both, f"--output={files / 'no.tsv'}") == 1
    assert "--fusion is fitted already" in capsys.readouterr().err
    place = files / "no.tsv"
    assert run("fuse", *systems, *development, f"--output={place}", f"--save={place}") == 1
    assert "two outputs would be written there" in capsys.readouterr().err
    assert not (files / "no.tsv").exists()
    picture = files / "bayes.png"
    assert run("bayes", f"fused={output}", f"--output={picture}") == 0
    assert picture.stat().st_size > 1000
    assert "0.01: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["picture", "picture.xlsx"])
def test_a_picture_of_no_format_is_refused_before_the_scores_are_read(tmp_path, capsys, name):
    assert run("bayes", tmp_path / "gone.tsv", f"--output={tmp_path / name}") == 1
    said = capsys.readouterr()
    assert f"{name}: a picture's suffix is its format, such as .png, .svg or .pdf" in said.err
    assert said.out == ""


def test_watchlist(files, capsys):
    gallery = [f"test{i}/{j} person{i}\n" for i in range(8) for j in range(2)]
    probes = [f"test{i}/{j} person{i}\n" for i in range(12) for j in (2, 3)]
    (files / "gallery.txt").write_text("".join(gallery))
    (files / "probes.txt").write_text("".join(probes))
    arguments = ["watchlist", files / "test_one.npz", files / "gallery.txt", files / "probes.txt"]
    options = ["--sizes=2,4", "--fpirs=0.2", "--ranks=1,2"]
    assert run(*arguments, *options, f"--output={files / 'found.json'}") == 0
    assert "8 identities of 16 templates; 16 mated probes, 8 of others" in capsys.readouterr().out
    found = json.loads((files / "found.json").read_text())
    assert [row["size"] for row in found["open_set"]] == [2, 4, 8]
    assert found["cmc"]["1"]["value"] > 0.5
    assert run(*arguments, "--ranks=100") == 1
    assert "ranks must be from 1 to the 8 identities" in capsys.readouterr().err
    assert run(*arguments[:3], files / "gallery.txt") == 1
    assert "16 recordings are in the gallery and among the probes" in capsys.readouterr().err
    with_suffix = "".join(line.replace(" ", ".wav ") for line in gallery)  # the same recordings
    (files / "suffix.txt").write_text(with_suffix)
    assert run(*arguments[:3], files / "suffix.txt") == 1
    assert "16 recordings are in the gallery and among the probes" in capsys.readouterr().err
    between = "".join(line.replace(" ", ", ") for line in gallery)
    (files / "commas.txt").write_text(between)
    assert run(*arguments[:2], files / "commas.txt", arguments[3]) == 0
    assert "8 identities of 16 templates" in capsys.readouterr().out
    bare = [files / "gallery_ids.txt", files / "probe_ids.txt"]  # the ids say whose they are
    for file, lines in zip(bare, (gallery, probes), strict=True):
        file.write_text("# recordings\n" + "".join(f"{line.split()[0]}\n" for line in lines))
    assert run(*arguments[:2], *bare) == 0
    assert "8 identities of 16 templates" in capsys.readouterr().out
    (files / "strange.txt").write_text("nobody/1 person1\n")
    assert run(*arguments[:3], files / "strange.txt") == 1
    assert "strange.txt have no embedding: nobody/1" in capsys.readouterr().err
    (files / "bare.txt").write_text("a\nb\n")
    assert run(*arguments[:2], files / "bare.txt", files / "probes.txt") == 1
    assert "do not tell the identity" in capsys.readouterr().err


def test_quality(files, capsys):
    arguments = [files / "dev_one.npz", files / "cohort_one.npz", files / "quality.txt"]
    assert run("quality", *arguments, "--top_n=5") == 0
    values = read_map(files / "quality.txt", float)
    assert len(values) == 48
    assert "the mean of the 5 nearest of 12 cohort entries" in capsys.readouterr().out
    assert run("quality", *arguments[:2], files / "no.txt", "--top_n=13") == 1
    assert "top_n is 13; it must be from 2 to the cohort's size, 12" in capsys.readouterr().err
    given = [files / "dev_one.tsv", files / "calibration.json"]
    assert run("calibrate", *given, f"--quality=cohort={files / 'quality.txt'}") == 0
    assert "higher cohort" in capsys.readouterr().out
    norms = f"--norm_of={files / 'dev_one.npz'}"
    for twice in ([f"--quality=a={files / 'quality.txt'}"] * 2,
                  [f"--quality=norm={files / 'quality.txt'}", norms]):  # fmt: skip
        assert run("calibrate", *given, "--overwrite", *twice) == 1
        assert "there is another quality of the name" in capsys.readouterr().err
    assert run("calibrate", *given, "--overwrite", f"--quality=={files / 'quality.txt'}") == 1
    assert "expected NAME=FILE" in capsys.readouterr().err
    assert run("quality", *arguments[:2], arguments[1]) == 1
    assert "the output is an input too" in capsys.readouterr().err
    assert run("quality", files / "dev_one.npz", files / "dev_two.npz", files / "no.txt") == 1
    assert "12 speakers are in the cohort" in capsys.readouterr().err


def test_a_quality_is_refused_for_speakers_of_the_cohort_whose_ids_are_their_names(
    files, tmp_path, capsys
):
    rng, given = np.random.default_rng(0), [files / "dev_one.npz", tmp_path / "means.npz"]
    for names, fault in (("dev", "12 speakers are in the cohort"), ("other", "")):
        means = {f"{names}{n}": rng.normal(size=16) for n in range(12)}
        save_embeddings(tmp_path / "means.npz", means)
        failed = run("quality", *given, tmp_path / f"{names}.txt", "--top_n=5")
        assert (failed, fault in capsys.readouterr().err) == (bool(fault), True)
    flat = {f"dev{n}": rng.normal(size=16) for n in range(3)}  # recordings of somebody
    save_embeddings(tmp_path / "flat.npz", flat)
    (tmp_path / "utt2spk").write_text("".join(f"{name} other1\n" for name in flat))
    given, known = [tmp_path / "flat.npz", tmp_path / "means.npz"], tmp_path / "utt2spk"
    assert run("quality", *given, tmp_path / "no.txt", f"--utt2spk={known}") == 1
    assert "1 speakers are in the cohort and in the trials: other1" in capsys.readouterr().err


def test_plda(files, capsys):
    given, saved = [files / "test_one.npz", files / "test.txt"], files / "plda.npz"
    fitted, again = files / "plda.tsv", files / "plda_again.tsv"
    assert run("plda", *given, fitted, f"--train={files / 'dev_one.npz'}", "--rank=8",
               f"--save={saved}") == 0  # fmt: skip
    assert run("plda", *given, again, f"--plda={saved}") == 0
    assert again.read_text() == fitted.read_text()
    trials, scores = read_scores(fitted)
    assert eer(operating_points(scores, trials.is_target)) < 0.3
    capsys.readouterr()
    assert run("plda", *given, files / "no.tsv", f"--train={files / 'test_two.npz'}") == 1
    assert "12 speakers are in test.txt too" in capsys.readouterr().err
    own = [files / "dev_one.npz", files / "dev.txt"]
    assert run("plda", *own, files / "no.tsv", f"--plda={saved}") == 1  # those it was fitted on
    assert "plda.npz: 12 speakers are in dev.txt too" in capsys.readouterr().err
    few = [f"--train={files / 'dev_one.npz'}", "--iterations=0"]
    assert run("plda", *given, files / "no.tsv", *few) == 1
    assert "iterations must be 1 or more, got 0" in capsys.readouterr().err
    assert run("plda", *given, files / "no.tsv") == 1
    assert "give --train embeddings" in capsys.readouterr().err


def test_development_scores_have_models_of_their_own(files, tmp_path, capsys):
    """Every model is of two recordings, of test or of development speakers."""
    for part in ("test", "dev"):
        models = [f"{part}-m{s} {part}{s}/{take}" for s in range(12) for take in (0, 1)]
        (tmp_path / f"{part}.models").write_text("\n".join(models) + "\n")
        pairs = [(s, t, take) for s in range(12) for t in range(12) for take in (2, 3)]
        lines = [f"{int(s == t)} {part}-m{s} {part}{t}/{take}\n" for s, t, take in pairs]
        (tmp_path / f"{part}.txt").write_text("".join(lines))
        for system in ("one", "two"):
            given = files / f"{part}_{system}.npz", tmp_path / f"{part}.txt"
            tables = tmp_path / f"{part}_{system}.tsv", f"--models={tmp_path / part}.models"
            assert run("cosine", *given, *tables) == 0
    systems = [f"{name}={tmp_path / f'test_{name}.tsv'}" for name in ("one", "two")]
    given = [f"--dev_scores={name}={tmp_path / f'dev_{name}.tsv'}" for name in ("one", "two")]
    given += [f"--models={tmp_path / 'test.models'}", f"--dev_models={tmp_path / 'dev.models'}"]
    fusion = tmp_path / "fusion.json"
    assert run("fuse", *systems, *given, f"--output={tmp_path / 'ab'}", f"--save={fusion}") == 0
    assert len(Fusion.load(fusion).speakers) == 12
    assert run("report", *systems, *given, f"--output={tmp_path / 'page'}") == 0
    points = [tmp_path / "page" / name for name in report_files(2) if "operating" in name]
    assert [OperatingPoint.load(one).optimistic for one in points] == [False, False]


@pytest.mark.parametrize("command", ["fuse", "report"])
def test_whose_development_scores_are_meant_is_read_in_one_way(files, tmp_path, capsys, command):
    systems = [f"{name}={files / f'test_{name}.tsv'}" for name in ("one", "two")]
    lines = (files / "dev_two.tsv").read_text().splitlines()
    bare = tmp_path / "two.tsv"  # of the system called so; its labels are the other file's
    bare.write_text("".join(line.rpartition("\t")[0] + "\n" for line in lines[1:]))
    given = [f"--dev_scores={files / 'dev_one.tsv'}", f"--dev_scores={bare}"]
    assert run(command, *systems, *given, f"--output={tmp_path / 'out'}") == 0
    capsys.readouterr()
    for wrong, message in (
        ([f"--dev_scores=three={bare}"], "no system is called three"),
        ([given[0], f"--dev_scores=one={bare}"], "two.tsv are of one: write NAME=FILE"),
        ([given[1]], "no file says which trials are targets; give the trial list (--dev_trials)"),
    ):
        assert run(command, *systems, *wrong, f"--output={tmp_path / 'no'}") == 1
        assert message in capsys.readouterr().err


def test_scores_of_another_back_end_are_kept_apart(files, tmp_path, capsys):
    """Of one encoder and one kind: a PLDA, a calibration or a fusion of their own."""
    for name, rank in (("eight", 8), ("four", 4)):
        saved = tmp_path / f"{name}.npz"
        held = files / "cohort_one.npz"
        for part in ("dev", "test"):
            given = files / f"{part}_one.npz", files / f"{part}.txt", tmp_path / f"{part}_{name}"
            made = f"--plda={saved}" if saved.exists() else f"--train={held}"
            more = [f"--rank={rank}", f"--save={saved}"] if not saved.exists() else []
            assert run("plda", *given, made, *more) == 0
        given = tmp_path / f"dev_{name}", tmp_path / f"{name}.json"
        assert run("calibrate", *given) == 0
        llr = tmp_path / f"llr_{name}"
        assert run("apply", tmp_path / f"{name}.json", tmp_path / f"test_{name}", llr) == 0
        fused = f"--output={tmp_path / f'fused_{name}'}", f"--save={tmp_path / f'fusion_{name}'}"
        systems = f"a={tmp_path / f'test_{name}'}", f"--dev_scores=a={tmp_path / f'dev_{name}'}"
        assert run("fuse", *systems, *fused) == 0
    bound = {}
    for kind in ("test", "llr", "fused"):
        assert run("report", tmp_path / f"{kind}_eight", f"--output={tmp_path / kind}") == 0
        bound[kind] = f"--operating_point={tmp_path / kind / 'operating_point.json'}"
    people, dev = f"--metadata={files / 'people.csv'}", tmp_path / "dev_eight"
    capsys.readouterr()
    for words in (
        *(("breakdown", tmp_path / f"{kind}_four", people, point) for kind, point in bound.items()),
        ("apply", tmp_path / "eight.json", tmp_path / "test_four", tmp_path / "out"),
        ("report", tmp_path / "test_four", f"--dev_scores={dev}", f"--output={tmp_path / 'p'}"),
        ("fuse", f"a={tmp_path / 'test_four'}", f"--fusion={tmp_path / 'fusion_eight'}",
         f"--output={tmp_path / 'out'}"),
    ):  # fmt: skip
        assert run(*words) == 1, words
        said = capsys.readouterr().err
        assert "is of the backend " in said
        assert "(a PLDA, a calibration or a fusion): it wants one of its own" in said
    for kind, point in bound.items():
        assert run("breakdown", tmp_path / f"{kind}_eight", people, point) == 0


@pytest.mark.parametrize("label", [0, 1])
def test_trials_of_one_class_are_refused_by_their_file(files, tmp_path, capsys, label):
    lines = (files / "test_one.tsv").read_text().splitlines()
    kept = [lines[1], *(line for line in lines[2:] if line.endswith(f"\t{label}"))]
    lone = tmp_path / "lone.tsv"  # without the first line, which names the list
    lone.write_text("\n".join(kept) + "\n")
    both, output = files / "test_one.tsv", f"--output={tmp_path / 'out'}"
    capsys.readouterr()
    for words in (
        ("report", lone, output),
        ("report", both, f"--dev_scores={lone}", output),
        ("bayes", lone, f"{output}.png"),
        ("breakdown", lone, f"--metadata={files / 'people.csv'}"),
        ("calibrate", lone, tmp_path / "out"),
        ("fuse", f"a={both}", f"--dev_scores=a={lone}", output),
    ):
        assert run(*words) == 1, words
        lack = "impostor" if label else "target"
        assert f"lone.tsv: it has no {lack} trials" in capsys.readouterr().err, words
    assert not (tmp_path / "out").exists()


def test_no_command_replaces_what_is_there_unasked(files, tmp_path, capsys):
    (tmp_path / "mine").write_text("by hand\n")
    mine, one = tmp_path / "mine", files / "test_one.tsv"
    embedded = [files / "test_one.npz", files / "test.txt", mine]
    systems = [f"{n}={one}" for n in "ab"] + [
        f"--dev_scores={n}={files / 'dev_one.tsv'}" for n in "ab"
    ]
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/results.txt").write_text("by hand\n")
    (tmp_path / "people").write_text("test0/0\n")
    for words in (
        ["cosine", *embedded],
        ["normalize", *embedded, files / "cohort_one.npz"],
        ["plda", *embedded, f"--train={files / 'cohort_one.npz'}"],
        ["plda", *embedded[:2], tmp_path / "out", f"--save={mine}"],
        ["calibrate", one, mine],
        ["apply", files / "gone.json", one, mine],
        ["score", *embedded[:2], f"--output={tmp_path / 'scores'}"],
        ["breakdown", one, f"--metadata={files / 'people.csv'}", f"--output={mine}"],
        ["fuse", *systems, f"--output={mine}"],
        ["fuse", *systems, f"--output={tmp_path / 'out'}", f"--save={mine}"],
        ["watchlist", embedded[0], tmp_path / "people", tmp_path / "people", f"--output={mine}"],
        ["bayes", one, f"--output={mine}"],
        ["quality", embedded[0], files / "cohort_one.npz", mine],
    ):
        assert run(*words) == 1, words
        assert "is there already; give another name, or say --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert mine.read_text() == "by hand\n"
    assert run("cosine", *embedded, "--overwrite") == 0
    assert len(read_scores(mine)[1]) == len(read_scores(one)[1])
