"""Any reference measure: the loss, its gradients and the softargmax against 120 digits."""

import math

import hypothesis.strategies as st
import mpmath
import pytest
import torch
import torch.nn.functional as F
from examples import some
from hypothesis import given, settings

from speechbrain_qmargin import (
    QMarginHead,
    alpha_softargmax,
    alpha_softmax_value,
    q_margin_loss,
    solve_tau,
)

DOUBLE = torch.float64


def exact(theta, log_q, alpha):
    """(p, tau) of one row by bisection with 120 digits.

    Alone a class of log q = 60 is q^(1 - alpha) = 1e-52 above its edge at alpha = 3.
    """
    with mpmath.workdps(120):
        theta, q = [mpmath.mpf(t) for t in theta], [mpmath.exp(x) for x in log_q]
        if alpha == 1:
            weights = [qj * mpmath.exp(t) for qj, t in zip(q, theta, strict=True)]
            return [w / sum(weights) for w in weights], mpmath.log(sum(weights))
        rate = mpmath.mpf(alpha) - 1
        k = 1 / rate

        def posterior(edge):
            u = [max(mpmath.mpf(0), rate * (t - edge)) for t in theta]
            return [qj * uj**k if uj else uj for qj, uj in zip(q, u, strict=True)]

        high = max(theta)
        low = max(t - k * qj**-rate for t, qj in zip(theta, q, strict=True))
        for _ in range(150):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(posterior(middle)) >= 1 else (low, middle)
        # what is left of a step is below the digits, unless the bracket began very wide
        return posterior(low), low + k


def exact_loss(theta, log_q, label, alpha):
    """Loss and posterior from the definition."""
    with mpmath.workdps(120):
        p, tau = exact(theta, log_q, alpha)
        total = sum(p)
        p = [x / total for x in p]
        q = [mpmath.exp(x) for x in log_q]
        own = mpmath.mpf(theta[label])
        if alpha == 1:
            return -mpmath.log(p[label]) if p[label] else tau - own - log_q[label], p
        a = mpmath.mpf(alpha)
        tilted = sum(qj ** (1 - a) * pj**a for qj, pj in zip(q, p, strict=True) if pj)
        value = sum(pj * mpmath.mpf(t) for pj, t in zip(p, theta, strict=True)) - own
        return value + (q[label] ** (1 - a) - tilted) / (a * (a - 1)), p


ALPHAS = [1.0, 1.05, 1.25, 1.5, 1.75, 2.0, 2.5]


@settings(max_examples=some(60), deadline=None)
@given(
    cosines=st.lists(
        st.one_of(st.sampled_from([-1.0, 0.0, 0.5]), st.floats(-1, 1, width=32)),
        min_size=2,
        max_size=6,
    ),
    data=st.data(),
    alpha=st.sampled_from(ALPHAS),
    scale=st.sampled_from([1.0, 5.0, 20.0]),
    margin=st.sampled_from([-0.2, 0.0, 0.3]),
    dtype=st.sampled_from([torch.float32, DOUBLE]),
)
def test_the_loss_with_any_measure(cosines, data, alpha, scale, margin, dtype):
    classes = len(cosines)
    log_q = data.draw(st.lists(st.floats(-20, 20, width=16), min_size=classes, max_size=classes))
    label = data.draw(st.integers(0, classes - 1))
    rows = torch.tensor([cosines], dtype=dtype, requires_grad=True)
    margins = torch.tensor([margin], dtype=dtype)
    loss = q_margin_loss(
        rows, torch.tensor([label]), alpha, scale, margins, log_q=torch.tensor(log_q, dtype=dtype)
    )
    loss.backward()
    theta = [scale * float(c) for c in rows.detach()[0].double()]
    prior = list(log_q)
    prior[label] -= scale * float(margins[0].double())
    wanted, p = exact_loss(theta, prior, label, alpha)
    gradient = [float(x) - (j == label) for j, x in enumerate(p)]
    found = (rows.grad[0].double() / scale).tolist()
    eps = torch.finfo(dtype).eps
    # at the edge of the support above alpha = 2 the slope is infinite
    tight = 200 * eps if alpha <= 2 else 20 * eps ** (1 / (alpha - 1))
    assert found == pytest.approx(gradient, abs=tight)
    # the size of what cancels: the target's own term, where it is not met by the others
    size = float(abs(wanted)) + 1 + scale
    assert float(loss.detach()) == pytest.approx(float(wanted), abs=200 * eps * size)


