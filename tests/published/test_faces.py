"""Published face networks: true layouts and names, random weights; outputs recomputed."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from published_layouts import randomised, save
from scripts import ROOT

from speechbrain_qmargin.models.iresnet import IResNet
from speechbrain_qmargin.models.mbf import MBF
from speechbrain_qmargin.published import load_published
from speechbrain_qmargin.published.source import Source
from speechbrain_qmargin.training.config import load_experiment

PARTS = {"bn1": "res_layer.0", "conv1": "res_layer.1", "bn2": "res_layer.2", "prelu": "res_layer.3",
         "conv2": "res_layer.4", "bn3": "res_layer.5", "downsample.0": "shortcut_layer.0",
         "downsample.1": "shortcut_layer.1"}  # fmt: skip
TOP = {"conv1": "input_layer.0", "bn1": "input_layer.1", "prelu": "input_layer.2",
       "bn2": "output_layer.0", "fc": "output_layer.3", "features": "output_layer.4"}  # fmt: skip


class Trap:
    place = ""

    def __reduce__(self):
        return (exec, (f"open({self.place!r}, 'w')",))


def images(size=32):
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def backbone():
    """AdaFace's net.py at depth 18: names and shapes of the published entries, 4 channels."""
    model = randomised(IResNet(18, 8, channels=4, image_size=32, plain_shortcuts=True))
    state = {}
    for key, value in model.state_dict().items():
        layer, _, name = key.rpartition(".")
        if layer in TOP:
            key = f"{TOP[layer]}.{name}"
        else:
            stage, block, part = layer.split(".", 2)
            key = f"body.{2 * int(stage[-1]) - 2 + int(block)}.{PARTS[part]}.{name}"
        state[key] = value
    del state["output_layer.4.weight"], state["output_layer.4.bias"]
    return state


def published_output(state, x):
    """Its forward pass, written from the definition; x in the order of its own channels."""

    def bn(x, at):
        weight, bias = state.get(f"{at}.weight"), state.get(f"{at}.bias")
        return F.batch_norm(
            x, state[f"{at}.running_mean"], state[f"{at}.running_var"], weight, bias
        )

    y = F.conv2d(x, state["input_layer.0.weight"], padding=1)
    y = F.prelu(bn(y, "input_layer.1"), state["input_layer.2.weight"])
    for block in range(8):
        at, stride = f"body.{block}", 2 - block % 2
        if f"{at}.shortcut_layer.0.weight" in state:
            short = F.conv2d(y, state[f"{at}.shortcut_layer.0.weight"], stride=stride)
            short = bn(short, f"{at}.shortcut_layer.1")
        else:
            short = F.max_pool2d(y, 1, stride)
        y = F.conv2d(bn(y, f"{at}.res_layer.0"), state[f"{at}.res_layer.1.weight"], padding=1)
        y = F.prelu(bn(y, f"{at}.res_layer.2"), state[f"{at}.res_layer.3.weight"])
        y = F.conv2d(y, state[f"{at}.res_layer.4.weight"], stride=stride, padding=1)
        y = bn(y, f"{at}.res_layer.5") + short
    y = bn(y, "output_layer.0").flatten(1)
    y = F.linear(y, state["output_layer.3.weight"], state["output_layer.3.bias"])
    return bn(y, "output_layer.4")


def output(published, x):
    with torch.no_grad():
        return published.encoder(x)[:, 0]


def test_arcface_torchs_files_wrapped_prefixed_and_halved(tmp_path):
    model = randomised(IResNet(18, 8, channels=4, image_size=32))
    state = model.state_dict()
    plain = load_published(save(state, tmp_path / "a/backbone.pth"))
    assert (plain.format, plain.network) == ("arcface_torch", "IResNet-18, 4 channels")
    assert "aligned 32 x 32, RGB in [-1, 1]; tests add the mirror image's" in plain.summary()
    assert plain.settings["model"] == "iresnet"
    x = images()
    with torch.no_grad():
        assert torch.equal(output(plain, x), model(x)[:, 0])
    wrapped = {
        "epoch": 19,
        "state_dict_backbone": {f"module._orig_mod.{key}": value for key, value in state.items()},
        "state_dict_softmax_fc": {"weight": torch.zeros(3, 8)},
    }
    save(wrapped, tmp_path / "b/checkpoint_gpu_0.pt")
    assert load_published(tmp_path / "b").digest == plain.digest
    halves = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    half = load_published(save(halves, tmp_path / "c/model.pt"))
    assert half.encoder.fc.weight.dtype == torch.float32
    torch.testing.assert_close(output(half, x), output(plain, x), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="is of faces, not speech"):
        plain.speech()


