"""The losses as SpeechBrain calls them."""

import math
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from launches import Counted
from speechbrain.nnet.losses import AdditiveAngularMargin, AngularMargin, LogSoftmaxWrapper
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import speechbrain_qmargin
from speechbrain_qmargin import (
    LOSSES,
    ArcFaceLoss,
    CosFaceLoss,
    QMarginFaceLoss,
    QMarginHead,
    QMarginLoss,
    alpha_softargmax,
    f_softargmax,
    make_loss,
    margin_for,
    solve_tau,
)
from speechbrain_qmargin.loss.dense import scores_of
from speechbrain_qmargin.loss.device import control_flow
from speechbrain_qmargin.loss.functional import QMarginStats, q_margin_loss
from speechbrain_qmargin.loss.interface import Objective, Rows


def outputs_and_labels(rows=5, classes=9):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.rand(rows, 1, classes, generator=generator) * 2 - 1
    return outputs, torch.randint(classes, (rows, 1), generator=generator)


def test_every_shape_gives_the_same_loss():
    outputs, labels = outputs_and_labels()
    loss = QMarginLoss()
    expected = q_margin_loss(outputs[:, 0], labels[:, 0], 1.5, 10.0, 0.2)
    assert loss(outputs, labels, torch.ones(5)) == expected
    assert loss(outputs[:, 0], labels) == expected
    assert loss(outputs, labels[:, 0]) == expected
    assert loss(outputs[:, 0], labels[:, 0]) == expected
    value, stats = loss.with_stats(outputs, labels)
    assert value == expected
    assert isinstance(stats, QMarginStats)


def test_one_sample_and_one_class_keep_their_dimensions():
    assert QMarginLoss()(torch.rand(1, 1, 4), torch.tensor([[2]])) >= 0
    assert QMarginLoss()(torch.rand(3, 1, 1), torch.zeros(3, 1, dtype=torch.long)) == 0
    assert QMarginLoss()(torch.rand(1, 1, 1), torch.zeros(1, 1, dtype=torch.long)) == 0


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("easy", [False, True])
def test_arcface_is_speechbrains(margin, easy):
    outputs, labels = outputs_and_labels(rows=40)
    outputs[0, 0, labels[0]] = -0.9999  # beyond pi - margin
    outputs.requires_grad_()
    theirs = LogSoftmaxWrapper(AdditiveAngularMargin(margin, 32.0, easy_margin=easy))
    wanted = theirs(outputs, labels)
    gradient = torch.autograd.grad(wanted, outputs)[0]
    loss = ArcFaceLoss(32.0, margin, easy_margin=easy)(outputs, labels)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, outputs)[0], gradient, rtol=1e-5, atol=1e-5
    )


def test_cosface_is_speechbrains():
    outputs, labels = outputs_and_labels()
    theirs = LogSoftmaxWrapper(AngularMargin(margin=0.2, scale=32))
    torch.testing.assert_close(CosFaceLoss()(outputs, labels), theirs(outputs, labels))


def test_the_family_by_name():
    for name in LOSSES:
        loss = make_loss(name, num_classes=100)
        assert type(loss) is LOSSES[name]
        assert f"scale={loss.value('scale'):g}" in repr(loss).replace(".0", "")
    assert isinstance(make_loss("qmargin_face"), QMarginFaceLoss)
    assert make_loss("entmax").margin == 0
    assert make_loss("sparsemax").alpha == 2
    loss = make_loss("qmargin", alpha=1.75, scale=5)
    assert (loss.alpha, loss.scale, loss.margin) == (1.75, 5, 0.2)
    arcface = make_loss("arcface", margin=0.3)
    assert isinstance(arcface, ArcFaceLoss)
    assert (arcface.margin, arcface.scale) == (0.3, 32)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "softmax",
            {},
            r"unknown name 'softmax'; choose one of .*arcface, combined, cosface",
        ),
        ("subcenter", {}, "is the classifier's: give --subcentres 3 with any loss"),
        ("arcface", {"alpha": 1.5}, "arcface has no alpha"),
        ("cosface", {"alpha": 1.5}, "cosface is alpha = 1"),
        ("entmax", {"margin": 0.2}, "entmax is margin = 0"),
        ("sparsemax", {"alpha": 1.5}, "sparsemax is alpha = 2"),
        ("qmargin", {"scale": -1}, "scale must be"),
        (
            "arcface",
            {"options": {"easy": True}},
            "arcface takes no easy; it takes scale, margin, easy_margin$",
        ),
        ("qmargin", {"scale": 5, "options": {"scale": 7}}, "5 and, in the loss's options, 7"),
    ],
)
def test_names_mean_what_they_say(name, given, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, **given)


