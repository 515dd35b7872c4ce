"""A3M against the definition: the alpha-entmax loss of ArcFace's logits, naively in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from speechbrain_qmargin import ArcFaceLoss, EntmaxLoss, QMarginHead, make_loss
from speechbrain_qmargin.loss.dense import DenseScores


def batch(classes, dim=8, rows=9):
    torch.manual_seed(classes)
    weight = torch.randn(classes, dim)
    labels = torch.randint(classes, (rows,))
    x = F.normalize(weight[labels], dim=1) + 0.3 * torch.randn(rows, dim)
    x[0] = -weight[labels[0]] + 0.05 * torch.randn(dim)  # beyond pi - m
    x[1] = weight[labels[1]] + 0.01 * torch.randn(dim)
    return x, weight, labels


def naive(cosines, labels, alpha, scale, margin):
    """max_p <p, theta> - D_f(p, 1) + D_f(e_y, 1) - theta_y, by bisection on the mass."""
    angle = torch.acos(cosines.gather(1, labels[:, None]))
    line = cosines.gather(1, labels[:, None]) - margin * math.sin(margin)
    own = torch.where(angle < math.pi - margin, torch.cos(angle + margin), line)
    theta = scale * cosines.scatter(1, labels[:, None], own)

    def posterior(tau):
        return (1 + (alpha - 1) * (theta - tau)).clamp(min=0) ** (1 / (alpha - 1))

    with torch.no_grad():
        low = theta.amax(1, keepdim=True)
        high = low + 1 / (alpha - 1)
        for _ in range(200):
            tau = (low + high) / 2
            heavy = posterior(tau).sum(1, keepdim=True) > 1
            low, high = torch.where(heavy, tau, low), torch.where(heavy, high, tau)
        p = posterior(tau)
        p = p / p.sum(1, keepdim=True)
    # Danskin: p is the maximiser, so that it counts as a constant
    value = ((p * theta).sum(1, keepdim=True) - theta.gather(1, labels[:, None])).squeeze(1)
    return value + (1 - (p**alpha).sum(1)) / (alpha * (alpha - 1))


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize(("alpha", "scale"), [(1.25, 32), (1.5, 10), (2, 5)])
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("classes", [2, 40])
def test_loss_and_gradients_are_the_definitions(classes, margin, alpha, scale, way):
    x, weight, labels = batch(classes)
    loss = make_loss("a3m", alpha, scale, margin)
    x.requires_grad_()
    if way == "dense":
        weight.requires_grad_()
        found = loss(DenseScores(F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T, x), labels)
    else:
        head = QMarginHead(x.shape[1], classes).train()
        with torch.no_grad():
            head.weight.copy_(weight)
        found, weight = loss(head(x), labels), head.weight
    found.backward()
    exact, rows = (one.detach().double().requires_grad_() for one in (x, weight))
    cosines = F.normalize(exact, dim=1) @ F.normalize(rows, dim=1).T
    wanted = naive(cosines, labels, alpha, scale, margin).mean()
    wanted.backward()
    near = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(found.detach().double(), wanted.detach(), **near)
    torch.testing.assert_close(x.grad.double(), exact.grad, **near)
    grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
    torch.testing.assert_close(grad.double(), rows.grad, **near)


def test_it_lies_between_arcface_and_entmax():
    x, weight, labels = batch(30)
    cosines = F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T
    torch.testing.assert_close(
        make_loss("a3m", 1, 16, 0.3)(cosines, labels), ArcFaceLoss(16, 0.3)(cosines, labels)
    )
    assert make_loss("a3m", 1.5, 16, 0)(cosines, labels) == EntmaxLoss(1.5, 16)(cosines, labels)
    with pytest.raises(ValueError, match="at most pi"):
        make_loss("a3m", margin=3.5)


def test_a_target_outside_the_support_still_has_its_gradient():
    cosines = torch.tensor([[-0.3, 0.6, 0.5]], dtype=torch.float64, requires_grad=True)
    loss, stats = make_loss("a3m").with_stats(cosines, torch.tensor([0]))
    loss.backward()
    assert stats.target_posterior == 0
    slope = math.sin(math.acos(-0.3) + 0.2) / math.sin(math.acos(-0.3))
    assert float(cosines.grad[0, 0]) == pytest.approx(-10 * slope)
