"""f-divergences: against scipy's optimiser, against the alpha-divergences, and by gradcheck."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from speechbrain_qmargin import QMarginHead, alpha_softargmax, make_loss, q_margin_loss
from speechbrain_qmargin.loss.diagnosis import Progress, advice
from speechbrain_qmargin.loss.f_operators import f_margin_loss, f_softargmax
from speechbrain_qmargin.loss.generators import (
    GENERATORS,
    Generator,
    f_hard_margin,
)

DOUBLE = torch.float64
# as the literature writes them, scaled to f''(1) = 1
TEXTBOOK = {
    "kl": lambda u: u * np.log(u) - u + 1,
    "chi_square": lambda u: (u - 1) ** 2 / 2,
    "le_cam": lambda u: (u - 1) ** 2 / (u + 1),
    "jensen_shannon": lambda u: 2 * (u * np.log(u) - (1 + u) * np.log((1 + u) / 2)),
    "squared_hellinger": lambda u: 2 * (np.sqrt(u) - 1) ** 2,
    "reverse_kl": lambda u: u - 1 - np.log(u),
}
SPARSE = {"chi_square", "le_cam"}
every = pytest.mark.parametrize("name", GENERATORS)
with_loss = pytest.mark.parametrize("name", sorted(set(GENERATORS) - {"reverse_kl"}))


def alpha_generator(alpha):
    """A divergence of one's own: that of an order above 0 other than 1."""
    rate, sparse = alpha - 1, alpha > 1

    def log_ratio(w):
        return (torch.log1p(-rate * w) if sparse else torch.log(-rate * w)) / rate

    def depth(log_u):
        return -torch.expm1(rate * log_u) / rate if sparse else -torch.exp(rate * log_u) / rate

    return Generator(
        f"alpha {alpha:g}",
        pole=0.0 if sparse else -1 / rate,
        log_ratio=log_ratio,
        slope=lambda w: torch.exp((2 - alpha) * log_ratio(w)),
        depth=depth,
        drop=lambda u: (alpha * u - u**alpha) / (alpha * rate),
        edge=1 / rate if sparse else math.inf,
        at_zero=1 / alpha,
    )


def batch(rows=5, classes=6, spread=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.rand(rows, classes, generator=generator, dtype=DOUBLE) * 2 - 1) * spread
    targets = torch.randint(classes, (rows,), generator=generator)
    log_q = torch.randn(rows, classes, generator=generator, dtype=DOUBLE) / 2
    return logits, targets, log_q.scatter(1, targets[:, None], -1.5)


