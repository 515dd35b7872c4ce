"""The recipe over two gloo processes against one process with the same global batch."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import free_port, train_together
from scripts import ROOT, load, train

from speechbrain_qmargin.data.recordio import write_records
from speechbrain_qmargin.embeddings import load_embeddings
from speechbrain_qmargin.faces.ijb import read_ijb
from speechbrain_qmargin.synthetic import faces as mini_faces
from speechbrain_qmargin.synthetic import voices as mini_voices

BATCH = 8  # of all processes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return mini_voices.build_mini_corpus(
        tmp_path_factory.mktemp("corpus") / "mini",
        progress=False,
        num_train_speakers=4,
        num_valid_speakers=2,
        num_test_speakers=2,
        num_sessions=2,
        num_utterances=4,
    )


def command_of(recipe, yaml, *options):
    """A recipe over two gloo processes, one thread each, as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command += [str(ROOT / "recipes" / recipe / "train.py"), str(ROOT / "hparams" / yaml)]
    return [*command, "--noprogressbar", "--device=cpu", "--distributed_backend=gloo", *options]


def torchrun(recipe, yaml, *options):
    command = command_of(recipe, yaml, *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-6000:]


def losses_of(output):
    history = (output / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in history]


def run(corpus, output, world, *options):
    """A run of the speaker recipe over `world` processes; its losses and embeddings."""
    tiny = [*tiny_run(corpus, output, world), *options]
    if world == 1:
        train("voxceleb", "qmargin.yaml", *tiny)
    else:
        train_together("voxceleb", "qmargin.yaml", *tiny, number=world)
    return losses_of(output), load_embeddings(output / "embeddings.npz")


def tiny_run(corpus, output, world, epochs=2):
    tiny = ["--size=small", "--channels=64", "--attention_channels=16", "--embedding_dim=16"]
    tiny += [
        f"--number_of_epochs={epochs}",
        "--lr=0.0003",
        "--final_lr=0.0003",
        "--warmup_epochs=0",
    ]
    tiny += ["--augment=none", "--sentence_len=0.5", f"--batch_size={BATCH // world}"]
    tiny += ["--num_valid_speakers=0", "--lr_reference_batch=8", "--average_checkpoints=2"]
    tiny += [f"--data_folder={corpus.folder}", f"--verification_file={corpus.trials_test}"]
    return [*tiny, f"--output_folder={output}"]


