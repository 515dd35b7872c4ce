"""What shards tell each other in a step: eight ranks as threads, against one process."""

import pytest
import torch
from ranks import on_ranks

from speechbrain_qmargin.head import QMarginHead
from speechbrain_qmargin.head.sizes import Sizes

WORLD, DIM, ROWS = 8, 16, 3
SIZES = Sizes(screen_from=1, sample=50, most=2.0)


def batch(rank, weight, noise):
    generator = torch.Generator().manual_seed(rank)
    labels = torch.randint(len(weight), (ROWS,), generator=generator)
    x = weight[labels] + noise * torch.randn(ROWS, DIM, generator=generator)
    return x.requires_grad_(), labels


def in_shards(classes, parameters, noise):
    """Of each rank: loss, gradients, collectives and bytes of a step."""
    weight = QMarginHead(DIM, classes, seed=0).weight.detach()

    def step(comm):
        head = QMarginHead(DIM, classes, *parameters, seed=0, group=comm, sizes=SIZES)
        x, labels = batch(comm.rank, weight, noise)
        comm.calls = comm.bytes = 0
        loss = head(x, labels)
        loss.backward()
        return loss.detach(), x.grad, head.weight.grad.to_dense(), comm.calls, comm.bytes

    return on_ranks(WORLD, step)


@pytest.mark.parametrize(
    ("parameters", "noise"),
    [((1.25, 32.0, 0.2), 0.1), ((1.5, 10.0, 0.2), 0.3), ((2.0, 5.0, 0.0), 0.3)],
)
def test_a_step_takes_at_most_12_collectives_and_its_volume_is_flat(parameters, noise):
    sent = []
    for classes in (1000, 8000):
        found = in_shards(classes, parameters, noise)
        head = QMarginHead(DIM, classes, *parameters, seed=0)
        inputs = [batch(rank, head.weight.detach(), noise) for rank in range(WORLD)]
        losses = [head(x, labels) for x, labels in inputs]
        (sum(losses) / WORLD).backward()
        for rank, (loss, by_x, _, calls, _) in enumerate(found):
            torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(by_x / WORLD, inputs[rank][0].grad, rtol=1e-4, atol=1e-6)
            assert calls <= 12
        by_weight = torch.cat([each[2] for each in found])
        torch.testing.assert_close(by_weight, head.weight.grad.to_dense(), rtol=1e-4, atol=1e-6)
        sent.append(found[0][4])
    exchange = 5 * 8 * ROWS * WORLD  # a step of Newton's method more or less aside
    assert abs(sent[1] - sent[0]) <= 2 * exchange


@pytest.mark.parametrize("parameters", [(1.25, 32.0, 0.2), (3.0, 4.0, 0.1)])
def test_all_ranks_end_alike_where_many_classes_are_active(parameters):
    """Embeddings of no class: tau is far from each shard's own."""
    found = in_shards(1000, parameters, 100.0)
    head = QMarginHead(DIM, 1000, *parameters, seed=0)
    for rank in range(WORLD):
        x, labels = batch(rank, head.weight.detach(), 100.0)
        torch.testing.assert_close(found[rank][0], head(x, labels).detach(), rtol=1e-5, atol=1e-6)
    assert len({each[3] for each in found}) == 1
