"""Published speaker networks: true layouts and names, random weights; outputs recomputed."""

import pytest
import speechbrain.lobes.models.Xvector
import torch
from published_layouts import ECAPA_YAML, huggingface, randomised, save, wespeaker
from scripts import ROOT
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization
from torchaudio.compliance import kaldi

from speechbrain_qmargin.models.campplus import CAMPPlus
from speechbrain_qmargin.models.ecapa import WeSpeakerEcapa
from speechbrain_qmargin.models.eres2net import ERes2Net, ERes2NetV2
from speechbrain_qmargin.models.resnet import ResNet
from speechbrain_qmargin.models.xvector import Xvector
from speechbrain_qmargin.published import load_published
from speechbrain_qmargin.training.config import load_experiment


def noise(samples=16000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, samples, generator=generator).cumsum(1).mul(0.05).sin() * 0.3


def embed(published, waveform):
    """As SpeakerEncoder: features, normalisation, network."""
    one = published.speech()
    with torch.no_grad():
        return published.encoder(one.mean_var_norm(one.compute_features(waveform)))[:, 0]


def ecapa(bands=20):
    return randomised(
        ECAPA_TDNN(bands, channels=[8] * 4 + [24], attention_channels=4, lin_neurons=12)
    )


def spkrec(folder, weights):
    """What huggingface.co/speechbrain/spkrec-ecapa-voxceleb holds."""
    save(weights.state_dict(), folder / "embedding_model.ckpt")
    (folder / "hyperparams.yaml").write_text(ECAPA_YAML)
    norm = InputNormalization(norm_type="global", std_norm=False)
    norm.count, norm.glob_mean, norm.glob_std = 7, torch.full((12,), 0.5), torch.tensor([0.0])
    save({"count": 7, "glob_mean": norm.glob_mean, "glob_std": norm.glob_std, "spk_dict_mean": {}},
         folder / "mean_var_norm_emb.ckpt")  # fmt: skip
    save({"weight": torch.zeros(7205, 12)}, folder / "classifier.ckpt")
    (folder / "label_encoder.txt").write_text(
        "'id1' => 0\n================\n'starting_index' => 0\n"
    )
    return sorted(folder.iterdir())


def test_speechbrains_folder_is_read_in_every_layout_and_says_what_it_is(tmp_path):
    model = ecapa()
    files = spkrec(tmp_path / "plain", model)
    one = load_published(tmp_path / "plain")
    assert (one.format, one.network, one.embedding_dim) == ("SpeechBrain", "ECAPA_TDNN", 12)
    assert one.settings == {
        "model": "ecapa", "embedding_dim": 12, "channels": 8, "attention_channels": 4,
        "n_mels": 20, "sample_rate": 16000, "features": "speechbrain",
    }  # fmt: skip
    assert torch.equal(one.embedding_mean, torch.full((12,), 0.5))
    text = one.summary()
    assert "20 SpeechBrain filterbanks, mean of each recording removed; 16000 Hz" in text
    assert "no sample_rate: 16 kHz" in text
    assert "not subtracted" in text
    cached = huggingface(tmp_path, "speechbrain/spkrec-ecapa-voxceleb", files)
    for path in (cached, next((cached / "snapshots").iterdir())):
        assert load_published(path).digest == one.digest
    # what SpeechBrain itself gives
    theirs = EncoderClassifier.from_hparams(
        source=str(next((cached / "snapshots").iterdir())),
        savedir=str(tmp_path / "saved"),
        overrides={"pretrained_path": str(next((cached / "snapshots").iterdir()))},
    )
    wave = noise()
    with torch.no_grad():
        wanted = theirs.encode_batch(wave)[:, 0]
    torch.testing.assert_close(embed(one, wave), wanted, rtol=1e-5, atol=1e-6)
    assert (
        load_published(tmp_path / "saved").digest == one.digest
    )  # its links, as from_hparams leaves them


