"""Settings, sizes, the output folder, checkpoints that appear whole."""

import shutil
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from speechbrain_qmargin.training.experiment import AtomicCheckpointer, load_experiment

HPARAMS = Path(__file__).parent.parent / "hparams"

BASE = """
overlays: [layers/<kind>.yaml, sizes/<size>.yaml]
size: auto
kind: wide
data_folder: null
seed: 0
output_folder: !ref results/<size>/<seed>
width: 512
deep: !ref <width> * 2
loss: qmargin
layer: !PLACEHOLDER
"""

WIDE = """
outputs: 1
layer: !new:torch.nn.Linear
    in_features: !ref <width>
    out_features: !ref <outputs>
"""


@pytest.fixture
def yaml(tmp_path):
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "mini.yaml").write_text("width: 8\ndepth_of_another_model: 3\n")
    (tmp_path / "sizes" / "flat.yaml").write_text("kind: none\n")
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "wide.yaml").write_text(WIDE)
    (tmp_path / "layers" / "biased.yaml").write_text("extends: wide.yaml\noutputs: 5\n")
    (tmp_path / "layers" / "none.yaml").write_text("layer: !new:torch.nn.Identity\n")
    (tmp_path / "base.yaml").write_text(BASE)
    return str(tmp_path / "base.yaml")


def test_auto_is_mini_without_data_and_full_with(yaml):
    assert load_experiment([yaml]).settings["deep"] == 16
    full = load_experiment([yaml, "--data_folder", "/some/where"])
    assert full.settings["deep"] == 1024
    assert full.settings["output_folder"] == "results/full/0"


def load(*argv, **known):
    experiment = load_experiment(list(argv))
    return experiment, experiment.load(**known)


def test_the_command_line_wins_over_the_size(yaml, tmp_path):
    out = f"--output_folder={tmp_path / 'out'}"
    experiment, hparams = load(yaml, "--size=mini", "--width", "4", out, seed=7)
    assert experiment.settings["width"] == 4
    assert hparams["layer"].in_features == 4
    assert hparams["seed"] == 7
    assert "depth_of_another_model" not in hparams


def test_tags_on_the_command_line_survive(yaml, tmp_path):
    _, hparams = load(yaml, "--layer=!new:torch.nn.Identity", f"--output_folder={tmp_path / 'out'}")
    assert isinstance(hparams["layer"], torch.nn.Identity)


def test_overlays_are_chosen_by_setting_size_and_command_line(yaml, tmp_path):
    out = f"--output_folder={tmp_path / 'out'}"
    assert load(yaml, out)[1]["layer"].out_features == 1
    assert load(yaml, "--kind=biased", out)[1]["layer"].out_features == 5
    assert load(yaml, "--kind=biased", "--outputs=2", out)[1]["layer"].out_features == 2
    assert isinstance(load(yaml, "--size=flat", out)[1]["layer"], torch.nn.Identity)
    assert load(yaml, "--size=flat", "--kind=wide", out)[1]["layer"].in_features == 512
    with pytest.raises(ValueError, match="kind: 'tall' is unknown; choose biased, none, wide"):
        load_experiment([yaml, "--kind=tall"])


def test_a_run_can_be_extended(yaml, tmp_path):
    first = tmp_path / "first"
    experiment, _ = load(yaml, "--kind=biased", "--width=3", f"--output_folder={first}", seed=5)
    experiment.begin()
    second = tmp_path / "second.yaml"
    second.write_text(
        "extends: <start>/experiment.yaml\nstart: !PLACEHOLDER\n"
        "output_folder: !ref <start>/tuned\noutputs: 4\n"
    )
    experiment, hparams = load(str(second), f"--start={first}")
    assert (hparams["layer"].in_features, hparams["layer"].out_features) == (3, 4)
    assert hparams["seed"] == 5
    assert experiment.output_folder == first / "tuned"
    with pytest.raises(ValueError, match="--start must be given"):
        load_experiment([str(second)])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_experiment([str(second), "--start=nowhere"])


def test_every_value_of_a_size_is_some_models():
    for recipe, sizes in (("qmargin.yaml", "speech"), ("face_qmargin.yaml", "face")):
        models = sorted((HPARAMS / sizes / "models").glob("*.yaml"))
        keys = set()
        for model in models:
            text = load_experiment(
                [str(HPARAMS / recipe), "--size=full", f"--model={model.stem}"]
            ).text
            keys |= set(YAML().load(text))
        for size in (HPARAMS / sizes / "sizes").glob("*.yaml"):
            assert set(YAML().load(size.read_text())) <= keys, size


def test_the_full_size_has_kaldis_features_and_the_others_speechbrains():
    def features(*options):
        text = load_experiment([str(HPARAMS / "qmargin.yaml"), *options]).text
        return str(YAML().load(text)["compute_features"].tag.value).rsplit(".", 1)[1]

    assert features("--size=full") == "KaldiFbank"
    assert features("--size=mini") == features("--size=small") == "Fbank"
    assert features("--size=mini", "--features=kaldi") == "KaldiFbank"
    with pytest.raises(ValueError, match="features: 'mfcc' is unknown; choose kaldi, speechbrain"):
        features("--features=mfcc")


def test_errors_name_what_is_wrong(yaml):
    with pytest.raises(ValueError, match=r"--widht is neither a setting .* width"):
        load_experiment([yaml, "--widht", "3"])
    with pytest.raises(ValueError, match="'huge' is unknown; choose auto, full, flat, mini"):
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


def test_a_number_of_classes_that_changed_is_named(yaml, tmp_path):
    out = f"--output_folder={tmp_path / 'out'}"
    experiment, _ = load(yaml, out, width=4)
    experiment.begin()
    with pytest.raises(ValueError, match="holds a run with width = 4; these data give 5"):
        load(yaml, out, width=5)


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