def test_parameters_that_overflow_are_refused():
    with pytest.raises(ValueError, match=r"96 > 80.*beyond any cosine"):
        QMarginLoss(alpha=4, scale=64, margin=0.5)


def test_a_setting_is_not_learnt():
    with pytest.raises(TypeError, match="alpha is a number; as a tensor it would not be learnt"):
        QMarginLoss(alpha=torch.tensor(1.5, requires_grad=True))
    outputs, labels = outputs_and_labels()
    with pytest.raises(TypeError, match="alpha must be a number here"):
        q_margin_loss(outputs[:, 0], labels[:, 0], alpha=torch.full((5,), 1.5))


def test_it_has_no_state():
    loss = QMarginLoss(1.75, 5.0, 0.1)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    copy = pickle.loads(pickle.dumps(loss))
    outputs, labels = outputs_and_labels()
    before = dict(vars(loss))
    assert copy(outputs, labels) == loss(outputs, labels)
    assert vars(loss) == before


def test_its_text_shows_the_hard_margin():
    assert "hard_margin_cos=0.544" in repr(QMarginLoss())
    assert "hard_margin_cos=inf" in repr(CosFaceLoss())
    assert "scale=0.5" in repr(QMarginLoss(scale=0.5))


class Head:
    """A sparse head's training output: it evaluates what the loss asks."""

    num_classes, embeddings = 9, None

    def cosines(self):
        raise TypeError("no")

    def evaluate(self, targets, objective: Objective, *, statistics=False):
        self.seen = targets.tolist(), objective, statistics
        return Rows(torch.tensor([6.0, 8.0]), torch.ones(2), torch.tensor([1, 3]))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("arcface", {}, "ArcFaceLoss(scale=32, margin=0.2)"),
        ("arcface", {"easy_margin": True}, "ArcFaceLoss(scale=32, margin=0.2, easy_margin=True)"),
        (
            "elasticface",
            {"kind": "cos", "plus": True},
            "ElasticFaceLoss(scale=64, margin=0.35, sigma=0.02, kind=cos, plus=True)",
        ),
        ("sphereface2", {"kind": "A"}, "margin=0.15, balance=0.7, kind=A)"),
        ("intertopk", {"k": 3}, "top_margin=0.06, k=3)"),
        ("magface", {"easy_margin": True}, "regulariser=35, easy_margin=True)"),
    ],
)
def test_its_text_shows_what_makes_it_another_loss(name, options, text):
    assert text in repr(make_loss(name, options=options))


def test_a_sparse_heads_output_evaluates_itself():
    head = Head()
    assert QMarginLoss()(head, torch.tensor([[3], [1]])) == 7
    targets, objective, statistics = head.seen
    assert (targets, statistics) == ([3, 1], False)
    assert (objective.alpha, objective.scale, objective.spread) == (1.5, 10.0, 2.0)
    assert objective.target_log_q.tolist() == [-2, -2]
    loss, stats = QMarginLoss().with_stats(head, torch.tensor([[3], [1]]))
    assert (loss, stats.support_mean, stats.support_max) == (7, 2, 3)
    with pytest.raises(TypeError, match=r"cosines \[B, 1, C\].*got list"):
        QMarginLoss()([0.1], torch.tensor([0]))


