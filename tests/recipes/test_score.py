"""The scoring recipe: several lists from one set of embeddings."""

import json
import runpy
import sys

import numpy as np
import pytest
from scripts import ROOT, load

from speechbrain_qmargin.embeddings import save_embeddings
from speechbrain_qmargin.scoring.score_files import read_scores


def run(*options):
    module = load("recipes/voxceleb/score.py")
    module.main([str(ROOT / "hparams" / "score.yaml"), *map(str, options)])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    rng = np.random.default_rng(0)
    everything = {}
    for part, count in (("O", 8), ("H", 8), ("dev", 8), ("cohort", 12)):
        rows = {}
        for speaker in range(count):
            voice = rng.normal(size=16)
            for take in range(4):
                rows[f"{part}{speaker}/{take}"] = voice + 0.8 * rng.normal(size=16)
        ids = list(rows)
        if part == "cohort":
            save_embeddings(folder / "cohort.npz", rows)
            continue
        everything |= rows
        pairs = [(a, b) for i, a in enumerate(ids) for b in ids[:i]]
        lines = [f"{int(a.split('/')[0] == b.split('/')[0])} {a} {b}\n" for a, b in pairs]
        (folder / f"{part}.txt").write_text("".join(lines))
    save_embeddings(folder / "embeddings.npz", everything)
    return folder


def test_lists_are_scored_normalised_and_calibrated_in_one_run(files, tmp_path, capsys):
    run(
        f"--embeddings={files / 'embeddings.npz'}",
        f"--trials=[{files / 'O.txt'}, {files / 'H.txt'}]",
        f"--cohort={files / 'cohort.npz'}",
        "--top_n=6",
        f"--dev_trials={files / 'dev.txt'}",
        f"--output_folder={tmp_path}",
    )
    printed = capsys.readouterr().out
    assert "O, cosine" in printed
    assert "H: as-norm minus cosine, paired over speakers" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"O", "H"}
    assert set(results["O"]) == {"cosine", "centred", "as-norm", "calibrated"}
    normalised, calibrated = (results["H"][name]["figures"] for name in ("as-norm", "calibrated"))
    assert calibrated["EER"]["value"] == pytest.approx(normalised["EER"]["value"])
    assert calibrated["Cllr"]["value"] >= calibrated["minCllr"]["value"]
    assert len(read_scores(tmp_path / "O" / "as-norm.tsv")[1]) == 32 * 31 // 2
    assert (tmp_path / "H" / "det.png").read_bytes().startswith(b"\x89PNG")


def test_optimistic_lists_are_refused(files, tmp_path):
    given = [f"--embeddings={files / 'embeddings.npz'}", f"--trials=[{files / 'O.txt'}]"]
    given.append(f"--output_folder={tmp_path}")
    with pytest.raises(ValueError, match=r"8 speakers are in O\.txt too"):
        run(*given, f"--dev_trials={files / 'O.txt'}")
    with pytest.raises(ValueError, match="8 speakers are in the cohort and in the trials"):
        run(*given, f"--cohort={files / 'embeddings.npz'}")
    with pytest.raises(ValueError, match="embeddings: give it"):
        run(given[1])
    with pytest.raises(ValueError, match="two lists of one name"):
        run(given[0], f"--trials=[{files / 'O.txt'}, {files / 'O.txt'}]")
    assert not list(tmp_path.iterdir())


def test_help_needs_no_yaml(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["score.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "recipes/voxceleb/score.py"), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("Score trial lists from one set of embeddings")
