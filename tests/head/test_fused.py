"""The GPU's step, its kernels in Triton's interpreter, against the definition in float64."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from brute_force import brute_force
from launches import FEW_CLASSES as SIZES
from launches import Counted, interpreted

from speechbrain_qmargin.head import QMarginHead, RowSparseSGD, fused
from speechbrain_qmargin.head.kernel_search import Asked, Room
from speechbrain_qmargin.head.sizes import Sizes, constants
from speechbrain_qmargin.loss.device import control_flow
from speechbrain_qmargin.loss.interface import Objective

kernels = pytest.importorskip("speechbrain_qmargin.head.kernels", exc_type=ImportError)
solve_kernels = pytest.importorskip("speechbrain_qmargin.head.solve_kernels", exc_type=ImportError)
row_kernels = pytest.importorskip("speechbrain_qmargin.head.row_kernels", exc_type=ImportError)
loss_kernels = pytest.importorskip("speechbrain_qmargin.loss.kernels", exc_type=ImportError)

EPS = 2.0**-23


@pytest.fixture(autouse=True)
def on_the_device(device, request):
    """On a CPU in the interpreter; with ``--device cuda`` compiled, and tensors are made there.

    Without TF32, which importing SpeechBrain turns on: the torch path is as exact as it is told.
    """
    interprets = device.type == "cpu" and "compile" not in request.node.name
    if interprets and torch.__version__.startswith("2.7"):
        pytest.skip("the interpreter of its Triton, 3.3, knows no int1; its compiler does")
    kind = interpreted() if device.type == "cpu" else nullcontext()
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with kind, control_flow(host=False), device:
        yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture
def only_fused(monkeypatch):
    """The torch path would hide what the kernels miss."""
    from speechbrain_qmargin.head import classifier

    monkeypatch.setattr(classifier.HeadLoss, "apply", None)


def problem(classes, dim, batch, noise=0.3, seed=0, **options):
    """A head, embeddings and labels, the same on every device."""
    torch.manual_seed(seed)
    device, sizes = torch.get_default_device(), options.pop("sizes", SIZES)
    with torch.device("cpu"):
        head = QMarginHead(dim, classes, sparse_grad=True, sizes=sizes, **options)
        with torch.no_grad():
            head.weight.mul_(torch.rand(classes, 1) * 3 + 0.1)
        labels = torch.randint(classes, (batch,))
        x = F.normalize(head.weight.detach()[labels], dim=1) + noise * torch.randn(batch, dim)
    return head.to(device), x.to(device).requires_grad_(), labels.to(device)


def evaluated(head, x, labels, alpha, scale, margin, log_q=None):
    """Losses, supports, and the gradients of their sum."""
    head.weight.grad, x.grad = None, None
    rows = head.train()(x)._rows(
        labels,
        lambda flat: fused_objective(flat, alpha, scale, margin, log_q),
    )
    rows.loss.sum().backward()
    return rows, x.grad, head.weight.grad


def fused_objective(labels, alpha, scale, margin, log_q):
    from speechbrain_qmargin.loss.functional import q_margin_objective

    return q_margin_objective(labels, alpha, scale, margin, log_q)


def check(head, x, labels, alpha, scale, margin, log_q=None):
    rows, grad_x, grad_w = evaluated(head, x, labels, alpha, scale, margin, log_q)
    whole = x.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    cosines = F.normalize(whole, dim=1) @ F.normalize(weight, dim=1).T
    own = torch.arange(len(labels)), labels
    prior = torch.zeros(cosines.shape, dtype=torch.float64)
    prior = prior if log_q is None else prior + log_q
    prior[own] -= scale * torch.as_tensor(margin, dtype=torch.float64)
    p, wanted = brute_force(scale * cosines.detach(), prior, labels, alpha)
    support = (p > 0).sum(1)
    p[own] -= 1
    cosines.backward(p * scale)
    torch.testing.assert_close(rows.loss.double(), wanted, rtol=1e-6, atol=1e-6)
    assert (rows.support - support).abs().max() <= 1  # a posterior at rounding level
    rounding = 16 * EPS * scale
    shortest = float(head.weight.detach().norm(dim=1).min())
    for found, exact, short in (
        (grad_x, whole.grad, float(x.detach().norm(dim=1).min())),
        (grad_w.to_dense(), weight.grad, shortest),
    ):
        error = float((found.double() - exact).norm())
        assert error <= 1e-5 * float(exact.norm()) + rounding / short
    return grad_w


FAMILY = [
    (1.1, 40.0, 0.2),
    (1.25, 32.0, 0.2),
    (1.5, 10.0, 0.2),
    (1.75, 5.0, 0.1),
    (2.0, 5.0, 0.0),
    (3.0, 4.0, 0.1),
]


@pytest.mark.parametrize(("alpha", "scale", "margin"), FAMILY)
def test_loss_support_and_gradients_are_exact(alpha, scale, margin, only_fused):
    check(*problem(150, 24, 2), alpha, scale, margin)


def test_a_margin_for_each_sample_and_a_prior_for_each_class(only_fused):
    head, x, labels = problem(100, 12, 2)
    log_q = 6 * torch.rand(100, dtype=torch.float64) - 3
    margin = 0.5 * torch.rand(2, dtype=torch.float64)
    check(head, x, labels, 1.5, 10.0, margin, log_q)


def test_ties_share_the_posterior(only_fused):
    head, x, labels = problem(120, 16, 2)
    with torch.no_grad():
        head.weight[40:80] = head.weight[39]
    labels[0] = 39  # one of the equal ones is the target
    grad = check(head, x, labels, 1.5, 10.0, 0.2)
    rows = grad._indices()[0]
    assert bool((rows[1:] > rows[:-1]).all())


def test_where_the_loss_is_zero_there_is_no_gradient(only_fused):
    head, x, labels = problem(50, 64, 3, noise=0.001)
    rows, grad_x, grad_w = evaluated(head, x, labels, 1.5, 10.0, 0.0)
    assert not rows.loss.any()
    assert not grad_x.any()
    assert grad_w._nnz() == 0


def test_a_room_too_small_grows_and_changes_nothing(only_fused):
    head, x, labels = problem(150, 12, 2)
    wanted = evaluated(head, x, labels, 1.25, 12.0, 0.2)
    sizes = replace(SIZES, screened=4, kept=2)
    small, *_ = problem(150, 12, 2, sizes=sizes)
    small.load_state_dict(head.state_dict())
    found = evaluated(small, x.detach().clone().requires_grad_(), labels, 1.25, 12.0, 0.2)
    assert small._room.kept >= wanted[0].support.max() > 2
    for a, b in zip((*wanted[0], *wanted[1:]), (*found[0], *found[1:]), strict=True):
        assert torch.equal(a.to_dense(), b.to_dense())  # to the last bit


def test_tensors_whose_elements_are_apart(only_fused):
    """The gradient of a sum is one number, expanded; labels may be a column of several."""
    head, x, labels = problem(60, 8, 3)
    log_q = torch.rand(60, dtype=torch.float64)

    def step_of(x, labels, log_q, factor):
        head.weight.grad, x = None, x.detach().requires_grad_()

        def move(cosines):
            return cosines - 0.2 if factor is None else factor * (cosines - 0.2)

        objective = Objective(12.0, 1.5, move_target=move, log_q=log_q)
        rows = head.train()(x).evaluate(labels, objective)
        rows.loss.sum().backward()
        return rows.loss, x.grad, head.weight.grad.to_dense()

    def apart(tensor):
        return torch.stack((tensor, torch.zeros_like(tensor)), -1)[..., 0]

    wanted = step_of(x, labels, log_q, torch.ones(3, dtype=torch.float64))
    found = step_of(apart(x), apart(labels), apart(log_q), None)
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)


def test_few_classes_are_no_reason_for_the_torch_path(only_fused):
    """As a speaker verifier has them, below what ``search`` screens."""
    few = replace(SIZES, screen_from=constants(torch.device("cuda")).screen_from)
    head, x, labels = problem(90, 12, 2, sizes=few)
    check(head, x, labels, 1.25, 32.0, 0.2)
    assert not head.prototypes().are_screened


@pytest.mark.slow
def test_a_batch_whose_classes_do_not_fit_is_halved(only_fused, monkeypatch):
    """Each loss is the same to the last bit, and what is remembered decides nothing."""
    head, x, labels = problem(150, 12, 5)
    margins = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    objective = Objective(scale=12.0, alpha=1.25, move_target=lambda cosines: cosines - margins)

    def step_of(head, x):
        head.weight.grad = x.grad = None
        rows = head.train()(x).evaluate(labels, objective)
        rows.loss.sum().backward()
        return rows.loss, rows.target_posterior, rows.support, x.grad, head.weight.grad.to_dense()

    attempts, one = [], fused._attempt

    def attempt(raw, *rest):
        step, facts = one(raw, *rest)
        attempts.append((len(raw), facts[1]))
        return step, facts

    monkeypatch.setattr(fused, "_attempt", attempt)
    wanted = step_of(head, x)
    [(_, kept)] = attempts
    # of 5 samples each has room for 0.8 times what one needs, of 3 for 1.3 times
    sizes = replace(SIZES, max_candidates=16 * kept, screened=4, kept=2)
    halved, *_ = problem(150, 12, 5, sizes=sizes)
    halved.load_state_dict(head.state_dict())
    for _ in range(2):
        attempts.clear()
        found = step_of(halved, x.detach().clone().requires_grad_())
        for a, b in zip(wanted[:3], found[:3], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(wanted[3:], found[3:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert halved._room.halvings == 1
    assert [size for size, _ in attempts] == [3, 2]  # and no vain one
    # a batch that fits is one part, though the last one did not
    near = head.weight.detach()[labels].requires_grad_()
    step_of(halved, near)
    assert halved._room.halvings == 0
    assert attempts[-1][0] == 5


def test_without_any_room_it_is_the_torch_path(caplog):
    head, x, labels = problem(40, 8, 2)
    wanted = evaluated(head, x, labels, 1.5, 0.5, 0.2)  # everything is active
    tight, *_ = problem(40, 8, 2, sizes=replace(SIZES, max_candidates=40, screened=4, kept=2))
    tight.load_state_dict(head.state_dict())
    with control_flow(host=True):
        for _ in range(2):
            found = evaluated(tight, x.detach().clone().requires_grad_(), labels, 1.5, 0.5, 0.2)
    told = [one.message for one in caplog.records if "many times slower" in one.message]
    assert len(told) == 1
    assert told[0].startswith(
        "39 classes of a sample may be active, and an eighth of a batch of 2 has room for 10"
    )
    torch.testing.assert_close(found[0].loss, wanted[0].loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[2].to_dense(), wanted[2].to_dense(), rtol=1e-4, atol=1e-6)


def products_in_eighths(samples, classes, seed=0):
    """[B, 8] and [C, 8] in bf16 whose products are exact, with many ties."""
    drawn = torch.Generator().manual_seed(seed)
    several = [
        torch.randint(-2, 3, (n, 8), generator=drawn, device="cpu") / 4 for n in (samples, classes)
    ]
    return [one.to(torch.get_default_device(), torch.bfloat16) for one in several]


def screened(embeddings, rows, labels, cuts, part, room, output_bytes, before=0):
    """The keys that ``screen`` leaves, [B, room], where there was -7, and its counts."""
    device = torch.get_default_device()
    counts = torch.full((len(labels),), before, dtype=torch.int32)
    batch = kernels.Batch._make([None] * len(kernels.Batch._fields))
    batch = batch._replace(
        raw=embeddings, rounded=embeddings, labels=labels.to(device), cuts=cuts, counts=counts
    )
    own = SimpleNamespace(
        screen=SimpleNamespace(rows=rows), sizes=replace(SIZES, output_bytes=output_bytes)
    )
    found = torch.full((len(labels), room), -7, dtype=torch.int64)
    kernels.screen(batch, own, part, found)
    return found.tolist(), counts.tolist()


def keys_of(embeddings, rows, labels, cuts, part):
    """Of each sample: class and product of what is not below its cut, without the target."""
    products = (embeddings.float() @ rows.float().T).cpu()
    bits = products.view(torch.int32).long() & 0xFFFFFFFF
    keys = (torch.arange(len(rows), device="cpu") << 32) | bits
    keep = ~(products < cuts.cpu().unsqueeze(1))
    keep[:, : part.start] = keep[:, part.stop :] = False
    for sample, label in enumerate(labels.tolist()):
        if 0 <= label < len(rows):
            keep[sample, label] = False
    return [set(one[kept].tolist()) for one, kept in zip(keys, keep, strict=True)]


@pytest.mark.parametrize("output_bytes", [1, 2**20])  # pieces of 1,024 and one of all
@pytest.mark.parametrize("part", [slice(37, 4301), slice(0, 16), slice(3, 4)])
def test_what_may_exceed_its_floor_is_found_once(part, output_bytes):
    """Ties with the cut are kept, NaN too; the target is not, nor is what is in another part."""
    embeddings, rows = products_in_eighths(6, 4400)
    rows[[3, 11, 1061, 4299]] = torch.nan
    # in the last piece; before and behind the part; in another shard; no class at all; the first
    labels = torch.tensor([4299, 36, 4301, -1, 2**32 + 40, 37], device="cpu")
    cuts = torch.tensor([1.0, 0.75, 1.25, 0.75, 1.0, torch.nan])
    wanted = keys_of(embeddings, rows, labels, cuts, part)
    found, counts = screened(embeddings, rows, labels, cuts, part, 4400, output_bytes)
    assert counts == [len(keys) for keys in wanted]
    for row, keys in zip(found, wanted, strict=True):
        assert set(row[: len(keys)]) == keys
        assert set(row[len(keys) :]) <= {-7}


def test_wherever_its_target_is_a_sample_does_not_find_it():
    """Around the ends of the lanes, of what they read at a time, and of the programs."""
    places = [0, 7, 8, 1016, 1023, 1024, 2047, 3072, 4088, 4095, 4096, 4199]
    rows = torch.zeros(4200, 8, dtype=torch.bfloat16)
    rows[places] = 1.0
    embeddings = torch.ones(len(places), 8, dtype=torch.bfloat16)
    labels, cuts = torch.tensor(places, device="cpu"), torch.full((len(places),), 8.0)
    found, counts = screened(embeddings, rows, labels, cuts, slice(0, 4200), 16, 2**20)
    assert counts == [len(places) - 1] * len(places)
    for row, place in zip(found, places, strict=True):
        assert {key >> 32 for key in row[: len(places) - 1]} == set(places) - {place}


@pytest.mark.parametrize("room", [1, 5, 40])
def test_beyond_the_room_classes_are_counted(room):
    """What was there stays, and no sample writes into the next one's room."""
    embeddings, rows = products_in_eighths(3, 1500, seed=1)
    labels, cuts = torch.tensor([5, -1, 1499], device="cpu"), torch.tensor([0.5, 9.0, 0.25])
    wanted = keys_of(embeddings, rows, labels, cuts, slice(0, 1500))
    assert len(wanted[0]) > 40
    assert not wanted[1]
    found, counts = screened(embeddings, rows, labels, cuts, slice(0, 1500), room, 1, before=2)
    assert counts == [2 + len(keys) for keys in wanted]
    for row, keys in zip(found, wanted, strict=True):
        assert set(row[:2]) == {-7}
        assert len(set(row[2:]) & keys) == (max(0, room - 2) if keys else 0)


