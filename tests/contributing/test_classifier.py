"""A classifier of one's own: cosines [B, 1, C] of embeddings [B, 1, D] are all that is asked."""

import pytest
import torch

from speechbrain_qmargin import make_loss
from speechbrain_qmargin.embeddings import load_embeddings

MODULE = '''
"""Prototypes that stay where they are, evenly spread (Mettes et al. 2019; here by a rotation)."""

import torch
from torch.nn import functional as F


class FixedPrototypes(torch.nn.Module):
    def __init__(self, embedding_dim, num_classes):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(max(num_classes, embedding_dim), embedding_dim, generator=generator)
        self.register_buffer("prototypes", torch.linalg.qr(drawn)[0][:num_classes])

    def forward(self, embeddings):
        return F.linear(F.normalize(embeddings, dim=-1), F.normalize(self.prototypes))
'''
OWN = """
width: 2
model: resnet34
embedding_dim: 8
classifier: !new:my_classifier.FixedPrototypes
    embedding_dim: !ref <embedding_dim>
    num_classes: !ref <out_n_neurons>
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_classifier.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return __import__("my_classifier")


@pytest.mark.parametrize("name", ["qmargin", "arcface", "entmax", "sphereface2"])
def test_every_loss_takes_the_cosines_of_a_classifier_of_ones_own(module, name):
    classifier, loss = module.FixedPrototypes(8, 5), make_loss(name)
    embeddings = torch.randn(6, 1, 8, requires_grad=True)
    targets = torch.arange(6).unsqueeze(1) % 5
    prototypes = torch.nn.functional.normalize(classifier.prototypes)
    cosines = torch.cosine_similarity(embeddings, prototypes, dim=-1)
    found, expected = loss(classifier(embeddings), targets), loss(cosines.unsqueeze(1), targets)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.slow
def test_one_file_and_one_yaml_train_with_a_classifier_of_ones_own(module, train):
    run = train(OWN)
    assert load_embeddings(run / "embeddings.npz").matrix.shape == (4, 8)
    (classifier,) = run.glob("save/CKPT*/classifier.ckpt")
    assert list(torch.load(classifier, weights_only=True)) == ["prototypes"]
