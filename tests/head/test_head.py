"""The sparse head against a dense float64 evaluation of the definition."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from brute_force import brute_force
from examples import some
from hypothesis import example, given, settings
from hypothesis import strategies as st
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper

from speechbrain_qmargin import QMarginLoss
from speechbrain_qmargin.head import QMarginHead, dense, prototypes, search
from speechbrain_qmargin.head.precision import product_roundoff
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.arcface import ArcFaceLoss
from speechbrain_qmargin.loss.device import control_flow
from speechbrain_qmargin.loss.functional import q_margin_objective


def dense_reference(embeddings, weight, labels, alpha, scale, margin):
    """Loss [B], posterior [B, C] and the gradients of the mean loss, naively in float64."""
    x = embeddings.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    cosines = F.normalize(x, dim=1) @ F.normalize(w, dim=1).T
    theta = scale * cosines
    log_q = torch.zeros_like(theta)
    log_q[torch.arange(len(labels)), labels] = -scale * margin
    with torch.no_grad():
        if alpha == 1:
            p = torch.softmax(theta + log_q, 1)
            entropy = (torch.special.xlogy(p, p) - p * log_q).sum(1)
            own = scale * margin
            loss = (p * theta).sum(1) - entropy - theta[torch.arange(len(labels)), labels] + own
        else:
            low = (theta - torch.expm1(log_q * (1 - alpha)) / (alpha - 1)).amax(1, keepdim=True)
            high = theta.amax(1, keepdim=True) + len(weight) / (alpha - 1)

            def posterior(tau):
                u = (1 + (alpha - 1) * (theta - tau)).clamp(min=0)
                return log_q.exp() * u ** (1 / (alpha - 1))

            for _ in range(90):
                middle = (low + high) / 2
                above = posterior(middle).sum(1, keepdim=True) > 1
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            p = posterior(low)
            p = p / p.sum(1, keepdim=True)
            q_power = (log_q * (1 - alpha)).exp()
            own = torch.arange(len(labels)), labels
            loss = (p * theta).sum(1) - theta[own]
            loss += (q_power[own] - (q_power * p**alpha).sum(1)) / (alpha * (alpha - 1))
        g = p.clone()
        g[torch.arange(len(labels)), labels] -= 1
    cosines.backward(g * scale / len(labels))
    return loss, p, x.grad, w.grad


EPS = 2.0**-23


def close(got, wanted, tolerance=1e-5, rounding=0.0):
    """Relative to the result, or to what rounding leaves of terms that cancelled in it."""
    got, wanted = got.detach().double(), wanted.detach().double()
    assert float((got - wanted).norm()) <= tolerance * float(wanted.norm()) + rounding + 1e-9


def check(head, embeddings, labels, alpha, scale, margin, tolerance=1e-5, alike=0):
    """`alike`: how many terms of a sum may be equal, whose roundings in float32 add up."""
    head.weight.grad = None
    x = embeddings.clone().requires_grad_()
    loss, stats = head.train()(x).q_margin_loss(
        labels, alpha, scale, margin, reduction="none", return_stats=True
    )
    loss.mean().backward()
    wanted, p, grad_x, grad_w = dense_reference(x, head.weight, labels, alpha, scale, margin)
    # of the float32 terms that cancel in a gradient
    rounding = (16 + alike / 2) * EPS * scale
    close(loss, wanted, tolerance)
    close(x.grad, grad_x, tolerance, rounding * float((1 / x.detach().norm(dim=1)).mean()))
    shortest = float(head.weight.detach().norm(dim=1).min())
    close(head.weight.grad.to_dense(), grad_w, tolerance, rounding / shortest)
    return stats, p


PARAMETERS = [(1.0, 32.0, 0.2), (1.25, 32.0, 0.2), (1.5, 10.0, 0.2), (1.75, 5.0, 0.1), (2.0, 5, 0)]


KINDS = [torch.bfloat16, torch.int8, torch.float32]


def small(kind, screen_from=1, chunk=512, block=300, sample=256, **others):
    """Screening for small sizes too, of a kind, in several chunks and blocks; never given up."""
    others = {"most": 2.0, **others}
    return Sizes(screen_from, kind, 4 * chunk, chunk=chunk, block=block, sample=sample, **others)


@pytest.fixture(params=KINDS, ids=str)
def screened(request):
    if request.param == torch.int8 and not prototypes._int8_is_exact():
        pytest.skip("int8 products saturate on this processor")
    return small(request.param)


def near(head, labels, noise, seed=1):
    torch.manual_seed(seed)
    own = F.normalize(head.weight.detach()[labels], dim=1)
    return own + noise * torch.randn(own.shape)


@pytest.mark.parametrize("parameters", [*PARAMETERS, (3.0, 4.0, 0.1)])
@pytest.mark.parametrize("noise", [0.05, 0.5, 100])
def test_equals_the_dense_loss_and_gradients(screened, parameters, noise):
    torch.manual_seed(0)
    head = QMarginHead(24, 3000, sizes=screened)
    with torch.no_grad():
        head.weight *= torch.rand(3000, 1) * 3 + 0.1  # the length of a prototype is no direction
    labels = torch.randint(3000, (16,))
    stats, p = check(head, near(head, labels, noise), labels, *parameters)
    support = (p > 0).sum(1).double()
    assert abs(float(stats.support_mean) - support.mean()) <= 0.2  # a posterior at rounding level


def test_support_is_the_dense_one(screened):
    torch.manual_seed(0)
    head = QMarginHead(24, 3000, sparse_grad=True, sizes=screened)
    labels = torch.randint(3000, (16,))
    x = near(head, labels, 0.4).requires_grad_()
    head(x).q_margin_loss(labels, 1.5, 10, 0.2, reduction="sum").backward()
    _, p, _, _ = dense_reference(x, head.weight, labels, 1.5, 10, 0.2)
    p[torch.arange(16), labels] -= 1
    rows = head.weight.grad.coalesce().indices()[0]
    assert set(rows.tolist()) == set((p.abs() > 1e-12).any(0).nonzero().squeeze(1).tolist())


@settings(max_examples=some(60), deadline=None)
@given(
    classes=st.integers(1, 700),
    batch=st.integers(1, 6),
    dim=st.integers(1, 9),
    parameters=st.sampled_from([*PARAMETERS, (1.05, 20.0, 0.3), (1.5, 0.5, 0.0)]),
    noise=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 50.0]),
    twins=st.booleans(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
@example(1, 1, 1, PARAMETERS[0], 0.0, False, KINDS[0], 0)
@example(700, 1, 4, (1.5, 10.0, 0.2), 0.0, True, KINDS[0], 5)
def test_any_shape_with_ties(classes, batch, dim, parameters, noise, twins, kind, seed):
    torch.manual_seed(seed)
    sizes = small(kind, screen_from=64, chunk=100, block=77, sample=50)
    head = QMarginHead(dim, classes, sizes=sizes)
    if twins:
        with torch.no_grad():
            head.weight[classes // 2 :] = head.weight[0].clone()
    labels = torch.randint(classes, (batch,))
    alike = classes - classes // 2 if twins else 0
    check(head, near(head, labels, noise, seed), labels, *parameters, 3e-5, alike)


@settings(max_examples=some(25), deadline=None)
@given(
    classes=st.integers(2, 400),
    parameters=st.sampled_from([(1.05, 20.0), (1.25, 32.0), (1.5, 10.0), (2.0, 5.0), (3.0, 4.0)]),
    decades=st.sampled_from([0.0, 1.0, 6.0, 12.0]),
    per_class=st.booleans(),
    per_sample=st.booleans(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
@example(88, (3.0, 4.0), 12.0, True, True, torch.bfloat16, 1)
def test_any_reference_measure(classes, parameters, decades, per_class, per_sample, kind, seed):
    """A margin a sample and a prior a class, over many orders of magnitude, against float64."""
    (alpha, scale), batch = parameters, 5
    generator = torch.Generator().manual_seed(seed)
    spread = decades * 2.303

    def draw(size):
        return spread * (torch.rand(size, generator=generator, dtype=torch.float64) - 0.5)

    sizes = small(kind, screen_from=64, chunk=100, block=77, sample=50)
    head = QMarginHead(8, classes, seed=seed, sparse_grad=True, sizes=sizes)
    labels = torch.randint(classes, (batch,), generator=generator)
    noise = torch.randn(batch, 8, generator=generator)
    x = (F.normalize(head.weight.detach()[labels], dim=1) + 0.3 * noise).requires_grad_()
    margin = 0.5 * torch.rand(batch, generator=generator).double() if per_sample else 0.2
    log_q = draw(classes) if per_class else None
    loss = head(x).q_margin_loss(labels, alpha, scale, margin, log_q=log_q, reduction="none")
    loss.sum().backward()
    whole = x.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    cosines = F.normalize(whole, dim=1) @ F.normalize(weight, dim=1).T
    own = torch.arange(batch), labels
    prior = torch.zeros(batch, classes, dtype=torch.float64)
    prior = prior if log_q is None else prior + log_q
    prior[own] -= scale * torch.as_tensor(margin, dtype=torch.float64)
    p, wanted = brute_force(scale * cosines.detach(), prior, labels, alpha)
    # dp / dtheta = q^(alpha - 1) p^(2 - alpha) at the edge of the support has no bound above
    # alpha = 2: there a logit's own rounding in float64 is seen, in the reference as well
    slope = torch.where(p > 0, ((alpha - 1) * prior).exp() * p ** (2 - alpha), 0)
    steep = 2.0**-49 * scale * float(slope.max())
    p[own] -= 1
    cosines.backward(p * scale)
    close(loss, wanted, 1e-5, 1e-6)
    rounding = (64 * EPS + steep) * scale
    close(x.grad, whole.grad, 1e-5, rounding * float((1 / x.detach().norm(dim=1)).max()))
    longest = float((1 / weight.detach().norm(dim=1)).max())
    close(head.weight.grad.to_dense(), weight.grad, 1e-5, rounding * longest)


@pytest.mark.parametrize("alpha", [1.25, 2.0])
def test_too_many_candidates_for_memory(screened, alpha):
    """All classes alike and all active: float32 passes with recomputation, nothing stored."""
    torch.manual_seed(0)
    head = QMarginHead(16, 2500, sizes=replace(screened, max_candidates=2000))
    labels = torch.randint(2500, (5,))
    check(head, torch.randn(5, 16), labels, alpha, 0.3, 0.2)
    with torch.no_grad():
        head.weight.copy_(head.weight[:1].expand_as(head.weight))
    check(head, torch.randn(5, 16), labels, alpha, 10, 0.2)


@pytest.mark.parametrize("parameters", [(1.5, 10.0, 0.2), (2.0, 5.0, 0.0), (2.5, 4.0, 0.1)])
def test_passes_in_float64_are_not_held_up_by_a_float32_bound(parameters):
    """Where the search found too much, its lower bound is of float32 cosines: within their rounding
    it may lie beyond the root. Each sample's gradient is exact relative to itself.
    """
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(1)
    head = QMarginHead(24, 400, *parameters, sizes=Sizes(max_candidates=20))
    with torch.no_grad():
        head.weight.copy_(torch.randn(400, 24))
    labels = torch.randint(400, (64,))
    x = F.normalize(head.weight[labels].detach()) + 0.1 * torch.randn(64, 24, generator=generator)
    x = x.requires_grad_()
    (len(x) * head(x, labels)).backward()
    _, _, wanted, _ = dense_reference(x, head.weight, labels, *parameters)
    wanted = len(x) * wanted
    active = wanted.norm(dim=1) > 1e-6
    assert active.any()
    error = (x.grad.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(error[active].max()) < 7e-7


def test_a_pass_over_all_classes_is_not_taken_in_vain(screened, monkeypatch):
    """On a GPU too: a pass takes longer than to ask whether the last one was enough."""
    torch.manual_seed(0)
    sizes = replace(screened, max_candidates=2000)
    head = QMarginHead(16, 2500, alpha=1.25, scale=0.5, margin=0.2, sizes=sizes)
    passes, blocks = [], dense.AllClasses._blocks
    monkeypatch.setattr(dense.AllClasses, "_blocks", lambda self: passes.append(1) or blocks(self))
    with control_flow(host=False):
        head(torch.randn(5, 16), torch.randint(2500, (5,))).backward()
    assert 2 < len(passes) <= 12


def test_nothing_is_looked_at_twice(screened, monkeypatch):
    """One pass over the classes, whatever the batch."""
    torch.manual_seed(0)
    head = QMarginHead(24, 3000, sizes=screened)
    seen = []
    survivors = search.Screening.survivors

    def counted(self, part):
        seen.extend(range(part.start, part.stop))
        return survivors(self, part)

    monkeypatch.setattr(search.Screening, "survivors", counted)
    for noise in (0.05, 0.4, 100.0):
        labels = torch.randint(3000, (16,))
        seen.clear()
        head(near(head, labels, noise), labels)
        assert seen == list(range(3000))


def test_a_coarser_product_loses_no_class(screened, monkeypatch):
    """As on a GPU with TF32, or a CPU with bf16 products in the place of float32's."""
    torch.manual_seed(0)
    head = QMarginHead(32, 5000, sparse_grad=True, sizes=screened)
    labels = torch.randint(5000, (64,))
    x = near(head, labels, 0.25)

    def rows():
        head.weight.grad = None
        head(x, labels).backward()
        return set(head.weight.grad.coalesce().indices()[0].tolist())

    wanted = rows()
    monkeypatch.setattr(search, "product", lambda a, b: (a.bfloat16() @ b.bfloat16().T).to(a.dtype))
    tf32 = torch.backends.cuda.matmul.allow_tf32  # SpeechBrain turns it on, for GPUs alone
    torch.set_float32_matmul_precision("medium")
    try:
        assert product_roundoff(x.device) == 2.0**-8
        assert rows() == wanted
    finally:
        torch.set_float32_matmul_precision("highest")  # of CPUs as well
        torch.backends.cuda.matmul.allow_tf32 = tf32
    monkeypatch.setattr(search, "product_roundoff", lambda device: 0.0)
    assert rows() != wanted  # what an allowance for float32 alone would give


