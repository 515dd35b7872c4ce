"""Checkpoints that appear whole."""

import shutil

import pytest
import torch

from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer


class Interrupted(Exception):
    pass


def test_a_full_disk_is_named_and_the_last_checkpoint_kept(tmp_path):
    def full(obj, path):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    checkpointer = AtomicCheckpointer(tmp_path, {"layer": torch.nn.Linear(2, 1)})
    checkpointer.save_checkpoint(meta={"epoch": 1})
    checkpointer.add_recoverable("other", torch.nn.Linear(1, 1), custom_save_hook=full)
    with pytest.raises(OSError, match=f"{tmp_path}.*make room") as error:
        checkpointer.save_checkpoint(meta={"epoch": 2})
    assert "PytorchStreamWriter" in str(error.value)
    assert [kept.meta["epoch"] for kept in checkpointer.list_checkpoints()] == [1]


def test_an_interrupted_save_leaves_the_last_checkpoint_to_resume_from(tmp_path):
    layer = torch.nn.Linear(2, 1)
    checkpointer = AtomicCheckpointer(tmp_path, {"layer": layer})
    kept = checkpointer.save_checkpoint(meta={"epoch": 1})
    assert kept.path.is_dir()
    assert kept.paramfiles["layer"].is_file()
    good = layer.weight.detach().clone()

    def fail(obj, path):
        path.write_text("half")
        raise Interrupted

    checkpointer.add_recoverable("other", torch.nn.Linear(1, 1), custom_save_hook=fail)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(Interrupted):
        checkpointer.save_checkpoint(meta={"epoch": 2})

    resumed = AtomicCheckpointer(tmp_path, {"layer": layer})
    assert resumed.recover_if_possible().meta["epoch"] == 1
    assert torch.equal(layer.weight, good)
    resumed.save_checkpoint(meta={"epoch": 3})
    assert not list(tmp_path.glob("partial_*"))
    assert len(resumed.list_checkpoints()) == 2
    shutil.rmtree(tmp_path)
