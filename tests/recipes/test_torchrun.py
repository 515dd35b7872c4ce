"""The recipe over two gloo processes against one process with the same global batch."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from speechbrain_qmargin.data import mini_voices
from speechbrain_qmargin.scoring.trials import load_embeddings

ROOT = Path(__file__).parents[2]
BATCH = 8


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


def train(corpus, output, world, *options):
    """A run of the recipe over `world` processes; returns its losses and embeddings."""
    command = [sys.executable]
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={world}"]
        command += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    command += [str(ROOT / "recipes/voxceleb/train.py"), str(ROOT / "hparams/qmargin.yaml")]
    command += ["--size=small", "--channels=64", "--attention_channels=16", "--embedding_dim=16"]
    command += ["--number_of_epochs=2", "--lr=0.003", "--final_lr=0.003", "--warmup_epochs=0"]
    command += ["--augment=none", "--noprogressbar"]
    command += ["--sentence_len=0.5", f"--batch_size={BATCH // world}", "--num_valid_speakers=0"]
    command += ["--device=cpu", "--distributed_backend=gloo", "--lr_reference_batch=8"]
    command += [f"--data_folder={corpus.folder}", f"--verification_file={corpus.trials_test}"]
    command += [f"--output_folder={output}", *options]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-6000:]
    history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    return [epoch["loss"] for epoch in history], load_embeddings(output / "embeddings.npz")


@pytest.mark.parametrize("head", ["dense", "sparse"])
def test_two_processes_are_one_with_the_whole_batch(corpus, tmp_path, head):
    losses, embeddings = train(corpus, tmp_path / "one", 1, f"--head={head}")
    two_losses, two_embeddings = train(corpus, tmp_path / "two", 2, f"--head={head}")
    assert len(losses) == 2
    # float32 rounding, which batch normalisation lets grow from step to step
    assert two_losses == pytest.approx(losses, rel=1e-3)
    for name, row in embeddings.items():
        other = two_embeddings[name]
        cosine = row @ other / np.linalg.norm(row) / np.linalg.norm(other)
        assert cosine > 0.999, name


def test_a_sparse_run_resumes_on_another_number_of_processes(corpus, tmp_path):
    output = tmp_path / "moved"
    two, before = train(corpus, output, 2, "--head=sparse", "--average_checkpoints=2")
    # as if it had been killed in its last epoch
    (output / "results.json").unlink()
    checkpoints = sorted((output / "save").glob("CKPT+*"))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    one, after = train(corpus, output, 1, "--head=sparse", "--average_checkpoints=2")
    assert one[:1] == two[:1]
    assert one[1] == pytest.approx(two[1], rel=1e-3)
    for name in before:
        np.testing.assert_allclose(after[name], before[name], rtol=0.02, atol=0.02)
