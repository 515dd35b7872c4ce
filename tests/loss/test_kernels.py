"""The dense loss by Triton's kernels: the definition in float64, on a GPU or in the interpreter."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from launches import Counted, interpreted
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

from speechbrain_qmargin import CosFaceLoss, QMarginLoss, make_loss
from speechbrain_qmargin.loss.device import control_flow
from speechbrain_qmargin.loss.functional import q_margin_loss

kernels = pytest.importorskip("speechbrain_qmargin.loss.kernels", exc_type=ImportError)

DOUBLE = torch.float64
# (alpha, scale, margin); k = 1 / (alpha - 1) is none, 20, 4, 2, 4/3, 1 and 2/3
FAMILY = [
    (1.0, 32, 0.2),
    (1.05, 32, 0.2),
    (1.25, 32, 0.2),
    (1.5, 10, 0.2),
    (1.75, 5, 0.2),
    (2.0, 5, 0.2),
    (2.5, 4, 0.2),
]
TIGHT = {DOUBLE: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


@pytest.fixture(autouse=True)
def kernels_on(device):
    kind = interpreted() if device.type == "cpu" else nullcontext()
    with kind, control_flow(host=False, kernels=True):
        yield


@pytest.fixture
def longer_rows(monkeypatch):
    """Rows beyond what stays in registers, without so many classes."""
    monkeypatch.setattr(kernels, "resident_classes", lambda dtype: 16)
    monkeypatch.setattr(kernels, "_TILE", 32)


def naive(cosines, targets, alpha, scale, log_q_y, log_q=None):
    """Losses and p - e_y from the definition: 120 bisections in float64."""
    theta = scale * cosines.double()
    measure = torch.zeros_like(theta) if log_q is None else log_q.double().expand_as(theta).clone()
    own = targets.unsqueeze(1)
    measure.scatter_(1, own, log_q_y.double().unsqueeze(1))
    q, one_hot = measure.exp(), F.one_hot(targets, theta.shape[1]).double()
    if alpha == 1:
        p = torch.softmax(theta + measure, 1)
        f = torch.special.xlogy(p, p / q) - p + q
        f_y = torch.special.xlogy(one_hot, one_hot / q) - one_hot + q
    else:

        def posterior(tau):
            return q * (1 + (alpha - 1) * (theta - tau)).clamp(min=0) ** (1 / (alpha - 1))

        high = theta.amax(1, True) + (1 + q.sum(1, True).log().clamp(min=0) * 100) / (alpha - 1)
        low = (theta - (q ** (1 - alpha) - 1) / (alpha - 1)).amax(1, True)
        for _ in range(120):
            middle = (low + high) / 2
            more = posterior(middle).sum(1, True) >= 1
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        p = posterior(low)

        def divergence(p):
            u = p / q
            return q * (u**alpha - 1 - alpha * (u - 1)) / (alpha * (alpha - 1))

        f, f_y = divergence(p), divergence(one_hot)
    theta_y = theta.gather(1, own).squeeze(1)
    return (p * theta).sum(1) - f.sum(1) + f_y.sum(1) - theta_y, p - one_hot


def batch(classes, device, rows=3, dtype=torch.float32, seed=0):
    """An easy, a hard and ordinary samples, with ties at the top."""
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(rows, classes, generator=generator, dtype=DOUBLE) * 1.2 - 0.8
    targets = torch.randint(classes, (rows,), generator=generator)
    cosines[0, targets[0]] = 1.0
    cosines[1, targets[1]] = -1.0
    cosines[-1, ::3] = 0.25
    return cosines.to(dtype).to(device), targets.to(device)


def check(cosines, targets, alpha, scale, margin, log_q=None):
    tight = TIGHT[cosines.dtype] * (1 if alpha <= 2 else 100)
    at = torch.as_tensor(margin, dtype=DOUBLE, device=cosines.device).expand(len(targets))
    log_q_y = -scale * at if log_q is None else log_q.double()[targets] - scale * at
    expected, gradient = naive(cosines, targets, alpha, scale, log_q_y, log_q)
    x = cosines.clone().requires_grad_()
    loss = q_margin_loss(x, targets, alpha, scale, margin, log_q=log_q, reduction="none")
    (by_x,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(loss.double(), expected, rtol=tight, atol=tight)
    if cosines.dtype in (torch.bfloat16, torch.float16):
        gradient = (scale * gradient).to(cosines.dtype).double() / scale
        tight = 2 * torch.finfo(cosines.dtype).eps
    torch.testing.assert_close(by_x.double() / scale, gradient, rtol=tight, atol=tight)


@pytest.mark.parametrize(("alpha", "scale", "margin"), FAMILY)
def test_loss_and_gradient_are_the_definition(device, alpha, scale, margin):
    check(*batch(50, device), alpha, scale, margin)
    check(*batch(20, device, rows=2, dtype=DOUBLE, seed=1), alpha, scale, margin)


@pytest.mark.parametrize(("alpha", "scale", "margin"), FAMILY)
def test_a_longer_row_goes_tile_by_tile(device, longer_rows, alpha, scale, margin):
    check(*batch(150, device), alpha, scale, margin)
    label = torch.tensor([3], device=device)
    check(torch.full((1, 150), 0.3, device=device), label, alpha, scale, margin)  # all are active
    few = torch.full((1, 150), -0.9, device=device)  # most are not written down
    few[0, 70], few[0, 149] = 0.9, 0.85
    check(few, label, alpha, scale, margin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(device, dtype):
    check(*batch(40, device, dtype=dtype), 1.5, 10.0, 0.2)


@pytest.mark.parametrize("alpha", [1.0, 1.05, 1.25, 2.0])
def test_margins_of_samples_and_priors_of_classes(device, longer_rows, alpha):
    generator = torch.Generator().manual_seed(1)
    log_q = (4 * torch.randn(40, generator=generator)).to(device)
    margin = torch.tensor([0.1, 0.4, -0.1], device=device)
    cosines, targets = batch(40, device)
    check(cosines, targets, alpha, 8.0, margin)
    check(cosines, targets, alpha, 8.0, margin, log_q)
    tensors = cosines.double(), margin.double(), log_q.double()
    found = []
    for on in (True, False):
        leaves = [each.clone().requires_grad_() for each in tensors]
        with control_flow(kernels=on):
            loss = q_margin_loss(leaves[0], targets, alpha, 8.0, leaves[1], log_q=leaves[2])
            found.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_tensors_whose_elements_are_apart(device):
    """A column of several, one number expanded, a transposed matrix."""
    cosines, targets = batch(40, device)
    log_q = torch.rand(40, device=device, dtype=DOUBLE)
    prior = torch.full((3,), -1.5, device=device, dtype=DOUBLE)
    moved = cosines.gather(1, targets.unsqueeze(1)).squeeze(1).double() - 0.1

    def apart(tensor):
        return torch.stack((tensor, torch.zeros_like(tensor)), -1)[..., 0]

    for measure in (log_q, log_q.expand(3, 40)):
        solved = kernels.solve_rows(
            cosines, targets, 1.5, 10.0, moved=moved, prior=prior, log_q=measure
        )
        other = kernels.solve_rows(
            cosines, apart(targets), 1.5, 10.0, moved=apart(moved), prior=prior[:1].expand(3),
            log_q=apart(measure),
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(solved, other, strict=True))
        ones = torch.ones(3, device=device)
        kept = solved.kept
        a = kernels.gradient(cosines, targets, kept, ones, 1.5, 10.0, log_q=measure)
        b = kernels.gradient(
            cosines, apart(targets), apart(kept), ones[:1].expand(3), 1.5, 10.0,
            log_q=apart(measure),
        )  # fmt: skip
        assert torch.equal(a, b)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_tiny_numbers_of_classes(device, classes):
    for alpha in (1.0, 1.25, 2.0, 2.5):
        check(*batch(classes, device, rows=2), alpha, 8.0, 0.1)


def test_extremes(device):
    for row in ([1.0] * 9, [-1.0] * 9, [1.0, -1.0, 0.0] * 3, [-1.0] * 8 + [1.0]):
        for label in (0, 8):
            cosines = torch.tensor([row], device=device)
            check(cosines, torch.tensor([label], device=device), 1.25, 32.0, 0.2)
            check(cosines.double(), torch.tensor([label], device=device), 1.75, 64.0, 0.3)


def test_the_other_losses_and_statistics_are_the_same(device):
    cosines, targets = batch(30, device)
    for name in ("cosface", "arcface", "curricularface", "qmargin"):
        found = []
        for on in (True, False):
            x = cosines.clone().requires_grad_()
            with control_flow(kernels=on):
                value, stats = make_loss(name).with_stats(x, targets)
                value.backward()
            found.append((value.detach(), x.grad / 32, *stats))
        torch.testing.assert_close(*found, rtol=2e-6, atol=2e-6)


def test_second_derivatives(device):
    cosines, targets = batch(7, device, rows=2, dtype=DOUBLE)
    x = cosines.mul(0.5).requires_grad_()
    found = []
    for on in (True, False):
        with control_flow(kernels=on):
            loss = q_margin_loss(x, targets, 1.25, 8.0, 0.2)
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_it_does_not_depend_on_the_batch_or_on_chance(device, longer_rows):
    cosines, targets = batch(150, device)
    both = [kernels.solve_rows(cosines, targets, 1.25, 32.0) for _ in range(2)]
    one = kernels.solve_rows(cosines[1:2], targets[1:2], 1.25, 32.0)
    assert torch.equal(both[0].loss, both[1].loss)
    assert torch.equal(both[0].kept, both[1].kept)
    assert torch.equal(both[0].kept[:, 1:2], one.kept)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(("alpha", "scale", "margin"), FAMILY)
@pytest.mark.parametrize("place", [0, 149])
def test_nan_is_not_passed_over(device, longer_rows, alpha, scale, margin, place):
    """As a maximum passes it over, on a GPU and in the interpreter."""
    cosines, targets = batch(150, device)
    good = torch.arange(len(targets)) != 2
    expected = q_margin_loss(cosines, targets, alpha, scale, margin, reduction="none")
    cosines[2, place] = math.nan
    x = cosines.requires_grad_()
    margins = torch.full(targets.shape, margin, device=device)
    for given in (margin, margins):
        loss = q_margin_loss(x, targets, alpha, scale, given, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert loss[2].isnan()
        assert gradient[2].isnan().any()
        assert gradient[good].isfinite().all()
        torch.testing.assert_close(loss[good], expected[good])
    margins[1] = math.nan
    loss = q_margin_loss(x, targets, alpha, scale, margins, reduction="none")
    assert loss.isnan().tolist() == [number in (1, 2) for number in range(len(loss))]


def test_outputs_that_are_no_cosines_are_asserted(device):
    if device.type == "cuda":
        pytest.skip("an assertion on the device ends the process's use of it")
    cosines, targets = batch(9, device)
    for bad in (-math.inf, math.inf, 1.01):
        cosines[2, 4] = bad
        with pytest.raises(RuntimeError, match=r"beyond 1.*not logits"):
            q_margin_loss(cosines, targets)
    with pytest.raises(RuntimeError, match="outside"):
        q_margin_loss(cosines, targets + 9)


def counted(loss, cosines, targets):
    x, saved = cosines.clone().requires_grad_(), {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with Counted() as counts, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss(x, targets).backward()
    return counts, sum(saved.values())


def test_gradients_of_several_directions_at_once(device):
    """As torch.autograd.functional.jacobian(vectorize=True) asks for."""
    x, targets = (2 * torch.rand(3, 20) - 1).to(device).requires_grad_(), torch.arange(3)
    loss = q_margin_loss(x, targets.to(device), 1.5, 10.0, 0.2, reduction="none")
    each = torch.eye(3, device=device)
    (batched,) = torch.autograd.grad(loss, x, each, is_grads_batched=True, retain_graph=True)
    single = torch.stack([torch.autograd.grad(loss, x, one, retain_graph=True)[0] for one in each])
    torch.testing.assert_close(batched, single)


@pytest.mark.parametrize("loss", [QMarginLoss(1.25, 32.0), CosFaceLoss()])
def test_launches_passes_and_memory_at_the_size_of_voxceleb(device, loss):
    """At most 60 launches and about 3 passes, and no more memory than SpeechBrain's AAM.

    The numbers of launches do not depend on the number of rows; interpreted rows are slow.
    """
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(2, 192, generator=generator), dim=1)
    w = F.normalize(torch.randn(17982, 192, generator=generator), dim=1)
    cosines, targets = (x @ w.T).to(device), torch.tensor([[5], [17981]], device=device)
    ours, kept = counted(loss, cosines.unsqueeze(1), targets)
    aam = LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30))
    theirs, theirs_kept = counted(aam, cosines.unsqueeze(1), targets)
    assert (ours.launches <= 60, ours.waits) == (True, 0)
    assert ours.peak <= theirs.peak
    assert kept <= theirs_kept
    assert kept <= 1.01 * cosines.nbytes
    solved = kernels.solve_rows(cosines, targets[:, 0], 1.25, 32.0)
    read = solved.counts[2].float().mean() / cosines.shape[1]
    assert read <= 1.02  # the backward pass reads once at most, and writes once