def test_a_measure_built_to_slow_newton_is_solved():
    """Each step drops half of the slope: 42 steps, where equal q are proved to take 33."""
    count, label = 45, torch.tensor([0])
    place = torch.arange(count, dtype=DOUBLE)
    theta = torch.cat((torch.tensor([-1.0, 0.0, 0.0]), 2.0**-count * (place + 1 / 16) - 1))
    log_q = math.log(2) * torch.cat((torch.full((3,), -1.0), count - 1 - place))
    wanted, tau = exact(theta.tolist(), log_q.tolist(), 2.0)
    assert float(solve_tau(theta, 2.0, log_q)) == pytest.approx(float(tau), rel=0, abs=1e-15)
    cosines = theta[None].requires_grad_()
    q_margin_loss(cosines, label, 2.0, 1.0, 0.0, log_q=log_q).backward()
    found = cosines.grad[0] + F.one_hot(label[0], len(theta))
    assert found.tolist() == pytest.approx([float(x) for x in wanted], rel=0, abs=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1.05, 1.5, 2.0])
def test_a_class_of_no_measure_is_absent(alpha):
    logits, log_q = torch.tensor([1.0, 2.0, 0.5, 0.2]), torch.tensor([0.3, -math.inf, 0.0, -1.0])
    there = [0, 2, 3]
    found = []
    for part in (slice(None), there):
        inputs = logits[part].requires_grad_(), log_q[part].requires_grad_()
        p = alpha_softargmax(inputs[0], alpha, inputs[1])
        value = alpha_softmax_value(inputs[0], alpha, inputs[1])
        slopes = [*torch.autograd.grad(value, inputs), *torch.autograd.grad(p[0], inputs)]
        found.append((value, solve_tau(logits[part], alpha, log_q[part]), p, *slopes))
    for whole, without in zip(*found, strict=True):
        assert not whole.ndim or whole[1] == 0
        torch.testing.assert_close(whole[there] if whole.ndim else whole, without)


def test_a_measure_of_ones_and_equal_margins_change_nothing():
    torch.manual_seed(0)
    cosines, targets = torch.rand(6, 3000) * 1.6 - 0.8, torch.randint(3000, (6,))
    for alpha, scale in [(1.0, 32), (1.25, 32), (1.5, 10), (2.0, 5), (3.0, 3)]:
        plain = q_margin_loss(cosines, targets, alpha, scale, 0.2, reduction="none")
        open_ = q_margin_loss(
            cosines,
            targets,
            alpha,
            scale,
            torch.full((6,), 0.2),
            log_q=torch.zeros(3000),
            reduction="none",
        )
        torch.testing.assert_close(open_, plain, rtol=1e-5, atol=1e-6)


def test_a_margin_for_each_sample_is_that_samples_margin():
    torch.manual_seed(1)
    cosines, targets = torch.rand(5, 40) * 2 - 1, torch.randint(40, (5,))
    margins = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5])
    each = q_margin_loss(cosines, targets, 1.5, 10, margins, reduction="none")
    for row, margin in enumerate(margins.tolist()):
        part = slice(row, row + 1)
        alone = q_margin_loss(cosines[part], targets[part], 1.5, 10, margin)
        torch.testing.assert_close(each[row], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1.05, 1.25, 1.5, 2.0])
def test_first_and_second_derivatives(alpha):
    """By the cosines, the margins and log q."""
    generator = torch.Generator().manual_seed(3)
    cosines = torch.rand(3, 5, generator=generator, dtype=DOUBLE) * 0.6 - 0.3
    margins = torch.rand(3, generator=generator, dtype=DOUBLE) * 0.2
    log_q = torch.randn(5, generator=generator, dtype=DOUBLE)
    targets = torch.tensor([0, 3, 3])
    inputs = [x.requires_grad_() for x in (cosines, margins, log_q)]

    def loss(c, m, q):
        return q_margin_loss(c, targets, alpha, 2.0, m, log_q=q, reduction="none")

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)

    def plain(c):
        return q_margin_loss(c, targets, alpha, 2.0, 0.2, reduction="none")

    assert torch.autograd.gradgradcheck(plain, (cosines,))