@pytest.mark.parametrize("shape", [(4, 8), (2, 2, 8), (16,), (1, 2, 8)])
def test_embeddings_of_another_batch_are_named(shape):
    """Of twice the batch, each norm would be that of two."""
    cosines = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"embeddings must be \[B, D\] or \[B, 1, D\], one for"):
        scores_of(cosines, torch.ones(shape))
    assert scores_of(cosines, torch.ones(2, 1, 8)).embeddings.shape == (2, 8)


def test_shapes_that_disagree_are_named():
    outputs, labels = outputs_and_labels()
    with pytest.raises(ValueError, match=r"\(5, 9\) and \(4,\)"):
        QMarginLoss()(outputs, labels[:4])
    with pytest.raises(ValueError, match=r"\(5, 2, 9\)"):
        QMarginLoss()(outputs.expand(5, 2, 9), labels)


@pytest.mark.parametrize("name", ["qmargin", "arcface", "intertopk", "sphereface2"])
def test_labels_of_another_kind_are_named(name):
    outputs, labels = outputs_and_labels()
    loss = make_loss(name)
    with pytest.raises(ValueError, match=r"one class label a sample.*\(5, 9\).*LogSoftmaxWrapper"):
        loss(outputs, F.one_hot(labels[:, 0], 9))
    for other in (labels.T, labels.unsqueeze(2), labels[0, 0]):
        with pytest.raises(ValueError, match="one class label a sample"):
            loss(outputs, other)
    with pytest.raises(TypeError, match="a tensor of class labels, got list"):
        loss(outputs, labels[:, 0].tolist())
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(TypeError, match=f"integer class labels, got {dtype}"):
            loss(outputs, labels.to(dtype))
    labels[3] = -100  # torch's ignore_index
    with pytest.raises(ValueError, match=r"label -100 is outside \[0, 9\): no label is ignored"):
        loss(outputs, labels)


def test_probabilities_are_no_cosines():
    outputs, labels = outputs_and_labels()
    with pytest.raises(ValueError, match=r"outputs are probabilities.*Leave the softmax out"):
        QMarginLoss()(F.softmax(outputs, 2), labels)
    with pytest.raises(ValueError, match="outputs are probabilities"):
        make_loss("arcface")(F.softmax(outputs, 2).bfloat16(), labels)
    assert QMarginLoss()(torch.eye(5), torch.arange(5)) == 0  # orthogonal classes, all recognised
    assert QMarginLoss()(outputs.abs(), labels) > 0


def test_it_trains_a_classifier():
    generator = torch.Generator().manual_seed(0)
    prototypes = F.normalize(torch.randn(20, 16, generator=generator), dim=1)
    labels = torch.arange(20).repeat(4)
    x = prototypes[labels] + 0.1 * torch.randn(80, 16, generator=generator)
    weight = torch.randn(20, 16, generator=generator, requires_grad=True)
    optimiser = torch.optim.SGD([weight], lr=1.0)
    losses = []
    for _ in range(60):
        cosines = F.normalize(x, dim=1) @ F.normalize(weight, dim=1).T
        loss = QMarginLoss()(cosines, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert (cosines.argmax(1) == labels).all()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [QMarginLoss(), CosFaceLoss()])
def test_torch_compile_gives_the_same_loss_and_gradient(loss):
    """On the CPU dynamo runs the solver, which asks whether it is done, outside its graphs."""
    outputs, labels = outputs_and_labels()
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=loss.alpha == 1)
    a, b = (outputs.clone().requires_grad_() for _ in range(2))
    first, second = loss(a, labels), compiled(b, labels)
    first.backward()
    second.backward()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(a.grad, b.grad)
    assert math.isfinite(second.item())


