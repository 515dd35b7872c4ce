"""Partial FC: exactly the loss of the classes that were drawn."""

import math

import pytest
import torch
import torch.nn.functional as F
from brute_force import brute_force
from ranks import on_ranks

from speechbrain_qmargin import QMarginHead, make_loss
from speechbrain_qmargin.head import PartialHead, RowSparseSGD
from speechbrain_qmargin.loss.prior import PriorQMarginLoss

CLASSES, DIM, RATE = 60, 8, 0.25


def batch():
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (6,))
    return torch.randn(6, DIM), torch.randn(CLASSES * 2, DIM), labels


LOSSES = {
    "arcface": lambda classes: make_loss("arcface", scale=16),
    "qmargin": lambda classes: make_loss("qmargin"),
    "sphereface2": lambda classes: make_loss("sphereface2", scale=8),
    "prior": lambda classes: PriorQMarginLoss(torch.arange(1, CLASSES + 1)),
}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("subcentres", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_what_was_drawn(name, subcentres, sparse):
    x, weight, labels = batch()
    weight = weight[: CLASSES * subcentres]
    head = PartialHead(DIM, CLASSES, RATE, subcentres=subcentres, sparse_grad=sparse).train()
    with torch.no_grad():
        head.weight.copy_(weight)
    torch.manual_seed(5)
    drawn = head.sample(labels)
    assert len(drawn) == 15
    assert torch.isin(labels, drawn).all()
    torch.manual_seed(5)
    mine = x.clone().requires_grad_()
    loss = LOSSES[name](CLASSES)
    value = loss(head(mine), labels)
    value.backward()
    at, rows = x.clone().requires_grad_(), weight.clone().requires_grad_()
    cosines = F.normalize(at, dim=1) @ F.normalize(rows, dim=1).T
    cosines = cosines.unflatten(1, (-1, subcentres)).amax(2)
    if name == "prior":
        loss.log_counts = loss.log_counts[drawn]
    wanted = loss(cosines[:, drawn], torch.searchsorted(drawn, labels))
    wanted.backward()
    grad = head.weight.grad
    assert grad.is_sparse == sparse
    near = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(value, wanted, **near)
    torch.testing.assert_close(mine.grad, at.grad, **near)
    torch.testing.assert_close(grad.to_dense(), rows.grad, **near)


def naive(name, cosines, labels, counts, bias):
    """Losses [B] of the classes that were drawn, by the formulas."""
    own = cosines.gather(1, labels[:, None])
    target = F.one_hot(labels, cosines.shape[1]).bool()
    if name == "arcface":
        angle = torch.acos(own)
        far = own - 0.2 * math.sin(0.2)
        moved = torch.where(angle < math.pi - 0.2, torch.cos(angle + 0.2), far)
        logits = 16 * torch.where(target, moved, cosines)
        return F.cross_entropy(logits, labels, reduction="none")
    if name == "sphereface2":
        g = 2 * ((cosines + 1) / 2) ** 3 - 1
        wrong = F.softplus(8 * (g + 0.2) + bias).masked_fill(target, 0).sum(1)
        return 0.7 * F.softplus(-8 * (g[target] - 0.2) - bias) + 0.3 * wrong
    log_q = torch.zeros_like(cosines[0]) if counts is None else counts.double().log() / 2
    log_q = log_q - 10 * 0.2 * target
    p, value = brute_force(10 * cosines.detach(), log_q, labels, 1.5)
    return value + 10 * ((p - target.double()) * (cosines - cosines.detach())).sum(1)


@pytest.mark.parametrize("subcentres", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_in_shards_is_that_of_one_process_on_what_all_drew(name, subcentres):
    """Losses, and gradients of the ranks' mean loss, in float64."""
    x, weight, labels = batch()
    weight = weight[: CLASSES * subcentres]
    sizes = [2, 4]

    def step(comm):
        head = PartialHead(DIM, CLASSES, RATE, subcentres=subcentres, group=comm).train()
        rows = slice(head.start * subcentres, head.stop * subcentres)
        with torch.no_grad():
            head.weight.copy_(weight[rows])
        drawn, sample = [], head.sample
        head.sample = lambda targets: drawn.append(sample(targets)) or drawn[0]
        at = x.split(sizes)[comm.rank].clone().requires_grad_()
        loss = LOSSES[name](CLASSES)
        value = loss(head(at), labels.split(sizes)[comm.rank])
        value.backward()
        learnt = [p.grad for p in loss.parameters()]
        return value.detach(), at.grad, head.weight.grad.to_dense(), drawn[0] + head.start, learnt

    found = on_ranks(2, step)
    drawn = torch.cat([each[3] for each in found])
    assert [len(each[3]) for each in found] == [8, 8]  # round(0.25 * 30)
    assert torch.isin(labels, drawn).all()
    at, rows = x.double().requires_grad_(), weight.double().requires_grad_()
    cosines = F.normalize(at, dim=1) @ F.normalize(rows, dim=1).T
    cosines = cosines.unflatten(1, (-1, subcentres)).amax(2)[:, drawn]
    counts = None
    if name == "prior":
        counts = torch.arange(1.0, CLASSES + 1).double()
        counts = (counts / counts.log().mean().exp())[drawn]
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    losses = naive(name, cosines, torch.searchsorted(drawn, labels), counts, bias)
    means = torch.stack([part.mean() for part in losses.split(sizes)])
    means.mean().backward()
    near = {"rtol": 2e-5, "atol": 2e-5}
    for rank, (value, by_x, _, _, learnt) in enumerate(found):
        torch.testing.assert_close(value.double(), means[rank].detach(), **near)
        torch.testing.assert_close(by_x.double() / 2, at.grad.split(sizes)[rank], **near)
        for grad in learnt:
            torch.testing.assert_close(grad.double(), bias.grad, **near)
    by_weight = torch.cat([each[2] for each in found]).double()
    torch.testing.assert_close(by_weight, rows.grad, **near)


def test_all_classes_are_the_exact_head():
    x, weight, labels = batch()
    found = []
    for head in (PartialHead(DIM, CLASSES, 1.0), QMarginHead(DIM, CLASSES)):
        with torch.no_grad():
            head.weight.copy_(weight[:CLASSES])
        found.append((head(x, labels), head.eval()(x)))
    torch.testing.assert_close(*found)


def test_it_trains_and_repeats_from_a_seed():
    x, _, labels = batch()
    runs = []
    for _ in range(2):
        head = PartialHead(DIM, CLASSES, RATE, seed=0)
        optimizer = RowSparseSGD(head.parameters(), lr=1.0, momentum=0.9, head=head)
        losses = []
        for step in range(20):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = head(x, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.5 * runs[0][0]


def test_what_it_refuses():
    x, _, labels = batch()
    with pytest.raises(ValueError, match=r"sample_rate must be in \(0, 1\], got 0"):
        PartialHead(DIM, CLASSES, 0)
    head = PartialHead(DIM, CLASSES)
    with pytest.raises(ValueError, match=r"label 60 is outside \[0, 60\)"):
        head(x, labels.clone().fill_(60))
    with pytest.raises(TypeError, match=r"looks at some classes only.*--head dense"):
        make_loss("intertopk")(head(x), labels)
    assert len(head.sample(torch.arange(40))) == 40  # more targets than the rate


@pytest.mark.parametrize("world", [1, 2])
def test_a_drawn_prototype_that_is_not_finite_is_not_passed_over(world):
    def step(comm):
        head = PartialHead(DIM, CLASSES, 1.0, group=comm, seed=0)
        with torch.no_grad():
            head.weight[0, 0] = torch.nan
        return float(head(batch()[0], batch()[2]))

    found = [step(None)] if world == 1 else on_ranks(world, step)
    assert all(math.isnan(loss) for loss in found)
