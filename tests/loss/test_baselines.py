"""The other losses against their papers' formulas, written naively with autograd in float64."""

import copy
import math

import entmax
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as pml

from speechbrain_qmargin import LOSSES, KappaFaceLoss, QMarginHead, make_loss, q_margin_loss
from speechbrain_qmargin.head import PartialHead
from speechbrain_qmargin.loss.combined import combined_margin
from speechbrain_qmargin.loss.dense import DenseScores, scores_of
from speechbrain_qmargin.loss.elasticface import Draws
from speechbrain_qmargin.loss.prior import PriorQMarginLoss

DOUBLE = torch.float64


def batch(classes=40, rows=6, dim=8, seed=0):
    """Embeddings of various norms: near their prototype, ordinary, and opposite to it."""
    torch.manual_seed(seed)
    weight = torch.randn(classes, dim)
    labels = torch.randint(classes, (rows,))
    x = F.normalize(weight[labels], dim=1) + 0.3 * torch.randn(rows, dim)
    x[0] = -weight[labels[0]] + 0.05 * torch.randn(dim)
    x *= torch.linspace(5, 130, rows).unsqueeze(1)
    return x, weight, labels


def cosines_of(x, weight):
    return F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T


def evaluate(loss, x, weight, labels, way):
    """Loss and gradients by the embeddings and the prototypes."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    if way == "dense":
        value = loss(DenseScores(cosines_of(x, weight), x), labels)
    else:
        head = QMarginHead(x.shape[1], len(weight)).train()
        with torch.no_grad():
            head.weight.copy_(weight)
        weight = head.weight
        value = loss(head(x), labels)
    value.backward()
    grad = weight.grad
    return value.detach(), x.grad, grad.to_dense() if grad.is_sparse else grad


def check(loss, naive, seed=0, **tolerance):
    """Against `naive(cosines, norms, labels)` -> losses [B], on the dense and the sparse head."""
    x, weight, labels = batch(seed=seed)
    ways = ("dense", "sparse")
    found = {way: evaluate(loss(), x, weight, labels, way) for way in ways}
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    wanted = naive(cosines_of(x, weight), x.norm(dim=1), labels).mean()
    wanted.backward()
    tolerance = {"rtol": 2e-5, "atol": 2e-5} | tolerance
    for way in ways:
        for got, want in zip(found[way], (wanted.detach(), x.grad, weight.grad), strict=True):
            torch.testing.assert_close(got.double(), want, **tolerance)


def margin_softmax(cosines, labels, own, scale, others=None):
    """Cross-entropy of logits whose targets are `own`."""
    one_hot = F.one_hot(labels, cosines.shape[1]).bool()
    others = cosines if others is None else others
    return F.cross_entropy(
        scale * torch.where(one_hot, own.unsqueeze(1), others), labels, reduction="none"
    )


def target(cosines, labels):
    return cosines.gather(1, labels.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize(("m1", "m2", "m3"), [(1, 0.3, 0.2), (1, 0, 0.2), (1.35, 0, 0), (4, 0, 0)])
def test_combined(m1, m2, m3):
    def naive(cosines, norms, labels):
        angle = m1 * torch.acos(target(cosines, labels)) + m2
        k = (angle / math.pi).floor().long()
        own = (-1.0) ** k * torch.cos(angle) - 2 * k - m3
        return margin_softmax(cosines, labels, own, 16)

    check(lambda: make_loss("combined", scale=16, options={"m1": m1, "m2": m2, "m3": m3}), naive)


def test_combined_is_arcface_and_cosface():
    x, weight, labels = batch()
    cosines = cosines_of(x, weight)
    cosines, labels = cosines[1:], labels[1:]  # below pi - margin
    for name, options in [
        ("arcface", {"m2": 0.3, "m3": 0.0}),
        ("cosface", {"m2": 0.0, "m3": 0.3}),
    ]:
        combined = make_loss("combined", scale=32, options=options)
        plain = make_loss(name, scale=32, margin=0.3)
        torch.testing.assert_close(combined(cosines, labels), plain(cosines, labels))


def test_sphereface_falls_all_the_way():
    cosines = torch.linspace(1, -1, 1001, dtype=DOUBLE)
    for m1, m2 in [(4, 0.0), (1.5, 0.3), (1, 0.5)]:
        moved = combined_margin(cosines, m1, m2, 0.0)
        assert (moved.diff() < 1e-12).all()


def test_adaface():
    def naive(cosines, norms, labels):
        a = norms.detach().clamp(0.001, 100)
        mean = 0.25 * a.mean() + 0.75 * 20
        deviation = 0.25 * a.std() + 0.75 * 100
        z = ((a - mean) / (deviation + 0.001) * 0.333).clamp(-1, 1)
        angle = (torch.acos(target(cosines, labels)) - 0.4 * z).clamp(1e-3, math.pi - 1e-3)
        own = torch.cos(angle) - (0.4 + 0.4 * z)
        return margin_softmax(cosines, labels, own, 16)

    check(lambda: make_loss("adaface", scale=16, options={"t_alpha": 0.25}), naive)


@pytest.mark.parametrize("name", ["adaface", "qmargin_norm"])
def test_the_running_norms_are_a_loss_s_state(name):
    x, weight, labels = batch()
    loss = make_loss(name)
    loss(DenseScores(cosines_of(x, weight), x), labels)
    a = x.double().norm(dim=1).clamp(max=100)
    state = loss.state_dict()
    torch.testing.assert_close(state["norms.mean"], 0.01 * a.mean() + 0.99 * 20)
    torch.testing.assert_close(state["norms.deviation"], 0.01 * a.std() + 0.99 * 100)
    other = make_loss(name)
    other.load_state_dict(state)
    loss.eval()
    other.eval()
    scores = DenseScores(cosines_of(x, weight), x)
    assert loss(scores, labels) == other(scores, labels)
    assert other.state_dict() == state  # evaluation changes nothing
    other.train()
    lost = torch.full_like(x, math.nan)
    assert other(DenseScores(cosines_of(lost, weight), lost), labels).isnan()
    assert other.state_dict() == state  # a batch that diverged is no measure
    other(DenseScores(cosines_of(x[:1], weight), x[:1]), labels[:1])
    state["norms.mean"] = 0.01 * a[0] + 0.99 * state["norms.mean"]
    torch.testing.assert_close(other.state_dict(), state)  # one norm has no deviation
    kind = type(loss).__name__
    with pytest.raises(TypeError, match=f"{kind} looks at the embeddings' norms.*QMarginHead"):
        loss(cosines_of(x, weight), labels)


@pytest.mark.parametrize("easy", [False, True])
def test_magface(easy):
    def naive(cosines, norms, labels):
        a = norms.clamp(10, 110)
        m = 0.45 + (0.8 - 0.45) * (a - 10) / 100
        own = target(cosines, labels)
        angle = torch.acos(own)
        far = own if easy else own - m * torch.sin(m)
        own = torch.where(own > 0 if easy else angle < math.pi - m, torch.cos(angle + m), far)
        return margin_softmax(cosines, labels, own, 16) + 35 * (a / 110**2 + 1 / a)

    check(lambda: make_loss("magface", scale=16, options={"easy_margin": easy}), naive)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_elasticface(kind, plus):
    def naive(cosines, norms, labels):
        margins = 0.35 + 0.1 * Draws(3).next(len(labels))
        own = target(cosines, labels)
        if plus:  # the largest cosine has the smallest margin
            order = own.argsort(descending=True)
            margins = torch.empty_like(margins).index_copy_(0, order, margins.sort().values)
        if kind == "cos":
            return margin_softmax(cosines, labels, own - margins, 16)
        angle = torch.acos(own)
        far = own - margins * torch.sin(margins)
        own = torch.where(angle < math.pi - margins, torch.cos(angle + margins), far)
        return margin_softmax(cosines, labels, own, 16)

    options = {"sigma": 0.1, "kind": kind, "plus": plus, "seed": 3}
    check(lambda: make_loss("elasticface", scale=16, margin=0.35, options=options), naive)


@pytest.mark.parametrize(
    ("options", "margin", "sigma"),
    [
        ({}, 0.5, 0.0125),
        ({"kind": "cos"}, 0.35, 0.0125),
        ({"plus": True}, 0.5, 0.0175),
        ({"kind": "cos", "plus": True}, 0.35, 0.02),
        ({"kind": "cos", "plus": True, "sigma": 0.0}, 0.35, 0.0),
    ],
)
def test_elasticface_has_the_numbers_of_its_kind(options, margin, sigma):
    loss = make_loss("elasticface", options=options)
    assert (loss.margin, loss.sigma) == (margin, sigma)
    assert make_loss("elasticface", margin=0.2, options=options).margin == 0.2


@pytest.mark.parametrize("name", ["elasticface", "qmargin_elastic"])
def test_in_evaluation_no_margin_is_drawn(name):
    x, weight, labels = batch()
    cosines = cosines_of(x, weight)
    loss = make_loss(name, options={"sigma": 0.1})
    drawn = loss(cosines, labels)
    state = loss.state_dict()
    found = loss.eval()(cosines, labels)
    fixed = make_loss(name, options={"sigma": 0.0})(cosines, labels)
    assert found == fixed != drawn
    assert loss.state_dict() == state


def test_elasticface_s_draws_repeat_on_resume():
    x, weight, labels = batch()
    cosines = cosines_of(x, weight)
    loss = make_loss("elasticface", options={"sigma": 0.1})
    first = [float(loss(cosines, labels)) for _ in range(4)]
    assert len(set(first)) == 4
    loss = make_loss("elasticface", options={"sigma": 0.1})
    again = [float(loss(cosines, labels)) for _ in range(2)]
    resumed = make_loss("elasticface", options={"sigma": 0.1})
    resumed.load_state_dict(loss.state_dict())
    again += [float(resumed(cosines, labels)) for _ in range(2)]
    assert again == first
    margins = 0.5 + 0.0125 * Draws().next(100_000)
    assert abs(float(margins.mean()) - 0.5) < 2e-4
    assert abs(float(margins.std()) - 0.0125) < 2e-4


def test_curricularface():
    def naive(cosines, norms, labels):
        own = target(cosines, labels)
        t = 0.3 * own.mean().detach()
        angle = torch.acos(own)
        turned = torch.cos(angle + 0.5)
        moved = torch.where(angle < math.pi - 0.5, turned, own - 0.5 * math.sin(0.5))
        hard = cosines > turned.unsqueeze(1)
        assert 20 < hard.sum() < hard.numel() - 20
        others = torch.where(hard, cosines * (t + cosines), cosines)
        return margin_softmax(cosines, labels, moved, 16, others)

    loss = make_loss("curricularface", scale=16, options={"momentum": 0.3})
    check(lambda: make_loss("curricularface", scale=16, options={"momentum": 0.3}), naive)
    x, weight, labels = batch()
    cosines = cosines_of(x, weight)
    loss(cosines, labels)
    mean = target(cosines, labels).double().mean()
    torch.testing.assert_close(loss.state_dict()["t"], 0.3 * mean)
    after = make_loss("curricularface", scale=16, options={"momentum": 1e-9})
    after.load_state_dict(loss.state_dict())
    torch.testing.assert_close(loss.eval()(cosines, labels), after(cosines, labels))
    assert loss.t == 0.3 * mean  # evaluation changes nothing
    assert loss.train()(torch.full_like(cosines, math.nan), labels).isnan()
    assert loss.t == 0.3 * mean  # a batch that diverged is no measure
    # beyond pi - m hard is what exceeds cos(theta + m), -0.94, not the line that goes on below -1
    loss, far = make_loss("curricularface", scale=1.0).eval(), torch.tensor([[-0.99, -0.95]])
    own = -0.99 - 0.5 * math.sin(0.5)
    assert float(loss(far, labels.new_zeros(1))) == pytest.approx(math.log1p(math.exp(-0.95 - own)))


@pytest.mark.parametrize("margin", [0.2, 0.3, 0.0])
def test_intertopk(margin):
    """The penalty of the others grows with the margin, as in WeSpeaker."""

    def naive(cosines, norms, labels):
        own = target(cosines, labels)
        angle = torch.acos(own)
        moved = torch.where(
            angle < math.pi - margin, torch.cos(angle + margin), own - margin * math.sin(margin)
        )
        wrong = cosines.detach().clone()
        wrong[torch.arange(len(labels)), labels] = -2
        top = torch.zeros_like(cosines, dtype=torch.bool).scatter(1, wrong.topk(5, 1).indices, True)
        nearer = torch.cos(torch.acos(cosines) - 0.06 * margin / 0.2)
        return margin_softmax(cosines, labels, moved, 16, torch.where(top, nearer, cosines))

    check(lambda: make_loss("intertopk", scale=16, margin=margin), naive)
    scores = DenseScores(torch.tensor([[0.5, 0.2]]))
    assert make_loss("intertopk")(scores, torch.tensor([0])) > 0  # fewer classes than k
    with pytest.raises(ValueError, match=r"label 2 is outside \[0, 2\)"):
        make_loss("intertopk")(scores, torch.tensor([2]))


def test_angular_sparsemax():
    def naive(cosines, norms, labels):
        own = target(cosines, labels)
        angle = torch.acos(own)
        moved = torch.where(
            angle < math.pi - 0.3, torch.cos(angle + 0.3), own - 0.3 * math.sin(0.3)
        )
        one_hot = F.one_hot(labels, cosines.shape[1]).double()
        z = 8 * torch.where(one_hot.bool(), moved.unsqueeze(1), cosines)
        p = entmax.sparsemax(z, 1)
        # Martins and Astudillo's loss by the projection onto the simplex
        return 0.5 * (z - one_hot).square().sum(1) - 0.5 * (z - p).square().sum(1)

    check(lambda: make_loss("angular_sparsemax", scale=8, margin=0.3), naive)


def test_kappaface():
    x, weight, labels = batch()
    counts = torch.arange(1.0, 41)
    counts *= 12 / counts.sum()  # two batches
    x2, _, labels2 = batch(seed=1)
    labels2[:3] = labels[:3]

    def naive(cosines, norms, labels, factors=None):
        own = target(cosines, labels)
        m = 0.5 * (torch.ones(40) if factors is None else factors)[labels]
        angle = torch.acos(own)
        moved = torch.where(angle < math.pi - m, torch.cos(angle + m), own - m * torch.sin(m))
        return margin_softmax(cosines, labels, moved, 16)

    def make():
        return KappaFaceLoss(counts, 8, scale=16, margin=0.5)

    check(make, naive)  # in the beginning
    loss = make()
    value = loss(DenseScores(cosines_of(x, weight), x), labels)
    assert (loss.psi == 1).all()
    resumed, set_back, halfway = make(), make(), copy.deepcopy(loss.state_dict())
    resumed.load_state_dict(halfway)
    for x_of, labels_of in ((x, labels), (x2, labels2)):  # its next estimate is far away
        set_back(DenseScores(cosines_of(x_of, weight), x_of), labels_of)
    set_back.load_state_dict(halfway)
    for each in (loss, resumed, set_back):
        assert each(DenseScores(cosines_of(x2, weight), x2), labels2) > 0
    everything, names = torch.cat((x, x2)).double(), torch.cat((labels, labels2))
    kappa = torch.zeros(40, dtype=DOUBLE)
    for c in names.unique():
        z = F.normalize(everything[names == c], dim=1)
        r = z.mean(0).norm()
        kappa[c] = r * (8 - r**2) / (1 - r**2) if len(z) > 1 else math.inf
    kappa[kappa.isinf()] = kappa[kappa.isfinite()].max()
    scattered = 1 - torch.sigmoid(0.4 * (kappa - kappa.mean()) / kappa.std())
    rare = (torch.cos(math.pi * counts / (1.05 * counts.max())) + 1) / 2
    factors = 0.7 * scattered + 0.3 * rare
    torch.testing.assert_close(loss.psi, factors, rtol=1e-4, atol=1e-5)
    assert torch.equal(loss.psi, resumed.psi)
    assert torch.equal(loss.psi, set_back.psi)
    assert not loss.seen.any()
    value = loss.eval()(DenseScores(cosines_of(x, weight), x), labels)
    wanted = naive(cosines_of(x.double(), weight.double()), None, labels, factors).mean()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not loss.seen.any()  # evaluation changes nothing


def test_a_batch_that_diverged_is_no_measure_of_a_class():
    batches = [batch(), batch(seed=1)]
    batches[1][2][:3] = batches[0][2][:3]
    lost = (torch.full_like(batches[0][0], math.nan), *batches[0][1:])
    counts = torch.tensor([2.25] + 39 * [0.25])  # two batches

    def after(*parts):
        loss = KappaFaceLoss(counts, 8)
        for x, weight, labels in parts:
            loss(DenseScores(cosines_of(x, weight), x), labels)
        return loss

    assert (after(batches[0], lost).psi == 1).all()
    wanted = after(*batches).psi
    assert (wanted != 1).any()
    assert torch.equal(after(batches[0], lost, batches[1]).psi, wanted)


@pytest.mark.parametrize("name", ["kappaface", "qmargin_prior"])
def test_counts_that_are_not_known_are_asked_for(name):
    x, weight, labels = batch()
    scores = DenseScores(cosines_of(x, weight), x)
    with pytest.raises(ValueError, match="counts: the number of items of each class is not known"):
        make_loss(name)(scores, labels)
    loss = make_loss(name)
    with pytest.raises(ValueError, match="one number > 0 for each class"):
        loss.count_classes([0, 1], 8)
    loss.count_classes([1, 2], 8)
    with pytest.raises(ValueError, match=r"40 classes|for 40"):
        loss(scores, labels)


@pytest.mark.parametrize("unit", [0, 1])
def test_it_is_pytorch_metric_learnings(unit):
    """ArcFace, CosFace, and SphereFace, whose logits are times the embedding's norm there."""
    x, weight, labels = batch(rows=9)
    x = F.normalize(x, dim=1) if unit else x
    sizes = {"num_classes": 40, "embedding_size": 8, "scale": 16}
    pairs = {
        "arcface": (pml.ArcFaceLoss(**sizes, margin=math.degrees(0.3)), {"margin": 0.3}),
        "cosface": (pml.CosFaceLoss(**sizes, margin=0.3), {"margin": 0.3}),
        "combined": (
            pml.SphereFaceLoss(**sizes, margin=4),
            {"options": {"m1": 4, "m2": 0, "m3": 0}},
        ),
    }
    for name, (theirs, settings) in pairs.items():
        if name == "combined" and not unit:
            continue
        with torch.no_grad():
            theirs.W.copy_(weight.T)
        at = x.clone().requires_grad_()
        value = theirs(at, labels)
        value.backward()
        found = evaluate(make_loss(name, scale=16, **settings), x, weight, labels, "dense")
        if name == "combined":  # theirs has a gradient by the norm as well
            at.grad -= (at.grad * x).sum(1, keepdim=True) * x
        for a, b in zip(found, (value.detach(), at.grad, theirs.W.grad.T), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_margin_by_the_norm_in_the_reference_measure():
    x, weight, labels = batch()
    loss = make_loss("qmargin_norm", options={"reach": 0.5, "t_alpha": 1.0})
    a = x.double().norm(dim=1).clamp(max=100)
    z = (0.333 * (a - a.mean()) / (a.std() + 0.001)).clamp(-1, 1)
    wanted = q_margin_loss(cosines_of(x, weight), labels, margin=0.2 * (1 + 0.5 * z))
    for way in ("dense", "sparse"):
        found = evaluate(
            make_loss("qmargin_norm", options={"t_alpha": 1.0}), x, weight, labels, way
        )
        torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)
    assert loss.value("reach") == 0.5