@pytest.mark.skipif(
    torch.__version__.startswith("2.7"), reason="2.7.1 for CUDA aborts without a GPU"
)
@pytest.mark.parametrize(
    ("alpha", "kernels"), [(1.0, True), (1.5, True), (3.0, True), (1.5, False)]
)
def test_a_gpu_is_never_waited_for(alpha, kernels):
    """On fake CUDA tensors (shapes without values) a look at a value raises."""
    if kernels:
        pytest.importorskip("triton")
    loss = QMarginLoss(alpha, 4.0)
    with FakeTensorMode(), control_flow(kernels=kernels):
        outputs = torch.empty(4, 1, 3000, device="cuda", requires_grad=True)
        labels = torch.empty(4, 1, device="cuda", dtype=torch.long)
        with pytest.raises(DataDependentOutputException):
            bool((labels > 0).all())
        value, stats = loss.with_stats(outputs, labels)
        assert value.device.type == stats.support_mean.device.type == "cuda"
        if kernels:
            torch.compiler.reset()
            compiled = torch.compile(loss, backend="eager", fullgraph=True)
            assert compiled(outputs, labels).shape == ()


def loss_of(name):
    loss = make_loss(name, num_classes=300, embedding_dim=16, samples=10_000)
    if loss.needs_counts:
        loss.count_classes([4] * 300, 16)
    return loss


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("spoilt", ["embedding", "prototype"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_what_is_not_finite_makes_a_loss_nan_on_every_classifier(name, spoilt, host):
    """Nothing is raised, on no device: whoever takes the step sees a loss that is not finite."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(4, 16, generator=generator), torch.arange(4)
    head = QMarginHead(16, 300, seed=0)
    with torch.no_grad():
        (x if spoilt == "embedding" else head.weight)[1, 2] = torch.nan
    cosines = F.normalize(x, dim=1) @ F.normalize(head.weight.detach(), dim=1).T
    cosines.requires_grad_()
    with control_flow(host=host):
        dense = loss_of(name).rows(scores_of(cosines, x), labels, statistics=True).loss
        sparse = loss_of(name).rows(head(x.requires_grad_()), labels, statistics=True).loss
        (gradient,) = torch.autograd.grad(dense.sum(), cosines)
        sparse.mean().backward()
    of_sample = [True] * 4 if spoilt == "prototype" else [False, True, False, False]
    assert dense.isnan().tolist() == of_sample
    assert gradient.isnan().any(1).tolist() == of_sample  # for GradScaler to find
    assert sparse.mean().isnan()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_labels_of_any_integer_type_are_the_same(name):
    """As an index uint8 would be a mask, and int16 nothing."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(3, 16, generator=generator)
    cosines = 0.5 * torch.rand(3, 300, generator=generator)

    def losses(kind):
        loss, labels = loss_of(name), torch.tensor([0, 1, 1]).to(kind)
        scores = scores_of(cosines, embeddings)
        return [loss(scores, labels), *loss.rows(scores, labels).loss]

    wanted = losses(torch.int64)
    for kind in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert losses(kind) == wanted


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"qmargin_f"}))
def test_torchs_function_transforms_give_the_same_gradients(name):
    """``torch.func``'s, of which grad makes a graph for a second one."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(3, 16, generator=generator).double(), torch.tensor([0, 1, 1])
    prototypes = F.normalize(torch.randn(300, 16, generator=generator).double(), dim=1)
    loss = loss_of(name).eval()

    def rows(x):
        scores = scores_of(F.normalize(x, dim=1) @ prototypes.T, x)
        return loss.rows(scores, labels).loss

    def penalty(x):
        return torch.func.grad(lambda x: rows(x).sum())(x).square().sum()

    at = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(rows(at).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), at)
    torch.testing.assert_close(torch.func.grad(lambda x: rows(x).sum())(x), first.detach())
    torch.testing.assert_close(torch.func.jacrev(rows)(x).sum(0), first.detach())
    torch.testing.assert_close(torch.func.grad(penalty)(x), second)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_torchs_default_device_is_not_where_anything_is_computed(name):
    """Not everything that a step makes is made of its inputs; there none could be read."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(4, 16, generator=generator), torch.arange(4)
    cosines = 0.5 * torch.rand(4, 300, generator=generator)
    heads = [QMarginHead(16, 300, seed=0) for _ in range(2)]
    here, there = loss_of(name), loss_of(name)

    def run(loss, head):
        value = loss(scores_of(cosines, x), labels) + loss(head(x), labels)
        value.backward()
        return value, head.weight.grad

    wanted = run(here, heads[0])
    with torch.device("meta"):
        found = run(there, heads[1])
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