def test_arcface_torchs_mobilefacenet_is_known_by_its_names(tmp_path):
    model = randomised(MBF(8, 1, (2, 1, 3, 1), 32))
    one = load_published(save(model.state_dict(), tmp_path / "backbone.pth"))
    assert (one.network, one.faces().image_size) == ("MobileFaceNet (mbf)", 32)
    assert one.settings["blocks"] == [2, 1, 3, 1]
    x = images()
    with torch.no_grad():
        assert torch.equal(output(one, x), model(x)[:, 0])
    argv = [str(ROOT / "hparams/face_qmargin.yaml"), "--size=full", f"--pretrained={one.path}"]
    built = load_experiment(argv).load(out_n_neurons=2)["embedding_model"]
    built.load_state_dict(one.encoder.state_dict())


def test_adafaces_checkpoint_takes_rgb_here_and_gives_its_own_output(tmp_path):
    state = backbone()
    checkpoint = {
        "state_dict": {f"model.{key}": value for key, value in state.items()}
        | {"head.kernel": torch.zeros(8, 3)},
        "epoch": 25,
        "hyper_parameters": {"arch": "ir_18", "head": "adaface"},
    }
    one = load_published(save(checkpoint, tmp_path / "adaface_ir18_casia.ckpt"))
    assert (one.format, one.embedding_dim) == ("AdaFace", 8)
    assert one.faces().channels == "BGR"
    assert "BGR in [-1, 1] (exchanged on loading: the encoder takes RGB)" in one.summary()
    assert one.settings["plain_shortcuts"] is True
    x = images()
    torch.testing.assert_close(
        output(one, x), published_output(state, x.flip(1)), rtol=1e-4, atol=1e-5
    )
    for key, said in (
        ("body.0.res_layer.5.se_block.fc1.weight", "squeeze-and-excitation"),
        ("body.0.res_layer.7.weight", "bottlenecks"),
        ("body.30.res_layer.0.weight", "31 blocks"),
        ("body.0.strange", "1 are not the network's, the first is body.0.strange"),
    ):
        save({"state_dict": {**state, key: torch.zeros(1)}}, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=said):
            load_published(tmp_path / "other.ckpt")


def test_cvlface_says_its_channels_in_a_yaml_and_is_refused_without(tmp_path):
    state = backbone()
    file = save(
        {f"net.{key}": value for key, value in state.items()},
        tmp_path / "pretrained_model/model.pt",
    )
    with pytest.raises(ValueError, match=r"model\.yaml must lie beside it"):
        load_published(file)
    about = tmp_path / "pretrained_model/model.yaml"
    x = images()
    for channels, given in (("RGB", x), ("BGR", x.flip(1))):
        about.write_text(
            f"input_size: [3, 112, 112]\ncolor_space: {channels}\nname: ir18\noutput_dim: 8\n"
        )
        for path in (tmp_path, tmp_path / "pretrained_model", file):
            one = load_published(path)
            assert (one.format, one.faces().channels) == ("CVLface", channels)
            torch.testing.assert_close(
                output(one, x), published_output(state, given), rtol=1e-4, atol=1e-5
            )
    about.write_text("color_space: YUV\n")
    with pytest.raises(ValueError, match="color_space is 'YUV'"):
        load_published(tmp_path)
    insightface = randomised(IResNet(18, 8, channels=4, image_size=32))
    save({f"net.{key}": value for key, value in insightface.state_dict().items()}, file)
    about.write_text("color_space: RGB\nname: ir18\n")
    with torch.no_grad():
        assert torch.equal(output(load_published(tmp_path), x), insightface(x)[:, 0])


def test_a_checkpoint_executes_nothing_and_gives_its_weights(tmp_path):
    Trap.place = str(tmp_path / "touched")
    # Lightning before 1.5 names the classes of its callbacks in the file
    state = {f"model.{key}": value for key, value in backbone().items()}
    checkpoint = {"state_dict": state, "callbacks": {Trap: {"best": 1}, "x": [Trap(), Fraction(1)]}}
    one = load_published(save(checkpoint, tmp_path / "adaface_ir18_casia.ckpt"))
    assert not (tmp_path / "touched").exists()
    assert "objects in the file were not made: " in one.summary()
    assert "builtins.exec" in one.summary() or "fractions.Fraction" in one.summary()
    plain = load_published(save({"state_dict": state}, tmp_path / "plain.ckpt"))
    assert plain.digest == one.digest
    file = save({"state_dict": {}, "x": Trap()}, tmp_path / "nothing.ckpt")
    with pytest.raises(ValueError, match="no weights in it"):
        load_published(file)
    assert not (tmp_path / "touched").exists()


class Program(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_torchscript_program_is_not_loaded(tmp_path, monkeypatch):
    """Its __setstate__ would run; torch.load hands such an archive to torch.jit.load."""
    torch.jit.script(Program()).save(str(tmp_path / "model.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"model\.pt: a TorchScript program .* is not loaded"):
        load_published(tmp_path / "model.pt")


def test_a_cache_of_several_snapshots_names_them(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="2 snapshots and no refs/main"):
        Source(tmp_path)