def test_a_margin_that_grows_with_the_norm_in_the_reference_measure():
    """MagFace's m(a) and g(a), and their gradients by the norm."""

    def naive(cosines, norms, labels):
        a = norms.clamp(10, 110)
        margins = 0.02 + (0.38 - 0.02) * (a - 10) / 100
        loss = q_margin_loss(cosines, labels, 1.5, 8, margins, reduction="none")
        return loss + 3 * (a / 110**2 + 1 / a)

    options = {"reach": 0.9, "regulariser": 3}
    check(lambda: make_loss("qmargin_magnitude", scale=8, options=options), naive)


@pytest.mark.parametrize("lead", [-1.0, 0.0, 0.4, 0.6, 1.0])
def test_the_best_norm_is_one_within_the_bounds(lead):
    loss, norms = make_loss("qmargin_magnitude"), torch.linspace(10.001, 109.999, 201, dtype=DOUBLE)
    x = (F.normalize(torch.ones(8, dtype=DOUBLE), dim=0) * norms.unsqueeze(1)).requires_grad_()
    cosines = torch.zeros(201, 5, dtype=DOUBLE)
    cosines[:, 0] = lead
    targets = torch.zeros(201, dtype=torch.long)
    loss.rows(DenseScores(cosines, x), targets).loss.sum().backward()
    slopes = (x.grad * F.normalize(x, dim=1)).sum(1)
    assert slopes[0] < 0
    assert slopes[-1] > -1e-6  # where g is flat
    assert (slopes.detach().diff() > 0).all()  # strictly convex
    assert "lower_norm=10, upper_norm=110, regulariser=3.5" in repr(loss)


