"""What a loss of one's own may say, and what would be silently wrong on one of the heads."""

import pytest
import torch
import torch.nn.functional as F

from speechbrain_qmargin.head import QMarginHead
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.dense import DenseScores
from speechbrain_qmargin.loss.generators import generator_named
from speechbrain_qmargin.loss.interface import BinaryObjective, Objective, slope_of

DIM, CLASSES, LABELS = 8, 60, torch.tensor([0, 3, 7, 7, 9])
PRIOR = torch.full((len(LABELS),), -2.0, dtype=torch.float64)


def batch():
    torch.manual_seed(0)
    return torch.randn(len(LABELS), DIM), torch.randn(CLASSES, DIM)


def evaluate(way, objective):
    """Losses and gradients of embeddings and prototypes, with an upstream gradient of 1, 2, ..."""
    x, weight = batch()
    x = x.requires_grad_()
    if way == "dense":
        weight = weight.requires_grad_()
        scores = DenseScores(F.linear(F.normalize(x), F.normalize(weight)))
    else:
        head = QMarginHead(DIM, CLASSES, sparse_grad=False, sizes=Sizes(chunk=16))
        with torch.no_grad():
            head.weight.copy_(weight)
        scores, weight = head(x), head.weight
    loss = scores.evaluate(LABELS, objective).loss
    (loss * torch.arange(1.0, len(LABELS) + 1)).sum().backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize(
    "move",
    [
        lambda cosines: cosines.sub_(0.2),
        lambda cosines: torch.zeros_like(cosines),
        lambda cosines: (cosines - 0.2).float(),
        lambda cosines: cosines - 0.2 * (cosines.detach().argsort().argsort() + 1),
    ],
    ids=["in place", "constant", "float32", "by rank"],
)
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_target_may_be_moved_in_any_of_these_ways(move, alpha):
    """The loss of the definition, with the dense loss's own solver alone in common."""
    x, weight = batch()
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    cosines = F.linear(F.normalize(x), F.normalize(weight))
    own = cosines.gather(1, LABELS[:, None])
    moved = cosines.scatter(1, LABELS[:, None], move(own.squeeze(1).clone())[:, None].double())
    wanted = DenseScores(moved / 4).evaluate(LABELS, Objective(40.0, alpha)).loss  # below 1
    (wanted * torch.arange(1, len(LABELS) + 1)).sum().backward()
    for way in ("dense", "sparse"):
        found = evaluate(way, Objective(10.0, alpha, move_target=move))
        for a, b in zip(found, (wanted.detach(), x.grad, weight.grad), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_samples_that_depend_on_each_other_are_for_all_cosines(alpha):
    """The slopes of a sparse head are one a sample: the gradient would be another's."""
    objective = Objective(10.0, alpha, move_target=lambda cosines: cosines - 0.1 * cosines.sum())
    evaluate("dense", objective)
    with pytest.raises(TypeError, match=r"cosines of other samples.*--head dense"):
        evaluate("sparse", objective)


@pytest.mark.parametrize(
    "result", [lambda c: (c - 0.2)[:, None], lambda c: c.mean(), lambda c: c[:1]]
)
@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_a_result_of_another_shape_is_named(way, result):
    """It would be broadcast: every sample would have the same target."""
    with pytest.raises(ValueError, match=r"move_target must be \[5\]"):
        evaluate(way, Objective(10.0, 1.5, move_target=result))
    with pytest.raises(ValueError, match=r"target_log_q must be"):
        evaluate(way, Objective(10.0, 1.5, target_log_q=result(PRIOR)))


@pytest.mark.parametrize(
    "move",
    [
        lambda cosines, target: torch.where(cosines >= cosines.amax(1, True), 1.1, 1.0) * cosines,
        lambda cosines, target: torch.where(
            cosines >= cosines.topk(2, 1).values[:, 1:], cosines + 0.1, cosines
        ),
        lambda cosines, target: cosines + 0.1 * torch.rand_like(cosines),
    ],
    ids=["largest", "two largest", "drawn"],
)
def test_classes_that_depend_on_each_other_are_for_all_cosines(move):
    """A sparse head takes them chunk by chunk: the result would depend on where chunks end."""
    evaluate("dense", Objective(10.0, move_others=move))
    with pytest.raises(TypeError, match=r"move_others gives a class another.*--head dense"):
        evaluate("sparse", Objective(10.0, move_others=move))
    others = BinaryObjective(lambda c: 10 * c, lambda c: 10 * move(c, None))
    evaluate("dense", others)
    with pytest.raises(TypeError, match=r"others gives a class another.*--head dense"):
        evaluate("sparse", others)


def test_what_is_learnt_has_its_gradient_or_is_named():
    """On all cosines autograd finds it; a sparse head forms the gradients it was told of."""
    b = torch.nn.Parameter(torch.tensor(0.3))

    def gradient(way, objective):
        b.grad = None
        evaluate(way, objective)
        return b.grad

    moved = Objective(10.0, move_others=lambda cosines, target: cosines + b * cosines.square())
    assert gradient("dense", moved) != 0
    with pytest.raises(TypeError, match=r"move_others uses a tensor that requires a gradient"):
        gradient("sparse", moved)
    functions = (lambda cosines: 10 * cosines - F.softplus(b),) * 2
    unlisted = BinaryObjective(*functions)
    wanted = gradient("dense", unlisted)
    with pytest.raises(TypeError, match="not among its parameters"):
        gradient("sparse", unlisted)
    listed = gradient("sparse", BinaryObjective(*functions, parameters=(b,)))
    torch.testing.assert_close(listed, wanted)
    behind = F.softplus(b)  # a listed tensor need be no leaf
    functions = (lambda cosines: 10 * cosines - behind,) * 2
    listed = gradient("sparse", BinaryObjective(*functions, parameters=(behind,)))
    torch.testing.assert_close(listed, wanted)


def test_a_number_that_would_not_be_learnt_is_named():
    s = torch.nn.Parameter(torch.tensor(10.0))
    with pytest.raises(TypeError, match="scale is a number here"):
        Objective(s, 1.5)
    with pytest.raises(TypeError, match="others_weight is a number here"):
        BinaryObjective(torch.neg, torch.neg, others_weight=s)
    prior = PRIOR.clone().requires_grad_()
    with pytest.raises(ValueError, match="has no gradient"):
        Objective(10.0, generator=generator_named("le_cam"), target_log_q=prior)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"scale": 0.0}, "scale must be a finite number > 0"),
        ({"scale": -8.0}, "scale must be a finite number"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": 8.0, "alpha": 0.5}, "alpha must be a finite number >= 1"),
        ({"scale": 8.0, "alpha": torch.tensor(1.5)}, "alpha must be a number here"),
    ],
)
def test_numbers_outside_the_family_are_named(numbers, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Objective(**numbers)


def test_slopes_are_of_each_element():
    at = torch.linspace(-1, 1, 7, dtype=torch.float64)
    moved, slopes = slope_of(lambda cosines: cosines**3 - 0.2, at)
    torch.testing.assert_close(moved, at**3 - 0.2)
    torch.testing.assert_close(slopes, 3 * at**2)
