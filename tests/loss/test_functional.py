"""The operators and the loss against their definitions, written out naively in float64."""

import math

import entmax
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from examples import some
from hypothesis import example, given, settings

from speechbrain_qmargin.head import QMarginHead
from speechbrain_qmargin.loss.functional import (
    alpha_softargmax,
    alpha_softmax_value,
    hard_margin,
    q_margin_loss,
    solve_tau,
)

DOUBLE = torch.float64
# (alpha, scale, margin): the paper's settings, the ends of the family, and beyond alpha = 2
FAMILY = [
    (1.1, 32, 0.2),
    (1.25, 32, 0.2),
    (1.5, 10, 0.2),
    (1.5, 64, 0.3),
    (1.75, 5, 0.2),
    (2.0, 5, 0.2),
    (2.0, 20, 0.0),
    (3.0, 4, 0.2),
    (4.0, 2, 0.2),
]


def naive_posterior(theta, log_q, alpha):
    """p of one row: 200 bisections of the sum of q [1 + (alpha-1)(theta - tau)]_+^k."""
    if alpha == 1:
        return torch.softmax(theta + log_q, 0)
    q = log_q.exp()

    def p(tau):
        return q * torch.clamp(1 + (alpha - 1) * (theta - tau), min=0) ** (1 / (alpha - 1))

    high = theta.max() + 1 / (alpha - 1)
    low = high - 1
    while p(low).sum() < 1:
        low = high - 2 * (high - low)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if p(middle).sum() >= 1 else (low, middle)
    return p(low)


def divergence(p, q, alpha):
    """D_f(p, q) with the generator of the alpha-divergence."""
    u = p / q
    if alpha == 1:
        f = torch.special.xlogy(u, u) - (u - 1)
    else:
        f = (u**alpha - 1 - alpha * (u - 1)) / (alpha * (alpha - 1))
    return (q * f).sum()


def naive_loss(cosines, targets, alpha, scale, margin):
    """The Fenchel-Young loss from its definition, and the posteriors."""
    losses, posteriors = [], []
    for row, label in zip(cosines.double(), targets.tolist(), strict=True):
        theta = scale * row
        log_q = torch.zeros_like(theta)
        log_q[label] = -scale * margin
        q = log_q.exp()
        p = naive_posterior(theta, log_q, alpha)
        one_hot = F.one_hot(torch.tensor(label), len(theta)).double()
        value = p @ theta - divergence(p, q, alpha)
        losses.append(value + divergence(one_hot, q, alpha) - theta[label])
        posteriors.append(p)
    return torch.stack(losses), torch.stack(posteriors)


def batch(rows=6, classes=50, seed=0, dtype=DOUBLE):
    """Cosines with an easy, a hard and ordinary samples."""
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(rows, classes, generator=generator, dtype=DOUBLE) * 1.6 - 0.8
    targets = torch.randint(classes, (rows,), generator=generator)
    cosines[0, targets[0]] = 1.0
    cosines[1, targets[1]] = -1.0
    return cosines.to(dtype), targets


# ----------------------------------------------------------------- the loss


@pytest.mark.parametrize(("alpha", "scale", "margin"), [(1.0, 32, 0.2), *FAMILY])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_loss_and_gradient_are_the_definition(alpha, scale, margin, dtype):
    cosines, targets = batch(dtype=dtype)
    expected, posterior = naive_loss(cosines, targets, alpha, scale, margin)
    cosines.requires_grad_()
    loss = q_margin_loss(cosines, targets, alpha, scale, margin, reduction="none")
    loss.sum().backward()
    assert loss.dtype == dtype
    gradient = posterior - F.one_hot(targets, cosines.shape[1])
    # where alpha > 2 a class enters the support with infinite slope
    tight = 1e-11 if dtype == DOUBLE else 2e-6 if alpha <= 2 else 2e-4
    torch.testing.assert_close(loss.double(), expected, rtol=tight, atol=tight)
    torch.testing.assert_close(cosines.grad.double() / scale, gradient, rtol=0, atol=tight)
    assert torch.equal(cosines.grad == 0, gradient == 0)


@pytest.mark.parametrize(("alpha", "scale", "margin"), [(1.0, 8, 0.2), *FAMILY])
def test_gradcheck(alpha, scale, margin):
    cosines, targets = batch(rows=4, classes=7)
    cosines = cosines.mul(0.5).requires_grad_()

    def loss(x):
        return q_margin_loss(x, targets[:4] % 7, alpha, scale, margin, reduction="none")

    assert torch.autograd.gradcheck(loss, (cosines,), atol=1e-5)


