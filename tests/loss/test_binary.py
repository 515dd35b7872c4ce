"""Losses that decide about each class on its own, and learn a threshold."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from speechbrain_qmargin import BinaryObjective, Loss, QMarginHead, make_loss
from speechbrain_qmargin.loss.dense import DenseScores

CLASSES, DIM = 40, 8


def batch(seed=0, rows=6):
    torch.manual_seed(seed)
    weight = torch.randn(CLASSES, DIM)
    labels = torch.randint(CLASSES, (rows,))
    x = weight[labels] + 0.3 * torch.randn(rows, DIM)
    x[0] = -weight[labels[0]] + 0.05 * torch.randn(DIM)  # beyond pi - margin
    return x, weight, labels


def wespeaker(kind, margin, s=8.0, lam=0.7, t=3):
    """SphereFace2 as WeSpeaker's projections have it."""

    def g(z):
        return 2 * ((z + 1) / 2) ** t - 1

    def losses(cosines, one_hot, bias):
        if kind == "C":
            own, wrong = g(cosines) - margin, g(cosines) + margin
        else:
            angle = torch.acos(cosines)
            turned = torch.cos(angle + margin)
            far = cosines - (1 + math.cos(math.pi - margin))
            own = g(torch.where(angle < math.pi - margin, turned, far))
            wrong = g(torch.cos(angle - margin))
        own, wrong = s * own + bias, s * wrong + bias
        own, wrong = lam * torch.log1p(torch.exp(-own)), (1 - lam) * torch.log1p(torch.exp(wrong))
        return torch.where(one_hot, own, wrong).sum(1)

    return losses


def zhou(cosines, one_hot, b, s=8.0, m=0.4, balance=0.5):
    """UniFace as in the authors' code, without its clips."""
    own = torch.log1p(torch.exp(-(s * (cosines - m) - b)))
    wrong = balance * torch.log1p(torch.exp(s * cosines - b))
    return torch.where(one_hot, own, wrong).sum(1)


CASES = {
    "C": ("sphereface2", {"kind": "C", "bias": 0.3}, wespeaker("C", 0.2)),
    "A": ("sphereface2", {"kind": "A", "bias": -0.3, "margin": 0.3}, wespeaker("A", 0.3)),
    "uniface": ("uniface", {"balance": 0.5}, zhou),
}


def make(case):
    name, options, naive = CASES[case]
    return make_loss(name, scale=8, options=options), naive


@pytest.mark.parametrize("subcentres", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_published_formula(case, subcentres):
    """Loss, and gradients by embeddings, prototypes and what is learnt."""
    x, weight, labels = batch()
    if subcentres > 1:
        weight = torch.cat((weight, torch.randn_like(weight)), 1).view(-1, DIM)
    at, w = x.double().requires_grad_(), weight.double().requires_grad_()
    cosines = F.normalize(at, dim=1) @ F.normalize(w, dim=1).T
    cosines = cosines.unflatten(1, (-1, subcentres)).amax(2)
    loss, naive = make(case)
    begins = CASES[case][1].get("bias", math.log(10 * CLASSES))
    learnt = torch.tensor(begins, dtype=torch.float64, requires_grad=True)
    wanted = naive(cosines, F.one_hot(labels, CLASSES).bool(), learnt).mean()
    wanted.backward()
    for way in ("dense", "sparse"):
        loss, _ = make(case)
        x.requires_grad_().grad = None
        if way == "dense":
            mine = weight.clone().requires_grad_()
            found = F.normalize(x, dim=1) @ F.normalize(mine, dim=1).T
            value = loss(found.unflatten(1, (-1, subcentres)).amax(2), labels)
        else:
            head = QMarginHead(DIM, CLASSES, subcentres=subcentres).train()
            mine = head.weight
            with torch.no_grad():
                mine.copy_(weight)
            value = loss(head(x), labels)
        (2 * value).backward()
        (parameter,) = loss.parameters()
        near = {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(value.double(), wanted, **near)
        for found, want in ((x, at), (mine, w), (parameter, learnt)):
            torch.testing.assert_close(found.grad.double() / 2, want.grad, **near)


def test_it_says_what_a_trainer_logs():
    x, weight, labels = batch()
    for outputs in (F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T, QMarginHead(DIM, 40)(x)):
        _, stats = make_loss("sphereface2").with_stats(outputs, labels)
        assert (stats.support_mean, stats.zero_loss) == (CLASSES, 0)
        assert 0 < stats.target_posterior < 1


def test_where_a_threshold_begins_and_goes_on():
    cosines, labels = torch.zeros(2, 1000), torch.tensor([0, 1])
    loss = make_loss("uniface")
    loss(cosines, labels)
    assert loss.threshold.item() == pytest.approx(math.log(10_000))
    with torch.no_grad():
        loss.threshold.fill_(7.0)
    loss(cosines, labels)
    other = make_loss("uniface")
    other.load_state_dict(loss.state_dict())
    assert other(cosines, labels) == loss(cosines, labels)
    assert other.threshold.item() == 7
    assert make_loss("sphereface2", margin="large").margin == 0.3
    assert make_loss("sphereface2", margin="large", options={"kind": "A"}).margin == 0.25


def test_second_derivatives_on_all_cosines():
    cosines = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    for case in CASES:
        loss, _ = make(case)
        loss.double()
        at = {"targets": torch.tensor([1, 4])}
        assert torch.autograd.gradgradcheck(functools.partial(loss, **at), (0.9 * cosines,))


class Constant(Loss):
    """Wrong classes without a slope."""

    settings = ("scale",)

    def objective(self, scores, targets):
        return BinaryObjective(lambda c: self.scale * c, lambda c: torch.zeros_like(c))


def test_what_has_no_slope_has_no_gradient():
    x, _, labels = batch()
    head = QMarginHead(DIM, CLASSES)
    Constant(scale=4.0)(head(x.requires_grad_()), labels).backward()
    touched = head.weight.grad.to_dense().any(1).nonzero().squeeze(1)
    assert set(touched.tolist()) == set(labels.tolist())
    with pytest.raises(ValueError, match=r"label 40 is outside \[0, 40\)"):
        Constant(scale=4.0)(DenseScores(torch.zeros(1, 40)), torch.tensor([40]))
    with pytest.raises(ValueError, match=r"label 40 is outside \[0, 40\)"):
        Constant(scale=4.0)(QMarginHead(DIM, 40)(x[:1]), torch.tensor([40]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sphereface2", {"kind": "B"}, "kind must be 'C' or 'A', got 'B'"),
        ("sphereface2", {"t": 0}, "t must be a whole number"),
        ("sphereface2", {"balance": 1}, "balance must be in"),
        ("uniface", {"balance": 0}, "balance must be > 0"),
    ],
)
def test_settings_outside_their_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, options=options)