def test_a_folder_executes_nothing(tmp_path):
    spkrec(tmp_path, ecapa())
    file = tmp_path / "hyperparams.yaml"
    touched = tmp_path / "touched"
    file.write_text(
        ECAPA_YAML + f"\nx: !apply:pathlib.Path.touch [!new:pathlib.Path ['{touched}']]\n"
    )
    assert load_published(tmp_path).embedding_dim == 12
    bad = f"!apply:pathlib.Path.touch [!new:pathlib.Path ['{touched}']]"
    for old, new, said in (
        (
            "input_size: !ref <n_mels>\n    channels",
            f"input_size: {bad}\n    channels",
            "!apply:pathlib.Path.touch",
        ),
        ("!ref <n_mels>", "!ref <n_mels.__class__>", "does not refer to a value"),
        ("speechbrain.lobes.features.Fbank", "os.getcwd", "compute_features is !new:os.getcwd"),
        ("n_mels: 20", "n_mels: !ref <n_mels>", "round in a circle"),
        ("lin_neurons: 12", "lin_neuron: 12", "lin_neuron"),
        ("lin_neurons: 12", "lin_neurons: 13", "have another shape, the first is fc.conv.weight"),
    ):
        file.write_text(ECAPA_YAML.replace(old, new, 1))
        with pytest.raises(ValueError, match=said):
            load_published(tmp_path)
    assert not touched.exists()


@pytest.mark.parametrize(("name", "depth"), [("ResNet34", 34), ("ResNet50", 50)])
def test_wespeakers_folder_is_its_network_with_its_features(tmp_path, name, depth):
    model = randomised(ResNet(16, channels=2, lin_neurons=8, depth=depth))
    folder = wespeaker(tmp_path / "exp", name, model, 8, bands=16)
    one = load_published(folder)
    assert (one.format, one.network, one.embedding_dim) == ("WeSpeaker", name, 8)
    assert (one.settings["model"], one.settings.get("depth", 34)) == ("resnet34", depth)
    assert one.settings["width"] == 2
    wave = noise()
    # wespeaker/cli/speaker.py: samples as 16-bit integers, no dither, the mean removed
    features = kaldi.fbank(
        wave * 2**15, num_mel_bins=16, window_type="hamming", sample_frequency=16000
    )
    with torch.no_grad():
        wanted = model((features - features.mean(0))[None])[:, 0]
    torch.testing.assert_close(embed(one, wave), wanted, rtol=1e-4, atol=1e-5)
    assert "the head of the training is left out (projection.weight)" in one.summary()
    bare = load_published(folder / "avg_model.pt")
    assert bare.digest == one.digest
    (folder / "config.yaml").unlink()
    assert "no config.yaml beside it" in load_published(folder / "avg_model.pt").summary()


