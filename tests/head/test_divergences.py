"""Other divergences on the sparse head and in shards: the definitions by bisection in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from speechbrain_qmargin import make_loss
from speechbrain_qmargin.head import PartialHead, QMarginHead, search
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.generators import GENERATORS
from speechbrain_qmargin.loss.interface import Objective

CLASSES, DIM, ROWS = 700, 8, [2, 4]
# (f*)'(v) below its pole, and f, as the literature has them
RATIOS = {
    "le_cam": (1.0, lambda v: (2 / (1 - v).sqrt() - 1).clamp(min=0)),
    "jensen_shannon": (2 * math.log(2), lambda v: 1 / (2 * torch.exp(-v / 2) - 1)),
    "squared_hellinger": (2.0, lambda v: 4 / (2 - v).square()),
}
DIVERGENCES = {
    "le_cam": lambda u: (u - 1).square() / (u + 1),
    "jensen_shannon": lambda u: 2 * torch.xlogy(u, u) - 2 * (1 + u) * torch.log((1 + u) / 2),
    "squared_hellinger": lambda u: 2 * (u.sqrt() - 1).square(),
}


def definition(name, cosines, labels, scale, margin):
    """Losses [B] and supports: max_p <p, theta> - D(p, q) + D(e_y, q) - theta_y."""
    (pole, ratio), f = RATIOS[name], DIVERGENCES[name]
    one_hot = F.one_hot(labels, cosines.shape[1]).double()
    q = torch.exp(-scale * margin * one_hot)
    theta = scale * cosines.detach()
    low = theta.amax(1, keepdim=True) - pole + 1e-12
    high = low + scale * 2 + 50

    def posterior(tau):
        return q * ratio(theta - tau)

    for _ in range(90):
        tau = (low + high) / 2
        heavy = posterior(tau).sum(1, keepdim=True) > 1
        low, high = torch.where(heavy, tau, low), torch.where(heavy, high, tau)
    p = posterior(high)
    p = p / p.sum(1, keepdim=True)
    gap = (q * (f(one_hot / q) - f(p / q))).sum(1)
    # Danskin: p counts as a constant
    return gap + scale * ((p - one_hot) * cosines).sum(1), (p > 0).sum(1)


def batch(noise, subcentres):
    torch.manual_seed(0)
    weight = torch.randn(CLASSES * subcentres, DIM)
    labels = torch.randint(CLASSES, (sum(ROWS),))
    x = F.normalize(weight[labels * subcentres], dim=1) + noise * torch.randn(sum(ROWS), DIM)
    x[0] = -weight[labels[0] * subcentres]
    return x, weight, labels


WAYS = {
    "screened": Sizes(screen_from=100, sample=50, most=2.0),
    "scored": Sizes(),
    "too many candidates": Sizes(screen_from=100, sample=50, max_candidates=100, most=2.0),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("name", "way", "scale", "noise", "subcentres"),
    [
        ("le_cam", "screened", 30, 0.1, 1),
        ("le_cam", "screened", 10, 0.5, 2),
        ("le_cam", "scored", 20, 0.2, 1),
        ("le_cam", "too many candidates", 10, 0.5, 1),
        ("jensen_shannon", "scored", 15, 0.2, 1),
        ("squared_hellinger", "scored", 8, 0.2, 2),
    ],
)
def test_loss_and_gradients_are_the_definitions(name, way, scale, noise, subcentres, world):
    x, weight, labels = batch(noise, subcentres)
    sizes = [sum(ROWS)] if world == 1 else ROWS

    def step(comm):
        head = QMarginHead(DIM, CLASSES, subcentres=subcentres, group=comm, sizes=WAYS[way]).train()
        rows = slice(head.start * subcentres, head.stop * subcentres)
        with torch.no_grad():
            head.weight.copy_(weight[rows])
        at = x.split(sizes)[comm.rank].clone().requires_grad_()
        loss = make_loss("qmargin_f", scale=scale, options={"divergence": name})
        found = loss.rows(head(at), labels.split(sizes)[comm.rank], statistics=True)
        found.loss.mean().backward()
        return found.loss.detach(), found.support, at.grad, head.weight.grad.to_dense()

    found = on_ranks(world, step)
    at, rows = x.double().requires_grad_(), weight.double().requires_grad_()
    cosines = F.normalize(at, dim=1) @ F.normalize(rows, dim=1).T
    cosines = cosines.unflatten(1, (-1, subcentres)).amax(2)
    wanted, support = definition(name, cosines, labels, scale, 0.2)
    sum(part.mean() for part in wanted.split(sizes)).div(world).backward()
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([one[0] for one in found]).double(), wanted, **near)
    assert torch.cat([one[1] for one in found]).tolist() == support.tolist()
    by_x = torch.cat([one[2] for one in found]).double() / world
    torch.testing.assert_close(by_x, at.grad, **near)
    torch.testing.assert_close(torch.cat([one[3] for one in found]).double(), rows.grad, **near)


def test_passes_over_all_classes_are_not_held_up_by_a_float32_bound():
    """As at alpha > 1: within the rounding of float32 cosines the bound may lie beyond the root."""
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(1)
    weight, labels = torch.randn(400, 24), torch.randint(400, (64,))
    x = F.normalize(weight[labels]) + 0.2 * torch.randn(64, 24, generator=generator)
    head = QMarginHead(24, 400, sizes=Sizes(max_candidates=20)).train()
    with torch.no_grad():
        head.weight.copy_(weight)
    found, at = x.clone().requires_grad_(), x.double().requires_grad_()
    make_loss("qmargin_f", scale=30).rows(head(found), labels).loss.sum().backward()
    cosines = F.normalize(at, dim=1) @ F.normalize(weight.double(), dim=1).T
    definition("le_cam", cosines, labels, 30, 0.2)[0].sum().backward()
    active = at.grad.norm(dim=1) > 1e-6
    assert active.any()
    error = (found.grad - at.grad).norm(dim=1) / at.grad.norm(dim=1)
    assert float(error[active].max()) < 7e-7


def test_what_is_screened_away_is_little_more_than_what_rests(monkeypatch):
    """Le Cam's own floor, not that of another divergence."""
    x, weight, labels = batch(0.1, 1)
    head = QMarginHead(DIM, CLASSES, sizes=WAYS["screened"]).train()
    with torch.no_grad():
        head.weight.copy_(weight)
    seen = []
    refined = search.refined

    def watched(*arguments):
        found = refined(*arguments)
        seen.append((found[0].cosines > -math.inf).sum(1) + 1)  # and the target
        return found

    monkeypatch.setattr("speechbrain_qmargin.head.step.refined", watched)
    rows = make_loss("qmargin_f", scale=30).rows(head(x), labels, statistics=True)
    assert (seen[0] - rows.support).abs().max() <= 1


def test_partial_fc_takes_them_too():
    x, weight, labels = batch(0.2, 1)
    head = PartialHead(DIM, CLASSES, 0.2).train()
    with torch.no_grad():
        head.weight.copy_(weight)
    torch.manual_seed(3)
    drawn = head.sample(labels)
    torch.manual_seed(3)
    found = make_loss("qmargin_f", scale=20)(head(x), labels)
    cosines = F.normalize(x.double(), dim=1) @ F.normalize(weight.double(), dim=1).T
    wanted, _ = definition("le_cam", cosines[:, drawn], torch.searchsorted(drawn, labels), 20, 0.2)
    torch.testing.assert_close(found.double(), wanted.mean(), rtol=1e-5, atol=1e-5)


def test_a_generator_goes_with_a_margin_alone():
    with pytest.raises(ValueError, match="scale and target_log_q alone"):
        Objective(10.0, alpha=1.5, generator=GENERATORS["le_cam"])
    with pytest.raises(ValueError, match="scale and target_log_q alone"):
        Objective(10.0, log_q=torch.zeros(3), generator=GENERATORS["le_cam"])
