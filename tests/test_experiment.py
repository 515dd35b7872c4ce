"""Settings, sizes, the output folder, checkpoints that appear whole."""

import shutil

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_qmargin.experiment import AtomicCheckpointer, load_experiment

BASE = """
size: auto
data_folder: null
seed: 0
output_folder: !ref results/<size>/<seed>
width: 512
deep: !ref <width> * 2
loss: qmargin
layer: !new:torch.nn.Linear
    in_features: !ref <width>
    out_features: 1
"""


@pytest.fixture
def yaml(tmp_path):
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "mini.yaml").write_text("width: 8\n")
    (tmp_path / "base.yaml").write_text(BASE)
    return str(tmp_path / "base.yaml")


def test_auto_is_mini_without_data_and_full_with(yaml):
    assert load_experiment([yaml]).settings["deep"] == 16
    full = load_experiment([yaml, "--data_folder", "/some/where"])
    assert full.settings["deep"] == 1024
    assert full.settings["output_folder"] == "results/full/0"


def test_the_command_line_wins_over_the_size(yaml):
    experiment = load_experiment([yaml, "--size=mini", "--width", "4"])
    assert experiment.settings["width"] == 4
    with open(yaml) as file:
        hparams = load_hyperpyyaml(file, experiment.overrides)
    assert hparams["layer"].in_features == 4


def test_tags_on_the_command_line_survive(yaml):
    experiment = load_experiment([yaml, "--layer=!new:torch.nn.Identity"])
    with open(yaml) as file:
        hparams = load_hyperpyyaml(file, experiment.overrides)
    assert isinstance(hparams["layer"], torch.nn.Identity)


def test_errors_name_what_is_wrong(yaml):
    with pytest.raises(ValueError, match=r"--widht is neither a setting .* width"):
        load_experiment([yaml, "--widht", "3"])
    with pytest.raises(ValueError, match="'huge' is unknown; choose auto, full, mini"):
        load_experiment([yaml, "--size", "huge"])
    with pytest.raises(ValueError, match="--width is given twice"):
        load_experiment([yaml, "--width=3", "--width=4"])
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        load_experiment(["gone.yaml"])


def test_another_experiments_folder_is_refused(yaml, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    experiment = load_experiment([yaml, "--output_folder", str(folder)])
    experiment.check_output_folder()
    (folder / "hyperparams.yaml").write_text(
        f"output_folder: {folder}\nwidth: 8\nloss: cosface\nsize: mini\n"
    )
    with pytest.raises(ValueError, match="loss: cosface there, qmargin now"):
        experiment.check_output_folder()
    same = load_experiment([yaml, "--output_folder", str(folder), "--loss", "cosface"])
    same.check_output_folder()


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
