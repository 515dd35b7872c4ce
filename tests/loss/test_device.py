"""The GPU's flow of control, on a CPU: the same results, few steps, and no look at a value."""

import math
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from examples import some
from hypothesis import example, given, settings
from launches import Counted
from scripts import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from speechbrain_qmargin.head.classifier import QMarginHead
from speechbrain_qmargin.loss.dense import DenseScores, check_labels
from speechbrain_qmargin.loss.device import (
    asked_for,
    assert_on_device,
    control_flow,
    usable_device,
)
from speechbrain_qmargin.loss.functional import q_margin_loss, solve_tau
from speechbrain_qmargin.loss.solver import (
    FEW_STEPS,
    Block,
    Measure,
    single_class_level,
    solve,
)

DOUBLE = torch.float64
# (alpha, scale, margin): the published settings, the ends of the family, and scales at which
# nearly all classes are active
FAMILY = [
    (1.0, 32, 0.2),
    (1.05, 32, 0.2),
    (1.25, 32, 0.2),
    (1.25, 2, 0.2),
    (1.5, 10, 0.2),
    (1.5, 64, 0.3),
    (1.75, 5, 0.2),
    (2.0, 5, 0.2),
    (2.0, 0.5, 0.0),
    (2.5, 4, 0.2),
]


def batch(classes, rows=8, dim=64, noise=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(classes)
    prototypes = F.normalize(torch.randn(classes, dim, generator=generator, dtype=dtype), dim=1)
    targets = torch.randint(classes, (rows,), generator=generator)
    embeddings = torch.randn(rows, dim, generator=generator, dtype=dtype)
    if noise is not None:
        embeddings = prototypes[targets] + noise * embeddings
    return F.normalize(embeddings, dim=1) @ prototypes.T, targets


def loss_and_gradient(cosines, targets, *arguments, **options):
    cosines = cosines.clone().requires_grad_()
    loss = q_margin_loss(cosines, targets, *arguments, reduction="none", **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), cosines)


@pytest.mark.parametrize(("alpha", "scale", "margin"), FAMILY)
@pytest.mark.parametrize("noise", [0.05, None])
def test_a_few_steps_are_enough(alpha, scale, margin, noise):
    for classes in (7, 300, 5994) if alpha <= 2 else (300,):
        cosines, targets = batch(classes, noise=noise)
        expected = loss_and_gradient(cosines, targets, alpha, scale, margin)
        with control_flow(host=False), Counted() as counted:
            got = loss_and_gradient(cosines, targets, alpha, scale, margin)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1] / scale, expected[1] / scale, rtol=0, atol=1e-6)
        assert counted.waits == 0
        assert counted.launches < (900 if alpha <= 2 else 8000)


def test_margins_of_samples_and_priors_of_classes_make_nobody_wait():
    cosines, targets = batch(3000)
    generator = torch.Generator().manual_seed(0)
    margin = torch.rand(8, generator=generator)
    log_q = torch.randn(3000, generator=generator)
    expected = loss_and_gradient(cosines, targets, 1.5, 10.0, margin, log_q=log_q)
    with control_flow(host=False), Counted() as counted:
        got = loss_and_gradient(cosines, targets, 1.5, 10.0, margin, log_q=log_q)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert counted.waits == 0
    with control_flow(host=False), pytest.raises(RuntimeError, match="takes float64 cosines"):
        q_margin_loss(cosines, targets, log_q=log_q * 200)


def test_every_message_has_room_on_a_gpu(monkeypatch):
    """CUDA takes 254 bytes of one; a longer one fails every loss there."""
    said, ask = set(), torch._assert_async

    def spy(condition, message):
        said.add(message)
        return ask(condition, message)

    monkeypatch.setattr(torch, "_assert_async", spy)
    cosines, targets = batch(300)
    many = 9_999_999_999
    with control_flow(host=False):
        check_labels(targets, many)
        with FakeTensorMode():
            DenseScores(torch.empty(2, many))
        q_margin_loss(cosines, targets, 1.5, 10.0, log_q=torch.zeros(300))
        head = QMarginHead(8, 300)
        head(torch.ones(1, 8)).q_margin_loss(torch.zeros(1, dtype=torch.long), 1.5, 10.0, 0.2)
    assert len(said) == 8  # two of them for two numbers of classes
    assert max(len(message.encode()) for message in said) < 255
    callers = [
        file.name
        for file in (ROOT / "speechbrain_qmargin").rglob("*.py")
        if "_assert_async" in file.read_text(encoding="utf-8")
    ]
    assert callers == ["device.py"]
    with pytest.raises(ValueError, match="has 255 bytes and may have 254"):
        assert_on_device(torch.tensor(True), "x" * 255)
    assert_on_device(torch.tensor(True), "x" * 254)


