"""The face recipe from the command line to the results, on faces drawn for the test."""

import json

import pytest
from scripts import train

from speechbrain_qmargin.data import mini_faces

TINY = ["--depth=18", "--width=4", "--embedding_dim=16", "--image_size=32", "--batch_size=8"]
TINY += ["--number_of_epochs=2"]


def run(*options, tiny=TINY):
    train("face", "face_qmargin.yaml", *tiny, *options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return mini_faces.build_mini_faces(
        tmp_path_factory.mktemp("faces"),
        num_train=6,
        num_valid=2,
        num_test=3,
        num_images=4,
        progress=False,
    )


def test_the_main_job_ends_with_its_results_and_says_when_it_is_done(
    corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mini_faces, "build_mini_faces", lambda: corpus)
    output = tmp_path / "out"
    run(f"--output_folder={output}")
    printed = capsys.readouterr().out
    assert "TAR@FAR=0.01" in printed
    assert "generated faces" in printed
    assert "of 3 identities" in printed
    assert (output / "scores/trials_test/det.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((output / "results.json").read_text())
    assert results["settings"]["size"] == "mini"
    history = (output / "history.jsonl").read_text().splitlines()
    assert "valid_eer" in json.loads(history[-1])
    run(f"--output_folder={output}")
    assert "This run is done" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--loss=arcface", "--head=sparse", "--model=mobilefacenet"])
def test_loss_head_and_model_are_one_flag_each(corpus, tmp_path, option):
    output = tmp_path / "out"
    tiny = TINY if "model" not in option else TINY[2:]  # depth and width are IResNet's
    given = [f"--data_folder={corpus.folder}", f"--verification_file={corpus.trials_test}"]
    run("--size=small", *given, option, f"--output_folder={output}", tiny=tiny)
    assert (output / "results.json").is_file()


def test_bad_input_is_named_before_anything_is_trained(corpus, tmp_path):
    output = f"--output_folder={tmp_path / 'out'}"
    pairs = f"--verification_file={corpus.trials_test}"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("--size=small", "--data_folder=/nowhere", pairs, output)
    with pytest.raises(ValueError, match="verification_file"):
        run("--size=small", f"--data_folder={corpus.folder}", output)
    broken = tmp_path / "pairs.txt"
    broken.write_text("1 train000/00.png ghost/00.png\n")
    with pytest.raises(FileNotFoundError, match="ghost"):
        run(
            "--size=small",
            f"--data_folder={corpus.folder}",
            f"--verification_file={broken}",
            output,
        )