def test_yamls_that_would_never_end_are_named(tmp_path):
    """Whatever reads them: lists of aliases, of references; brackets by the hundred."""
    aliases = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    references = "a: [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    for above, below in zip("bcdefghi", "abcdefgh", strict=True):
        aliases += f"{above}: &{above} [{', '.join([f'*{below}'] * 9)}]\n"
        references += f"{above}: [{', '.join([f'!ref <{below}>'] * 9)}]\n"
    channels = "channels: [8, 8, 8, 8, 24]"
    for text, said in (
        (aliases + ECAPA_YAML.replace(channels, "channels: *i"), "aliases grow beyond 1,000,000"),
        (references + ECAPA_YAML.replace(channels, "channels: !ref <i>"),
         "references grow beyond 10,000 values"),
        (ECAPA_YAML.replace(channels, f"channels: {'[' * 101}8{']' * 101}"), "deeper than 100"),
    ):  # fmt: skip
        folder = tmp_path / "speechbrain"
        folder.mkdir(exist_ok=True)
        save(ECAPA_TDNN(20, channels=[8] * 5).state_dict(), folder / "embedding_model.ckpt")
        (folder / "hyperparams.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"hyperparams\.yaml: .*{said}"):
            load_published(f"speechbrain:{folder}")
    folder = wespeaker(
        tmp_path / "exp", "ResNet18", ResNet(18, channels=2, lin_neurons=8), 8, bands=16
    )
    for text in (aliases + "model: *i\n", f"model: {'[' * 101}{']' * 101}\n"):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml: not plain YAML \(.* (grow|deeper)"):
            load_published(folder)


def test_what_is_wrong_with_a_file_of_wespeakers_is_named(tmp_path):
    model = ResNet(16, channels=2, lin_neurons=8)
    folder = wespeaker(tmp_path / "exp", "ResNet293", model, 8, bands=16)
    with pytest.raises(ValueError, match=r"config\.yaml says ResNet293, the weights are"):
        load_published(folder)
    state = dict(model.state_dict())
    for key, said in (("seg_1.bias", "1 entries are missing, the first is seg_1.bias"),):
        part = {name: value for name, value in state.items() if name != key}
        file = save(part, tmp_path / "avg_model.pt")
        with pytest.raises(ValueError, match=said):
            load_published(file)
    save({**state, "seg_1.extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"1 are not the network's, the first is seg_1\.extra"):
        load_published(file)
    save({**state, "seg_2.weight": torch.zeros(8, 8)}, file)
    with pytest.raises(ValueError, match="two embedding layers"):
        load_published(file)
    save({**state, "seg_1.bias": torch.full((8,), torch.nan)}, file)
    with pytest.raises(ValueError, match=r"seg_1\.bias and 0 others are not finite"):
        load_published(file)
    save({f"backbone.{key}": value for key, value in state.items() if key != "bn1.weight"}, file)
    with pytest.raises(ValueError, match=r"begin with backbone\.conv1.*WeSpeaker, .* lacks bn1\.w"):
        load_published(file)
    whole = bytearray(file.read_bytes())
    whole[whole.index(state["seg_1.weight"].numpy().tobytes()) + 3] ^= 1  # another exponent
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"or damaged; .*data/\d+ is not what was written\)"):
        load_published(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a checkpoint of weights alone, or damaged"):
        load_published(file)
    file.write_text("cv/a.flac\twav/a.flac\n")  # a list in the place of the model
    with pytest.raises(ValueError, match=r"nothing of it was loaded \(Unsupported ") as refusal:
        load_published(file)
    assert "weights_only" not in str(refusal.value)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_published(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"of no known format\. The folder holds nothing"):
        load_published(tmp_path / "empty")


def campplus(floor=1e-7):
    torch.manual_seed(0)
    return randomised(
        CAMPPlus(16, 8, growth=4, channels=16, layers=(1, 2, 1), least_variance=floor)
    )


OTHERS = {
    "CAMPPlus": campplus,
    "ECAPA_TDNN_GLOB_c8": lambda: randomised(WeSpeakerEcapa(16, 8, 8, pooled=16)),
    "ERes2Net34_Base": lambda: randomised(ERes2Net(16, 8, 8)),
    "ERes2NetV2": lambda: randomised(ERes2NetV2(16, 8, 8)),
    "ResNet293": lambda: randomised(ResNet(16, 2, 8, 293)),
}


# deep ones, and those that another of them stands for, take seconds
SLOW = ("ERes2NetV2", "ResNet293")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in OTHERS]
)
def test_a_recipe_builds_each_network_from_what_it_says_of_itself(tmp_path, name):
    model = OTHERS[name]()
    if name == "ERes2NetV2":
        path = save(model.state_dict(), tmp_path / "pretrained_eres2netv2.ckpt")
    else:
        path = wespeaker(tmp_path / "exp", name, model, 8, bands=16)
    one = load_published(path)
    assert one.network.startswith(name.removesuffix("_Base"))
    x = torch.randn(2, 40, 16)
    with torch.no_grad():
        assert torch.equal(one.encoder(x), model(x))
    argv = [str(ROOT / "hparams/qmargin.yaml"), "--size=small", f"--pretrained={path}"]
    hparams = load_experiment(argv).load(out_n_neurons=2)
    built = hparams["embedding_model"]
    built.load_state_dict(one.encoder.state_dict())
    assert torch.equal(built.eval()(x), model(x))
    ours, theirs = hparams["compute_features"].eval(), one.speech().compute_features
    assert torch.equal(ours(noise()), theirs(noise()))


XVECTOR = {
    "in_channels": 16,
    "lin_neurons": 8,
    "tdnn_channels": [8, 8, 8, 8, 12],
}


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        (ResNet, {"input_size": 16, "channels": 2, "lin_neurons": 8}),
        (ResNet, {"input_size": 16, "channels": 2, "lin_neurons": 8, "embedding_norm": True}),
        (ResNet, {"input_size": 16, "lin_neurons": 8}),
        (CAMPPlus, {"input_size": 16}),
        (ECAPA_TDNN, {"input_size": 16, "lin_neurons": 8}),
        (speechbrain.lobes.models.Xvector.Xvector, XVECTOR),
        (Xvector, XVECTOR),
        (Xvector, XVECTOR | {"embedding_norm": True}),
    ],
)
def test_a_folder_that_speechbrain_loads_keeps_its_embedding(tmp_path, network, arguments):
    """What it leaves to its network's defaults too, where the recipe or its size has others."""
    torch.manual_seed(0)
    model = randomised(network(**arguments))
    save(model.state_dict(), tmp_path / "embedding_model.ckpt")
    lines = "".join(f"    {name}: {value}\n" for name, value in arguments.items())
    (tmp_path / "hyperparams.yaml").write_text(
        "sample_rate: 16000\n"
        "compute_features: !new:speechbrain.lobes.features.Fbank {n_mels: 16}\n"
        "mean_var_norm: !new:speechbrain.processing.features.InputNormalization\n"
        "    {norm_type: sentence, std_norm: False}\n"
        f"embedding_model: !new:{network.__module__}.{network.__name__}\n{lines}"
    )
    x = torch.randn(2, 40, 16)

    @torch.no_grad()
    def embeddings(network):
        torch.manual_seed(1)  # SpeechBrain's pooling adds noise to the means
        return network.eval()(x)

    one = load_published(tmp_path)
    assert torch.equal(embeddings(one.encoder), embeddings(model))
    argv = [str(ROOT / "hparams/qmargin.yaml"), "--size=small", f"--pretrained={tmp_path}"]
    built = load_experiment(argv).load(out_n_neurons=2)["embedding_model"]
    built.load_state_dict(model.state_dict())
    assert torch.equal(embeddings(built), embeddings(model))