def test_drawn_margins_in_the_reference_measure():
    x, weight, labels = batch()
    margins = 0.2 + 0.1 * Draws(0).next(len(labels))
    wanted = q_margin_loss(cosines_of(x, weight), labels, margin=margins)
    for way in ("dense", "sparse"):
        loss = make_loss("qmargin_elastic", options={"sigma": 0.1})
        found = evaluate(loss, x, weight, labels, way)
        torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_prior_of_the_classes():
    x, weight, labels = batch()
    counts = torch.arange(1, 41)
    logs = counts.double().log()
    log_q = (0.5 * (logs - logs.mean())).float()
    wanted = q_margin_loss(cosines_of(x, weight), labels, log_q=log_q)
    for way in ("dense", "sparse"):
        found = evaluate(PriorQMarginLoss(counts), x, weight, labels, way)
        torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one number > 0 for each class"):
        PriorQMarginLoss([1, 0])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_name_on_every_head(name):
    """The same on the dense and the sparse head, with sub-centres too; or what works is named."""
    x, weight, labels = batch()
    cls = LOSSES[name]
    rows = torch.cat((weight, weight.flip(1)), 1).view(-1, weight.shape[1])

    def make():
        sizes = {"num_classes": 40, "embedding_dim": 8} if hasattr(cls, "sized_by_task") else {}
        loss = make_loss(name, **sizes)
        if cls.needs_counts:
            loss.count_classes(torch.arange(1, 41), 8)
        return loss.eval()

    head = QMarginHead(8, 40, subcentres=2)
    with torch.no_grad():
        head.weight.copy_(rows)
    nearest = DenseScores(cosines_of(x, rows).unflatten(1, (-1, 2)).amax(2), x)
    wanted = make()(nearest, labels)
    torch.testing.assert_close(make()(head(x), labels), wanted, rtol=1e-4, atol=1e-4)
    partial = PartialHead(8, 40, 1.0)
    with torch.no_grad():
        partial.weight.copy_(weight)
    if name == "intertopk":
        with pytest.raises(TypeError, match=r"train it with --head dense"):
            make()(partial(x), labels)
        return
    wanted = make()(DenseScores(cosines_of(x, weight), x), labels)
    torch.testing.assert_close(make()(partial(x), labels), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("combined", {"m1": 0}, "m1 must be > 0, got 0"),
        ("combined", {"m2": 4}, "m2 is an angle in radians"),
        ("adaface", {"t_alpha": 2}, "t_alpha must be in"),
        ("magface", {"lower_norm": 200}, "lower_norm must be in"),
        ("magface", {"regulariser": -1}, "regulariser must be >= 0"),
        ("qmargin_magnitude", {"reach": 2}, "reach must be in"),
        ("qmargin_magnitude", {"upper_norm": 5}, "lower_norm must be in"),
        ("elasticface", {"kind": "sphere"}, "kind must be 'arc' or 'cos', got 'sphere'"),
        ("curricularface", {"momentum": 0}, "momentum must be in"),
        ("intertopk", {"k": 0}, "k must be a whole number"),
        ("intertopk", {"margin": 3.0, "top_margin": 0.5}, "at 3.0 is more than pi"),
        ("qmargin_norm", {"reach": 2}, "reach must be in"),
        ("adaface", {"t": 2}, "adaface takes no t; it takes scale, margin, h, t_alpha"),
    ],
)
def test_settings_outside_their_range_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, options=options)


def test_a_cost_of_the_norm_does_not_wake_those_at_rest():
    """The cost is never zero: what rests is whose target alone is active."""
    x, weight, labels = batch()
    x = torch.cat((x, 60 * weight[labels]))  # some at their own prototypes
    labels = torch.cat((labels, labels))
    loss = make_loss("qmargin_magnitude", options={"reach": 0.0})
    cosines = cosines_of(x.double(), weight.double())
    rests = q_margin_loss(cosines, labels, reduction="none") == 0
    assert 0 < rests.double().mean() < 1
    head = QMarginHead(weight.shape[1], len(weight))
    with torch.no_grad():
        head.weight.copy_(weight)
    for scores in (scores_of(cosines.float(), x), head(x)):
        value, stats = loss.with_stats(scores, labels)
        assert value > 0
        torch.testing.assert_close(stats.zero_loss, rests.float().mean())
