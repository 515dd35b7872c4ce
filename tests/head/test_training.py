"""A training by the sparse head and by a dense one, written out naively in float64."""

import pytest
import torch
import torch.nn.functional as F

from speechbrain_qmargin.head import QMarginHead, RowSparseSGD, search
from speechbrain_qmargin.head.sizes import Sizes

CLASSES, DIM, BATCH, STEPS = Sizes().screen_from + 5, 8, 8, 30


class Dense:
    """The definition over all classes, and torch's SGD on all rows, whose idle ones are hidden.

    `rows` are where SGD has them; `seen` are as of their last visit, which is what the loss sees.
    """

    def __init__(self, weight, lr, momentum, weight_decay):
        self.rows, self.seen = weight.double(), weight.double()
        self.buffer = torch.zeros_like(self.rows)
        self.lr, self.momentum, self.decay = lr, momentum, weight_decay

    def loss(self, x, labels, alpha, scale, margin):
        """Mean loss with a graph, and the classes that have a gradient."""
        k, own = 1 / (alpha - 1), (torch.arange(len(labels)), labels)
        # without momentum the gradient is that of the rows' own length
        self.leaf = (self.seen if self.momentum else self.rows).clone().requires_grad_()
        theta = scale * F.normalize(x, dim=1) @ F.normalize(self.leaf, dim=1).T
        log_q = torch.zeros_like(theta)
        log_q[own] = -scale * margin
        low = (theta - k * torch.exp(-log_q / k)).amax(1, keepdim=True).detach()
        near = (theta > low - 1).any(0).nonzero()[:, 0]  # the edge of the support lies above low
        part, prior = theta[:, near].detach(), log_q[:, near]
        high = part.amax(1, keepdim=True)
        for _ in range(60):
            middle = (low + high) / 2
            mass = prior.exp() * ((part - middle) / k).clamp(min=0) ** k
            above = mass.sum(1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        p = prior.exp() * ((part - low) / k).clamp(min=0) ** k
        p = p / p.sum(1, keepdim=True)
        divergence = torch.exp(-log_q[own] / k) - (torch.exp(-prior / k) * p**alpha).sum(1)
        loss = (p * theta[:, near]).sum(1) - theta[own] + divergence / (alpha * (alpha - 1))
        self.visited = torch.cat([near[(p > 0).any(0)], labels]).unique()
        return loss.mean()

    def step(self):
        grad = self.leaf.grad + self.decay * self.rows
        # a visited row has first made the steps it was idle for, then takes the gradient
        self.buffer = self.momentum * self.buffer + grad
        self.rows = self.rows - self.lr * self.buffer
        self.seen[self.visited] = self.rows[self.visited]


@pytest.mark.parametrize(
    ("parameters", "momentum"),
    [pytest.param((1.25, 32.0, 0.2), 0.0, marks=pytest.mark.slow), ((1.5, 10.0, 0.2), 0.9)],
)
def test_a_training_is_that_of_a_dense_head_in_float64(parameters, momentum, monkeypatch):
    """At a size where classes are screened; also the encoder, which moves with the gradients."""
    screened, survivors = [], search.Screening.survivors

    def counted(self, part):
        screened.append(part)
        return survivors(self, part)

    monkeypatch.setattr(search.Screening, "survivors", counted)
    options = dict(lr=0.2, momentum=momentum, weight_decay=1e-4)
    head = QMarginHead(DIM, CLASSES, *parameters, seed=0)
    with torch.no_grad():  # of length 1: short ones turn far in a step, and rounding with them
        head.weight.copy_(F.normalize(head.weight))
    torch.manual_seed(0)
    encoder = torch.nn.Linear(DIM, DIM)
    twin = torch.nn.Linear(DIM, DIM).double()
    twin.load_state_dict(encoder.state_dict())
    dense = Dense(head.weight.detach(), **options)
    mine = RowSparseSGD([*encoder.parameters(), *head.parameters()], **options, head=head)
    theirs = torch.optim.SGD(twin.parameters(), **options)
    people = torch.randint(CLASSES, (3 * BATCH,))  # who come again, and have been idle
    voices = 0.5 * head.weight.detach()[people] + 0.2 * torch.randn(3 * BATCH, DIM)
    first = None
    for _ in range(STEPS):
        chosen = torch.randperm(len(people))[:BATCH]
        x, labels = voices[chosen] + 0.05 * torch.randn(BATCH, DIM), people[chosen]
        loss = head(encoder(x), labels)
        wanted = dense.loss(twin(x.double()), labels, *parameters)
        for optimizer, value in ((mine, loss), (theirs, wanted)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        dense.step()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        first = first or wanted.item()
    assert len(screened) >= STEPS
    assert wanted.item() < 0.5 * first
    same(head.weight, dense.seen)
    same(encoder.weight, twin.weight)
    mine.catch_up()
    same(head.weight, dense.rows)


def same(found, wanted):
    """Each row, to 1e-6 of its length."""
    difference = (found.detach().double() - wanted.detach()).norm(dim=1)
    assert (difference / wanted.detach().norm(dim=1)).max() < 1e-6