def test_reductions_and_statistics():
    cosines, targets = batch()
    cosines[0] *= 0.2
    cosines[0, targets[0]] = 1.0
    each = q_margin_loss(cosines, targets, 1.5, 10, 0.2, reduction="none")
    assert q_margin_loss(cosines, targets, 1.5, 10, 0.2) == each.mean()
    assert q_margin_loss(cosines, targets, 1.5, 10, 0.2, reduction="sum") == each.sum()
    loss, stats = q_margin_loss(cosines, targets, 1.5, 10, 0.2, return_stats=True)
    _, posterior = naive_loss(cosines, targets, 1.5, 10, 0.2)
    sizes = (posterior > 0).sum(1).double()
    assert loss == each.mean()
    assert stats.support_mean == sizes.mean()
    assert stats.support_max == sizes.max()
    assert stats.zero_loss == (each == 0).double().mean() > 0
    target_posterior = posterior.gather(1, targets[:, None]).mean()
    torch.testing.assert_close(stats.target_posterior, target_posterior)


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_alpha_one_is_cosface(margin):
    cosines, targets = batch(dtype=torch.float32)
    cosines.requires_grad_()
    shifted = 32 * (cosines - margin * F.one_hot(targets, cosines.shape[1]))
    expected = torch.autograd.grad(F.cross_entropy(shifted, targets), cosines)[0]
    loss = q_margin_loss(cosines, targets, 1.0, 32, margin)
    torch.testing.assert_close(loss, F.cross_entropy(shifted, targets))
    torch.testing.assert_close(torch.autograd.grad(loss, cosines)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_alpha_towards_one_is_smooth(dtype):
    cosines, targets = batch(dtype=dtype)
    limit = q_margin_loss(cosines, targets, 1.0, 32, 0.2, reduction="none")
    previous = math.inf
    for exponent in range(4, 9):
        near = q_margin_loss(cosines, targets, 1 + 10.0**-exponent, 32, 0.2, reduction="none")
        error = (near - limit).abs().max()
        assert error <= 3000 * 10.0**-exponent + 2e-5 * (dtype == torch.float32)
        assert error <= previous + 2e-5
        previous = error


@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.5, 1.75, 2.0])
def test_without_margin_it_is_the_entmax_loss(alpha):
    cosines, targets = batch(dtype=DOUBLE)
    logits = 10 * cosines
    ours = q_margin_loss(cosines, targets, alpha, 10, 0.0, reduction="none")
    theirs = entmax.entmax_bisect_loss(logits, targets, alpha, n_iter=100)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    if alpha == 2:
        torch.testing.assert_close(ours, entmax.sparsemax_loss(logits, targets))


@pytest.mark.parametrize(("alpha", "scale"), [(1.25, 32), (1.5, 10), (1.75, 5), (2.0, 5)])
@pytest.mark.parametrize("margin", [0.0, 0.1, 0.2])
def test_zero_loss_begins_at_the_hard_margin(alpha, scale, margin):
    lead = hard_margin(alpha, scale, margin)
    cosines = torch.full((2, 9), 0.3 - lead, dtype=DOUBLE)
    cosines[:, 3] = 0.3 + torch.tensor([1e-9, -1e-4], dtype=DOUBLE)
    cosines.requires_grad_()
    loss = q_margin_loss(cosines, torch.tensor([3, 3]), alpha, scale, margin, reduction="none")
    loss.sum().backward()
    assert loss[0] == 0
    assert (cosines.grad[0] == 0).all()
    assert loss[1] > 0
    assert cosines.grad[1, 3] < 0


def test_hard_margins_of_the_paper():
    margins = [hard_margin(*row) for row in [(1.25, 32, 0.2), (1.5, 10, 0.2), (1.75, 5, 0.2)]]
    assert margins == pytest.approx([0.619, 0.544, 0.565], abs=5e-4)
    assert hard_margin(1, 32, 0.2) == math.inf
    assert hard_margin(4, 1e4, 1) == math.inf


def test_a_lost_target_keeps_a_finite_gradient():
    cosines = torch.zeros(1, 5)
    cosines[0, 0], cosines[0, 1] = -1.0, 1.0
    cosines.requires_grad_()
    loss = q_margin_loss(cosines, torch.tensor([0]), 2.0, 20, 0.2)
    loss.backward()
    assert cosines.grad[0].tolist() == [-20, 20, 0, 0, 0]
    assert math.isfinite(loss.item())


def test_a_single_class_has_nothing_to_learn():
    for alpha in (1.0, 1.5, 2.0, 3.0):
        cosines = torch.tensor([[-0.4], [0.9]], requires_grad=True)
        loss = q_margin_loss(cosines, torch.zeros(2, dtype=torch.long), alpha, 10, 0.2)
        loss.backward()
        assert loss == 0
        assert (cosines.grad == 0).all()


