"""The alignment recipe on photographs whose landmarks are known."""

import numpy as np
import pytest
from PIL import Image

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.data.align import ARCFACE_TEMPLATE, align_face


@pytest.fixture
def photographs(tmp_path):
    """Two photographs and a broken one, with a file of landmarks."""
    rng = np.random.default_rng(0)
    lines = []
    for name in ("ann/first one.jpg", "bob/1.png", "bob/2.png"):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (150, 140, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        points = 1.2 * ARCFACE_TEMPLATE + 3
        lines.append(name + "".join(f" {value:.3f}" for value in points.flatten()) + "\n")
    file.write_bytes(b"no image")
    (tmp_path / "landmarks.txt").write_text("".join(lines))
    return tmp_path


def align(folder, *before):
    arguments = [folder / "images", folder / "landmarks.txt", folder / "out"]
    return main([*before, "align", *map(str, arguments)])


def test_photographs_are_aligned_and_broken_ones_listed(photographs, capsys):
    align(photographs)
    told = capsys.readouterr()
    assert "2 aligned images" in told.out
    assert "3/3" in told.err
    out = photographs / "out"
    pixels = np.asarray(Image.open(photographs / "images/bob/1.png"))
    wanted = align_face(pixels, 1.2 * ARCFACE_TEMPLATE + 3)
    difference = np.abs(np.asarray(Image.open(out / "bob/1.png")).astype(int) - wanted)
    assert difference.max() <= 1  # landmarks have three decimals in the file
    assert Image.open(out / "ann/first one.png").size == (112, 112)
    assert (out / "skipped_images.txt").read_text().startswith("bob/2.png\t")

    # again: what is there stays, what is repaired is done
    before = (out / "bob/1.png").stat().st_mtime_ns
    Image.fromarray(pixels).save(photographs / "images/bob/2.png")
    align(photographs, "--quiet")
    assert capsys.readouterr().err == ""  # no progress bar
    assert (out / "bob/1.png").stat().st_mtime_ns == before
    assert (out / "bob/2.png").is_file()
    assert not (out / "skipped_images.txt").exists()


def test_other_landmarks_and_another_photograph_are_aligned_anew(photographs, monkeypatch, capsys):
    align(photographs)
    out, pixels = photographs / "out", np.asarray(Image.open(photographs / "images/bob/1.png"))
    before = {name: (out / name).read_bytes() for name in ("ann/first one.png", "bob/1.png")}
    listed = photographs / "landmarks.txt"
    ann, bob, broken = listed.read_text().splitlines()
    points = 1.1 * ARCFACE_TEMPLATE + 7
    bob = "bob/1.png" + "".join(f" {value:.3f}" for value in points.flatten())
    listed.write_text(f"{bob}\n{broken}\n")  # without ann, whose image stays
    monkeypatch.chdir(photographs)
    assert main(["--quiet", "align", "images", "landmarks.txt", "out"]) == 0
    difference = np.abs(np.asarray(Image.open(out / "bob/1.png")).astype(int)
                        - align_face(pixels, points))  # fmt: skip
    assert difference.max() <= 1
    assert (out / "ann/first one.png").read_bytes() == before["ann/first one.png"]

    Image.fromarray(pixels[::-1]).save(photographs / "images/ann/first one.jpg")
    (out / "bob/1.png").write_bytes(b"as it is")
    listed.write_text(f"{ann}\n{bob}\n{broken}\n")
    align(photographs, "--quiet")
    assert (out / "ann/first one.png").read_bytes() != before["ann/first one.png"]
    assert (out / "bob/1.png").read_bytes() == b"as it is"  # wherefrom the command is given
    assert "2 aligned images" in capsys.readouterr().out


def test_an_image_that_is_not_of_the_command_is_not_passed_over(photographs, capsys):
    file = photographs / "out/bob/1.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"somebody else's")
    assert align(photographs) == 1
    assert "out/bob/1.png is not of this command; give another OUTPUT" in capsys.readouterr().err
    assert file.read_bytes() == b"somebody else's"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg 1 2 3", "landmarks.txt:4: expected 'image x1 y1"),
        ("a.jpg" + " x" * 10, "landmarks.txt:4: expected 'image x1 y1"),
        ("", "landmarks.txt:4: expected"),
        ("a.jpg" + " 1" * 9 + " nan", "landmarks.txt:4: expected 'image x1 y1"),
        ("../a.jpg" + " 1" * 10, "landmarks.txt:4: ../a.jpg must be a path below"),
        ("bob/1.jpg" + " 1" * 10, "landmarks.txt:4: bob/1.jpg would overwrite the image of line 2"),
    ],
)
def test_lines_that_do_not_fit_are_named(photographs, line, message, capsys):
    with (photographs / "landmarks.txt").open("a") as stream:
        stream.write(line + "\n")
    assert align(photographs) == 1
    assert message in capsys.readouterr().err
