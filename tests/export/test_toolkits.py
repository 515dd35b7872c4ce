"""Encoders written as WeSpeaker's and arcface_torch's, and read again."""

import pytest
import torch
import yaml
from published_layouts import randomised
from speechbrain.processing.features import InputNormalization

from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.face_encoder import FaceEncoder
from speechbrain_qmargin.export.toolkits import export_arcface_torch, export_wespeaker
from speechbrain_qmargin.features import KaldiFbank
from speechbrain_qmargin.models.campplus import CAMPPlus
from speechbrain_qmargin.models.ecapa import WeSpeakerEcapa
from speechbrain_qmargin.models.eres2net import ERes2Net, ERes2NetV2
from speechbrain_qmargin.models.iresnet import IResNet
from speechbrain_qmargin.models.mbf import MBF
from speechbrain_qmargin.models.mobilefacenet import MobileFaceNet
from speechbrain_qmargin.models.resnet import ResNet
from speechbrain_qmargin.published import load_published


def encoder_of(model, **features):
    modules = {
        "compute_features": KaldiFbank(n_mels=16, **features),
        "mean_var_norm": InputNormalization(norm_type="sentence", std_norm=False),
        "embedding_model": randomised(model),
    }
    return SpeakerEncoder(modules)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ResNet(16, 2, 8, 34), "ResNet34"),
        (lambda: ResNet(16, 2, 8, 50), "ResNet50"),
        (lambda: CAMPPlus(16, 8, growth=4, channels=16, layers=(1, 1, 1)), "CAMPPlus"),
        (lambda: WeSpeakerEcapa(16, 8, 8, pooled=16), "ECAPA_TDNN_GLOB_c8"),
        pytest.param(lambda: ERes2Net(16, 8, 8), "ERes2Net34_Base", marks=pytest.mark.slow),
    ],
)
def test_wespeakers_folder_and_back(tmp_path, make, name):
    encoder = encoder_of(make())
    said = export_wespeaker(encoder, tmp_path / "exp")
    assert said == f"{name} of a size that WeSpeaker's own functions do not build"
    config = yaml.safe_load((tmp_path / "exp/config.yaml").read_text())
    assert config["model"] == name
    assert (config["model_args"]["feat_dim"], config["model_args"]["embed_dim"]) == (16, 8)
    published = load_published(tmp_path / "exp")
    for key, value in encoder.embedding_model.state_dict().items():
        assert torch.equal(published.encoder.state_dict()[key], value)
    with pytest.raises(FileExistsError, match="exp is there already"):
        export_wespeaker(encoder, tmp_path / "exp")


@pytest.mark.parametrize("make", [lambda: ResNet(16, 2, 8, 18, True),
                                  lambda: ERes2Net(16, 8, 8, embedding_norm=True)])  # fmt: skip
def test_a_normalised_embedding_becomes_part_of_wespeakers_layer(tmp_path, make):
    encoder = encoder_of(make())
    export_wespeaker(encoder, tmp_path / "exp")
    network = load_published(tmp_path / "exp").encoder
    assert not any(key.startswith("seg_bn_1") for key in network.state_dict())
    frames = torch.randn(2, 40, 16)
    with torch.no_grad():
        ours = encoder.embedding_model.eval()(frames)
        torch.testing.assert_close(network.eval()(frames), ours)
    raw = encoder.embedding_model
    raw.seg_bn_1 = torch.nn.Identity()
    with torch.no_grad():
        assert (raw(frames) - ours).norm() > 0.1 * ours.norm()


def test_what_wespeaker_does_not_have_is_refused_and_nothing_is_left(tmp_path):
    for encoder, said in (
        (encoder_of(ERes2NetV2(16, 8, 8)), "WeSpeaker has no ERes2NetV2"),
        (encoder_of(ResNet(16, 2, 8), window="povey"), "WeSpeaker takes Kaldi's filterbanks"),
        (encoder_of(ResNet(16, 2, 8), frame_shift=8.0), "25 ms every 10 ms"),
        (FaceEncoder(MBF(8, 1, (1, 1, 1, 1), 32), 32), "of speech; this is an encoder of faces"),
    ):
        with pytest.raises(ValueError, match=said):
            export_wespeaker(encoder, tmp_path / "exp")
        assert not (tmp_path / "exp").exists()


def test_arcface_torchs_file_and_back(tmp_path):
    for model in (IResNet(18, 8, 4, image_size=32), MBF(8, 1, (1, 1, 1, 1), 32)):
        encoder = FaceEncoder(randomised(model), 32)
        file = tmp_path / f"{type(model).__name__}.pth"
        assert "at 32 x 32, a size that get_model does not build" in export_arcface_torch(
            encoder, file
        )
        published = load_published(file)
        x = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(published.encoder(x), model(x))
    for encoder, said in (
        (FaceEncoder(IResNet(18, 8, 4, image_size=32, plain_shortcuts=True), 32), "has no such"),
        (FaceEncoder(MobileFaceNet(8, 32), 32), "has no such MobileFaceNet"),
        (FaceEncoder(IResNet(18, 8, 4, image_size=40), 40), "image_size 40"),
        (encoder_of(ResNet(16, 2, 8)), "of faces; this is an encoder of speech"),
    ):
        with pytest.raises(ValueError, match=said):
            export_arcface_torch(encoder, tmp_path / "other.pth")
    assert len(list(tmp_path.iterdir())) == 2
