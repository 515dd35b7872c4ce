"""Shards on a GPU, by kernels: in Triton's interpreter or with ``--device cuda``; as threads."""

import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from launches import FEW_CLASSES, Counted, interpreted
from ranks import on_ranks

from speechbrain_qmargin.head import QMarginHead, classifier, fused_shards
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.device import control_flow
from speechbrain_qmargin.loss.functional import q_margin_objective
from speechbrain_qmargin.loss.interface import Objective

kernels = pytest.importorskip("speechbrain_qmargin.head.kernels", exc_type=ImportError)
solve_kernels = pytest.importorskip("speechbrain_qmargin.head.solve_kernels", exc_type=ImportError)

DIM, CLASSES = 12, 121  # in shards of two sizes
SIZES = replace(FEW_CLASSES, sample=20, screened=256, kept=128)
pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.7"), reason="the interpreter of Triton 3.3 knows no int1"
)


@pytest.fixture(autouse=True)
def as_on_a_gpu(device):
    with interpreted() if device.type == "cpu" else nullcontext(), control_flow(host=False):
        yield


def batch(rank, weight, noise):
    """One sample of the first rank, two of the second, ...; on a CPU."""
    generator, rows = torch.Generator().manual_seed(rank), 1 + rank
    labels = torch.randint(len(weight), (rows,), generator=generator)
    x = F.normalize(weight[labels]) + noise * torch.randn(rows, DIM, generator=generator)
    return (3 * x).requires_grad_(), labels


def on(device, x, labels):
    return x.detach().to(device).requires_grad_(), labels.to(device)


def in_shards(
    device, parameters, noise, sizes=SIZES, ask=q_margin_objective, only_kernels=True, world=2
):
    """Of each rank: losses, supports, gradients, collectives, and the head.

    The torch path would hide what the kernels miss, so as a rule it is not there.
    """
    weight = QMarginHead(DIM, CLASSES, seed=0).weight.detach()

    def one(comm):
        head = QMarginHead(DIM, CLASSES, *parameters, seed=0, group=comm, sizes=sizes).to(device)
        x, labels = on(device, *batch(comm.rank, weight, noise))
        comm.calls = 0
        rows = head.train()(x).evaluate(labels, ask(labels, *parameters))
        rows.loss.mean().backward()
        gradients = x.grad, head.weight.grad.to_dense()
        found = rows.loss.detach(), rows.support, *gradients
        return *(each.cpu() for each in found), comm.calls, head

    with pytest.MonkeyPatch.context() as patch:
        if only_kernels:
            patch.setattr(classifier.HeadLoss, "apply", None)
        return on_ranks(world, one, device)


def check(found, parameters, noise, ask=q_margin_objective):
    """Against one process, whose step is another."""
    head = QMarginHead(DIM, CLASSES, *parameters, seed=0, sizes=Sizes())
    inputs = [batch(rank, head.weight.detach(), noise) for rank in range(len(found))]
    with control_flow(host=True):
        rows = [head.train()(x).evaluate(labels, ask(labels, *parameters)) for x, labels in inputs]
        (sum(each.loss.mean() for each in rows) / len(found)).backward()
    for rank, (loss, support, by_x, *_) in enumerate(found):
        torch.testing.assert_close(loss, rows[rank].loss.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(support, rows[rank].support)
        torch.testing.assert_close(by_x / len(found), inputs[rank][0].grad, rtol=1e-5, atol=1e-6)
    by_weight = torch.cat([each[3] for each in found])
    torch.testing.assert_close(by_weight, head.weight.grad.to_dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "noise", "world"),
    [
        pytest.param((1.25, 32.0, 0.2), 0.1, 3, marks=pytest.mark.slow),
        ((1.5, 10.0, 0.2), 100.0, 2),
        ((3.0, 4.0, 0.1), 0.3, 2),
    ],
)
def test_the_step_is_that_of_one_process(device, parameters, noise, world):
    found = in_shards(device, parameters, noise, world=world)
    check(found, parameters, noise)
    if parameters[0] <= 2:  # above, Newton's steps are safeguarded and more
        assert max(each[4] for each in found) <= 12


def test_a_prior_of_each_class(device):
    log_q = 4 * torch.rand(CLASSES, dtype=torch.float64) - 2

    def ask(labels, *parameters):
        return q_margin_objective(labels, *parameters, log_q.to(labels.device))

    check(in_shards(device, (1.5, 10.0, 0.2), 0.3, ask=ask), (1.5, 10.0, 0.2), 0.3, ask)


