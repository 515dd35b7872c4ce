"""Kernels of rows, in Triton's interpreter or with ``--device cuda``, against the torch code."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from launches import interpreted
from row_owner import Rows

from speechbrain_qmargin.head import RowSparseAdam, RowSparseSGD
from speechbrain_qmargin.head.prototypes import Derived, mark
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.device import control_flow

row_kernels = pytest.importorskip("speechbrain_qmargin.head.row_kernels", exc_type=ImportError)

BOUND = Sizes(screen_from=1, screen=torch.bfloat16)


@pytest.fixture(autouse=True)
def in_the_interpreter(device):
    if device.type == "cpu" and torch.__version__.startswith("2.7"):
        pytest.skip("the interpreter of its Triton, 3.3, knows no int1; its compiler does")
    with interpreted(row_kernels) if device.type == "cpu" else nullcontext():
        yield


def gradient(rows, values, weight):
    return torch.sparse_coo_tensor(
        torch.as_tensor(rows)[None], values, weight.shape, is_coalesced=True, check_invariants=True
    ).to(weight.device)


def trained(kind, options, kernels, device, dim, transposed, steps=6):
    """A weight and its optimiser after some steps, with rows that rest in between."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(9, dim, generator=generator).to(device)
    weight = torch.nn.Parameter(start.T.contiguous().T if transposed else start)
    optimizer = kind([weight], **options, head=Rows(weight))
    with control_flow(kernels=kernels):
        for step in range(steps):
            rows = torch.randperm(9, generator=generator)[: step % 5].sort().values
            values = torch.randn(len(rows), dim, generator=generator)
            weight.grad = gradient(rows, values, weight)
            optimizer.param_groups[0]["lr"] = options["lr"] / (1 + step)
            optimizer.step()
    return weight, optimizer


def compare(kind, options, device, dim, transposed=False):
    (weight, mine), (expected, theirs) = (
        trained(kind, options, kernels, device, dim, transposed) for kernels in (True, False)
    )
    torch.testing.assert_close(weight, expected, rtol=2e-6, atol=2e-6)
    state, wanted = mine.state[weight], theirs.state[expected]
    assert state.keys() == wanted.keys()
    for name, value in state.items():
        # squares have no sign, so that nothing cancels
        atol = 0 if name == "exp_avg_sq" else 2e-6
        torch.testing.assert_close(value, wanted[name], rtol=2e-6, atol=atol)
    assert weight._version == expected._version or weight._version >= 6  # a write is seen


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_sgd(momentum, nesterov, decay, device):
    options = dict(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    compare(RowSparseSGD, options, device, dim=5)


@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adam(eps, decay, device):
    compare(RowSparseAdam, dict(lr=0.1, eps=eps, weight_decay=decay), device, dim=20)


def test_a_weight_that_is_not_contiguous(device):
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    compare(RowSparseSGD, options, device, dim=5, transposed=True)


@pytest.mark.parametrize("dim", [1, 20, 600])
def test_what_is_derived_of_rows(dim, device):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, dim, generator=generator)
    weight[3], weight[4], weight[5] = 0, 1e-20, 1e15
    weight = weight.to(device)
    found, expected = Derived(BOUND), Derived(BOUND)
    with control_flow(kernels=True):
        mine = found.of(weight)
    with control_flow(kernels=False):
        theirs = expected.of(weight)
    for again in (False, True):
        torch.testing.assert_close(mine.inverse_norm, theirs.inverse_norm, rtol=1e-6, atol=0)
        assert mine.screen is not None
        assert theirs.screen is not None
        if dim > 1:  # the interpreter rounds towards zero
            torch.testing.assert_close(mine.screen.rows, theirs.screen.rows, rtol=2**-7, atol=0)
            lacking = mine.screen.rows - weight * mine.inverse_norm.unsqueeze(1)
            most = lacking.double().norm(dim=1).max()
            # a GPU subtracts from the unrounded product (fused multiply-add)
            assert most <= 1.0001 * mine.screen.residual
            assert again or mine.screen.residual <= 1.0001 * most  # it only grows
        rows = torch.tensor([0, 3, 36], device=device)  # and once more, of some rows alone
        marks = found._mark, expected._mark
        weight[rows] *= -3
        with control_flow(kernels=True):
            found.rows_changed(weight, rows, marks[0])
        with control_flow(kernels=False):
            expected.rows_changed(weight, rows, marks[1])


def test_a_row_that_is_not_finite_lets_every_class_pass(device):
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weight[2, 1] = torch.nan
    with control_flow(kernels=True):
        screen = Derived(BOUND).of(weight.to(device)).screen
    assert screen is not None
    assert screen.residual == torch.inf


