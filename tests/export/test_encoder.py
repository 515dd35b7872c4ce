"""The encoder of a run for others: SpeechBrain's inference classes, ONNX, and back."""

import shutil
import socket
import textwrap

import numpy as np
import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from ranks import on_ranks
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.inference.speaker import SpeakerRecognition
from speechbrain.utils.checkpoints import Checkpointer

from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.speech_dataset import SpeechDataset
from speechbrain_qmargin.export import inference
from speechbrain_qmargin.export.encoder import SpeakerEncoder, load_encoder
from speechbrain_qmargin.export.inference import (
    export_for_inference,
    export_run,
)
from speechbrain_qmargin.export.onnx import export_onnx
from speechbrain_qmargin.head import QMarginHead
from speechbrain_qmargin.scoring.decision import OperatingPoint, choose_operating_point
from speechbrain_qmargin.scoring.metrics import operating_points
from speechbrain_qmargin.training.brain import SpeakerBrain
from speechbrain_qmargin.training.checkpoints import load_average

SPEAKERS = ["ann", "bob", "cyd"]
ECAPA = """
    !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 20
    channels: [8, 8, 8, 8, 24]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    groups: [1, 1, 1, 1, 1]
    attention_channels: 8
    lin_neurons: 16
"""
ONE_BLOCK = """
    !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 20
    channels: [8, 8, 8]
    kernel_sizes: [5, 3, 1]
    dilations: [1, 2, 1]
    groups: [1, 1, 1]
    attention_channels: 8
    res2net_scale: 2
    lin_neurons: 16
"""
CLASSIFIER = """
    !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: 16
    out_neurons: 3
"""
SPARSE = """
    !new:speechbrain_qmargin.head.QMarginHead
    embedding_dim: 16
    num_classes: 9
"""
SENTENCE = "norm_type: sentence, std_norm: False"


def make_run(folder, classifier=CLASSIFIER, model=ECAPA, norm=SENTENCE, fbank="", epochs=2):
    """A run's output folder as training leaves it, with random weights."""
    classifier, model = (textwrap.dedent(text).strip() for text in (classifier, model))
    text = f"""
# Training
sample_rate: 16000
average_checkpoints: 2
compute_features: &id001 !new:speechbrain.lobes.features.Fbank {{n_mels: 20{fbank}}}
mean_var_norm: &id002 !new:speechbrain.processing.features.InputNormalization {{{norm}}}

# A comment in between
embedding_model: &id003 {textwrap.indent(model, "    ").strip()}

# Another one
classifier: &id004 {textwrap.indent(classifier, "    ").strip()}
modules:
    compute_features: *id001
    mean_var_norm: *id002
    embedding_model: *id003
    classifier: *id004
"""
    (folder / "save").mkdir(parents=True)
    (folder / "hyperparams.yaml").write_text(text)
    encoder = CategoricalEncoder()
    encoder.update_from_iterable(SPEAKERS)
    encoder.save(folder / "save" / "label_encoder.txt")
    torch.manual_seed(1)
    modules = load_hyperpyyaml(text)["modules"]
    checkpointer = Checkpointer(folder / "save")
    checkpointer.add_recoverable("embedding_model", modules["embedding_model"])
    if hasattr(modules["classifier"], "save_shards"):
        hook = {"custom_save_hook": lambda head, path: head.save_shards(path)}
        checkpointer.add_recoverable("classifier", modules["classifier"], **hook)
    else:
        checkpointer.add_recoverable("classifier", modules["classifier"])
    for epoch in range(epochs):
        for name in ("embedding_model", "classifier"):
            for value in modules[name].state_dict(keep_vars=True).values():
                if value.is_floating_point():
                    value.data.mul_(0.9).add_(0.02 * torch.rand_like(value))
        checkpointer.save_checkpoint(meta={"epoch": epoch}, end_of_epoch=True)
    return modules


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "run"
    make_run(folder)
    export_run(folder)
    return folder


@pytest.fixture
def run(exported, tmp_path):
    """A run with its `inference/`, for a test alone."""
    return shutil.copytree(exported, tmp_path / "run")


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    import soundfile

    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    for name, rate, seconds in (("a", 16000, 0.8), ("b", 16000, 0.55), ("c", 8000, 0.7)):
        samples = 0.1 * rng.standard_normal(round(rate * seconds))
        soundfile.write(folder / f"{name}.wav", samples, rate)
    return folder


def extracted(modules, audio, folder):
    """Embeddings as the recipe's Brain extracts them after training."""
    brain = SpeakerBrain(
        modules=modules,
        hparams={"average_checkpoints": 2},
        run_opts={"device": "cpu", "noprogressbar": True},
        checkpointer=Checkpointer(folder / "save"),
    )
    paths = sorted(audio.glob("*.wav"))
    manifest = Manifest.of(Item(path.stem, str(path), "x", 0.0, 1.0) for path in paths)
    return brain.extract(SpeechDataset(manifest, 16000), batch_size=1)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