def test_the_order_in_which_classes_are_found_does_not_matter():
    """On a GPU it changes from run to run; levels and what is kept do not, to the last bit."""
    head, x, labels = problem(300, 12, 2)
    own, raw = head.prototypes(), x.detach()
    prior = torch.full((2,), -2.0, dtype=torch.float64)
    outcomes = []
    for shuffled in (False, True):
        batch = kernels.prepare(raw, labels, prior, None, 1.25, 12.0, own)
        kernels.sample_floors(batch, kernels.sample_scores(batch, own, 7), 7)
        found = torch.empty(2, 512, dtype=torch.int64)
        kept = torch.empty(2, 256, dtype=torch.int32)
        kernels.screen(batch, own, slice(0, 300), found)
        for row, count in enumerate(batch.counts.tolist() if shuffled else ()):
            found[row, :count] = found[row, :count].flip(0)
        kernels.raise_floors(batch, found, kept)
        outcomes.append((batch.levels, kept.sort(1).values, batch.counts))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


def test_the_bound_of_the_screen_loses_no_class():
    """The kept classes contain all above the edge of tau, which their levels are below."""
    head, x, labels = problem(200, 33, 2, noise=0.2)
    objective = fused_objective(labels, 1.25, 16.0, 0.2, None)
    step, _ = fused._attempt(x.detach(), labels, objective, head.prototypes(), Asked(512, 256))
    cosines = F.normalize(x.detach().double()) @ F.normalize(head.weight.detach().double()).T
    prior = torch.zeros_like(cosines)
    own = torch.arange(2), labels
    prior[own] = -16.0 * 0.2
    p, _ = brute_force(16.0 * cosines, prior, labels, 1.25)
    for sample in range(2):
        entries = set(step.solved.entries[sample].tolist())
        active = set((p[sample] > 1e-14).nonzero().squeeze(1).tolist())
        assert active <= entries | {int(labels[sample])}


