"""Kernels of rows, in Triton's interpreter or with ``--device cuda``, against the torch code."""

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from launches import interpreted
from row_owner import Rows

from speechbrain_qmargin.head import RowSparseAdam, RowSparseSGD
from speechbrain_qmargin.head.prototypes import Derived, are_finite
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.device import control_flow

row_kernels = pytest.importorskip("speechbrain_qmargin.head.row_kernels", exc_type=ImportError)

BOUND = Sizes(screen_from=1, screen=torch.bfloat16)


@pytest.fixture(autouse=True)
def in_the_interpreter(device):
    if device.type == "cpu" and torch.__version__.startswith("2.7"):
        pytest.skip("the interpreter of its Triton, 3.3, knows no int1; its compiler does")
    with interpreted() if device.type == "cpu" else nullcontext():
        yield


def trained(kind, options, kernels, device, dim, transposed, paused=None, steps=6):
    """A weight and its optimiser after some steps, with rows that rest in between."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(9, dim, generator=generator).to(device)
    weight = torch.nn.Parameter(start.T.contiguous().T if transposed else start)
    optimizer = kind([weight], **options, head=Rows(weight))
    with control_flow(kernels=kernels):
        for step in range(steps):
            rows = torch.randperm(9, generator=generator)[: step % 5].sort().values
            values = torch.randn(len(rows), dim, generator=generator)
            weight.grad = torch.sparse_coo_tensor(
                rows[None], values, weight.shape, is_coalesced=True, check_invariants=True
            ).to(device)
            optimizer.param_groups[0]["lr"] = options["lr"] / (1 + step)
            if step == paused:
                optimizer.param_groups[0]["momentum"] = 0.0
            optimizer.step()
    return weight, optimizer


def compare(kind, options, device, dim, transposed=False, paused=None):
    (weight, mine), (expected, theirs) = (
        trained(kind, options, kernels, device, dim, transposed, paused)
        for kernels in (True, False)
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


def test_sgd_whose_momentum_is_set_to_0(device):
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1)
    compare(RowSparseSGD, options, device, dim=5, paused=3)


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
        found = Derived(BOUND).of(weight.to(device))
    assert found.screen is not None
    assert found.screen.residual == torch.inf
    assert not are_finite(found.inverse_norm)


def test_an_optimisers_step_is_two_launches(device):
    """One of the step, one of what is derived of the rows: whatever their number."""
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
    assert launched == [row_kernels._sgd, row_kernels._derive]
