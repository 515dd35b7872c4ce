"""The suggested parameters, against the solver on drawn cosines and against what was measured."""

import pytest
import torch

from speechbrain_qmargin import hard_margin, make_loss, q_margin_loss, suggest_parameters
from speechbrain_qmargin.loss.parameters import ClassStatistics, expected

PAPER = {"speakers": (5994, 192, (1.5, 10, 0.2)), "faces": (2_060_000, 512, (1.25, 32, 0.2))}


@pytest.mark.parametrize("target", [None, 0.5, 0.7])
@pytest.mark.parametrize(("alpha", "scale"), [(1.25, 20), (1.5, 10), (1.75, 5), (2, 5)])
@pytest.mark.parametrize("classes", [30, 438, 5994])
def test_expectations_are_the_solvers_means(classes, alpha, scale, target):
    dim, rows = 192, 200
    wrong = ClassStatistics.untrained(dim)
    if target is not None:
        wrong = ClassStatistics.trained(classes, dim, target)
    generator = torch.Generator().manual_seed(1)
    cosines = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    cosines = (wrong.mean + wrong.deviation * cosines).clamp(-1, 1)
    cosines[:, 0] = target or 0
    labels = torch.zeros(rows, dtype=torch.long)
    _, found = q_margin_loss(cosines, labels, alpha, scale, 0.2, return_stats=True)
    theory = expected(classes, alpha, scale, 0.2, target or 0, wrong)
    # means of 200 and of 512 samples
    assert float(found.support_mean) == pytest.approx(theory.support, rel=0.12, abs=0.2)
    assert float(found.zero_loss) == pytest.approx(theory.zero_loss, abs=0.1)


def test_random_prototypes_have_the_untrained_statistics():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(4000, 64, generator=generator), dim=1)
    cosines = rows[1:] @ rows[0]
    wrong = ClassStatistics.untrained(64)
    assert float(cosines.mean()) == pytest.approx(wrong.mean, abs=3 * wrong.deviation / 4000**0.5)
    assert float(cosines.std()) == pytest.approx(wrong.deviation, rel=0.04)
    largest = torch.stack([(rows @ row).topk(2).values[1] for row in rows[:400]]).median()
    assert float(largest) == pytest.approx(wrong.largest(4000), abs=0.02)


def test_evenly_spread_prototypes_have_the_trained_statistics():
    """A simplex, and an orthogonal frame: both meet the Welch bound."""
    simplex = torch.eye(5, dtype=torch.float64) - 0.2
    simplex = (
        torch.nn.functional.normalize(simplex, dim=1)
        @ torch.linalg.qr(torch.ones(5, 5))[0].double()
    )
    cosines = (simplex @ simplex.T)[~torch.eye(5).bool()]
    found = ClassStatistics.trained(5, 4, 1.0)
    torch.testing.assert_close(cosines, torch.full_like(cosines, found.mean), rtol=1e-5, atol=1e-5)
    angles = torch.arange(8) * torch.pi / 8  # eight lines in the plane, a tight frame
    frame = torch.stack((angles.cos(), angles.sin()), 1)
    squares = (frame @ frame.T)[~torch.eye(8).bool()].square().mean()
    found = ClassStatistics.trained(8, 2, 1.0)
    assert float(squares) == pytest.approx(found.mean**2 + found.deviation**2, rel=1e-5)


@pytest.mark.parametrize("which", PAPER)
def test_the_papers_settings_at_the_papers_sizes(which):
    classes, dim, setting = PAPER[which]
    found = suggest_parameters(classes, embedding_dim=dim)
    assert (found.alpha, found.scale, found.margin) == setting


def test_support_is_of_the_order_that_was_reported():
    """1,020 classes on average on WebFace42M; 15 at 438 speakers after 12 epochs."""
    found = suggest_parameters(2_060_000, embedding_dim=512)
    assert 500 < found.untrained.support < 1500
    later, earlier = (
        expected(438, 1.5, 10, 0.2, cosine, ClassStatistics.trained(438, 192, cosine)).support
        for cosine in (0.6, 0.5)
    )
    assert later < 15 < earlier