def test_weights_that_two_toolkits_have_are_told_apart_or_asked_about(tmp_path):
    file = save(campplus().state_dict(), tmp_path / "campplus_voxceleb.bin")
    one = load_published(file)
    assert (one.format, one.encoder.least_variance) == ("3D-Speaker", 0.0)
    assert "povey window" in one.summary()
    other = load_published(wespeaker(tmp_path / "exp", "CAMPPlus", campplus(), 8, bands=16))
    assert (other.format, other.encoder.least_variance) == ("WeSpeaker", 1e-7)
    assert "hamming window" in other.summary()
    assert "three_d_speaker:" in other.summary()
    unknown = save(campplus().state_dict(), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="say which, three_d_speaker:PATH or wespeaker:PATH"):
        load_published(unknown)
    assert load_published(f"wespeaker:{unknown}").digest == other.digest
    assert load_published(f"three_d_speaker:{unknown}").digest == one.digest
    again = load_published(f"three_d_speaker:{tmp_path / 'exp/avg_model.pt'}")
    assert again.digest == one.digest


def test_3d_speakers_ecapa_is_speechbrains_with_kaldis_features(tmp_path):
    model = ecapa(bands=16)
    file = save(model.state_dict(), tmp_path / "ecapa-tdnn.ckpt")
    (tmp_path / "configuration.json").write_text(
        '{"task": "speaker-verification", "model": {"pretrained_model": "ecapa-tdnn.ckpt"}}'
    )
    one = load_published(tmp_path)
    assert one.path == file
    assert (one.format, one.embedding_dim) == ("3D-Speaker", 12)
    wave = noise()
    # speakerlab/process/processor.py: torchaudio's defaults, samples in [-1, 1]
    features = kaldi.fbank(wave, num_mel_bins=16, sample_frequency=16000)
    with torch.no_grad():
        wanted = model((features - features.mean(0))[None])[:, 0]
    torch.testing.assert_close(embed(one, wave), wanted, rtol=1e-3, atol=1e-4)
    assert one.settings["fbank_window"] == "povey"
    assert load_published(f"three_d_speaker:{file}").digest == one.digest
