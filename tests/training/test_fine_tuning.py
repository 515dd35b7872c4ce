"""Starting from a published model: its network and features, frozen layers, a rate of its own."""

import pytest
import torch
from published_layouts import ECAPA_YAML, randomised, save, wespeaker
from scripts import ROOT, load
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from torch import nn

from speechbrain_qmargin.models.iresnet import IResNet
from speechbrain_qmargin.models.resnet import ResNet
from speechbrain_qmargin.published import load_published
from speechbrain_qmargin.training.checkpoints import AtomicCheckpointer
from speechbrain_qmargin.training.config import load_experiment
from speechbrain_qmargin.training.freezing import Freezing, layers_until
from speechbrain_qmargin.training.pretrained import load_pretrained

brains = load("tests/training/test_brain.py")
folder = brains.folder
SPEECH, FACES = (str(ROOT / "hparams" / name) for name in ("qmargin.yaml", "face_qmargin.yaml"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """SpeechBrain's layout, at the sizes that the tests of the Brain have."""
    root = tmp_path_factory.mktemp("spkrec")
    torch.manual_seed(0)
    model = ECAPA_TDNN(20, channels=[8] * 4 + [24], attention_channels=8, lin_neurons=16)
    save(randomised(model).state_dict(), root / "embedding_model.ckpt")
    text = ECAPA_YAML.replace("lin_neurons: 12", "lin_neurons: 16")
    (root / "hyperparams.yaml").write_text(
        text.replace("attention_channels: 4", "attention_channels: 8")
    )
    return root


def test_a_published_model_brings_its_network_and_features(folder, published, tmp_path):
    _, brain, _ = brains.make_brain(
        folder, tmp_path, pretrained=str(published), n_mels=20, channels=8
    )
    hparams = vars(brain.hparams)
    load_pretrained(hparams)
    wanted = load_published(published)
    for key, value in wanted.encoder.state_dict().items():
        assert torch.equal(hparams["embedding_model"].state_dict()[key], value)
    assert (hparams["n_mels"], hparams["features"], hparams["model"]) == (
        20,
        "speechbrain",
        "ecapa",
    )
    with pytest.raises(ValueError, match="has no prototypes of these classes"):
        load_pretrained({**hparams, "pretrained_classes": "keep", "checkpointer": _Nothing()})
    # a network or features of another make, however they came about
    with pytest.raises(ValueError, match=r"embedding_model is another network: .* first is"):
        load_pretrained({**hparams, "embedding_model": nn.Linear(2, 2), "checkpointer": _Nothing()})
    from speechbrain.lobes.features import Fbank

    other = {"compute_features": Fbank(n_mels=20, f_max=4000), "checkpointer": _Nothing()}
    with pytest.raises(ValueError, match=r"takes 20 SpeechBrain filterbanks.* are others"):
        load_pretrained({**hparams, **other})


class _Nothing:
    def list_checkpoints(self):
        return []


def test_what_the_command_line_says_against_the_model_is_refused_before_the_data(tmp_path):
    model = ResNet(16, channels=2, lin_neurons=8)
    exp = wespeaker(tmp_path / "exp", "ResNet34", model, 8, bands=16)
    found = load_experiment([SPEECH, "--size", "small", "--pretrained", str(exp)]).settings
    wanted = {
        "model": "resnet34",
        "width": 2,
        "embedding_dim": 8,
        "embedding_norm": False,  # whatever the size says
        "features": "kaldi",
        "n_mels": 16,
    }
    assert wanted.items() <= found.items()
    with pytest.raises(ValueError, match=r"--model ecapa: .*ResNet34, with model resnet34"):
        load_experiment([SPEECH, "--pretrained", str(exp), "--model", "ecapa"])
    with pytest.raises(ValueError, match="is of speech, not faces"):
        load_experiment([FACES, "--pretrained", str(exp)])
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        load_experiment([SPEECH, "--pretrained", "nowhere"])
    with pytest.raises(ValueError, match=r"no run \(no experiment.*no known format"):
        load_experiment([SPEECH, "--pretrained", str(tmp_path)])
    file = save(IResNet(18, 8, channels=2, image_size=32).state_dict(), tmp_path / "backbone.pth")
    found = load_experiment([FACES, "--size", "small", "--pretrained", str(file)]).settings
    assert (found["depth"], found["width"], found["image_size"]) == (18, 2, 32)


def test_frozen_layers_keep_weights_and_statistics_and_thaw(folder, tmp_path):
    fit, brain, _ = brains.make_brain(
        folder, tmp_path, number_of_epochs=1, freeze="blocks.1", encoder_lr=0.1
    )
    model = brain.modules["embedding_model"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit()
    after = model.state_dict()
    frozen = {key for key in after if key.startswith(("blocks.0.", "blocks.1."))}
    assert frozen
    assert {key for key in after if torch.equal(after[key], before[key])} == frozen
    groups = brain.optimizer.param_groups
    assert groups[0]["lr"] == pytest.approx(0.1 * groups[1]["lr"])

    options = {"number_of_epochs": 2, "freeze_epochs": 1}
    fit, brain, _ = brains.make_brain(folder, tmp_path / "second", **options)
    model, states = brain.modules["embedding_model"], []
    start = {key: value.clone() for key, value in model.state_dict().items()}
    end = brain.on_stage_end

    def on_stage_end(*args):
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        end(*args)

    brain.on_stage_end = on_stage_end
    fit()
    assert all(torch.equal(states[0][key], start[key]) for key in start)
    assert not all(torch.equal(states[1][key], start[key]) for key in start)


def test_over_processes_gradients_of_what_will_learn_are_dropped():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    freezing = Freezing(net, "1", epochs=1)
    freezing.begin(1, processes=2)
    net.train()
    freezing.hold()
    assert not net[1].training
    net(torch.randn(4, 2)).sum().backward()
    assert net[0].weight.grad is not None
    freezing.drop_gradients()
    assert net[0].weight.grad is None
    assert net[2].weight.grad is not None
    freezing.begin(2, processes=2)
    net.train()
    freezing.hold()
    assert net[1].training
    assert str(freezing) == "10 parameters of the encoder are frozen for 1 epoch"


def test_layers_are_named_and_what_never_learns_stays_so():
    model = IResNet(18, 8, channels=2, image_size=32)
    assert layers_until(model, "layer1.0")[-1] is model.layer1[0].downsample[1]
    for until in ("all", "features"):
        freezing = Freezing(model, until, None)
        freezing.begin(1)
        assert not any(p.requires_grad for p in model.parameters())
        freezing = Freezing(model, until, None)
    with pytest.raises(ValueError, match="no layer stage3; it has conv1, bn1, prelu, layer1"):
        Freezing(model, "stage3", None)
    with pytest.raises(ValueError, match="freeze_epochs: 0"):
        Freezing(model, None, 0)
    assert str(Freezing(model, None, None)) == ""


def test_a_run_of_other_sizes_is_named_by_its_settings(tmp_path):
    saved = AtomicCheckpointer(tmp_path / "run/save", {"embedding_model": nn.Linear(3, 2)})
    saved.save_checkpoint(meta={"epoch": 1})
    text = "lr: 1\nsize: 3\nmodel: one\nn_mels: !ref <size>\nembedding_dim: 2\nembedding_model: "
    text += "!new:torch.nn.Linear [!ref <n_mels>, !ref <embedding_dim>]\n"
    (tmp_path / "run/experiment.yaml").write_text(text)
    hparams = {"pretrained": str(tmp_path / "run"), "pretrained_classes": "none", "lr": 2}
    hparams |= {"model": "one", "size": 3, "n_mels": 4, "embedding_dim": 2}
    hparams |= {"embedding_model": nn.Linear(4, 2), "checkpointer": _Nothing()}
    said = r"other sizes than this run: n_mels: 3 there, 4 now\. To start from it, say --n_mels=3$"
    with pytest.raises(ValueError, match=said):
        load_pretrained(hparams)
    (tmp_path / "run/experiment.yaml").unlink()
    with pytest.raises(ValueError, match=r"\(--model, --size, --channels, \.\.\.\); see its"):
        load_pretrained(hparams)