@pytest.mark.parametrize("noise", [0.3, 100.0])
def test_most_classes_active(screened, monkeypatch, noise):
    """The dense way, chosen by the sample."""
    monkeypatch.setattr(search.Screening, "survivors", None)
    torch.manual_seed(0)
    head = QMarginHead(24, 3000, sizes=replace(screened, most=0.1))
    labels = torch.randint(3000, (16,))
    check(head, near(head, labels, noise), labels, 1.05, 16.0, 0.2)


@settings(max_examples=some(50), deadline=None)
@given(
    dim=st.integers(1, 600),
    seed=st.integers(0, 10_000),
    floors=st.sampled_from([(0.06, 0.9), (0.3, 0.31), (-0.5, 0.5)]),
    kind=st.sampled_from(KINDS),
)
def test_screening_keeps_whatever_is_above_a_floor(dim, seed, floors, kind):
    """Rows of many lengths, a floor right below each sample's largest cosine or a random one."""
    torch.manual_seed(seed)
    head = QMarginHead(dim, 300, sizes=small(kind))
    with torch.no_grad():
        head.weight *= torch.rand(300, 1) * 3 + 0.01
    own = head.prototypes()
    x = F.normalize(head.weight.detach()[:7] / own.inverse_norm[:7, None] + 0.2, dim=1)
    cosines = x.double() @ F.normalize(head.weight.detach().double(), dim=1).T
    floor = torch.empty(7).uniform_(*floors)
    best = cosines.amax(1).float()
    floor = torch.where((best > floor[0]) & (torch.rand(7) < 0.5), best - 1e-6, floor)
    wanted = (cosines >= floor.unsqueeze(1)).any(0).nonzero().squeeze(1)
    found = search.Screening(x, floor, own).survivors(slice(0, 300))
    assert set(wanted.tolist()) <= set(found.tolist())


