"""Settings that are asleep or out of reach, and what is advised instead."""

import math
import re

import pytest
import torch

from speechbrain_qmargin import QMarginLoss, hard_margin, make_loss, suggest_parameters
from speechbrain_qmargin.loss.diagnosis import Progress, advice
from speechbrain_qmargin.loss.parameters import ClassStatistics


def flags(text):
    """(alpha, scale, margin) of an advice, and the hard margin that it names."""
    pattern = r"--alpha (\S+) --scale (\S+) --margin (\S+) \((\S+)\)"
    alpha, scale, margin, lead = map(float, re.search(pattern, text).groups())
    assert hard_margin(alpha, scale, margin) == pytest.approx(lead, abs=0.006)
    return alpha, scale, margin


def test_a_loss_that_is_worse_than_equal_cosines_is_lost():
    """A ResNet34 of 468 speakers whose embeddings stayed one way, and one that learnt."""
    loss, level = QMarginLoss(1.25, 20, 0.2), 8.0101
    # of a posterior of all the others and a target whose share of the measure is lower
    one_out = loss(torch.zeros(1, 468, dtype=torch.float64), torch.tensor([3]))
    assert float(one_out) == pytest.approx(level, abs=1e-4)

    def said(mean_loss, done, loss=loss):
        return advice(loss, Progress(0.0, done, 468, 128, mean_loss=mean_loss))

    text = said(10.37, 4 / 12)
    assert text.startswith(
        "lost: its mean, 10.4, is above the 8.01 of an encoder that tells nobody"
    )
    assert "--embedding_norm True" in text
    assert said(7.74, 4 / 12) is None
    assert said(13.4, 2 / 12) is None  # early
    assert said(20.0, 1.0, make_loss("cosface", scale=16, margin=0.35)) is None  # not sparse
    assert said(20.0, 1.0, make_loss("arcface")) is None


@pytest.mark.parametrize(
    ("loss", "level"),
    [  # sparsemax of n equal logits that lead: (1 - 1 / n) / 2, and what the target is behind
        (make_loss("a3m", alpha=2, scale=5, margin=0.2), 5 * math.sin(0.2) + 0.5 - 0.5 / 467),
        (make_loss("sparsemax"), 0.5 - 0.5 / 468),
    ],
    ids=["a3m", "sparsemax"],
)
def test_the_level_is_that_of_the_loss_itself(loss, level):
    """Q-Margin's at the same numbers is another: 1.36 where the first has 1.49."""
    for mean_loss, lost in ((1.001 * level, True), (0.999 * level, False)):
        text = advice(loss, Progress(0.01, 0.5, 468, 512, mean_loss=mean_loss))
        assert (text or "").startswith("lost") == lost
    settings = {"embedding_dim": 512, "mean_loss": 99.0, "num_classes": 468}
    for name in ("qmargin_norm", "qmargin_prior"):  # whose level is not that of cosines alone
        assert advice(make_loss(name), Progress(0.01, 0.5, **settings)) is None
    drawn = make_loss("qmargin_elastic")
    assert advice(drawn, Progress(0.01, 0.5, **settings)).startswith("lost")
    assert drawn.draws.count == 0


@pytest.mark.parametrize("name", ["entmax", "sparsemax"])
def test_without_a_margin_the_suggested_one(name):
    text = advice(make_loss(name), Progress(0.94, 0.3, 30, 192))
    assert text.startswith("asleep: 94 % of the samples are at zero loss with 30 %")
    assert flags(text) == (1.5, 10, 0.2)


def test_with_the_suggested_one_a_larger():
    text = advice(QMarginLoss(), Progress(0.94, 0.3, 20, 192))
    assert flags(text) == (1.5, 10, 0.301)
    assert "--loss arcface" in text
    text = advice(QMarginLoss(1.5, 10, 0.4), Progress(0.94, 0.3, 20, 192))
    assert "fewer epochs" in text
    wide = make_loss("qmargin_f", scale=5)  # Le Cam, which has no alpha
    assert "fewer epochs" in advice(wide, Progress(0.94, 0.3, 20, 192))


