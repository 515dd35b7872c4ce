"""Settings, sizes, overlays, the command line."""

import re
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from speechbrain.utils.run_opts import HELP_TEXTS

from speechbrain_qmargin.training.brain import SpeakerBrain
from speechbrain_qmargin.training.config import load_experiment
from speechbrain_qmargin.training.run import train_verifier
from speechbrain_qmargin.training.run_folder import RunFolder

HPARAMS = Path(__file__).parents[2] / "hparams"

BASE = """
overlays: [layers/<kind>.yaml, known: sizes/<size>.yaml]
auto:
    size: {mini: {data_folder: null}, full: {}}

size: auto  # how much
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
    (tmp_path / "sizes" / "full.yaml").write_text("# as it is\n")
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


def test_an_object_on_the_command_line_takes_the_place_of_another(yaml, tmp_path):
    """With named arguments it was merged into the old one, whose class it kept without a word."""
    out = f"--output_folder={tmp_path / 'out'}"
    layer = "--layer=!new:torch.nn.Bilinear {in1_features: !ref <width>, in2_features: 3, %s}"
    _, hparams = load(yaml, "--width=4", layer % "out_features: 2", out)
    assert isinstance(hparams["layer"], torch.nn.Bilinear)
    assert hparams["layer"].weight.shape == (2, 4, 3)
    _, hparams = load(yaml, "--layer={out_features: 7}", out)  # without a tag: some arguments
    assert hparams["layer"].out_features == 7
    options = [str(HPARAMS / "qmargin.yaml"), "--out_n_neurons=2", out]
    given = "--opt_class=!name:torch.optim.Adam {lr: 0.5}"
    optimizer = load(*options, given)[1]["opt_class"]([torch.zeros(1, requires_grad=True)])
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["lr"] == 0.5


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
    RunFolder(experiment).begin()
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


@pytest.mark.slow
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
            assert set(YAML().load(size.read_text()) or {}) <= keys, size


def _mean_cosine(network, inputs):
    with torch.no_grad():
        unit = torch.nn.functional.normalize(network.train()(inputs).squeeze(1))
    return float((unit @ unit.T - torch.eye(len(unit))).sum() / (len(unit) * (len(unit) - 1)))


SPEECH_MODELS = sorted(path.stem for path in (HPARAMS / "speech/models").glob("*.yaml"))
FACE_MODELS = sorted(path.stem for path in (HPARAMS / "face/models").glob("*.yaml"))


DEEP = ("resnet152", "resnet221", "resnet293")  # resnet34's file with another depth


@pytest.mark.parametrize(
    "model", [pytest.param(one, marks=[pytest.mark.slow] * (one in DEEP)) for one in SPEECH_MODELS]
)
def test_untrained_embeddings_do_not_point_one_way(model):
    """Where they do, a sparse posterior moves that way about: Q-Margin was lost for an epoch."""
    argv = [str(HPARAMS / "qmargin.yaml"), "--size=small", f"--model={model}"]
    experiment = load_experiment(argv)
    frames = 5 + torch.randn(8, 40, experiment.settings["n_mels"])
    network = experiment.load(out_n_neurons=2)["embedding_model"]
    assert abs(_mean_cosine(network, frames)) < 0.2
    if "embedding_norm" not in experiment.settings:
        return
    plain = load_experiment([*argv, "--embedding_norm=False"]).load(out_n_neurons=2)
    assert _mean_cosine(plain["embedding_model"], frames) > 0.5
    more = set(network.state_dict()) - set(plain["embedding_model"].state_dict())
    assert len(more) == 5  # of one batch normalisation


@pytest.mark.parametrize("model", FACE_MODELS)
def test_untrained_embeddings_of_faces_do_not_point_one_way(model):
    argv = [str(HPARAMS / "face_qmargin.yaml"), "--size=small", f"--model={model}"]
    experiment = load_experiment(argv)
    size = experiment.settings["image_size"]
    images = torch.rand(8, 1, 1, 1) * torch.rand(8, 3, size, size)
    network = experiment.load(out_n_neurons=2)["embedding_model"]
    assert abs(_mean_cosine(network, images)) < 0.2


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
    with pytest.raises(ValueError, match=r"--widht is neither a setting .* is it --width\?"):
        load_experiment([yaml, "--widht", "3"])
    with pytest.raises(ValueError, match=r"is it --width\? --help after .*base.yaml shows all$"):
        load_experiment([yaml, "--max_width", "3"])
    with pytest.raises(ValueError, match=r"the settings are data_folder, deep, kind, .*, width$"):
        load_experiment([yaml, "--epochs", "3"])
    with pytest.raises(ValueError, match="'huge' is unknown; choose auto, flat, full, mini"):
        load_experiment([yaml, "--size", "huge"])
    with pytest.raises(ValueError, match="--width is given twice"):
        load_experiment([yaml, "--width=3", "--width=4"])
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        load_experiment(["gone.yaml"])
    with pytest.raises(
        ValueError, match=r"base\.yaml has no setting manifest: is it the YAML of an"
    ):
        load_experiment([yaml]).settings["manifest"]


@pytest.mark.parametrize(
    ("setting", "before", "given", "wanted"),
    [
        ("lr", "0.1", "high", "a number, such as 0.1"),
        ("crop", "2.0", "2s", "a number, such as 2.0"),
        ("epochs", "30", "[3]", "a number, such as 30"),
        ("epochs", "30", "True", "a number, such as 30"),
        ("missing", "False", "no", "True or False"),  # a string in YAML, hence true
        ("missing", "False", "2", "True or False"),
        ("options", "{}", "easy", "a mapping, such as '{key: value}'"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(tmp_path, setting, before, given, wanted):
    file = tmp_path / "one.yaml"
    file.write_text(f"{setting}: {before}  # why\n")
    with pytest.raises(ValueError, match=re.escape(f"--{setting}: {given!r} is not {wanted}")):
        load_experiment([str(file), f"--{setting}={given}"])


@pytest.mark.parametrize(
    ("before", "given", "value"),
    [
        ("0.1", "1e-2", 0.01),
        ("20", "null", None),
        ("null", "a", "a"),
        ("large", "0.5", 0.5),
        ("False", "1", 1),
        ("[1.0, 0.9]", "1", [1]),
        ("[]", "it's, here.bin", ["it's, here.bin"]),
        ("[]", "[a, b]", ["a", "b"]),
    ],
)
def test_a_scalar_is_a_list_of_one_and_null_takes_any_place(tmp_path, before, given, value):
    file = tmp_path / "one.yaml"
    file.write_text(f"seed: 0\nsetting: {before}\n")
    experiment = load_experiment([str(file), "--setting", given])
    assert experiment.settings["setting"] == value == experiment.load()["setting"]


def test_a_package_that_an_object_wants_is_named_with_how_it_is_had(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "train_logger: !apply:importlib.import_module [no_such_package]\n"
    )
    experiment = load_experiment([str(tmp_path / "one.yaml")])
    wanted = r"one\.yaml with these settings: .*no_such_package.*pip install no_such_package"
    with pytest.raises(ImportError, match=wanted):
        experiment.load()


def test_comments_stay_at_their_keys(yaml, tmp_path):
    (tmp_path / "base.yaml").write_text(
        "# What this is.\n\noverlays: [known: over.yaml]\n"
        "layer: !new:torch.nn.Linear  # an object\n    in_features: !ref <width>  # within\n"
        "    out_features: 2\n\n# How wide\nwidth: 512        # columns, 'or' so\n"
        "# How deep\ndepth: 3          # rows\n"
    )
    (tmp_path / "over.yaml").write_text("width: 8\nother: 1\n")
    text = load_experiment([str(tmp_path / "base.yaml"), "--depth", "4"]).text
    assert text == (
        "# What this is.\n\n"
        "# How wide\nwidth: 8          # columns, 'or' so\n"
        "# How deep\ndepth: 4          # rows\n"
        "layer: !new:torch.nn.Linear  # an object\n    in_features: !ref <width>  # within\n"
        "    out_features: 2\n"
    )


def test_what_is_composed_is_plain_hyperpyyaml(tmp_path):
    options = [f"--output_folder={tmp_path}", "--out_n_neurons=2"]
    for recipe in ("qmargin.yaml", "face_qmargin.yaml"):
        for head in ("dense", "sparse"):
            text = load_experiment([str(HPARAMS / recipe), f"--head={head}", *options]).text
            assert not {"extends", "overlays", "auto"} & set(YAML().load(text))
            hparams = load_hyperpyyaml(text)
            assert hparams["output_folder"] == str(tmp_path)
            assert len(next(iter(hparams["modules"]["classifier"].parameters()))) == 2


def test_abbreviations_of_options_are_refused(yaml):
    with pytest.raises(
        ValueError, match=r"--optimizer is not an option; .* --optimizer_step_limit"
    ):
        load_experiment([yaml, "--optimizer", "adam"])
    with pytest.raises(ValueError, match="--width needs a value; null stands for none"):
        load_experiment([yaml, "--width", "--size=flat"])
    with pytest.raises(ValueError, match="'stray': settings are given as --key value"):
        load_experiment([yaml, "--debug", "stray"])
    experiment = load_experiment([yaml, "--device", "cpu", "--precision=bf16", "--loss", "a=b"])
    assert (experiment.run_opts.device, experiment.run_opts.precision) == ("cpu", "bf16")
    assert experiment.settings["loss"] == "a=b"
    for recipe in ("qmargin.yaml", "face_qmargin.yaml"):
        for key in load_experiment([str(HPARAMS / recipe)]).settings:
            assert not [name for name in HELP_TEXTS if name.startswith(key) and name != key]


def test_a_yaml_of_ones_own_chooses_within_what_it_extends(yaml, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("extends: base.yaml\nkind: biased\nseed: 3\n")
    _, hparams = load(str(own), "--size=mini", f"--output_folder={tmp_path / 'out'}")
    assert (hparams["layer"].in_features, hparams["layer"].out_features) == (8, 5)
    assert hparams["seed"] == 3


@pytest.mark.parametrize("recipe", ["qmargin.yaml", "face_qmargin.yaml"])
def test_the_partial_head_takes_its_own_rate_not_the_audios(recipe, tmp_path):
    folder = f"--output_folder={tmp_path}"
    experiment = load_experiment([str(HPARAMS / recipe), "--size=small", "--head=partial", folder])
    assert experiment.load(out_n_neurons=10)["classifier"].sample_rate == 0.1


@pytest.mark.parametrize("head", ["dense", "sparse", "partial"])
@pytest.mark.parametrize("recipe", ["qmargin.yaml", "face_qmargin.yaml"])
def test_prototypes_start_alike_in_every_head(recipe, head, tmp_path):
    """Their length decides how fast SGD turns them; of Xavier's 300 classes it would be 5 times."""
    options = [f"--head={head}", "--size=small", f"--output_folder={tmp_path}"]
    classifier = load_experiment([str(HPARAMS / recipe), *options]).load(out_n_neurons=300)
    weight = classifier["classifier"].weight.detach()
    assert float(weight.std()) == pytest.approx(0.01, rel=0.02)
    options.append("--prototype_std=0.03")
    longer = load_experiment([str(HPARAMS / recipe), *options]).load(out_n_neurons=300)
    assert float(longer["classifier"].weight.detach().std()) == pytest.approx(0.03, rel=0.02)


@pytest.mark.parametrize("option", ["number_of_epochs=0", "batch_size=-4", "batch_size=2.5"])
def test_settings_that_train_nothing_are_refused_before_anything_is_done(tmp_path, option):
    key, value = option.split("=")
    argv = [str(HPARAMS / "qmargin.yaml"), f"--output_folder={tmp_path / 'run'}", f"--{option}"]
    with pytest.raises(ValueError, match=f"^{key}: {value}; a whole number from 1 on"):
        train_verifier(argv, SpeakerBrain, lambda settings: pytest.fail("data were prepared"))
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_here_is_named_before_anything_is_done(tmp_path):
    argv = [str(HPARAMS / "qmargin.yaml"), "--device=cuda:77", f"--output_folder={tmp_path}/run"]
    with pytest.raises(ValueError, match="device: cuda:77 cannot be used here"):
        train_verifier(argv, SpeakerBrain, prepare=lambda _: pytest.fail("data were prepared"))
    assert not (tmp_path / "run").exists()