def test_a_penalty_on_the_gradient_has_its_own_gradient():
    """Silently half of the right one where the loss was differentiable once."""
    torch.manual_seed(0)
    cosines = (torch.rand(4, 6, dtype=DOUBLE) - 0.5).requires_grad_()
    targets = torch.arange(4)

    def penalised(c):
        loss = q_margin_loss(c, targets, 1.5, 4.0, 0.2)
        (gradient,) = torch.autograd.grad(loss, c, create_graph=True)
        return loss + gradient.square().sum()

    (found,) = torch.autograd.grad(penalised(cosines), cosines)
    for row, column in [(0, 0), (1, 4), (3, 2)]:
        step = torch.zeros_like(cosines)
        step[row, column] = 1e-5
        up, down = (
            penalised((cosines.detach() + sign * step).requires_grad_()).detach()
            for sign in (1, -1)
        )
        assert float(found[row, column]) == pytest.approx(float((up - down) / 2e-5), rel=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0, 2.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_softargmax_with_counts_up_to_a_million(alpha, dtype):
    """NaN in float32 from log q of 12 at alpha 2.5 and 20 at alpha 2, once."""
    counts = [1.0, 3.0, 50.0, 1e6, 1e6, 7e5]
    theta = [2.0, 1.5, -0.5, 0.25, 0.250001, 0.0]
    log_q = torch.tensor(counts, dtype=dtype).log()
    logits = torch.tensor(theta, dtype=dtype)
    for shift in (0.0, 14.0):
        p = alpha_softargmax(logits, alpha, log_q + shift)
        wanted, tau = exact(
            [float(x) for x in logits.double()], [float(x) for x in (log_q + shift).double()], alpha
        )
        tolerance = 100 * torch.finfo(dtype).eps ** (1 if alpha <= 2 else 1 / (alpha - 1))
        assert p.tolist() == pytest.approx([float(x) for x in wanted], abs=tolerance)
        tau_found = float(solve_tau(logits, alpha, log_q + shift))
        assert tau_found == pytest.approx(float(tau), rel=10 * torch.finfo(dtype).eps)
        assert math.isfinite(float(alpha_softmax_value(logits, alpha, log_q)))


@settings(max_examples=some(60), deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6),
    st.data(),
    st.sampled_from([1.0, 1.1, 1.5, 2.0, 3.0]),
    st.sampled_from([torch.float32, DOUBLE]),
)
def test_softargmax_with_any_measure(theta, data, alpha, dtype):
    log_q = data.draw(
        st.lists(st.floats(-60, 60, width=16), min_size=len(theta), max_size=len(theta))
    )
    p = alpha_softargmax(torch.tensor(theta, dtype=dtype), alpha, torch.tensor(log_q, dtype=dtype))
    wanted, _ = exact(theta, log_q, alpha)
    total = float(sum(wanted))
    wanted = [float(x) / total for x in wanted]
    eps = torch.finfo(dtype).eps
    # p moves by k eps of log q's size
    tolerance = 1000 * eps if alpha <= 2 else 100 * eps ** (1 / (alpha - 1))
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert p.tolist() == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 16), (1.25, 32), (1.5, 10), (2.0, 5)])
@pytest.mark.parametrize("classes", [700, 40_000])
def test_the_sparse_head_takes_the_same_measure(alpha, scale, classes):
    """And gives the same gradients, by the margins too."""
    torch.manual_seed(0)
    head, labels = QMarginHead(32, classes, seed=0).train(), torch.randint(classes, (8,))
    own = F.normalize(head.weight.detach()[labels], dim=1)
    x = own + torch.linspace(0.05, 0.5, 8)[:, None] * torch.randn(8, 32)
    margins, log_q = 0.4 * torch.rand(8), 4 * torch.randn(classes)
    sparse = [t.clone().requires_grad_() for t in (x, margins)]
    dense = [t.double().requires_grad_() for t in (x, margins)]
    loss = head(sparse[0]).q_margin_loss(
        labels, alpha, scale, sparse[1], log_q=log_q, reduction="none"
    )
    cosines = F.normalize(dense[0], dim=1) @ F.normalize(head.weight.detach().double(), dim=1).T
    wanted = q_margin_loss(
        cosines, labels, alpha, scale, dense[1], log_q=log_q.double(), reduction="none"
    )
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    wanted.sum().backward()
    for found, right in zip(sparse, dense, strict=True):
        assert (found.grad - right.grad).norm() < 3e-6 * right.grad.norm() + 1e-6
    with pytest.raises(TypeError, match="no gradient by log_q"):
        head(x).q_margin_loss(labels, alpha, scale, 0.2, log_q=log_q.requires_grad_())


