"""Losses that want to know how many items each class has hear it from the training data."""

import math

import numpy as np
import pytest

from speechbrain_qmargin import KappaFaceLoss, PriorQMarginLoss, make_loss
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.speech_dataset import SpeechDataset
from speechbrain_qmargin.training.run import count_classes


class Counted:
    def __init__(self, counts):
        self.counts = counts

    def class_counts(self):
        return self.counts


def hparams(name, **options):
    loss = make_loss(name, options=options)
    return {"compute_cost": loss, "loss": name, "embedding_dim": 4, "loss_options": options}


def test_a_loss_hears_the_counts():
    settings = hparams("qmargin_prior", temperature=1.0)
    count_classes(settings, Counted(np.array([100, 10, 0])))
    logs = np.log([100, 10, 1])
    assert settings["compute_cost"].log_q.tolist() == pytest.approx(list(logs - logs.mean()))
    settings = hparams("kappaface")
    count_classes(settings, Counted(np.array([2, 3])))
    assert settings["compute_cost"].sums.shape == (2, 4)
    assert settings["compute_cost"].state_dict().keys() >= {"psi", "seen", "sums"}


def test_others_do_not_and_own_counts_stay():
    count_classes(hparams("arcface"), Counted(None))
    count_classes({}, None)
    settings = hparams("qmargin_prior", counts=[1, 2])
    count_classes(settings, Counted(None))
    assert len(settings["compute_cost"].log_q) == 2
    # as a YAML makes them
    prior = PriorQMarginLoss(counts=[100, 1], temperature=1.0)
    kappa = KappaFaceLoss(counts=[5, 20], embedding_dim=4)
    for loss in (prior, kappa):
        count_classes({"compute_cost": loss, "loss_options": {}}, Counted(np.array([7, 7])))
    assert prior.log_q.tolist() == pytest.approx([math.log(10), -math.log(10)])
    assert kappa.counts.tolist() == [5, 20]
    with pytest.raises(ValueError, match="qmargin_prior needs the number of images"):
        count_classes(hparams("qmargin_prior"), Counted(None))


def test_speakers_at_other_speeds_count_as_themselves(tmp_path):
    items = [Item(f"{name}/{k}", "x.wav", name, 0.0, 1.0) for name, k in ["b0", "a0", "b1", "b2"]]
    labels = {"a": 0, "b": 1}
    data = SpeechDataset(Manifest.of(items), 16000, labels=labels, speeds=(1.0, 0.9))
    assert data.class_counts().tolist() == [0.5, 1.5, 0.5, 1.5]