@pytest.mark.parametrize("dim", [64, 192, 512])
@pytest.mark.parametrize("classes", [2, 3, 30, 90, 438, 3959, 17_982, 93_431, 2_060_000, 10**8])
def test_hard_margins_are_where_the_plane_was_best_or_within_reach(classes, dim):
    found = suggest_parameters(classes, embedding_dim=dim)
    assert 1.25 <= found.alpha <= 1.5
    wrong = ClassStatistics.trained(classes, dim, 0.7).largest(classes)
    assert found.resting_cosine == pytest.approx(found.hard_margin + wrong)
    if found.margin == 0.2:
        assert 0.4 < found.hard_margin < 1
    else:  # in few dimensions
        assert found.resting_cosine == pytest.approx(0.85, abs=0.01)
        assert "would ask for" in found.reasons[-1]
    assert make_loss("qmargin", found.alpha, found.scale, found.margin).warning() is None


# docs/comparison_first.md, "The plane": classes, samples, and by alpha at (alpha - 1) scale = 5 the
# mean TAR at 1e-2 over the scales, one run of four being worth 0.6; 438 speakers by EER
PLANE = {
    (30, 20 * 736): {1.25: 20.6, 1.5: 20.5, 1.75: 19.9, 2.0: 20.2},
    (90, 20 * 736): {1.25: 22.1, 1.5: 20.3, 1.75: 16.9, 2.0: 16.6},
}


@pytest.mark.parametrize("size", PLANE)
def test_alpha_is_among_the_planes_good_ones(size):
    classes, samples = size
    found = suggest_parameters(classes, samples=samples)
    good = [alpha for alpha, tar in PLANE[size].items() if max(PLANE[size].values()) - tar < 2]
    assert min(good) <= found.alpha <= max(good)
    pushes = {alpha: pushed(classes, samples, alpha, 5 / (alpha - 1)) for alpha in PLANE[size]}
    assert all((pushes[alpha] > 2000) == (alpha in good) for alpha in pushes)


def pushed(classes: int, samples: int, alpha: float, scale: float, dim: int = 192) -> float:
    found = expected(classes, alpha, scale, 0.2, 0.0, ClassStatistics.untrained(dim))
    return samples * found.support / classes


def test_the_suggestion_is_the_third_tunings_best():
    """docs/comparison.md: 408 speakers, prototypes that start short, TAR@1e-2 at m = 0.2."""
    tried = {(1.1, 32): 59.6, (1.25, 10): 60.0, (1.25, 20): 63.6, (1.5, 10): 56.9}
    found = suggest_parameters(408, samples=32_556, embedding_dim=128)
    assert tried[found.alpha, found.scale] == max(tried.values())


def test_a_short_training_gets_a_smaller_alpha_at_the_same_hard_margin():
    """438 speakers: alpha 1.25 was ahead of 1.5 after 12 epochs, and 30 epochs closed the gap."""
    short, longer = (suggest_parameters(438, samples=epochs * 2341) for epochs in (12, 30))
    assert (short.alpha, short.scale) == (1.25, 20)
    assert (longer.alpha, longer.scale) == (1.5, 10)
    assert min(short.pushes, longer.pushes) >= 4000
    assert longer.hard_margin == pytest.approx(short.hard_margin, rel=1e-3)
    assert short.hard_margin == hard_margin(short.alpha, short.scale, short.margin)
    assert "times as many epochs would be enough at alpha 1.25" in str(
        suggest_parameters(438, samples=2341)
    )
    assert suggest_parameters(438).pushes is None


def test_what_is_given_stays():
    found = suggest_parameters(438, alpha=1.75)
    assert (found.alpha, found.scale) == (1.75, 6.667)
    loss = make_loss("qmargin_auto", alpha=1.75, num_classes=438, embedding_dim=256)
    assert (loss.value("alpha"), loss.value("scale")) == (1.75, 6.667)
    loss = make_loss("qmargin_auto", margin="large", num_classes=438, samples=28_000)
    assert hard_margin(1.25, 20, loss.value("margin")) == pytest.approx(0.9)
    assert "pushed away" in loss.describe()
    assert make_loss("qmargin_auto", num_classes=438, samples=0).value("alpha") == 1.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a whole number"),
        ({"num_classes": 2.5}, "num_classes must be a whole number"),
        ({"num_classes": 9, "samples": 0}, "samples must be a whole number"),
        ({"num_classes": 9, "alpha": 1.0}, "use cosface"),
        ({"num_classes": 9, "embedding_dim": -1}, "embedding_dim must be"),
    ],
)
def test_numbers_outside_their_range_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        suggest_parameters(**given)


def test_auto_wants_the_number_of_classes():
    with pytest.raises(ValueError, match="qmargin_auto wants num_classes"):
        make_loss("qmargin_auto")
