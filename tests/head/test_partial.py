"""Partial FC: exactly the loss of the classes that were drawn."""

import pytest
import torch
import torch.nn.functional as F

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