# a generator's Newton steps go on until the host sees that all rows are done
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"qmargin_f"}))
def test_no_loss_waits_for_a_gpu(name):
    """From the second step on: what a run begins with may be asked for once."""
    embeddings = F.normalize(torch.randn(4, 16), dim=1)
    cosines, labels = (0.5 * torch.rand(4, 300)).requires_grad_(), torch.arange(4)
    loss = loss_of(name)
    with control_flow(host=False):
        loss(scores_of(cosines, embeddings), labels)
        with Counted() as counted:
            rows = loss.rows(scores_of(cosines, embeddings), labels, statistics=True)
            rows.loss.mean().backward()
            loss.statistics(rows)
    assert counted.waits == 0


@pytest.mark.skipif(
    torch.__version__.startswith("2.7"), reason="2.7.1 for CUDA aborts without a GPU"
)
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"qmargin_f"}))
def test_no_loss_mixes_devices(name):
    """On fake CUDA tensors, among which one of the CPU raises."""
    loss = loss_of(name)
    loss(scores_of(0.5 * torch.rand(4, 300), torch.rand(4, 16)), torch.arange(4))
    with FakeTensorMode(), control_flow(kernels=False):
        for module in loss.modules():  # as Module.to, which fakes nothing
            for key, one in [*module.named_buffers(recurse=False)]:
                setattr(module, key, torch.empty(one.shape, dtype=one.dtype, device="cuda"))
            for key, one in [*module.named_parameters(recurse=False)]:
                setattr(module, key, torch.nn.Parameter(torch.empty(one.shape, device="cuda")))
        embeddings, cosines = torch.empty(4, 16, device="cuda"), torch.empty(4, 300, device="cuda")
        labels = torch.empty(4, device="cuda", dtype=torch.long)
        rows = loss.rows(scores_of(cosines, embeddings), labels, statistics=True)
        assert {row.device.type for row in (rows.loss, *loss.statistics(rows))} == {"cuda"}


@pytest.mark.parametrize(
    ("code", "loaded", "absent"),
    [
        ("import speechbrain_qmargin", set(), {"torch", "numpy"}),
        pytest.param(
            "from speechbrain_qmargin import QMarginLoss, QMarginHead, RowSparseSGD, q_margin_loss",
            {"torch"},
            {"speechbrain", "scipy", "sklearn", "matplotlib", "torchaudio", "soundfile"},
            marks=pytest.mark.slow,
        ),
        ("import speechbrain_qmargin.scoring.metrics", {"numpy"}, {"torch", "speechbrain"}),
    ],
)
def test_an_import_costs_what_it_needs(code, loaded, absent):
    code = f"{code}; import sys; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded <= set(answer.stdout.split()), answer.stderr
    assert not absent & set(answer.stdout.split())


def test_every_public_name_is_there():
    for name in speechbrain_qmargin.__all__:
        assert getattr(speechbrain_qmargin, name) is not None
    assert set(speechbrain_qmargin.__all__) <= set(dir(speechbrain_qmargin))
    with pytest.raises(AttributeError, match="no attribute 'QMarginLos'"):
        speechbrain_qmargin.QMarginLos  # noqa: B018