def test_bad_labels_and_embeddings_that_are_not_finite(only_fused):
    head, x, labels = problem(30, 8, 3)
    with pytest.raises(ValueError, match=r"target label 30 is outside \[0, 30\)"):
        head(x, torch.tensor([0, 1, 30]))
    with torch.no_grad():
        x[1, 2] = torch.nan
    rows, grad_x, grad_w = evaluated(head, x, labels, 1.5, 10.0, 0.2)
    assert rows.loss.isnan().all()
    assert not grad_x.any()
    assert not grad_w.to_dense().any()


def test_a_prototype_that_is_no_number_is_not_passed_over(only_fused):
    head, x, labels = problem(60, 8, 2)
    with torch.no_grad():
        head.weight[50] = torch.nan
    with control_flow(kernels=True):  # of what is derived too
        found = fused.evaluate(
            x.detach(), labels, fused_objective(labels, 1.5, 10.0, 0.2, None), head.prototypes(),
            Room(),
        )  # fmt: skip
    assert found is None  # the torch path says what it is


def test_launches_and_waits_do_not_grow_with_the_classes(only_fused):
    """Forward and backward: at most 25 launches and one wait; three for each eightfold of classes.

    And two for each piece of products beyond the first; here there is only one.
    """
    found = []
    for classes in (400, 700, 3000):
        head, x, labels = problem(classes, 8, 2, noise=0.1, alpha=1.25, scale=32.0, margin=0.2)
        head.prototypes()
        kernels.numbers(1.25, 32.0, x.device)  # which are brought to the device once
        fused.ones(2, x.device)
        with Counted((*kernels.KERNELS, *solve_kernels.KERNELS)) as counted:
            head(x, labels).backward()
        assert counted.launches <= 25 + 3 * (classes == 3000), counted.names
        # the report is the one tensor whose values the host reads
        assert counted.names.count("_report") + counted.waits == 1
        found.append(counted.names)
    assert found[0] == found[1]
    assert sorted(found[2]) == sorted([*found[1], "mm", "_filter", "_raise_floors"])
    # 1,000,000 classes are two parts, as 400 are here, each one piece where a batch has 128 samples
    own = constants(torch.device("cuda"))
    parts, most = own.parts_of(1_000_000), own.rows_of_products(128)
    assert len(parts) == len(SIZES.parts_of(400)) == 2
    assert max(part.stop - part.start for part in parts) <= most