@pytest.mark.slow
def test_sigterm_to_every_process_ends_after_a_checkpoint_of_all(corpus, tmp_path):
    """As Slurm sends it: to torchrun, its processes and their workers, all at once."""
    output = tmp_path / "run"
    options = [*tiny_run(corpus, output, 2, epochs=500), "--num_workers=1", "--head=sparse"]
    command = command_of("voxceleb", "qmargin.yaml", *options)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as ran:
        until = time.monotonic() + 300
        while not (output / "history.jsonl").is_file():
            assert ran.poll() is None, ran.communicate()[1][-6000:]
            assert time.monotonic() < until
            time.sleep(0.2)
        os.killpg(ran.pid, signal.SIGTERM)
        said = ran.communicate(timeout=60)[1]
    assert ran.returncode != 0  # torchrun's own; that of its processes is 143
    where = r"SIGTERM: the run ends at epoch (\d+), (?:step (\d+)|its end); a checkpoint is written"
    epoch, step = re.search(where, (output / "log.txt").read_text()).groups()
    newest = max((output / "save").glob("CKPT+*"), key=lambda path: path.stat().st_mtime)
    assert json.loads((newest / "brain.ckpt").read_text())["step"] == int(step or 0)
    assert len(losses_of(output)) == int(epoch) - (step is not None)
    assert "killed by signal" not in said  # of a worker
    assert "SIGKILL" not in said  # by torchrun, of what has not ended 30 s later


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--head=dense", "--freeze=blocks.1", "--freeze_epochs=1"], ["--head=sparse"]]
)
def test_two_processes_are_one_with_the_whole_batch_and_one_goes_on_for_two(
    corpus, tmp_path, options
):
    options = [*options, "--reset_after_epochs=[1]", "--reset_prototypes=all"]
    options += ["--max_grad_norm=0.5"]  # the norm is that of all shards
    losses, embeddings = run(corpus, tmp_path / "one", 1, *options)
    output = tmp_path / "two"
    two_losses, two_embeddings = run(corpus, output, 2, *options)
    for folder in (tmp_path / "one", output):
        first = json.loads((folder / "history.jsonl").read_text().splitlines()[0])
        assert first["prototypes_reset"] == 6  # 2 speakers at 3 speeds
    assert len(losses) == 2
    # float32 rounding, which batch normalisation lets grow from step to step: ten times the rate
    # makes 1e-3 to 4e-3 of it, by the processor
    assert two_losses == pytest.approx(losses, rel=1e-3)
    for name, row in embeddings.items():
        other = two_embeddings[name]
        cosine = row @ other / np.linalg.norm(row) / np.linalg.norm(other)
        assert cosine > 0.999, name

    # as if the two had been killed in their last epoch
    (output / "results.json").unlink()
    checkpoints = sorted((output / "save").glob("CKPT+*"))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    moved_losses, moved = run(corpus, output, 1, *options)
    assert moved_losses[0] == two_losses[0]
    assert moved_losses[1] == pytest.approx(two_losses[1], rel=1e-3)
    for name in two_embeddings:
        np.testing.assert_allclose(moved[name], two_embeddings[name], rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_webface_in_small_trains_in_shards_resumes_and_is_scored_on_ijb(tmp_path, capsys):
    """The YAML of 2 M identities with 129 of them: records, shards over two ranks, .bin, IJB."""

    def png(face):
        stream = io.BytesIO()
        face.save(stream, format="PNG")
        return stream.getvalue()

    identities = 129
    faces = [png(mini_faces.draw_face((0, i), j, 32)) for i in range(identities) for j in range(2)]
    write_records(tmp_path / "train.rec", faces, [i // 2 for i in range(len(faces))])
    same = [True, False] * 10
    images = [faces[0], faces[1], faces[2], faces[5]] * 10
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, same)))
    output = tmp_path / "out"
    options = ["--size=webface42m", f"--data_folder={tmp_path / 'train.rec'}", "--width=4"]
    options += ["--number_of_epochs=2", "--average_checkpoints=2"]
    options += [f"--test_sets=[{tmp_path / 'lfw.bin'}]", "--num_workers=0", "--image_size=32"]
    options += ["--batch_size=32"]  # four steps an epoch
    options += [f"--output_folder={output}"]
    torchrun("face", "face_qmargin.yaml", *options)
    results = json.loads((output / "results.json").read_text())
    assert results["settings"]["depth"] == 100
    assert results["settings"]["loss"] == "qmargin_face"
    assert results["settings"]["out_n_neurons"] == identities
    accuracy, _ = results["pair_sets"]["lfw"]
    assert 0 <= accuracy["mean"] <= 1
    assert accuracy["pairs"] == 20
    assert len((output / "scores/lfw/cosine.tsv").read_text().splitlines()) >= 20
    assert (output / "scores/lfw/det.png").is_file()

    # as if it had been killed in its last epoch
    before = losses_of(output)
    (output / "results.json").unlink()
    shutil.rmtree(sorted((output / "save").glob("CKPT+*"))[-1])
    train_together("face", "face_qmargin.yaml", *options, number=2)
    assert losses_of(output) == pytest.approx(before, rel=1e-5)

    write_ijb = load("tests/faces/test_ijb.py").write_ijb
    write_ijb(tmp_path / "IJBB", "IJBB", subjects=6)
    crops = tmp_path / "IJBB" / "loose_crop"
    crops.mkdir()
    for number, name in enumerate(read_ijb(tmp_path, "IJBB").names):
        mini_faces.draw_face((1, number % 6), number).save(crops / name)
    evaluate = load("recipes/face/evaluate_ijb.py")
    arguments = ["--ijb", tmp_path, "--target", "IJBB", "--encoder", output]
    evaluate.main([str(a) for a in [*arguments, "--output", tmp_path / "ijb"]])
    assert "TAR@FAR=0.0001" in capsys.readouterr().out