cosine = st.one_of(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), st.floats(-1, 1, width=32))


@settings(max_examples=some(150), deadline=None)
@example([0.1], 0, 1.75, 64.0, 0.5)
@given(
    st.lists(cosine, min_size=1, max_size=12),
    st.integers(0, 11),
    st.sampled_from([1.0, 1.0001, 1.05, 1.25, 1.5, 1.75, 2.0, 2.5, 4.0]),
    st.sampled_from([1.0, 5.0, 10.0, 32.0, 64.0]),
    st.sampled_from([0.0, 0.2, 0.5]),
)
def test_any_row(row, label, alpha, scale, margin):
    """Ties, extremes, one or two classes, targets far below, s m up to 32."""
    if (alpha - 1) * scale * margin > 80:
        scale = 5.0
    cosines = torch.tensor([row], dtype=DOUBLE, requires_grad=True)
    target = torch.tensor([label % len(row)])
    loss = q_margin_loss(cosines, target, alpha, scale, margin)
    loss.backward()
    p = cosines.grad[0] / scale + F.one_hot(target[0], len(row))
    expected, posterior = naive_loss(cosines.detach(), target, alpha, scale, margin)
    # an infinite slope at the edge of the support (alpha > 2) leaves eps^(1/(alpha-1))
    edge = 1e-9 if alpha <= 2 else 10 * torch.finfo(DOUBLE).eps ** (1 / (alpha - 1))
    assert loss >= 0
    assert abs(p.sum() - 1) < 1e-9
    assert (p >= -1e-12).all()
    torch.testing.assert_close(p, posterior[0], rtol=0, atol=edge)
    assert torch.equal(p > edge, posterior[0] > edge) or alpha > 2
    # the definition cancels terms of the size of q_y^(1-alpha); ours does not
    rounding = 4 * torch.finfo(DOUBLE).eps * math.exp((alpha - 1) * scale * margin)
    rounding /= max(alpha - 1, 1e-4) * alpha
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-7, atol=1e-7 + rounding)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("kept", [0.55, 0.64, 0.75])
def test_logits_built_to_slow_newton_are_solved(dtype, kept):
    """Each step is made to drop a share of the classes just past it: the worst of the proof.

    In float64 these take up to 28 steps at C = 5,994; ordinary logits take 3 to 8.
    """
    count, gap, at, levels = 5994, 1.0, 0.0, []
    while count > 2:
        dropped = min(max(1, round(count * (1 - kept))), count - 2)
        levels += [at] * dropped
        step = gap / count
        count -= dropped
        gap -= step * count
        at += step
    levels = torch.tensor(levels, dtype=DOUBLE) / (2 * at + gap)
    logits = torch.cat([torch.zeros(2, dtype=DOUBLE), levels + 1e-9 - 1]).to(dtype)
    tau = solve_tau(logits, 2.0).double()
    # tau within its own resolution: the mass crosses one there
    reach = 8 * torch.finfo(dtype).eps
    below, above = (
        (1 + logits.double() - tau - shift).clamp(min=0).sum() for shift in (-reach, reach)
    )
    assert above < 1 < below


# ----------------------------------------------------------------- precision


@pytest.mark.parametrize(("alpha", "tolerance"), [(1.5, 1e-6), (2, 1e-6), (3, 1e-5), (4, 2e-3)])
def test_float32_resolves_a_crowd_of_barely_active_classes(alpha, tolerance):
    """49 wrong classes share 0.2: at alpha = 4 their u is 7e-8, beside 1 - (alpha-1) tau ~ 0."""
    u, u_y = (0.2 / 49) ** (alpha - 1), (0.8 * math.e) ** (alpha - 1)
    cosines = torch.zeros(1, 50)
    cosines[0, 7] = (u_y - u) / ((alpha - 1) * 5)
    cosines.requires_grad_()
    loss = q_margin_loss(cosines, torch.tensor([7]), alpha, 5.0, 0.2)
    loss.backward()
    expected, posterior = naive_loss(cosines.detach(), torch.tensor([7]), alpha, 5.0, 0.2)
    gradient = posterior - F.one_hot(torch.tensor([7]), 50)
    torch.testing.assert_close(cosines.grad.double() / 5, gradient, rtol=0, atol=tolerance)
    torch.testing.assert_close(loss.double(), expected[0], rtol=10 * tolerance, atol=0)