@pytest.mark.parametrize(
    ("name", "margin"),
    [("arcface", 0.5), ("cosface", 0.5), ("entmax", 0), ("sparsemax", 0), ("qmargin_face", 0.247)],
)
def test_large_margins_of_fine_tuning(name, margin):
    loss = make_loss(name, margin="large")
    assert loss.value("margin") == pytest.approx(margin, abs=1e-3)
    with pytest.raises(ValueError, match="'huge'; give a number or large"):
        make_loss(name, margin="huge")
    assert QMarginLoss().large_margin() == pytest.approx(0.301, abs=1e-3)
    assert QMarginLoss(margin=0.35).large_margin() == 0.35  # of a training that had a larger


def test_a_margin_that_no_cosines_reach_is_said(caplog):
    make_loss("qmargin", margin=0.5)
    assert "is 2.44, more than two cosines can differ by" in caplog.text
    with pytest.raises(ValueError, match=r"it is 0\.2 or more"):
        margin_for(1.5, 10, 0.1)
    with pytest.raises(ValueError, match="never vanishes"):
        margin_for(1.0, 10, 0.5)


@pytest.mark.parametrize("value", [None, "much", torch.ones(2)])
def test_a_setting_that_is_no_number_is_named(value):
    """`margin:` with nothing behind it is None in a YAML."""
    for make in (QMarginLoss, ArcFaceLoss, CosFaceLoss):
        with pytest.raises(ValueError, match=f"{make.__name__}: margin must be a number, got"):
            make(margin=value)
    loss = QMarginLoss()
    for name, wrong in (("margin", value), ("alpha", 0.5)):
        with pytest.raises(ValueError, match=f"{name} must be a"):
            loss.set(scale=20.0, **{name: wrong})
        assert loss.values() == QMarginLoss().values()  # all or none
    with pytest.raises(ValueError, match="loss: None is no name"):
        make_loss(None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_setting_that_is_not_finite_is_named(name, value):
    """Whatever a loss checks itself: `temperature: .nan` would make every loss NaN."""
    for setting in LOSSES[name].settings:
        with pytest.raises(ValueError, match=f"{setting} must be a (finite )?number"):
            loss_of(name).set(**{setting: value})
        if setting in ("alpha", "scale", "margin"):
            with pytest.raises(ValueError, match=f"{setting}"):
                make_loss(name, **{setting: value}, num_classes=300)


def test_what_is_no_tensor_is_named():
    cosines, labels = torch.tensor([[0.5, 0.2]]), torch.tensor([0])
    for arguments, name, kind in (
        ((cosines, [0]), "targets", "list"),
        ((cosines.numpy(), labels), "cosines", "ndarray"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got {kind}"):
            q_margin_loss(*arguments)
    with pytest.raises(TypeError, match="log_q must be a tensor, got list"):
        q_margin_loss(cosines, labels, log_q=[0.0, 0.0])
    operators = (
        alpha_softargmax,
        partial(solve_tau, alpha=1.5),
        partial(f_softargmax, divergence="kl"),
    )
    for operator in operators:
        with pytest.raises(TypeError, match="logits must be a tensor, got list"):
            operator([1.0, 2.0])
        with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
            operator(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="embeddings must be a tensor, got ndarray"):
        QMarginHead(2, 3)(cosines.numpy(), labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "qmargin_auto"])
def test_what_a_loss_keeps_stays_in_its_precision_where_the_module_is_cast(name, dtype):
    def made():
        loss = make_loss(name, num_classes=4, embedding_dim=8)
        loss.count_classes([1, 2, 3, 40], 8)
        return loss

    kept, cast = made(), made().to(dtype)
    found = {key: buffer.dtype for key, buffer in cast.named_buffers()}
    assert found == {key: buffer.dtype for key, buffer in kept.named_buffers()}
    for loss in (kept, cast):
        torch.manual_seed(0)
        scores = scores_of(torch.rand(6, 4).to(dtype), embeddings=torch.randn(6, 8).to(dtype))
        loss(scores, torch.tensor([0, 1, 2, 3, 3, 3]))
    for key, buffer in cast.named_buffers():
        assert torch.equal(buffer, dict(kept.named_buffers())[key]), key
