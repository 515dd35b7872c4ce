"""An encoder of one's own, or any of SpeechBrain's: one file outside the package, one YAML."""

import numpy as np
import pytest
import torch
from speechbrain.lobes.models.Xvector import Xvector

from speechbrain_qmargin.cli import main
from speechbrain_qmargin.embeddings import load_embeddings
from speechbrain_qmargin.export.encoder import load_encoder
from speechbrain_qmargin.models import check_embeddings

MODULE = '''
"""The mean over time of some layers: what else it could be is up to its author."""

import torch


class MeanNet(torch.nn.Module):
    def __init__(self, bands, hidden, embedding_dim, shape="good"):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(bands, hidden), torch.nn.ReLU())
        self.last = torch.nn.Linear(hidden, embedding_dim)
        self.shape = shape

    def forward(self, features, lengths=None):
        frames = self.layers(features)
        if lengths is not None:
            kept = (lengths * features.shape[1]).round()
            mask = torch.arange(features.shape[1], device=features.device) < kept[:, None]
            frames = frames * mask[..., None] / mask.float().mean(1)[:, None, None]
        embeddings = self.last(frames.mean(1))
        return embeddings.unsqueeze(1) if self.shape == "good" else embeddings
'''

OWN = """
hidden: 12              # a setting of this encoder
embedding_dim: 8
embedding_model: !new:my_encoder.MeanNet
    bands: !ref <n_mels>
    hidden: !ref <hidden>
    embedding_dim: !ref <embedding_dim>
"""
SPEECHBRAINS = """
embedding_dim: 8
embedding_model: !new:speechbrain.lobes.models.Xvector.Xvector
    in_channels: !ref <n_mels>
    tdnn_blocks: 2
    tdnn_channels: [8, 8]
    tdnn_kernel_sizes: [3, 1]
    tdnn_dilations: [1, 1]
    lin_neurons: !ref <embedding_dim>
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [(torch.zeros(4, 8), r"\[4, 8\]"), (torch.zeros(3, 1, 8), r"\[3, 1, 8\]"), ((0.0, 1), "tuple")],
)
def test_what_is_no_embedding_is_named(given, said):
    """A tuple of something and the embedding is what some toolkits' encoders give."""
    with pytest.raises(ValueError, match=rf"gave {said} for 4 items; an encoder gives \[B, 1, D"):
        check_embeddings(given, 4)


@pytest.mark.slow
def test_one_file_and_one_yaml_train_an_encoder_of_ones_own(voices, train, monkeypatch, capsys):
    (voices / "my_encoder.py").write_text(MODULE)
    monkeypatch.syspath_prepend(voices)
    run = train(OWN, "--hidden=6")
    assert "EER" in capsys.readouterr().out
    trained = load_embeddings(run / "embeddings.npz")
    assert trained.matrix.shape == (4, 8)

    # its folder names code of somebody's: that is to be said
    with pytest.raises(ValueError, match=r"!new:my_encoder\.MeanNet would run code"):
        load_encoder(run)
    assert load_encoder(run, trust=True).embedding_model.layers[0].out_features == 6
    out = voices / "out.npz"
    argv = ["--quiet", "extract", str(run), str(voices / "voices"), str(out), "--device=cpu"]
    assert main(argv) == 1
    assert main([*argv, "--trust"]) == 0
    again = load_embeddings(out)
    for name in trained.ids:
        np.testing.assert_allclose(again[name], trained[name], rtol=1e-4, atol=1e-5)

    with pytest.raises(ValueError, match=r"gave \[4, 8\] for 4 items; an encoder gives \[B, 1, D"):
        train(OWN + "    shape: flat\n", output="flat")


@pytest.mark.slow
def test_one_yaml_trains_any_encoder_of_speechbrain(voices, train):
    run = train(SPEECHBRAINS)
    encoder = load_encoder(run)  # without --trust
    assert isinstance(encoder.embedding_model, Xvector)
    assert encoder(torch.randn(1, 8000)).shape == (1, 8)