@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_measure_in_half_precision_is_taken_as_the_numbers_it_holds(dtype, alpha):
    torch.manual_seed(0)
    head = QMarginHead(8, 300)
    x, labels = torch.randn(6, 8), torch.arange(6)
    cosines = F.normalize(x) @ F.normalize(head.weight.detach()).T
    log_q = (3 * torch.randn(300)).to(dtype)
    exact = {"log_q": log_q.double(), "reduction": "none"}
    wanted = q_margin_loss(cosines.double(), labels, alpha, 5, 0.2, **exact)
    half = {"log_q": log_q, "reduction": "none"}
    for found in (
        q_margin_loss(cosines, labels, alpha, 5, 0.2, **half),
        head(x).q_margin_loss(labels, alpha, 5, 0.2, **half),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_zero_loss_counts_no_rounding():
    """At alpha = 1 a loss may round to 0, and none of them is."""
    cosines = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    targets = torch.tensor([0, 0])
    loss, stats = q_margin_loss(cosines, targets, 1.0, 64.0, 0.0, return_stats=True)
    assert stats.zero_loss == 0
    assert loss == pytest.approx(math.exp(-128), rel=1e-5, abs=1e-45)
    _, stats = q_margin_loss(cosines, targets, 1.5, 10.0, 0.2, return_stats=True)
    assert stats.zero_loss == 1


def test_what_is_no_measure_is_named():
    cosines, targets = torch.rand(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"number or a tensor \[3\].*got \[4\]"):
        q_margin_loss(cosines, targets, margin=torch.zeros(4))
    with pytest.raises(ValueError, match="q must be positive"):
        q_margin_loss(cosines, targets, log_q=torch.tensor([0, 0, -math.inf, 0]))
    with pytest.raises(ValueError, match=r"one for each of 4 classes, got \[5\]"):
        q_margin_loss(cosines, targets, log_q=torch.zeros(5))
    with pytest.raises(ValueError, match=r"shape \[C\]"):
        q_margin_loss(cosines, targets, log_q=torch.zeros(3, 4))
    for function in (alpha_softmax_value, solve_tau):
        with pytest.raises(TypeError, match="alpha must be a number"):
            function(cosines, torch.tensor([1.5, 1.6, 1.7]))


# ----------------------------------------------------------------- alpha as a tensor


@settings(max_examples=some(40), deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6),
    st.data(),
    st.sampled_from([1.0, 1.0001, 1.1, 1.5, 2.0, 3.0]),
)
def test_softargmax_of_an_order_for_each_row(theta, data, alpha):
    classes = len(theta)
    log_q = data.draw(st.lists(st.floats(-15, 15, width=16), min_size=classes, max_size=classes))
    logits = torch.tensor([theta, theta[::-1]], dtype=DOUBLE)
    prior = torch.tensor([log_q, log_q[::-1]], dtype=DOUBLE)
    p = alpha_softargmax(logits, torch.tensor([[alpha], [1.75]], dtype=DOUBLE), prior)
    edge = 1e-9 if alpha <= 2 else 1e-6
    for row, order in enumerate((alpha, 1.75)):
        wanted, _ = exact(logits[row].tolist(), prior[row].tolist(), order)
        assert p[row].tolist() == pytest.approx([float(x) for x in wanted], abs=edge)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_order_is_learnt(rows):
    """Gradients by it, for each row or one for all, and second derivatives."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 4, generator=generator, dtype=DOUBLE, requires_grad=True)
    log_q = torch.randn(4, generator=generator, dtype=DOUBLE, requires_grad=True)
    alpha = torch.tensor([[1.03], [1.5], [1.9]], dtype=DOUBLE)[-rows:].clone().requires_grad_()
    assert torch.autograd.gradcheck(alpha_softargmax, (logits, alpha, log_q))
    assert torch.autograd.gradgradcheck(alpha_softargmax, (logits, alpha, log_q))


def test_the_gradient_by_the_order_towards_one():
    """At alpha = 1 the one to the right: -p / 2 of centred squares of log(p / q)."""
    logits = torch.tensor([1.0, 0.3, -2.0], dtype=DOUBLE)
    slopes = []
    for value in (1.0, 1 + 1e-7, 1 + 1e-4):
        alpha = torch.tensor([value], dtype=DOUBLE, requires_grad=True)
        slopes.append(torch.autograd.grad(alpha_softargmax(logits, alpha)[0], alpha)[0])
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(slopes[2], slopes[0], rtol=1e-2, atol=1e-5)
    step = 1e-5
    up = alpha_softargmax(logits, 1 + step)[0] - alpha_softargmax(logits, 1.0)[0]
    torch.testing.assert_close(slopes[0][0], up / step, rtol=1e-3, atol=1e-5)


def test_an_order_for_each_row_of_any_dimension():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    orders = torch.tensor([1.2, 1.5, 2.0])
    p = alpha_softargmax(logits, orders, dim=1)
    assert p.dtype == torch.float32
    for column, order in enumerate(orders.tolist()):
        wanted = alpha_softargmax(logits[:, :, column], order, dim=1)
        torch.testing.assert_close(p[:, :, column], wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"must broadcast to \[2, 1, 3\]"):
        alpha_softargmax(logits, torch.full((5, 1), 1.5), dim=1)
    with pytest.raises(ValueError, match="finite and >= 1 in every row"):
        alpha_softargmax(logits, torch.tensor([1.5, 0.5, 2.0]), dim=1)
