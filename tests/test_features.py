"""Filterbanks as Kaldi's, item by item."""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.classifiers import EncoderClassifier
from speechbrain.processing.features import InputNormalization
from torchaudio.compliance import kaldi

from speechbrain_qmargin.export.encoder import PARTS, SpeakerEncoder
from speechbrain_qmargin.export.inference import export_for_inference
from speechbrain_qmargin.export.onnx import export_onnx
from speechbrain_qmargin.features import KaldiFbank


def waveforms(*shape, seed=0):
    """Noise whose level and colour change, in [-1, 1]."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(-1).mul(0.05).sin() * torch.linspace(0.01, 0.9, shape[-1])


def reference(waveform, **options):
    options = {"sample_frequency": 16000, "num_mel_bins": 80, **options}
    return kaldi.fbank(waveform[None] * 2**15, window_type="hamming", dither=0.0, **options)


@pytest.mark.parametrize("samples", [400, 559, 560, 12345])
def test_it_is_torchaudios(samples):
    signals = waveforms(3, samples)
    signals[2] = 0.5  # constant: every frame is zero without its mean
    found = KaldiFbank().eval()(signals)
    assert found.shape == (3, 1 + (samples - 400) // 160, 80)
    for item, signal in zip(found, signals, strict=True):
        torch.testing.assert_close(item, reference(signal), rtol=0, atol=1e-4)


def test_other_rates_and_frames():
    signal = waveforms(1, 8000)
    found = KaldiFbank(8000, 40, frame_length=32, frame_shift=8).eval()(signal)[0]
    options = {"sample_frequency": 8000, "num_mel_bins": 40}
    expected = reference(signal[0], frame_length=32, frame_shift=8, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_an_item_is_the_same_alone_and_in_a_padded_batch():
    fbank, signals = KaldiFbank().eval(), waveforms(2, 8000)
    signals[1, 5000:] = 0
    alone = fbank(signals[1:, :5000])[0]
    torch.testing.assert_close(fbank(signals)[1, : len(alone)], alone, rtol=0, atol=1e-4)


def test_dither_is_of_training_alone_and_follows_the_seed():
    fbank, silence = KaldiFbank(), torch.zeros(1, 16000)
    torch.manual_seed(0)
    one = fbank(silence)
    torch.manual_seed(0)
    assert torch.equal(fbank(silence), one)
    # noise of variance 1 in 16-bit units: what torchaudio's own dither gives
    theirs = kaldi.fbank(silence, window_type="hamming", num_mel_bins=80, dither=1.0)
    assert one.mean().item() == pytest.approx(theirs.mean().item(), abs=0.1)
    assert torch.equal(fbank.eval()(silence)[0], reference(silence[0]))
    assert torch.equal(KaldiFbank(dither=0.0)(silence), fbank(silence))


def test_float32_whatever_autocast_says():
    fbank, signals = KaldiFbank().eval(), waveforms(2, 16000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fbank(signals)
    assert found.dtype == torch.float32
    assert torch.equal(found, fbank(signals))


def test_less_than_a_frame_is_refused():
    with pytest.raises(ValueError, match="399 samples are shorter than a frame of 400"):
        KaldiFbank()(torch.zeros(1, 399))


def test_it_adds_nothing_to_a_checkpoint():
    assert not KaldiFbank().state_dict()


class Mean(torch.nn.Linear):
    """The smallest model that there is."""

    def forward(self, features, lengths=None):
        return super().forward(features).relu().mean(1, keepdim=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_waveform_model_is_written_as_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    normalisation = InputNormalization(norm_type="sentence", std_norm=False)
    parts = (KaldiFbank(n_mels=20), normalisation, Mean(20, 16))
    encoder = SpeakerEncoder(dict(zip(PARTS, parts, strict=True)))
    differences = export_onnx(encoder, tmp_path / "encoder.onnx")  # checks its parity
    assert max(differences.values()) < 2e-5


YAML = """
sample_rate: 16000
compute_features: !new:speechbrain_qmargin.features.KaldiFbank
    n_mels: 20
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
    std_norm: False
embedding_model: !new:speechbrain_qmargin.models.resnet.ResNet
    input_size: 20
    channels: 4
    lin_neurons: 16
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <mean_var_norm>
    embedding_model: !ref <embedding_model>
"""


def test_speechbrain_loads_an_inference_folder_with_it(tmp_path):
    (tmp_path / "hyperparams.yaml").write_text(YAML)
    modules = load_hyperpyyaml(YAML)["modules"]
    modules["compute_features"].train()  # as training leaves it: the export dithers nothing
    folder = export_for_inference(tmp_path / "hyperparams.yaml", modules, tmp_path / "out")
    loaded = EncoderClassifier.from_hparams(source=str(folder), savedir=str(tmp_path / "cache"))
    signals = waveforms(2, 16000)
    with torch.no_grad():
        expected = SpeakerEncoder(modules)(signals)
    torch.testing.assert_close(loaded.encode_batch(signals)[:, 0], expected)
