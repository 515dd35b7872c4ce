"""Losses that keep running values, or look at all classes, with the classes in shards."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import start

from speechbrain_qmargin import KappaFaceLoss, QMarginHead, make_loss
from speechbrain_qmargin.loss.dense import DenseScores
from speechbrain_qmargin.loss.prior import PriorQMarginLoss

CLASSES, DIM, SIZES = 41, 8, [3, 5]
LOSSES = {
    "adaface": lambda: make_loss("adaface", scale=16, options={"t_alpha": 0.25}),
    "magface": lambda: make_loss("magface", scale=16),
    "curricularface": lambda: make_loss("curricularface", scale=16, options={"momentum": 0.3}),
    "qmargin_norm": lambda: make_loss("qmargin_norm", options={"t_alpha": 0.25}),
    "qmargin_magnitude": lambda: make_loss("qmargin_magnitude", options={"reach": 0.9}),
    "prior": lambda: PriorQMarginLoss(torch.arange(1, CLASSES + 1)),
    "a3m": lambda: make_loss("a3m"),
    "sphereface2": lambda: make_loss("sphereface2", scale=8, options={"bias": 0.2}),
    "uniface": lambda: make_loss("uniface", scale=8),
    "kappaface": lambda: KappaFaceLoss(torch.full((CLASSES,), 0.1), DIM, scale=16),
    "combined": lambda: make_loss("combined", scale=16),
}


CENTRES = 3  # of the head with sub-centres


def samples():
    torch.manual_seed(0)
    weight = F.normalize(torch.randn(CLASSES, DIM), dim=1)
    labels = torch.randint(CLASSES, (sum(SIZES),))
    x = weight[labels] + 0.4 * torch.randn(sum(SIZES), DIM)
    return x * torch.linspace(5, 130, sum(SIZES)).unsqueeze(1), weight, labels


def compare(rank, rendezvous):
    torch.set_num_threads(1)
    x, weight, labels = samples()
    wanted = {}
    for name, make in LOSSES.items():  # one process has all
        loss, at, w = make(), x.clone().requires_grad_(), weight.clone().requires_grad_()
        cosines = F.normalize(at, dim=1) @ F.normalize(w, dim=1).T
        parts = loss.rows(DenseScores(cosines, at), labels).loss.split(SIZES)
        means = [part.mean() for part in parts]
        (sum(means) / 2).backward()
        wanted[name] = means[rank].detach(), at.grad.split(SIZES)[rank], w.grad, loss
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    head = QMarginHead(DIM, CLASSES)
    with torch.no_grad():
        head.weight.copy_(weight[head.start : head.stop])
    mine = x.split(SIZES)[rank].clone().requires_grad_()
    for name, make in LOSSES.items():
        value, by_x, by_weight, alone = wanted[name]
        mine.grad = head.weight.grad = None
        loss = make()
        found = loss(head(mine), labels.split(SIZES)[rank])
        found.backward()
        grad = head.weight.grad
        grad = grad.to_dense() if grad.is_sparse else grad
        near = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found.detach(), value, **near)
        torch.testing.assert_close(mine.grad / 2, by_x, **near)
        torch.testing.assert_close(grad, by_weight[head.start : head.stop], **near)
        for p, other in zip(loss.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, other.grad, **near)  # the mean's, in each rank
        for key, other in alone.state_dict().items():
            torch.testing.assert_close(loss.state_dict()[key], other, rtol=1e-6, atol=1e-6)
    subcentres(rank)
    with pytest.raises(TypeError, match="needs all cosines"):
        head(mine).cosines()
    dist.barrier()
    dist.destroy_process_group()


def subcentres(rank):
    torch.manual_seed(1)
    rows, (x, _, labels) = torch.randn(CLASSES * CENTRES, DIM), samples()
    head = QMarginHead(DIM, CLASSES, subcentres=CENTRES)
    mine = slice(head.start * CENTRES, head.stop * CENTRES)
    with torch.no_grad():
        head.weight.copy_(rows[mine])
    for make in (lambda: make_loss("arcface", scale=16), lambda: make_loss("qmargin")):
        at, w = x.clone().requires_grad_(), rows.clone().requires_grad_()
        cosines = F.normalize(at, dim=1) @ F.normalize(w, dim=1).T
        cosines = cosines.unflatten(1, (-1, CENTRES)).amax(2)
        parts = make().rows(DenseScores(cosines, at), labels).loss.split(SIZES)
        (sum(part.mean() for part in parts) / 2).backward()
        own = x.split(SIZES)[rank].clone().requires_grad_()
        head.weight.grad = None
        found = make()(head(own), labels.split(SIZES)[rank])
        found.backward()
        grad = head.weight.grad
        near = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found, parts[rank].mean(), **near)
        torch.testing.assert_close(own.grad / 2, at.grad.split(SIZES)[rank], **near)
        grad = grad.to_dense() if grad.is_sparse else grad
        torch.testing.assert_close(grad, w.grad[mine], **near)
    torch.testing.assert_close(head.eval()(x)[:, 0], cosines.detach())


@pytest.mark.slow
def test_in_two_shards_they_are_what_they_are_in_one_process(tmp_path):
    start(compare, str(tmp_path / "rendezvous"), number=2)