@settings(max_examples=some(50), deadline=None)
@given(
    dim=st.integers(1, 600),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1.0, 7.3, 0.011]),
    aligned=st.booleans(),
)
def test_screening_bound(dim, seed, scale, aligned):
    """bf16 products against float64 ones, also in the worst direction."""
    torch.manual_seed(seed)
    w = F.normalize(torch.randn(64, dim), dim=1)
    rounded_w = w.bfloat16()
    residual = (w - rounded_w.float()).norm(dim=1).amax() * (1 + 2**-20)
    x = scale * F.normalize((w - rounded_w.float() + 1e-9) if aligned else torch.randn(64, dim))
    rounded = x.bfloat16()
    slack = search.screening_slack(x, rounded, residual)
    products = torch.mm(rounded, rounded_w.T)
    exact = x.double() @ w.double().T
    threshold = search._round_down((exact - slack.unsqueeze(1)).float())
    assert bool((products >= threshold).all())


def test_the_cache_follows_every_change_of_the_weight(screened):
    torch.manual_seed(0)
    head = QMarginHead(24, 3000, sizes=screened)
    labels = torch.randint(3000, (16,))
    for change in (
        lambda: head.load_state_dict(QMarginHead(24, 3000).state_dict()),
        lambda: torch.nn.init.normal_(head.weight),
    ):
        check(head, near(head, labels, 0.3), labels, 1.5, 10, 0.2)
        change()
    check(head, near(head, labels, 0.3), labels, 1.5, 10, 0.2)


