"""The console command from embeddings to the report, and its messages."""

import json

import numpy as np
import pytest

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.embeddings import save_embeddings
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


def test_from_embeddings_to_a_report(files, capsys):
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
    report += [f"--development=AS-norm={files / 'dev_normalize.tsv'}"]
    assert main(report) == 0
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert "report.html" in printed
    content = json.loads((files / "report" / "report.json").read_text())
    assert set(content["systems"]) == {"cosine", "AS-norm"}
    point = OperatingPoint.load(files / "report" / "operating_point_2.json")
    assert point.system == "AS-norm"
    assert not point.optimistic


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
