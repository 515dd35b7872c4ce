"""The recipes' networks in ONNX: the same embeddings, in any batch, at any length."""

import pytest
import torch
from published_layouts import randomised
from speechbrain.processing.features import InputNormalization

from speechbrain_qmargin.export.encoder import SpeakerEncoder
from speechbrain_qmargin.export.face_encoder import FaceEncoder
from speechbrain_qmargin.export.onnx import export_onnx
from speechbrain_qmargin.features import KaldiFbank
from speechbrain_qmargin.models import eres2net, resnet
from speechbrain_qmargin.models.campplus import CAMPPlus
from speechbrain_qmargin.models.eres2net import ERes2NetV2
from speechbrain_qmargin.models.mbf import MBF
from speechbrain_qmargin.models.resnet import ResNet

pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def speech(model):
    norm = InputNormalization(norm_type="sentence", std_norm=False)
    modules = {"compute_features": KaldiFbank(n_mels=16), "mean_var_norm": norm}
    return SpeakerEncoder({**modules, "embedding_model": randomised(model)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: speech(CAMPPlus(16, 8, growth=4, channels=16, layers=(1, 1, 1))),
        lambda: speech(ResNet(16, 2, 6, 221)),
        lambda: speech(ERes2NetV2(16, channels=4, lin_neurons=6)),
        lambda: FaceEncoder(randomised(MBF(8, 1, (1, 1, 1, 1), 32)), 32, "none"),
    ],
    ids=["campplus", "resnet221", "eres2netv2", "mbf"],
)
def test_a_network_gives_the_same_embeddings_in_onnx(tmp_path, monkeypatch, make):
    """Of every kind of block one: the time that an export takes grows with their number."""
    monkeypatch.setitem(resnet.BLOCKS, 221, (1, 1, 1, 1))
    monkeypatch.setattr(eres2net, "BLOCKS", (1, 1, 1, 1))
    torch.manual_seed(0)
    differences = export_onnx(make(), tmp_path / "encoder.onnx", from_waveform=False)
    assert len(differences) >= 3  # other batches and lengths than the one it was traced at
    assert max(differences.values()) < 1e-5