def test_speechbrain_loads_the_folder_and_gives_the_recipes_embeddings(tmp_path, audio):
    modules = make_run(tmp_path / "run")
    ours = extracted(modules, audio, tmp_path / "run")
    export_run(tmp_path / "run")
    folder = shutil.move(tmp_path / "run" / "inference", tmp_path / "elsewhere")

    classifier = EncoderClassifier.from_hparams(source=str(folder), savedir=str(tmp_path / "cache"))
    for name in "abc":
        signal = classifier.load_audio(str(audio / f"{name}.wav"))
        theirs = classifier.encode_batch(signal)[0, 0].numpy()
        np.testing.assert_allclose(theirs, ours[name], rtol=1e-5, atol=1e-6)
    classifier.hparams.label_encoder.expect_len(3)
    cosines, _, _, label = classifier.classify_file(str(audio / "a.wav"))
    a = ours["a"] / np.linalg.norm(ours["a"])
    weight = modules["classifier"].weight.detach().numpy()
    expected = weight @ a / np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(cosines[0].numpy(), expected, atol=1e-5)
    assert label == [SPEAKERS[expected.argmax()]]

    verifier = SpeakerRecognition.from_hparams(source=str(folder), savedir=str(tmp_path / "other"))
    score, accepted = verifier.verify_files(str(audio / "a.wav"), str(audio / "c.wav"))
    cosine = a @ ours["c"] / np.linalg.norm(ours["c"])
    assert score.item() == pytest.approx(cosine, abs=1e-5)
    assert accepted.item() == (cosine > 0.25)


def test_every_file_is_weights_alone(exported):
    for name in ("embedding_model", "compute_features", "classifier"):
        torch.load(exported / "inference" / f"{name}.ckpt", weights_only=True)
    assert not list(exported.glob(".inference*"))


def test_flipped_bits_of_an_exported_encoder_are_noticed(run):
    """torch reads them as they are: an encoder that is nearly the one that was trained."""
    file = run / "inference" / "embedding_model.ckpt"
    weights = torch.load(file, weights_only=True)
    content = bytearray(file.read_bytes())
    content[content.index(weights["fc.conv.weight"].numpy().tobytes()) + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match=r"embedding_model\.ckpt: damaged \(.*not what was written"):
        load_encoder(run)


@pytest.mark.parametrize("change", ["missing", "other size"])
def test_weights_of_another_network_are_named(run, change):
    file = run / "inference" / "embedding_model.ckpt"
    weights = torch.load(file, weights_only=True)
    if change == "missing":
        del weights["fc.conv.weight"]
    else:
        weights["fc.conv.weight"] = weights["fc.conv.weight"][:-1]
    torch.save(weights, file)
    with pytest.raises(ValueError, match=r"embedding_model\.ckpt: weights of another .*fc\.conv"):
        load_encoder(run)


def test_a_run_loads_before_and_after_its_export(tmp_path):
    modules = make_run(tmp_path, epochs=3)
    load_average(modules, Checkpointer(tmp_path / "save"), 2)
    definition = load_encoder(tmp_path).definition
    wanted = SpeakerEncoder(modules, definition=definition).digest()
    assert load_encoder(tmp_path).digest() == wanted
    folder = export_run(tmp_path)
    assert load_encoder(tmp_path).digest() == wanted
    assert load_encoder(folder).digest() == wanted


def test_the_prototypes_of_all_shards_are_exported():
    def exported(communicator):
        return inference._prototypes(QMarginHead(4, 7, seed=0, group=communicator), 6)

    whole = QMarginHead(4, 7, seed=0).weight[:6]
    for found in on_ranks(2, exported):
        assert torch.equal(found, whole)


def test_the_sparse_heads_prototypes_classify_without_the_copies_at_other_speeds(tmp_path):
    modules = make_run(tmp_path, classifier=SPARSE, epochs=1)
    folder = export_run(tmp_path)
    classifier = EncoderClassifier.from_hparams(source=str(folder), savedir=str(tmp_path / "cache"))
    assert torch.equal(classifier.mods.classifier.weight, modules["classifier"].weight[:3])


def test_too_many_classes_leave_the_classifier_out_and_verification_in(tmp_path, audio):
    make_run(tmp_path)
    folder = export_run(tmp_path, max_classes=2)
    assert not (folder / "classifier.ckpt").exists()
    verifier = SpeakerRecognition.from_hparams(source=str(folder), savedir=str(tmp_path / "cache"))
    verifier.verify_files(str(audio / "a.wav"), str(audio / "b.wav"))


