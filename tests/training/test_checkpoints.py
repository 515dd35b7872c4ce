"""Checkpoints that appear whole."""

import builtins
import errno
import shutil

import pytest
import torch
from speechbrain.utils.epoch_loop import EpochCounter

from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer, load_average, load_module


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


def three(folder):
    """Three epochs' checkpoints, whose weights are 1, 2, 3."""
    layer, counter = torch.nn.Linear(64, 8), EpochCounter(9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    recoverables = {"layer": layer, "counter": counter, "optimizer": optimizer}
    checkpointer = AtomicCheckpointer(folder, recoverables)
    for value in (1, 2, 3):
        torch.nn.init.constant_(layer.weight, value)
        counter.current = value
        checkpointer.save_checkpoint(meta={"epoch": value, "unixtime": value})
    return layer, counter, recoverables


def flip(file, at=0.5):
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    file.write_bytes(data)


DAMAGES = {
    "truncated weights": ("layer.ckpt", lambda file: file.write_bytes(file.read_bytes()[:-200])),
    "flipped weights": ("layer.ckpt", flip),
    "empty weights": ("layer.ckpt", lambda file: file.write_bytes(b"")),
    "text for weights": ("layer.ckpt", lambda file: file.write_text("weights")),
    "flipped optimiser": ("optimizer.ckpt", flip),
    "no weights": ("layer.ckpt", lambda file: file.unlink()),
    "no counter": ("counter.ckpt", lambda file: file.write_text("")),
    "another counter": ("counter.ckpt", lambda file: file.write_bytes(b"\xff\xfe")),
    "no meta": ("CKPT.yaml", lambda file: file.write_text("")),
    "damaged meta": ("CKPT.yaml", lambda file: file.write_text("epoch: [1\n")),
    "binary meta": ("CKPT.yaml", lambda file: file.write_bytes(b"\0\xff\0")),
    "meta of nothing": ("CKPT.yaml", lambda file: file.write_text("epoch: 3\n")),
}


@pytest.mark.parametrize(("name", "harm"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, name, harm, caplog):
    layer, counter, recoverables = three(tmp_path)
    newest = sorted(tmp_path.glob("CKPT*"))[-1]
    harm(newest / name)
    torch.nn.init.zeros_(layer.weight)
    found = AtomicCheckpointer(tmp_path, recoverables).recover_if_possible()
    assert found.meta["epoch"] == counter.current == 2
    assert (layer.weight == 2).all()
    said = [one for one in caplog.messages if "the checkpoint before it is taken" in one]
    assert len(said) == 1
    assert newest.name in said[0]
    assert name in said[0]


def test_where_none_is_whole_the_run_does_not_begin_anew(tmp_path):
    _, _, recoverables = three(tmp_path)
    for folder in tmp_path.glob("CKPT*"):
        flip(folder / "layer.ckpt")
    with pytest.raises(OSError, match=r"no checkpoint is whole.*layer\.ckpt: damaged"):
        AtomicCheckpointer(tmp_path, recoverables).recover_if_possible()
    assert AtomicCheckpointer(tmp_path / "new", {}).recover_if_possible() is None


@pytest.mark.parametrize("name", ["CKPT.yaml", "layer.ckpt"])
def test_a_lack_of_open_files_is_no_damage_of_a_checkpoint(tmp_path, monkeypatch, name):
    """An older one would be taken, or the mean of fewer epochs."""
    layer, _, recoverables = three(tmp_path)
    checkpointer = AtomicCheckpointer(tmp_path, recoverables)
    newest, opened = sorted(tmp_path.glob("CKPT*"))[-1] / name, open

    def full(path, *arguments, **options):
        if newest.samefile(path):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OSError, match="Too many open files"):
        checkpointer.recover_if_possible()
    with pytest.raises(OSError, match="Too many open files"):
        load_average({"layer": layer}, checkpointer, 3)


def test_the_average_leaves_damaged_epochs_out_and_says_so(tmp_path, caplog):
    layer, _, recoverables = three(tmp_path)
    flip(sorted(tmp_path.glob("CKPT*"))[1] / "layer.ckpt")
    checkpointer = AtomicCheckpointer(tmp_path, recoverables)
    averaged = load_average({"layer": layer}, checkpointer, 3)
    assert [one.meta["epoch"] for one in averaged] == [3, 1]
    assert (layer.weight == 2).all()
    assert "damaged" in caplog.text
    assert "the average is that of 2 epochs" in caplog.text
    for folder in tmp_path.glob("CKPT*"):
        (folder / "layer.ckpt").write_bytes(b"")
    with pytest.raises(OSError, match="no checkpoint is whole"):
        load_average({"layer": layer}, checkpointer, 3)
    with pytest.raises(OSError, match=r"layer\.ckpt: damaged, or not weights alone"):
        load_module(layer, folder / "layer.ckpt")


def test_checkpoints_of_tensors_alone(tmp_path):
    _, _, recoverables = three(tmp_path)
    newest = sorted(tmp_path.glob("CKPT*"))[-1]
    torch.save({"weight": EpochCounter(1)}, newest / "layer.ckpt")
    assert AtomicCheckpointer(tmp_path, recoverables).recover_if_possible().meta["epoch"] == 2
