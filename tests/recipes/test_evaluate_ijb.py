"""The IJB recipe on a tiny tree in the official format."""

import numpy as np
import pytest
from scripts import load

from speechbrain_qmargin.scoring.ijb import read_ijb, save_image_embeddings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ijb")
    write_ijb = load("tests/scoring/test_ijb.py").write_ijb
    rows = write_ijb(folder / "IJBB", "IJBB", subjects=30)
    names = read_ijb(folder, "IJBB").names
    save_image_embeddings(folder / "images.npz", names, rows[:, 0], rows[:, 1])
    return folder


def test_the_whole_evaluation(folder, capsys):
    recipe = load("recipes/face/evaluate_ijb.py")
    recipe.main(["--ijb", str(folder), "--target", "IJBB", "--replicates", "50", "--all_options",
                 "--embeddings", str(folder / "images.npz"), "--output_folder",
                 str(folder / "out"), "--no-use_detector_score"])  # fmt: skip
    text = capsys.readouterr().out
    assert "IJBB 1:1, N1 D0 F2: embeddings keep their norm, unweighted" in text
    assert "TAR@FAR=1e-06" in text
    table = (folder / "out/options.txt").read_text().splitlines()
    assert len(table) == 1 + 3 * 2 * 2
    shown = next(row for row in table if row.startswith("N1 D0 F2")).split()
    assert f"TAR@FAR=0.01    {shown[4]} %" in text
    assert len(np.load(folder / "out/scores.npy")) == len(read_ijb(folder, "IJBB").trials)
    assert (folder / "out/roc.png").stat().st_size > 1000