class DerivedRows(Rows):
    """Rows with what is derived from them, which a step's kernel brings along or leaves."""

    def __init__(self, weight, sizes, brought):
        super().__init__(weight)
        self.derived, self.brought = Derived(sizes), brought

    def derived_by_kernel(self, before):
        return self.derived.by_kernel(before) if self.brought else None

    def rows_changed(self, rows, before, *, derived=False):
        assert derived is self.brought
        self.derived.rows_changed(self.weight, rows, before, derived=derived)


@pytest.mark.filterwarnings("ignore:invalid value")  # 0/0 beyond the rows, in the interpreter
@pytest.mark.parametrize(
    ("sizes", "kind", "options"),
    [
        (BOUND, RowSparseSGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)),
        (BOUND, RowSparseAdam, dict(lr=0.1, weight_decay=0.01, eps=0.0)),
        (Sizes(screen_from=100), RowSparseSGD, dict(lr=0.1)),
        (Sizes(1, torch.float32), RowSparseAdam, dict(lr=0.1)),
    ],
)
def test_a_step_derives_what_a_second_launch_would(sizes, kind, options, device):
    """To the last bit, in several programs of two rows each, the last of them half empty."""
    outcomes = []
    for brought in (True, False):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(9, 600, generator=generator).to(device))
        owner = DerivedRows(weight, sizes, brought)
        optimizer = kind([weight], **options, head=owner)
        with control_flow(kernels=True):
            kept = owner.derived.of(weight)
            for rows in ([0, 3, 8], [1, 3, 4], [2, 5, 8]):
                values = torch.randn(len(rows), 600, generator=generator)
                weight.grad = gradient(rows, values, weight)
                optimizer.step()
            assert owner.derived.of(weight) is kept  # not built anew
        fresh = Derived(sizes)
        with control_flow(kernels=True):
            again = fresh.of(weight)
        assert torch.equal(kept.inverse_norm, again.inverse_norm)
        outcomes.append([weight.detach(), kept.inverse_norm])
        if sizes is BOUND:
            assert kept.screen is not None
            assert again.screen is not None
            assert torch.equal(kept.screen.rows, again.screen.rows)
            assert kept.screen.residual >= again.screen.residual
            outcomes[-1] += [kept.screen.rows, kept.screen.residual]
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_a_row_that_is_not_finite_after_a_step_lets_every_class_pass(device):
    weight = torch.nn.Parameter(torch.ones(4, 5, device=device))
    owner = DerivedRows(weight, BOUND, brought=True)
    optimizer = RowSparseSGD([weight], lr=0.1, head=owner)
    with control_flow(kernels=True):
        screen = owner.derived.of(weight).screen
        weight.grad = gradient([2], torch.full((1, 5), torch.nan), weight)
        optimizer.step()
    assert screen is not None
    assert screen.residual == torch.inf


def test_what_was_written_by_another_is_not_brought_along(device):
    """Rows that nobody derived would be taken for up to date."""
    weight = torch.nn.Parameter(torch.ones(4, 5, device=device))
    owner = DerivedRows(weight, BOUND, brought=True)
    with control_flow(kernels=True):
        assert owner.derived.by_kernel(mark(weight)) is None  # there is nothing yet
        kept = owner.derived.of(weight)
        assert owner.derived.by_kernel(mark(weight)) is kept
        with torch.no_grad():
            weight[1] = 2
        assert owner.derived.by_kernel(mark(weight)) is None
        assert owner.derived.of(weight) is not kept
    with control_flow(kernels=False):
        assert owner.derived.by_kernel(mark(weight)) is None


def test_an_optimisers_step_is_one_launch(device):
    """Of the step and of what is derived of the rows: whatever their number."""
    launched = []
    for kernel in (row_kernels._sgd, row_kernels._derive):
        kernel.add_pre_run_hook(lambda *_, name=kernel, **__: launched.append(name))
    head = import_module("speechbrain_qmargin.head").QMarginHead(4, 60, sizes=BOUND).to(device)
    optimizer = RowSparseSGD(head.parameters(), lr=0.1, momentum=0.9, head=head)
    with control_flow(kernels=False):
        head(torch.randn(6, 4, device=device), torch.arange(6, device=device)).backward()
    try:
        with control_flow(kernels=True):
            optimizer.step()
    finally:
        for kernel in (row_kernels._sgd, row_kernels._derive):
            kernel.pre_run_hooks.clear()
    assert launched == [row_kernels._sgd]