def test_many_shards_show_each_other_less(device, monkeypatch):
    """What is not shown costs exchanges, not exactness."""
    monkeypatch.setattr(fused_shards, "shown_by", lambda _: 4)
    parameters, noise = (1.25, 8.0, 0.2), 0.5
    found = in_shards(device, parameters, noise)
    check(found, parameters, noise)
    assert max(float(each[1].max()) for each in found) > 20  # more are active than are shown


def test_targets_that_move(device):
    """As a margin on the angle moves them, of each sample its own."""

    def ask(labels, alpha, scale, margin):
        margins = margin * (1 + labels.double() / CLASSES)
        return Objective(scale, alpha, move_target=lambda x: torch.cos(torch.acos(x) + margins))

    check(in_shards(device, (1.5, 10.0, 0.2), 0.3, ask=ask), (1.5, 10.0, 0.2), 0.3, ask)


def test_an_embedding_that_is_not_finite_spoils_the_batch(device, monkeypatch):
    one = batch

    def spoiled(rank, weight, noise):
        x, labels = one(rank, weight, noise)
        with torch.no_grad():
            x[0, 3] = torch.inf if rank == 1 else x[0, 3]
        return x, labels

    monkeypatch.setattr(sys.modules[__name__], "batch", spoiled)
    for loss, _, by_x, by_weight, *_ in in_shards(device, (1.5, 10.0, 0.2), 0.3):
        assert loss.isnan().all()
        assert not by_x.any()
        assert not by_weight.any()


@pytest.mark.slow
def test_launches_do_not_grow_with_the_ranks(device):
    """Of one rank: at most 100 launches, and 12 collectives; a prior costs five more."""

    def one(comm):
        head = QMarginHead(DIM, CLASSES, 1.25, 32.0, 0.2, seed=0, group=comm, sizes=SIZES)
        head = head.to(device)
        x, labels = on(device, *batch(comm.rank, weight, 0.1))
        head.prototypes()
        comm.calls = 0
        own = Counted((*kernels.KERNELS, *solve_kernels.KERNELS)) if comm.rank == 0 else None
        with own or nullcontext():
            head(x, labels).backward()
        return own, comm.calls

    weight = QMarginHead(DIM, CLASSES, seed=0).weight.detach()
    kernels.numbers(1.25, 32.0, device)  # which are brought to the device once
    for world in (2, 3):
        counted, collectives = on_ranks(world, one, device)[0]
        assert counted.launches <= 100, counted.names
        assert collectives <= 12


@pytest.mark.slow
def test_a_room_too_small_grows_or_the_batch_is_halved(device, monkeypatch):
    parameters, noise = (1.25, 12.0, 0.2), 0.3
    needed, one = [], fused_shards.halvings_for
    monkeypatch.setattr(
        fused_shards,
        "halvings_for",
        lambda asked, *rest: needed.append(asked) or one(asked, *rest),
    )
    found = in_shards(device, parameters, noise, sizes=replace(SIZES, screened=4, kept=2))
    check(found, parameters, noise)
    kept = max(each[5]._room.kept for each in found)
    assert kept > 2
    # room for what one of three samples needs, if they are two at a time
    most = max(asked.kept for asked in needed)
    tight = replace(SIZES, screened=4, kept=2, max_candidates=4 * 2 * most)
    found = in_shards(device, parameters, noise, sizes=tight)
    check(found, parameters, noise)
    assert max(each[5]._room.halvings for each in found) == 1  # each rank as it has to


def test_without_any_room_every_class_is_looked_at(device):
    """All ranks do, where one of them has to."""
    parameters, noise = (1.5, 0.5, 0.2), 100.0
    tight = replace(SIZES, screened=4, kept=2, max_candidates=40)
    check(in_shards(device, parameters, noise, sizes=tight, only_kernels=False), parameters, noise)


def test_one_rank_without_kernels_is_enough_for_the_other_way(device, monkeypatch):
    parameters, noise = (1.5, 10.0, 0.2), 0.3
    kernels_of = QMarginHead.may_use_kernels
    monkeypatch.setattr(
        QMarginHead,
        "may_use_kernels",
        property(lambda self: self.comm.rank != 1 and kernels_of.fget(self)),
    )
    asked = []
    monkeypatch.setattr(fused_shards, "evaluate", lambda *_: asked.append(1))
    check(in_shards(device, parameters, noise, only_kernels=False), parameters, noise)
    assert not asked