def test_what_the_host_asks_for_is_waited_for_where_it_is_read(monkeypatch):
    """What a GPU is given in between goes on."""
    done = []
    event = SimpleNamespace(synchronize=lambda: done.append("waited for"))
    stream = SimpleNamespace(record_event=lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with FakeTensorMode():
        found = asked_for(torch.empty(2, device="cuda"))
        done.append("given more")
        assert found().device.type == "cpu"
    assert done == ["given more", "waited for"]


@pytest.mark.parametrize("name", ["cuda:77", "gpu", "cuda:x"])
def test_a_device_that_is_not_here_is_named(name):
    with pytest.raises(ValueError, match=f"device: {name} cannot be used here .*; cpu can"):
        usable_device(name)


cosine = st.one_of(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), st.floats(-1, 1, width=32))


@settings(max_examples=some(60), deadline=None)
@example([0.1], 0, 1.75, 64.0, 0.5)
@given(
    st.lists(cosine, min_size=1, max_size=12),
    st.integers(0, 11),
    st.sampled_from([1.0, 1.0001, 1.05, 1.25, 1.5, 1.75, 2.0]),
    st.sampled_from([1.0, 5.0, 10.0, 32.0, 64.0]),
    st.sampled_from([0.0, 0.2, 0.5]),
)
def test_any_row(row, label, alpha, scale, margin):
    cosines = torch.tensor([row], dtype=DOUBLE)
    target = torch.tensor([label % len(row)])
    expected = loss_and_gradient(cosines, target, alpha, scale, margin)
    with control_flow(host=False):
        got = loss_and_gradient(cosines, target, alpha, scale, margin)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("q", [1e-12, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.5, 1.75, 2.0])
def test_float64_from_the_level_of_float32_takes_five_evaluations(alpha, q):
    """Less its rounding the level of float32 is a lower bound, next to the root."""
    scale = {1.05: 32, 1.25: 32, 1.5: 10, 1.75: 5, 2.0: 5}[alpha]
    cosines, targets = batch(2000, dtype=DOUBLE, noise=0.2)
    target = scale * cosines.gather(1, targets[:, None]).squeeze(1)
    v = (scale * (alpha - 1)) * cosines.scatter(1, targets[:, None], -math.inf)
    measure = Measure(alpha, torch.full((8,), math.log(q), dtype=DOUBLE))
    peak = v.amax(1) / (alpha - 1)
    spread, evaluations = abs(math.log(q)), 0

    def level(dtype, lower, **options):
        block = Block(v.to(dtype), alpha)

        def sums(at):
            nonlocal evaluations
            evaluations += 1
            return block.sums(at)

        return solve(sums, target, measure, lower, peak.to(dtype), 2000, spread, **options)

    cold = single_class_level(peak, alpha)
    rounded = level(torch.float32, cold)
    expected = level(DOUBLE, cold)
    slack = 2**-20 * (scale + 1 + rounded.abs())
    assert ((expected - rounded).abs() < slack).all()
    evaluations = 0
    with control_flow(host=False):
        warm = level(DOUBLE, rounded - slack, few=5)
    assert evaluations == 5
    torch.testing.assert_close(warm, expected, rtol=1e-14, atol=1e-14)


def test_logits_that_need_more_steps_are_not_let_through():
    """Each step is made to drop a share of the classes just past it: the worst of the proof."""
    count, gap, at, levels = 5994, 1.0, 0.0, []
    while count > 2:
        dropped = min(max(1, round(count * 0.36)), count - 2)
        levels += [at] * dropped
        step = gap / count
        count, gap, at = count - dropped, gap - step * (count - dropped), at + step
    levels = torch.tensor(levels, dtype=DOUBLE) / (2 * at + gap)
    v = torch.cat([torch.zeros(2, dtype=DOUBLE), levels + 1e-9 - 1])[None]
    far = torch.tensor([-9.0], dtype=DOUBLE)
    arguments = Measure(2.0, torch.zeros(1, dtype=DOUBLE)), far + 8, v.amax(1), 5994, 0.0
    sums = Block(v, 2.0).sums
    expected = solve(sums, far, *arguments)
    with control_flow(host=False):
        torch.testing.assert_close(solve(sums, far, *arguments), expected, rtol=0, atol=1e-14)
        with pytest.raises(RuntimeError, match=f"in {FEW_STEPS} steps.*QMARGIN_STEPS=all"):
            solve(sums, far, *arguments, few=FEW_STEPS)
        bound = solve(sums, far, *arguments, few=FEW_STEPS, exact=False)
    assert bound < expected
    torch.testing.assert_close(expected + 1, solve_tau(v, 2.0), rtol=0, atol=1e-14)