@pytest.mark.parametrize("alpha", [1.0, 1.5, torch.tensor([[1.0], [1.3], [2.0]])])
def test_the_softargmax_takes_torchs_function_transforms(alpha):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    jacobian = torch.func.jacrev(lambda x: alpha_softargmax(x, alpha))(logits)
    wanted = torch.autograd.functional.jacobian(lambda x: alpha_softargmax(x, alpha), logits)
    torch.testing.assert_close(jacobian, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype):
    cosines, targets = batch(dtype=dtype)
    cosines.requires_grad_()
    loss = q_margin_loss(cosines, targets)
    loss.backward()
    expected = q_margin_loss(cosines.detach().float(), targets)
    assert loss.dtype == torch.float32
    assert cosines.grad.dtype == dtype
    assert loss.detach() == expected


def test_autocast_changes_nothing():
    cosines, targets = batch(dtype=torch.float32)
    expected = q_margin_loss(cosines, targets)
    expected_p = alpha_softargmax(10 * cosines)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert q_margin_loss(cosines, targets) == expected
        assert torch.equal(alpha_softargmax(10 * cosines), expected_p)


def test_bf16_cosines_may_overshoot_one_a_little():
    cosines = torch.tensor([[1.0078, 0.0]], dtype=torch.bfloat16)
    assert q_margin_loss(cosines, torch.tensor([0])) == 0


def test_many_classes_in_float32():
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(8, 192, generator=generator), dim=1)
    w = F.normalize(torch.randn(17982, 192, generator=generator), dim=1)
    targets = torch.arange(8)
    cosines = x @ w.T
    for alpha, scale in [(1.25, 32), (1.5, 10), (1.75, 5)]:
        ours = cosines.clone().requires_grad_()
        loss = q_margin_loss(ours, targets, alpha, scale, 0.2, reduction="none")
        loss.sum().backward()
        expected, posterior = naive_loss(cosines, targets, alpha, scale, 0.2)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        gradient = posterior - F.one_hot(targets, 17982)
        torch.testing.assert_close(ours.grad.double() / scale, gradient, rtol=0, atol=1e-5)


# ----------------------------------------------------------------- the activation


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.25, 1.5, 2.0, 3.0])
def test_softargmax_and_value_are_the_definition(alpha):
    generator = torch.Generator().manual_seed(1)
    theta = 3 * torch.randn(5, 8, generator=generator, dtype=DOUBLE)
    log_q = torch.randn(8, generator=generator, dtype=DOUBLE)
    p = alpha_softargmax(theta, alpha, log_q)
    value = alpha_softmax_value(theta, alpha, log_q)
    for row in range(5):
        expected = naive_posterior(theta[row], log_q, alpha)
        torch.testing.assert_close(p[row], expected, rtol=1e-8, atol=1e-8)
        best = expected @ theta[row] - divergence(expected, log_q.exp(), alpha)
        torch.testing.assert_close(value[row], best, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 2.5])
def test_softargmax_without_prior_is_entmax(alpha):
    logits = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    theirs = entmax.entmax_bisect(logits, alpha, n_iter=100)
    torch.testing.assert_close(alpha_softargmax(logits, alpha), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.3, 1.5, 2.0])
def test_softargmax_and_value_differentiate(alpha):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 7, generator=generator, dtype=DOUBLE, requires_grad=True)
    log_q = torch.randn(7, generator=generator, dtype=DOUBLE, requires_grad=True)

    def posterior(x, lq):
        return alpha_softargmax(x, alpha, lq)

    def value(x, lq):
        return alpha_softmax_value(x, alpha, lq)

    assert torch.autograd.gradcheck(posterior, (logits, log_q))
    assert torch.autograd.gradcheck(value, (logits, log_q))
    assert torch.autograd.gradgradcheck(lambda x: alpha_softargmax(x, alpha), (logits,))
    grad = torch.autograd.grad(value(logits, log_q).sum(), logits)[0]
    torch.testing.assert_close(grad, posterior(logits, log_q))


def test_a_prior_below_float32_has_a_gradient():
    log_q = torch.tensor([-200.0, 0.0], requires_grad=True)
    alpha_softmax_value(torch.tensor([300.0, 0.0]), 1.0, log_q).backward()
    assert log_q.grad.tolist() == [1, -1]  # p - q


def test_dim_shapes_and_absent_classes():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(4))
    p = alpha_softargmax(logits, dim=1)
    assert torch.equal(p, alpha_softargmax(logits.movedim(1, -1)).movedim(-1, 1))
    assert alpha_softmax_value(logits, dim=1).shape == (2, 3)
    holes = torch.cat([logits, torch.full((2, 1, 3), -math.inf)], 1)
    padded = alpha_softargmax(holes, dim=1)
    torch.testing.assert_close(padded[:, :5], p)
    assert (padded[:, 5] == 0).all()
    level = torch.tensor(0.3)
    assert torch.equal(
        solve_tau(logits, 1.5, level), solve_tau(logits, 1.5, level.expand_as(logits))
    )