def test_learned_features_and_global_statistics_are_carried(tmp_path):
    modules = make_run(tmp_path, norm="norm_type: global", fbank=", requires_grad: True")
    waveforms = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    modules["mean_var_norm"].train()
    modules["mean_var_norm"](modules["compute_features"](waveforms))
    folder = tmp_path / "out"
    export_for_inference(tmp_path / "hyperparams.yaml", modules, folder)
    encoder = SpeakerEncoder(modules, definition=load_encoder(folder).definition)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(folder)(waveforms), encoder(waveforms))
        assert load_encoder(folder).digest() == encoder.digest()
        wanted = encoder.digest()
        modules["mean_var_norm"].glob_mean += 1
        assert encoder.digest() != wanted
        modules["mean_var_norm"].glob_mean -= 1
        loaded = EncoderClassifier.from_hparams(source=str(folder), savedir=str(tmp_path / "cache"))
        torch.testing.assert_close(loaded.encode_batch(waveforms)[:, 0], encoder(waveforms))


def test_global_statistics_go_with_the_encoder_to_another_device(tmp_path):
    modules = make_run(tmp_path, norm="norm_type: global")
    encoder = SpeakerEncoder(modules)
    modules["mean_var_norm"].train()(torch.randn(2, 50, 80))
    assert encoder.to("meta").mean_var_norm.glob_mean.device.type == "meta"


def test_every_model_of_the_recipe_is_covered_by_its_own_yaml(tmp_path):
    pytest.importorskip("speechbrain_qmargin.models.resnet")
    resnet = """
        !new:speechbrain_qmargin.models.resnet.ResNet
        input_size: 20
        channels: 4
        lin_neurons: 16
    """
    modules = make_run(tmp_path, model=resnet, epochs=1)
    folder = export_run(tmp_path)
    loaded = EncoderClassifier.from_hparams(source=str(folder), savedir=str(tmp_path / "cache"))
    waveforms = torch.randn(2, 16000)
    with torch.no_grad():
        expected = SpeakerEncoder(modules)(waveforms)
    torch.testing.assert_close(loaded.encode_batch(waveforms)[:, 0], expected)


def test_the_operating_point_travels_with_the_folder(run):
    folder = run / "inference"
    encoder = load_encoder(folder).digest()
    for shift in (0.0, 0.125):
        point = point_of(encoder=encoder, shift=shift)
        export_run(run, operating_point=point)
        verifier = SpeakerRecognition.from_hparams(source=str(folder))
        assert verifier.hparams.threshold == point.threshold
    assert OperatingPoint.load(folder / "operating_point.json") == point


def point_of(kind="cosine", encoder="", shift=0.0):
    points = operating_points(np.linspace(0, 0.5, 100) + shift, np.arange(100) >= 90)
    return choose_operating_point("mine", points, 0.1, kind=kind, encoder=encoder)


@pytest.mark.parametrize(
    ("kind", "encoder", "fault"),
    [
        ("as-norm", "", "the threshold of 'mine' is for as-norm scores; .* gives? cosines"),
        ("centred cosine", "", "is for centred cosine scores"),
        ("", "", "of scores whose kind it does not say"),
        ("cosine", "0" * 64, "the threshold is of the encoder 0000000000000000, and this is"),
    ],
)
def test_a_threshold_of_other_scores_or_of_another_encoder_is_refused(
    exported, kind, encoder, fault
):
    folder = exported / "inference"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match=fault):
        export_run(exported, operating_point=point_of(kind, encoder))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_second_export_keeps_what_was_measured(run, tmp_path):
    folder = run / "inference"
    point = point_of(encoder=load_encoder(folder).digest())
    export_run(run, operating_point=point)
    (folder / "calibration.json").write_text("{}")
    export_run(run)
    assert OperatingPoint.load(folder / "operating_point.json") == point
    assert f"threshold: {point.threshold!r}\n" in (folder / "hyperparams.yaml").read_text()
    assert (folder / "calibration.json").read_text() == "{}"

    make_run(tmp_path / "other", epochs=1)  # other weights: it stays, and decides nothing
    shutil.copytree(folder, tmp_path / "other" / "inference")
    with pytest.warns(UserWarning, match=r"operating_point\.json stays, but it is not for this"):
        folder = export_run(tmp_path / "other")
    assert OperatingPoint.load(folder / "operating_point.json") == point
    assert "threshold:" not in (folder / "hyperparams.yaml").read_text()