def test_memory_beyond_weights_at_2_million_classes(only_fused):
    """What a step allocates, counted at a small size, is what the formula says of a large one."""
    head, x, labels = problem(300, 8, 2, alpha=1.25, scale=12.0, margin=0.2)
    head.prototypes()
    with Counted((*kernels.KERNELS, *solve_kernels.KERNELS)) as counted:
        head(x, labels).backward()
    rows = head.weight.grad._nnz()
    sample = 38  # of 300 classes, every 8th
    products = 304  # all are one part, in rows of a multiple of 16
    formula = fused.bytes_of_a_step(2, 8, sample, products, SIZES.screened, SIZES.kept)
    formula += rows * 8 * 4
    assert 0.4 * formula < counted.peak <= formula
    own = constants(torch.device("cuda"))
    products = own.rows_of_products(1024)
    for screened in (own.screened, Asked.most(1024, own).screened):  # at first, and grown
        step = fused.bytes_of_a_step(1024, 512, own.sample, products, screened, own.kept)
        assert step <= 300e6


def test_a_training_is_that_of_the_torch_path():
    """With the optimiser of rows, whose bf16 copy follows; both ways from the same start."""
    weights = []
    for sizes in (SIZES, Sizes()):
        head, x, labels = problem(80, 8, 2, sizes=sizes, alpha=1.5, scale=10.0, margin=0.2)
        optimizer = RowSparseSGD(head.parameters(), lr=0.1, momentum=0.9, head=head)
        for step in range(3):
            optimizer.zero_grad()
            head(x.detach() + 0.1 * step, labels).backward()
            optimizer.step()
        weights.append(head.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_kernels_compile_for_a_gpu():
    """For an H100, without one: the interpreter takes programs that the compiler refuses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "compiled_kernels.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    every = (*kernels.KERNELS, *solve_kernels.KERNELS, *row_kernels.KERNELS)
    every += loss_kernels.KERNELS
    assert done.stdout.split() == [kernel.fn.__name__ for kernel in every]
