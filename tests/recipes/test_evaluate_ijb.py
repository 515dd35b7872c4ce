"""The IJB recipe on a tiny tree in the official format."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import load

from speechbrain_qmargin.faces.ijb import read_ijb, save_image_embeddings
from speechbrain_qmargin.models.iresnet import IResNet
from speechbrain_qmargin.published import load_published


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ijb")
    write_ijb = load("tests/faces/test_ijb.py").write_ijb
    rows = write_ijb(folder / "IJBB", "IJBB", subjects=30)
    names = read_ijb(folder, "IJBB").names
    save_image_embeddings(folder / "images.npz", names, rows[:, 0], rows[:, 1])
    return folder


def test_the_whole_evaluation(folder, capsys):
    recipe = load("recipes/face/evaluate_ijb.py")
    recipe.main(["--ijb", str(folder), "--target", "IJBB", "--all_options", "--search",
                 "--embeddings", str(folder / "images.npz"), "--output",
                 str(folder / "out"), "--no-use_detector_score"])  # fmt: skip
    text = capsys.readouterr().out
    assert "IJBB 1:1, N1 D0 F2: embeddings keep their norm, unweighted" in text
    assert "TAR@FAR=1e-06" in text
    assert "gallery S1: " in text
    table = (folder / "out/options.txt").read_text().splitlines()
    assert len(table) == 1 + 3 * 2 * 2
    shown = next(row for row in table if row.startswith("N1 D0 F2")).split()
    assert f"TAR@FAR=0.01    {shown[4]} %" in text
    assert len(np.load(folder / "out/scores.npy")) == len(read_ijb(folder, "IJBB").trials)
    assert (folder / "out/roc.png").stat().st_size > 1000


def test_a_published_checkpoint_is_evaluated_beside_itself(tmp_path, capsys):
    write_ijb = load("tests/faces/test_ijb.py").write_ijb
    write_ijb(tmp_path / "IJBC", "IJBC", subjects=6)
    protocol = read_ijb(tmp_path, "IJBC")
    rng = np.random.default_rng(0)
    crops = tmp_path / "IJBC/loose_crop"
    crops.mkdir()
    for name in protocol.names:
        Image.fromarray(rng.integers(0, 256, (120, 120, 3), dtype=np.uint8)).save(crops / name)

    recipe = load("recipes/face/evaluate_ijb.py")
    torch.manual_seed(0)
    for name in ("a", "b"):
        state = IResNet(18, embedding_dim=8, channels=2).state_dict()
        torch.save(
            {f"module.{key}": value for key, value in state.items()}, tmp_path / f"{name}.pth"
        )

    def evaluate(name, *options):
        arguments = ["--ijb", tmp_path, "--encoder", tmp_path / f"{name}.pth"]
        recipe.main([str(one) for one in (*arguments, "--device", "cpu", *options)])

    evaluate("a")
    shown = capsys.readouterr().out
    assert "a.pth: arcface_torch, IResNet-18, 2 channels" in shown
    assert "IJBC 1:1, N1 D1 F2" in shown
    found = np.load(tmp_path / "a_IJBC/cache/embeddings.npy")
    assert found.shape == (len(protocol.names), 2, 8)

    # the first image, embedded by hand
    model = load_published(tmp_path / "a.pth").encoder
    from speechbrain_qmargin.data.align import align_face

    pixels = np.asarray(Image.open(crops / protocol.names[0]))
    image = torch.from_numpy(align_face(pixels, protocol.landmarks[0]).copy())
    image = (image.permute(2, 0, 1)[None].float() - 127.5) / 127.5
    with torch.no_grad():
        wanted = torch.cat([model(image), model(image.flip(3))])[:, 0]
    np.testing.assert_allclose(found[0], wanted, rtol=1e-3, atol=1e-3)

    evaluate("b")
    assert (tmp_path / "b_IJBC/report.txt").is_file()
    with pytest.raises(ValueError, match=r"cache\.json: of the model .* \(--output\)"):
        evaluate("b", "--output", tmp_path / "a_IJBC")


def test_results_of_a_model_go_where_no_other_model_writes(folder, tmp_path):
    recipe = load("recipes/face/evaluate_ijb.py")
    recipe.main(["--ijb", str(folder), "--target", "IJBB",
                 "--embeddings", str(folder / "images.npz")])  # fmt: skip
    assert (folder / "images_IJBB/report.json").is_file()
    (tmp_path / "save").mkdir()
    run = Namespace(encoder=str(tmp_path), embeddings=None, target="IJBC")
    assert recipe.default_folder(run) == tmp_path / "IJBC"
