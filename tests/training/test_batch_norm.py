"""Batch normalisation over gloo processes against torch's on the whole batch, in float64."""

import pytest
import torch
import torch.distributed as dist
from processes import start
from torch import nn

from speechbrain_qmargin.training.batch_norm import synchronised_batch_norm

SIZES = (3, 5)


def whole(shape):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4) if len(shape) < 3 else nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    x = 3 + 2 * torch.randn(sum(SIZES), 4, *shape[1:], dtype=torch.float64)
    return norm.double(), x.requires_grad_(), torch.randn_like(x)


def job(rank, rendezvous):
    torch.set_num_threads(1)
    world = len(SIZES)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    for shape in ((0,), (0, 5, 2)):
        compare(rank, shape)
    dist.barrier()
    dist.destroy_process_group()


def compare(rank, shape):
    norm, x, weights = whole(shape)
    y = norm(x)
    (y * weights).sum().backward()

    ours, mine, weights = whole(shape)
    ours = synchronised_batch_norm(ours)
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    part = mine.detach()[own].requires_grad_()
    z = ours(part)
    (z * weights[own]).sum().backward()
    torch.testing.assert_close(z, y[own], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(part.grad, x.grad[own], rtol=1e-10, atol=1e-10)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)
    for parameter, reference in zip(ours.parameters(), norm.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.eval()(part), norm.eval()(x)[own])


@pytest.mark.slow
def test_uneven_shares_of_a_batch_are_the_whole_batch(tmp_path):
    start(job, str(tmp_path / "rendezvous"), number=len(SIZES))