@settings(max_examples=some(100), deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=10),
    st.data(),
    st.sampled_from([1.0, 1.001, 1.25, 1.5, 2.0, 3.0]),
)
def test_tau_on_a_subset_is_a_lower_bound(row, data, alpha):
    keep = data.draw(st.lists(st.sampled_from(range(len(row))), min_size=1, unique=True))
    log_q = data.draw(st.lists(st.floats(-8, 2), min_size=len(row), max_size=len(row)))
    logits, log_q = torch.tensor(row, dtype=DOUBLE), torch.tensor(log_q, dtype=DOUBLE)
    subset = solve_tau(logits[keep], alpha, log_q[keep])
    whole = solve_tau(logits, alpha, log_q)
    assert subset <= whole + 1e-7 * (1 + whole.abs())
    if alpha > 1:
        mass = log_q.exp() * (1 + (alpha - 1) * (logits - whole)).clamp(min=0) ** (1 / (alpha - 1))
        assert mass.sum() == pytest.approx(1, abs=1e-6 if alpha <= 2 else 1e-3)


# ----------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.9}, "alpha must be a finite number >= 1, got 0.9"),
        ({"alpha": math.nan}, "alpha"),
        ({"scale": 0}, "scale must be a finite number > 0, got 0"),
        ({"margin": -0.1}, "margin must be a finite number >= 0, got -0.1"),
        ({"reduction": "avg"}, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    ],
)
def test_parameters_are_checked(kwargs, message):
    cosines, targets = batch()
    with pytest.raises(ValueError, match=message):
        q_margin_loss(cosines, targets, **kwargs)


def test_a_scale_that_would_not_be_learnt_is_named():
    """It was taken as a number: the training went on, and the scale stayed where it began."""
    cosines, targets = batch()
    scale = torch.tensor(10.0, requires_grad=True)
    head = QMarginHead(8, 50)
    for call in (
        lambda: q_margin_loss(cosines, targets, scale=scale),
        lambda: QMarginHead(8, 50, scale=scale),
        lambda: head(torch.ones(len(targets), 8)).q_margin_loss(targets, 1.5, scale, 0.2),
    ):
        with pytest.raises(TypeError, match=r"scale is a number here.*alpha_softmax_value"):
            call()
    with pytest.raises(TypeError, match="alpha must be a number here"):
        head(torch.ones(len(targets), 8)).q_margin_loss(targets, torch.tensor(1.5), 10.0, 0.2)
    fixed = q_margin_loss(cosines, targets, scale=scale.detach())
    assert torch.equal(fixed, q_margin_loss(cosines, targets, scale=10.0))


@pytest.mark.parametrize(("label", "remedy"), [(-1, "no label is ignored"), (50, "out_n_neurons")])
def test_a_label_outside_names_itself_and_the_remedy(label, remedy):
    cosines, targets = batch()
    targets[2] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside \[0, 50\).*{remedy}"):
        q_margin_loss(cosines, targets)


def test_inputs_are_checked():
    cosines, targets = batch()
    with pytest.raises(
        ValueError, match=r"\|3\| > 1.*not logits.*ECAPA_TDNN.Classifier \[512, cpu, 0, 192, 50\]"
    ):
        q_margin_loss(3 * cosines.clamp(-1, 1), targets)
    broken = cosines.clone()
    broken[1, 2] = -math.inf  # no unit vectors have it
    with pytest.raises(ValueError, match=r"\|inf\| > 1"):
        q_margin_loss(broken, targets)
    with pytest.raises(ValueError, match=r"\(6, 50\) and \(5,\)"):
        q_margin_loss(cosines, targets[:5])
    with pytest.raises(ValueError, match="empty batch"):
        q_margin_loss(cosines[:0], targets[:0])
    with pytest.raises(TypeError, match=r"integer class labels, got torch\.float64"):
        q_margin_loss(cosines, targets.double())
    with pytest.raises(TypeError, match="floating point"):
        q_margin_loss(cosines.long(), targets)
    with pytest.raises(ValueError, match=r"\(3,\) does not broadcast to logits of shape \(6, 50\)"):
        alpha_softargmax(cosines, log_q=torch.zeros(3))
    with pytest.raises(TypeError, match="floating point"):
        alpha_softargmax(torch.tensor([1, 2]))