def test_in_speechbrain_s_place_of_a_classifier():
    torch.manual_seed(0)
    head, cost = QMarginHead(embedding_dim=24, num_classes=300), QMarginLoss(1.5, 10, 0.2)
    embeddings = torch.randn(8, 1, 24, requires_grad=True)
    labels = torch.randint(300, (8, 1))
    sparse = cost(head(embeddings), labels, torch.ones(8))
    sparse.backward()
    got, embeddings.grad = embeddings.grad, None
    cosines = head.eval()(embeddings)
    assert cosines.shape == (8, 1, 300)
    dense = cost(cosines, labels)
    dense.backward()
    close(sparse, dense)
    close(got, embeddings.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.train()(embeddings).q_margin_loss(labels[:, 0], 1.5, 10, 0.2).equal(sparse)


def test_errors():
    head = QMarginHead(4, 10)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"target label 10 is outside \[0, 10\)"):
        head(torch.randn(2, 4), torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"takes embeddings \[B, 4\]"):
        head(torch.randn(2, 5), labels)
    with pytest.raises(ValueError, match="empty batch"):
        head(torch.randn(0, 4), labels)
    with pytest.raises(ValueError, match="num_classes"):
        QMarginHead(4, 0)
    with pytest.raises(TypeError, match="float32 prototypes"):
        QMarginHead(4, 10).half()(torch.randn(2, 4), labels)
    loss = head(torch.randn(2, 4), labels)
    with torch.no_grad():
        head.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed between"):
        loss.backward()
    with pytest.raises(RuntimeError, match=r"size mismatch"):
        head.load_state_dict(QMarginHead(4, 11).state_dict())


