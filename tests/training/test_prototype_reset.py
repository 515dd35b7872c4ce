"""Which prototypes are set anew, to what, and what else of their state changes."""

import pytest
import torch
import torch.nn.functional as F

from speechbrain_qmargin import QMarginHead, make_loss
from speechbrain_qmargin.head import RowSparseSGD
from speechbrain_qmargin.training.prototype_reset import PrototypeReset

CLASSES, DIM = 7, 5


def watched(which="collapsed"):
    """Classes 0 (active once), 1 and 2 (never); others had no samples."""
    torch.manual_seed(0)
    reset = PrototypeReset((CLASSES, DIM), [2], which)
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
    else:
        head = QMarginHead(DIM, CLASSES)
        weight = head.weight
        optimizer = RowSparseSGD(head.parameters(), lr=0.1, momentum=0.9, head=head)
        make_loss("a3m")(head(torch.randn(4, DIM)), torch.arange(4)).backward()
    optimizer.step()
    before = weight.detach().clone()
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
            assert torch.equal(weight[row], before[row]) or kind == "sparse"
    if kind == "sparse":  # what is derived from the rows follows them
        x = torch.randn(3, DIM)
        cosines = F.normalize(x, dim=1) @ F.normalize(weight.detach(), dim=1).T
        loss = make_loss("a3m")
        labels = torch.tensor([1, 2, 0])
        torch.testing.assert_close(loss(head(x), labels).detach(), loss(cosines, labels))


def test_nothing_is_set_where_nothing_collapsed():
    reset, _ = watched()
    reset.active[:] = True
    weight = torch.randn(CLASSES, DIM)
    assert reset.apply_to(weight) == 0
    reset.begin()
    assert not bool(reset.seen.any())
    assert not bool(reset.sums.any())


def test_embeddings_that_are_not_finite_are_left_out():
    reset = PrototypeReset((CLASSES, DIM), [1])
    reset.observe(torch.full((1, DIM), torch.nan), torch.tensor([3]), torch.tensor([0.0]))
    assert reset.apply_to(torch.randn(CLASSES, DIM)) == 0


def test_settings_are_checked():
    with pytest.raises(ValueError, match="choose collapsed or all"):
        PrototypeReset((2, 2), [1], "some")
    with pytest.raises(ValueError, match="epochs from 1 on"):
        PrototypeReset((2, 2), [0])