def test_the_digest_is_of_settings_and_weights_not_of_how_they_are_written(tmp_path):
    make_run(tmp_path / "a")
    yaml = tmp_path / "a" / "hyperparams.yaml"
    wanted = load_encoder(tmp_path / "a").digest()
    yaml.write_text(yaml.read_text().replace("{n_mels: 20}", "\n    n_mels: 20  # bands\n"))
    assert load_encoder(tmp_path / "a").digest() == wanted
    yaml.write_text(yaml.read_text().replace("n_mels: 20", "n_mels: 20\n    hop_length: 20"))
    assert load_encoder(tmp_path / "a").digest() != wanted  # no weight, no word of repr() tells


def test_modules_that_the_yaml_does_not_describe_are_refused_and_the_old_folder_stays(tmp_path):
    modules = make_run(tmp_path)
    folder = export_run(tmp_path)
    kept = (folder / "embedding_model.ckpt").read_bytes()
    yaml = tmp_path / "hyperparams.yaml"
    yaml.write_text(yaml.read_text().replace("norm_type: sentence", "norm_type: batch"))
    with pytest.raises(ValueError, match=r"hyperparams\.yaml: .* other embeddings"):
        export_for_inference(yaml, modules, folder)
    assert (folder / "embedding_model.ckpt").read_bytes() == kept
    assert not list(tmp_path.glob(".inference*"))


def test_bad_input_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hyperparams\.yaml"):
        load_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a run"):
        export_run(tmp_path)
    make_run(tmp_path / "run", epochs=0)
    with pytest.raises(FileNotFoundError, match="no checkpoint of a finished epoch"):
        load_encoder(tmp_path / "run")
    many = CategoricalEncoder()
    many.update_from_iterable([*SPEAKERS, "dan"])
    many.save(tmp_path / "labels.txt")
    modules = make_run(tmp_path / "other", epochs=1)
    with pytest.raises(ValueError, match="4 labels and 3 classes"):
        export_for_inference(
            tmp_path / "other" / "hyperparams.yaml",
            modules,
            tmp_path / "out",
            label_encoder=tmp_path / "labels.txt",
        )


def onnx_embeddings(path, **inputs):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    assert session.get_inputs()[0].shape[:2] == [
        "batch",
        "samples" if "waveform" in inputs else "frames",
    ]
    return torch.from_numpy(session.run(["embedding"], inputs)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_gives_the_same_embeddings_at_other_lengths(tmp_path):
    pytest.importorskip("onnxscript")
    make_run(tmp_path, model=ONE_BLOCK, epochs=1)
    encoder, path = load_encoder(tmp_path), tmp_path / "encoder.onnx"
    differences = export_onnx(encoder, path)
    assert len(differences) == 4
    assert max(differences.values()) < 1e-4
    waveforms = torch.randn(4, 12345)
    with torch.no_grad():
        expected = encoder(waveforms)
    found = onnx_embeddings(path, waveform=waveforms.numpy())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Mean(torch.nn.Linear):
    """The smallest model that there is: exporting a whole one is the other test."""

    def forward(self, features, lengths=None):
        return super().forward(features).relu().mean(1, keepdim=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_starts_from_features_where_asked(tmp_path):
    pytest.importorskip("onnxscript")
    modules = make_run(tmp_path, epochs=0)
    encoder = SpeakerEncoder({**modules, "embedding_model": Mean(20, 16)})
    export_onnx(encoder, tmp_path / "encoder.onnx", from_waveform=False)
    with torch.no_grad():
        features = encoder.compute_features(torch.randn(4, 12345))
        expected = encoder.embed(features)
    found = onnx_embeddings(tmp_path / "encoder.onnx", features=features.numpy())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_that_disagrees_is_not_left(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch_export = pytest.importorskip("torch.onnx")
    make_run(tmp_path, epochs=1)

    class Other:
        def __init__(self, *_, **__):
            pass

        def run(self, _, inputs):
            return [np.ones((len(inputs["waveform"]), 16), np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Other)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(torch_export, "export", lambda *given, **_: given[2].write_bytes(b"x"))
    with pytest.raises(ValueError, match=r"encoder\.onnx: onnxruntime's embeddings differ"):
        export_onnx(load_encoder(tmp_path), tmp_path / "encoder.onnx")
    assert not list(tmp_path.glob("*.onnx")) + list(tmp_path.glob(".*.onnx"))


def test_what_a_module_draws_is_no_difference_between_two():
    """SpeechBrain's pooling of statistics adds noise, which was another in each."""

    class Noisy(torch.nn.Module):
        def forward(self, x):
            return x + 0.01 * torch.randn_like(x)

    before = torch.random.get_rng_state()
    inference._refuse_another(Noisy(), Noisy(), torch.ones(2, 4), "own.yaml")
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"own\.yaml: the modules it describes, .* give other"):
        inference._refuse_another(Noisy(), torch.nn.Identity(), torch.ones(2, 4), "own.yaml")