@functools.cache
def near_the_margin(parameters):
    """Samples whose lead is about the hard margin, and what the loss is to be there."""
    torch.manual_seed(0)
    weight = F.normalize(QMarginHead(256, 3000).weight.detach())
    labels = torch.randint(3000, (256,))
    edge = {1.0: 0.01, 1.25: 0.040, 1.5: 0.053, 2.0: 0.053}[parameters[0]]
    noise = torch.linspace(0.8 * edge, 1.2 * edge, 256).unsqueeze(1)
    x = weight[labels] + noise * torch.randn(256, 256)
    return weight, labels, x, dense_reference(x, weight, labels, *parameters)


def test_a_measure_that_float64_cannot_hold_next_to_the_logits_is_refused():
    """u of a class alone is q^-9 here, e^-45: its edge is its logit, and all its mass was lost."""
    head, x, labels = QMarginHead(8, 60, seed=1).train(), torch.randn(5, 8), torch.arange(5)
    log_q = torch.linspace(-5, 5, 60, dtype=torch.float64)
    head(x).evaluate(labels, q_margin_objective(labels, 3.0, 4.0, 0.1, log_q))
    with pytest.raises(ValueError, match="log_q: the posteriors of a sample do not sum to 1"):
        head(x).evaluate(labels, q_margin_objective(labels, 10.0, 4.0, 0.1, log_q))