def test_a_loss_without_a_known_lead_is_told_as_well():
    assert "a larger margin, or a cross-entropy" in advice(
        make_loss("a3m"), Progress(0.95, 0.1, 30, 192)
    )


def test_a_hard_margin_beyond_any_cosine():
    """The issue's kind, and one that two cosines allow but a hundred thousand classes do not."""
    text = advice(QMarginLoss(1.25, 32, 0.5), Progress(0.0, 0.1, 438, 192, samples=12 * 2341))
    assert text.startswith(
        "out of reach: no sample can be at zero loss, for the hard margin of 6.8"
    )
    assert flags(text) == (1.25, 20, 0.2)
    text = advice(QMarginLoss(1.5, 10, 0.2), Progress(0.0, 0.9, 100_000, 64))
    assert "ask for a target's cosine of 1.0" in text
    assert flags(text)[2] < 0.15


def test_where_no_margin_is_within_reach_the_advice_is_what_would_bring_one():
    """40,000 classes in 16 dimensions: the margin that was advised was 1.82e-13."""
    text = advice(QMarginLoss(1.5, 10, 0.2), Progress(0.0, 0.9, 40_000, 16))
    assert "--margin" not in text
    assert "no margin is within reach with 40000 classes in 16 dimensions" in text
    found = suggest_parameters(40_000, embedding_dim=16)
    assert found.margin == 0
    assert "margin 0: with wrong cosines up to 1.04 in 16 dimensions" in str(found)
    assert "scale of" not in text  # wrong cosines alone are beyond 0.85
    pattern = r"at least (\d+) dimensions \((\d+) for the usual .*\), or at most (\d+) classes$"
    least, usual, most = map(int, re.search(pattern, text).groups())
    numbers = found.alpha, found.scale
    for dim, classes, margin in ((least, 40_000, 0), (usual, 40_000, 0.2), (16, most, 0)):
        lead = hard_margin(*numbers, margin)

        def rests(classes, dim, lead=lead):
            return lead + ClassStatistics.trained(classes, dim, 0.7).largest(classes)

        assert rests(classes, dim) <= 0.85
        beyond = (classes + 1, dim) if dim == 16 else (classes, dim - 1)
        assert rests(*beyond) > 0.85


def test_a_scale_that_brings_a_margin_within_reach_is_named():
    found = suggest_parameters(40_000, embedding_dim=36)
    assert found.margin == 0
    scale = int(re.search(r"or a scale of at least (\d+)", found.remedy).group(1))
    largest = found.resting_cosine - found.hard_margin
    assert hard_margin(found.alpha, scale, 0) + largest <= 0.85
    assert hard_margin(found.alpha, scale - 1, 0) + largest > 0.85
    assert suggest_parameters(40_000, embedding_dim=192).remedy is None


@pytest.mark.parametrize(
    ("loss", "epoch"),
    [
        (QMarginLoss(), Progress(0.69, 0.3, 30, 192)),
        (QMarginLoss(), Progress(0.94, 0.9, 30, 192)),  # at the end they may rest
        (QMarginLoss(), Progress(0.0, 0.5, 438, 192)),
        (QMarginLoss(1.25, 32, 0.2), Progress(0.0, 0.5, 2_060_000, 512)),
        (make_loss("arcface"), Progress(0.0, 0.1, 438, 192)),
        (make_loss("cosface"), Progress(0.0, 0.1, 438, 192)),
        (make_loss("a3m"), Progress(0.0, 0.1, 438, 192)),
        (QMarginLoss(), Progress(0.0, 0.1, 1, 192)),
    ],
)
def test_nothing_is_said_of_what_is_in_order(loss, epoch):
    assert advice(loss, epoch) is None
