"""Which prototypes are set anew, to what, and what else of their state changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from speechbrain_qmargin import QMarginHead, make_loss
from speechbrain_qmargin.head import RowSparseSGD
from speechbrain_qmargin.training.prototype_reset import PrototypeReset

CLASSES, DIM = 7, 5


def watched(which="collapsed"):
    """Classes 0 (active once), 1 and 2 (never); others had no samples."""
    torch.manual_seed(0)
    reset = PrototypeReset(CLASSES, DIM, [2], which)
    x = torch.randn(6, DIM) * torch.linspace(1, 50, 6)[:, None]
    targets = torch.tensor([0, 1, 1, 2, 0, 2])
    posterior = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.3, 0.0])
    for part in (slice(0, 4), slice(4, 6)):
        reset.observe(x[part], targets[part], posterior[part])
    unit = F.normalize(x.double(), dim=1)
    means = {k: F.normalize(unit[targets == k].mean(0), dim=0) for k in (0, 1, 2)}
    return reset, means


@pytest.mark.parametrize(("which", "rows"), [("collapsed", [1, 2]), ("all", [0, 1, 2])])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_they_become_the_mean_of_their_samples(which, rows, kind):
    reset, means = watched(which)
    if kind == "dense":
        weight = torch.nn.Parameter(3 * torch.randn(CLASSES, DIM))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        weight.square().sum().backward()
        optimizer.step()
        before = weight.detach().clone()
    else:  # the last three classes are idle after the first step
        head = QMarginHead(DIM, CLASSES)
        weight = head.weight
        optimizer = RowSparseSGD(head.parameters(), lr=0.1, momentum=0.9, head=head)
        for classes in (CLASSES, 4):
            place = torch.arange(classes)[None]
            weight.grad = torch.sparse_coo_tensor(
                place, torch.randn(classes, DIM), weight.shape, check_invariants=True
            )
            optimizer.step()
        twin, its = copy.deepcopy((head, optimizer))
        its.catch_up()  # dense SGD's positions
        before = twin.weight.detach()
        assert not torch.equal(before[-1], weight[-1])
    assert reset.apply_to(weight, optimizer) == len(rows)
    moments = [
        v for v in optimizer.state[weight].values() if getattr(v, "shape", 0) == before.shape
    ]
    assert moments
    for row in range(CLASSES):
        if row in rows:
            expected = means[row] * before[row].double().norm()
            torch.testing.assert_close(weight[row].double(), expected, rtol=1e-5, atol=1e-6)
            assert all(bool((moment[row] == 0).all()) for moment in moments)
        else:
            assert torch.equal(weight[row], before[row])
    if kind == "sparse":  # what is derived from the rows follows them
        x = torch.randn(3, DIM)
        cosines = F.normalize(x, dim=1) @ F.normalize(weight.detach(), dim=1).T
        loss = make_loss("a3m")
        labels = torch.tensor([1, 2, 0])
        torch.testing.assert_close(loss(head(x), labels).detach(), loss(cosines, labels))


def test_nothing_is_set_where_nothing_collapsed():
    reset, _ = watched()
    reset.table[:, -1] = 1
    weight = torch.randn(CLASSES, DIM)
    assert reset.apply_to(weight) == 0
    reset.begin()
    assert not bool(reset.table.any())


def test_samples_that_cancel_out_leave_their_prototype():
    """Their mean has no direction, and a prototype of length 0 none either."""
    reset, x = PrototypeReset(CLASSES, DIM, [1]), torch.eye(DIM)[:1]
    reset.observe(torch.cat((x, -3 * x)), torch.tensor([3, 3]), torch.zeros(2))
    weight = torch.randn(CLASSES, DIM)
    before = weight.clone()
    assert reset.apply_to(weight) == 0
    assert torch.equal(weight, before)


def test_embeddings_that_are_not_finite_are_left_out():
    reset = PrototypeReset(CLASSES, DIM, [1])
    reset.observe(torch.full((1, DIM), torch.nan), torch.tensor([3]), torch.tensor([0.0]))
    assert reset.apply_to(torch.randn(CLASSES, DIM)) == 0


def test_settings_are_checked():
    with pytest.raises(ValueError, match="choose collapsed or all"):
        PrototypeReset(2, 2, [1], "some")
    with pytest.raises(ValueError, match="epochs from 1 on"):
        PrototypeReset(2, 2, [0])


@pytest.mark.parametrize("which", ["collapsed", "all"])
@pytest.mark.parametrize("in_shards", [False, True])
def test_over_processes_they_are_what_they_are_in_one(in_shards, which, tmp_path):
    """Uneven batches, a class that is active on one rank alone, and a move to other processes."""
    torch.manual_seed(1)
    x, weight = torch.randn(12, DIM), torch.randn(CLASSES, DIM)
    targets = torch.tensor([0, 1, 1, 2, 0, 6, 6, 3, 2, 1, 0, 4])
    posterior = torch.zeros(12)
    posterior[9] = 0.2  # class 1, of the second process
    x[7, 0] = torch.nan  # class 3 has no other sample
    steps = [[slice(0, 1), slice(1, 4)], [slice(4, 8), slice(8, 12)]]
    expected, alone = weight.clone(), PrototypeReset(CLASSES, DIM, [1], which)
    for step in steps:
        both = slice(step[0].start, step[1].stop)
        alone.observe(x[both], targets[both], posterior[both])
    number = alone.apply_to(expected)
    assert number == (4 if which == "collapsed" else 5)
    moved = [r for r in range(CLASSES) if not torch.equal(expected[r], weight[r])]
    assert moved == [r for r in (0, 1, 2, 4, 6) if which == "all" or r != 1]

    def train(comm, first, last):
        reset = PrototypeReset(CLASSES, DIM, [1], which, comm, in_shards)
        if first and in_shards:
            reset.load(tmp_path)
        for step in steps[first:last]:
            parts = step if comm.world == 2 else [slice(step[0].start, step[1].stop)]
            part = parts[comm.rank]
            reset.observe(x[part], targets[part], posterior[part])
        rows = weight[reset.start : reset.stop].clone()
        if last == 1:
            reset.save(tmp_path)
        return reset.apply_to(rows), rows

    def check(found):
        assert {count for count, _ in found} == {number}
        rows = [part for _, part in found]
        if in_shards:
            rows = [torch.cat(rows)]
        for each in rows:
            torch.testing.assert_close(each, expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(each, rows[0])  # the same to the last bit

    check(on_ranks(2, lambda comm: train(comm, 0, 2)))
    if in_shards:
        on_ranks(2, lambda comm: train(comm, 0, 1))
        check(on_ranks(1, lambda comm: train(comm, 1, 2)))