@pytest.mark.slow
@pytest.mark.parametrize("candidates", [4_000_000, 0])  # 0: passes over chunks
@pytest.mark.parametrize(
    "parameters", [(1.0, 32.0, 0.2), (1.25, 32.0, 0.2), (1.5, 10.0, 0.2), (2.0, 5.0, 0.2)]
)
def test_near_zero_each_loss_and_gradient_is_exact_relative_to_itself(
    screened, parameters, candidates
):
    weight, labels, x, (wanted, p, grad_x, grad_w) = near_the_margin(parameters)
    head = QMarginHead(256, 3000, sizes=replace(screened, max_candidates=candidates))
    head.load_state_dict({"weight": weight})
    x = x.clone().requires_grad_()
    loss, stats = head.train()(x).q_margin_loss(
        labels, *parameters, reduction="none", return_stats=True
    )
    loss.mean().backward()
    small = (wanted > 0) & (wanted < 1e-2)
    if parameters[0] > 1:
        assert small.sum() >= 3
        assert wanted[small].min() < 1e-3
    positive = wanted > 1e-8  # below, the reference has rounding of its own
    assert ((loss.double() - wanted).abs() / wanted)[positive].max() < 1e-5
    error = (x.grad.double() - grad_x).norm(dim=1) / grad_x.norm(dim=1)
    assert error[positive].max() < 1e-5
    close(head.weight.grad.to_dense(), grad_w, 1e-5)
    torch.testing.assert_close(stats.support_mean, (p > 0).sum(1).float().mean())


def test_ties_above_alpha_2_share_the_gradient(screened):
    torch.manual_seed(0)
    head = QMarginHead(16, 400, sizes=screened)
    with torch.no_grad():
        head.weight[:40] = head.weight[0]  # forty equal prototypes
    labels = torch.full((8,), 100)
    x = (F.normalize(head.weight.detach()[:1]) + 0.3 * torch.randn(8, 16)).requires_grad_()
    loss = head.train()(x).q_margin_loss(labels, 3.0, 6.0, 0.1, reduction="none")
    loss.mean().backward()
    wanted, p, grad_x, grad_w = dense_reference(x, head.weight, labels, 3.0, 6.0, 0.1)
    assert (p > 0).sum(1).max() >= 40
    close(loss, wanted, 1e-5, 0)
    close(x.grad, grad_x, 1e-5, 1e-7)
    close(head.weight.grad.to_dense(), grad_w, 1e-5, 1e-7)


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
def test_arcface_is_speechbrains(margin):
    torch.manual_seed(0)
    head = QMarginHead(16, 300)
    labels = torch.arange(8)
    own = F.normalize(head.weight.detach()[:8])
    x = own + 0.3 * torch.randn(8, 16)
    x[0] = -own[0] + 0.02 * torch.randn(16)  # beyond pi - margin
    x = x.requires_grad_()
    loss = ArcFaceLoss(scale=32.0, margin=margin)(head.train()(x.unsqueeze(1)), labels[:, None])
    loss.backward()
    dense, w = x.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    cosines = F.normalize(dense, dim=1) @ F.normalize(w, dim=1).T
    speechbrains = LogSoftmaxWrapper(AdditiveAngularMargin(margin=margin, scale=32.0))
    wanted = speechbrains(cosines.unsqueeze(1), labels[:, None])
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    close(x.grad, dense.grad, 1e-5, 1e-6)
    close(head.weight.grad, w.grad, 1e-5, 1e-6)