@pytest.mark.parametrize("name", [*GENERATORS, -0.5, 0.5, 1.5])
def test_a_generator_is_one_function(name):
    """Ratio, slope, depth and drop belong to the textbook's f, by differences."""
    if isinstance(name, str):
        f, textbook_f = GENERATORS[name], TEXTBOOK[name]
    else:
        f = alpha_generator(name)

        def textbook_f(u):
            return (u**name - 1 - name * (u - 1)) / (name * (name - 1))

    u = torch.tensor([1e-3, 0.2, 0.9, 1.0, 1.7, 30.0], dtype=DOUBLE)
    textbook = torch.from_numpy(textbook_f(u.numpy()))
    drop = f.drop(u) - (f.at_zero if math.isfinite(f.at_zero) else 0)
    torch.testing.assert_close(drop, -textbook)
    step = 1e-6 * u
    derivative = (textbook_f((u + step).numpy()) - textbook_f((u - step).numpy())) / (
        2 * step.numpy()
    )
    depth = f.depth(u.log())
    torch.testing.assert_close(f.pole - depth, torch.from_numpy(derivative), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(f.log_ratio(depth), u.log(), rtol=1e-9, atol=1e-9)
    near = f.log_ratio(depth * (1 + 1e-6)).exp() - f.log_ratio(depth * (1 - 1e-6)).exp()
    where = depth.abs() > 1e-3
    slope = (-near / (2e-6 * depth))[where]
    torch.testing.assert_close(f.slope(depth)[where], slope, rtol=1e-4, atol=1e-6)
    assert f.slope(f.depth(torch.zeros(1, dtype=DOUBLE))) == pytest.approx(1)  # f''(1) = 1
    assert f.is_sparse == (name in SPARSE if isinstance(name, str) else name > 1)


@pytest.mark.parametrize(("name", "log_u"), [("le_cam", 20.5), ("jensen_shannon", -20.5)])
def test_a_depth_has_all_its_digits_where_the_ratio_is_far_from_one(name, log_u):
    log_u = torch.tensor(log_u, dtype=DOUBLE)
    found = GENERATORS[name].log_ratio(GENERATORS[name].depth(log_u))
    assert float(found) == pytest.approx(float(log_u), rel=0, abs=1e-12)


@every
def test_the_softargmax_is_a_numerical_optimisers(name):
    logits, _, log_q = batch()
    found = f_softargmax(logits, name, log_q).numpy()
    for theta, q, p in zip(logits.numpy(), log_q.exp().numpy(), found, strict=True):

        def cost(x, theta=theta, q=q):
            x = np.maximum(x, 1e-15)
            return -(x @ theta) + (q * TEXTBOOK[name](x / q)).sum()

        best = minimize(
            cost,
            np.full(len(theta), 1 / len(theta)),
            method="SLSQP",
            bounds=[(0, 1)] * len(theta),
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        assert cost(p) <= best.fun + 1e-9
        np.testing.assert_allclose(p, best.x, atol=2e-4)
        assert p.sum() == pytest.approx(1, abs=1e-14)
        assert ((p > 0).all()) == (name not in SPARSE)


@with_loss
def test_the_loss_is_the_definition(name):
    logits, targets, log_q = batch(spread=8)
    loss, p_y, support = f_margin_loss(logits, targets, name, log_q)
    q, f = log_q.exp(), GENERATORS[name]
    p = f_softargmax(logits, name, log_q)

    def divergence(p):
        return (q * (f.at_zero - f.drop(p / q))).sum(1)

    one_hot = torch.nn.functional.one_hot(targets, logits.shape[1]).to(DOUBLE)
    wanted = ((p - one_hot) * logits).sum(1) - divergence(p) + divergence(one_hot)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(p_y, p.gather(1, targets[:, None])[:, 0])
    assert torch.equal(support, (p > 0).sum(1))


@every
def test_gradients(name):
    logits, targets, log_q = batch(rows=2, classes=4, spread=2)
    logits.requires_grad_()
    log_q.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, q: f_softargmax(x, name, q), (logits, log_q))
    if name != "reverse_kl":
        fixed = log_q.detach()
        assert torch.autograd.gradcheck(lambda x: f_margin_loss(x, targets, name, fixed)[0], logits)


def test_second_derivatives_are_refused():
    """Also under a gradient that is constant, of a mean, where torch's own decorator lets one pass
    that lacks the operator's part."""
    angles, targets, log_q = batch(rows=2, classes=4, spread=2)
    angles.requires_grad_()
    for value in (
        f_softargmax(angles.sin(), "le_cam", log_q)[:, 0].sum(),
        f_margin_loss(angles.sin(), targets, "le_cam", log_q)[0].mean(),
        make_loss("qmargin_f")(angles.sin(), targets),
    ):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(value, angles, create_graph=True)


@pytest.mark.parametrize(("name", "alpha"), [("kl", 1), ("chi_square", 2), (None, 1.5), (None, 3)])
def test_alpha_divergences_are_the_fast_paths(name, alpha):
    logits, targets, _ = batch(rows=20, classes=30, spread=8)
    f = name or alpha_generator(alpha)
    log_q = torch.zeros_like(logits).scatter(1, targets[:, None], -8 * 0.2)
    loss, _, _ = f_margin_loss(logits, targets, f, log_q)
    fast = q_margin_loss(logits / 8, targets, alpha, 8, 0.2, reduction="none")
    torch.testing.assert_close(loss, fast, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        f_softargmax(logits, f, log_q),
        alpha_softargmax(logits, alpha, log_q),
        rtol=1e-7,
        atol=1e-12,
    )


def test_orders_below_one_and_pearsons_scale():
    logits, targets, log_q = batch()
    for alpha, name in ((0.5, "squared_hellinger"),):
        a, b = (f_margin_loss(logits, targets, f, log_q)[0] for f in (alpha_generator(alpha), name))
        torch.testing.assert_close(a, b)
    # Pearson's (u - 1)^2 at scale s is twice (u - 1)^2 / 2 at scale s / 2
    p = f_softargmax(logits / 2, "chi_square", log_q)
    value = (p * logits).sum(1) - (log_q.exp() * (p / log_q.exp() - 1) ** 2).sum(1)
    for other in torch.rand(50, *p.shape, dtype=DOUBLE):
        other = other / other.sum(1, keepdim=True)
        lower = (other * logits).sum(1) - (log_q.exp() * (other / log_q.exp() - 1) ** 2).sum(1)
        assert bool((lower <= value).all())


@every
def test_ties_extremes_and_few_classes(name):
    one = f_softargmax(torch.tensor([[3.0]]), name, torch.tensor([[-40.0]]))
    assert one == 1
    ties = f_softargmax(torch.full((1, 4), 7.0), name)
    torch.testing.assert_close(ties, torch.full((1, 4), 0.25))
    # a target with a tiny q that is far ahead, and one that is far behind
    logits = torch.tensor([[60.0, 0.0, -3.0], [-60.0, 0.0, -3.0]], dtype=DOUBLE)
    log_q = torch.tensor([[-30.0, 0.0, 0.0]], dtype=DOUBLE)
    p = f_softargmax(logits, name, log_q)
    assert bool(p.isfinite().all())
    torch.testing.assert_close(p.sum(1), torch.ones(2, dtype=DOUBLE))
    assert p[1, 0] < 1e-6
    # where every class holds what its depth says: the optimality condition
    f, q = GENERATORS[name], log_q.exp().expand_as(p)
    for row in (0, 1):
        active = p[row] > 1e-300
        tau = logits[row] - f.pole + f.depth(p[row].log() - q[row].log())
        assert float(tau[active].max() - tau[active].min()) < 1e-6
    absent = f_softargmax(torch.tensor([[1.0, -math.inf, 0.0]]), name)
    assert absent[0, 1] == 0


@pytest.mark.parametrize("name", sorted(SPARSE))
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_zero_loss_begins_at_the_hard_margin(name, margin):
    lead = f_hard_margin(name, 8, margin)
    loss = make_loss("qmargin_f", scale=8, margin=margin, options={"divergence": name})
    assert loss.resting_lead() == lead
    cosines = torch.tensor([[lead + 1e-6, 0, -0.5], [lead - 1e-3, 0, -0.5]], dtype=DOUBLE) - 0.1
    rows = loss.rows(*scored(cosines), statistics=True)
    assert rows.loss[0] == 0
    assert rows.loss[1] > 0
    assert loss.statistics(rows).zero_loss == 0.5


def scored(cosines):
    from speechbrain_qmargin.loss.dense import DenseScores

    return DenseScores(cosines), torch.zeros(len(cosines), dtype=torch.long)


@pytest.mark.parametrize("name", ["kl", "chi_square", "jensen_shannon", "le_cam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_the_loss_by_name(name, dtype):
    torch.manual_seed(0)
    cosines = (torch.rand(4, 1, 12) * 2 - 1).to(dtype).requires_grad_()
    labels = torch.randint(12, (4, 1))
    loss = make_loss("qmargin_f", options={"divergence": name})
    value, stats = loss.with_stats(cosines, labels)
    value.backward()
    log_q = torch.zeros(4, 12, dtype=DOUBLE).scatter(1, labels, -2.0)
    exact = cosines.detach()[:, 0].double() * 10
    wanted, p_y, _ = f_margin_loss(exact, labels[:, 0], name, log_q)
    torch.testing.assert_close(value.double(), wanted.mean(), rtol=1e-5, atol=1e-6)
    assert float(stats.target_posterior) == pytest.approx(float(p_y.mean()), abs=1e-6)
    assert cosines.grad.dtype == dtype
    assert (float(stats.support_mean) < 12) == (name in SPARSE)


def test_where_it_runs_and_where_not():
    head, x, labels = QMarginHead(4, 9).train(), torch.randn(3, 4), torch.tensor([0, 1, 2])
    for name, same in (("kl", make_loss("cosface", scale=10)), ("chi_square", None)):
        loss = make_loss("qmargin_f", options={"divergence": name})
        same = same or make_loss("qmargin", alpha=2, scale=10)
        assert loss(head(x), labels) == same(head(x), labels)
    with pytest.raises(ValueError, match="reverse_kl has no loss"):
        make_loss("qmargin_f", options={"divergence": "reverse_kl"})
    with pytest.raises(ValueError, match="choose one of kl, chi_square, le_cam"):
        make_loss("qmargin_f", options={"divergence": "hellinger"})
    with pytest.raises(ValueError, match="> 300"):
        make_loss("qmargin_f", scale=64, margin=5)
    with pytest.raises(ValueError, match="label 9 is outside"):
        make_loss("qmargin_f")(torch.zeros(1, 9), torch.tensor([9]))
    with pytest.raises(ValueError, match="log_q must be within"):
        f_softargmax(torch.zeros(2), "kl", torch.tensor([0.0, -700.0]))
    asleep = advice(make_loss("qmargin_f"), Progress(0.95, 0.1, 30, 192))
    assert "--loss qmargin --alpha 1.5" in asleep


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("lead", [0, 22], ids=["far", "near"])
def test_thousands_of_classes_take_few_evaluations(name, lead):
    calls = []
    found = GENERATORS[name]
    counted = dataclasses.replace(found, log_ratio=lambda w: calls.append(1) or found.log_ratio(w))
    logits = 2.2 * torch.randn(8, 6000, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += lead
    log_q = torch.zeros(6000).index_fill(0, torch.tensor(0), -6.4)
    p = f_softargmax(logits.double(), counted, log_q)
    torch.testing.assert_close(p.sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-14)
    assert len(calls) <= 25


@pytest.mark.parametrize("name", ["le_cam", "jensen_shannon"])
def test_a_loss_is_pickled_with_its_divergence(name):
    loss = pickle.loads(pickle.dumps(make_loss("qmargin_f", options={"divergence": name})))
    assert repr(loss) == repr(make_loss("qmargin_f", options={"divergence": name}))
    assert loss(torch.tensor([[0.5, 0.1, 0.3]]), torch.tensor([1])) > 0
