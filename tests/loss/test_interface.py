"""What a loss of one's own may say, and what would be silently wrong on one of the heads."""

import math

import pytest
import torch
import torch.nn.functional as F

from speechbrain_qmargin import Loss, q_margin_loss
from speechbrain_qmargin.head import QMarginHead
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.dense import DenseScores
from speechbrain_qmargin.loss.generators import generator_named
from speechbrain_qmargin.loss.interface import BinaryObjective, Objective, Rows, slope_of

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
    own = BinaryObjective(result, torch.neg)
    with pytest.raises(ValueError, match=r"target must be \[5\]"):
        evaluate(way, own)


@pytest.mark.parametrize("result", [lambda c: c.amax(1, True), lambda c: c.mean(), lambda c: c[0]])
@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_a_result_of_other_classes_is_named(way, result):
    """One column would be a batch without a wrong class, one row that of every sample."""
    with pytest.raises(ValueError, match=r"move_others must be \[5, \d+\]"):
        evaluate(way, Objective(10.0, move_others=lambda cosines, target: result(cosines)))
    with pytest.raises(ValueError, match=r"others must be \[5, \d+\]"):
        evaluate(way, BinaryObjective(torch.neg, result))


def nearer(cosines):
    """cos(theta - 0.1) as one writes it, with an infinite slope at a cosine of 1."""
    return torch.cos(torch.acos(cosines) - 0.1)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(10.0, move_others=lambda cosines, target: nearer(cosines)),
        BinaryObjective(lambda cosines: 4 * cosines, lambda cosines: 4 * nearer(cosines)),
    ],
    ids=["move_others", "others"],
)
def test_a_target_at_its_prototype_is_not_among_the_others(objective):
    """Its slope there would be infinite, and times its zero in the sum no number."""
    weight, label = torch.eye(3), torch.tensor([0])
    head = QMarginHead(3, 3, sparse_grad=False)
    head.load_state_dict({"weight": weight})
    found = []
    for way in ("dense", "sparse"):
        x = weight[:1].clone().requires_grad_()
        scores = DenseScores(F.linear(F.normalize(x), weight)) if way == "dense" else head(x)
        rows = scores.evaluate(label, objective)
        rows.loss.sum().backward()
        found.append((rows.loss.detach(), x.grad))
    by_angle = math.cos(math.pi / 2 - 0.1)
    if isinstance(objective, Objective):
        wanted = math.log(1 + 2 * math.exp(10 * (by_angle - 1)))
    else:
        wanted = math.log1p(math.exp(-4)) + 2 * math.log1p(math.exp(4 * by_angle))
    torch.testing.assert_close(found[0][0], torch.tensor([wanted], dtype=torch.float32))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1][0, 1] > 0


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_a_prior_of_the_classes_is_that_of_the_targets_too(way, alpha):
    """As the logit adjustment of Menon et al.: the sum has the target's prior as any other."""
    x, weight = batch()
    log_q = torch.linspace(-2, 1, CLASSES)
    cosines = F.linear(F.normalize(x), F.normalize(weight))
    loss, *_ = evaluate(way, Objective(10.0, alpha, log_q=log_q))
    wanted = q_margin_loss(cosines, LABELS, alpha, 10.0, 0.0, log_q=log_q, reduction="none")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    if alpha == 1:
        adjusted = F.cross_entropy(10 * cosines + log_q, LABELS, reduction="none")
        torch.testing.assert_close(loss, adjusted, rtol=1e-5, atol=1e-5)
    own = Objective(10.0, alpha, log_q=log_q, target_log_q=PRIOR - 1)  # is another
    assert not torch.isclose(evaluate(way, own)[0], loss).any()


class Mine(Loss):
    settings = ("scale",)

    def __init__(self, given, scale=10.0):
        super().__init__(scale=scale)
        self.given = given

    def objective(self, scores, targets):
        return self.given


class Own(Mine):
    def rows(self, scores, targets, *, statistics=False):
        return self.given(scores.cosines())


@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_what_is_no_objective_is_named(way):
    x, weight = batch()
    outputs = F.linear(F.normalize(x), F.normalize(weight))
    if way == "sparse":
        outputs = QMarginHead(DIM, CLASSES)(x)
    for given, kind in ((torch.tensor(0.5), "Tensor"), (None, "NoneType"), ((1, 2), "tuple")):
        with pytest.raises(TypeError, match=f"got {kind}; a loss that computes its own values"):
            Mine(given)(outputs, LABELS)
    for name in ("target_log_q", "log_q"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            Objective(10.0, **{name: [0.0] * CLASSES})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda c: c.sum(1), r"Own.rows gave Tensor; it gives Rows\(loss, target_posterior"),
        (lambda c: (c.sum(1), c.sum(1)), "Own.rows gave tuple"),
        (lambda c: Rows(c.mean(), c[:, 0], None), r"Own.rows: loss must be \[5\], got \[\]"),
        (lambda c: Rows(c, c[:, 0], None), r"Own.rows: loss must be \[5\], got \[5, 60\]"),
        (lambda c: Rows(c[:, 0], c, None), "Own.rows: target_posterior must be"),
        (lambda c: Rows(c[:, 0], None, None), "target_posterior must be .* got NoneType"),
        (lambda c: Rows(c[:, 0], c[:, 0], 3), "Own.rows: support must be .* got int"),
    ],
)
def test_rows_that_are_none_are_named(given, message):
    """A row for each class would be a loss that is divided by their number."""
    x, weight = batch()
    cosines = F.linear(F.normalize(x), F.normalize(weight))
    for call in (Own(given), Own(given).with_stats):
        with pytest.raises((TypeError, ValueError), match=message):
            call(cosines, LABELS)
    loss = Own(lambda c: Rows(c.sum(1), c[:, 0], None))
    torch.testing.assert_close(loss(cosines, LABELS[:, None]), cosines.sum(1).mean())


def test_others_that_move_by_their_target_take_it_for_a_constant():
    def move(cosines, target):
        return cosines * (1 + target)

    x, weight = batch()
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    cosines = F.linear(F.normalize(x), F.normalize(weight))
    own = cosines.gather(1, LABELS[:, None]) - 0.2
    moved = move(cosines, own.detach()).scatter(1, LABELS[:, None], own)
    wanted = F.cross_entropy(10 * moved, LABELS, reduction="none")
    (wanted * torch.arange(1, len(LABELS) + 1)).sum().backward()
    objective = Objective(10.0, move_target=lambda cosines: cosines - 0.2, move_others=move)
    for way in ("dense", "sparse"):
        found = evaluate(way, objective)
        for a, b in zip(found, (wanted.detach(), x.grad, weight.grad), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


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
