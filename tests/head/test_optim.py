"""Row-sparse optimisers against torch's on the same gradients, made dense."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from examples import some
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import Counted
from row_owner import Rows

from speechbrain_qmargin.head import PartialHead, QMarginHead, RowSparseAdam, RowSparseSGD, optim
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.device import control_flow


def parameter(start):
    return torch.nn.Parameter(start.clone())


def as_seen(grad, optimizer, rows):
    """A gradient [C, D] in proportion to 1 / length, at the length that a row is seen with."""
    state = optimizer.state.get(rows, {})
    if "idle" not in state or isinstance(optimizer, RowSparseAdam):
        return grad
    ww, wb = state["idle"][state["idle_since"].long(), :2].T
    return grad * torch.where(wb == 0, ww, 1).to(grad).unsqueeze(1)


def compare(kind, dense_kind, options, dense_at, save_at, write_at, max_idle, seed, steps=50):
    """Fifty steps of one kind of optimiser on rows, of the other on the same gradients, dense."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(20, 3, generator=generator)
    rows, dense = parameter(start), parameter(start)
    mine, theirs = kind([rows], **options, head=Rows(rows)), dense_kind([dense], **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "_MAX_IDLE", max_idle)
        patch.setattr(optim, "_ROWS_AT_ONCE", 4)
        for step in range(steps):
            chosen = torch.randint(20, (3,), generator=generator)  # some twice: not coalesced
            values = torch.randn(3, 3, generator=generator)
            dense.grad = torch.zeros(20, 3).index_add_(0, chosen, values)
            rows.grad = as_seen(dense.grad, mine, rows)
            if step != dense_at:
                values = as_seen(torch.ones(20, 3), mine, rows)[chosen] * values
                rows.grad = torch.sparse_coo_tensor(
                    chosen[None], values, (20, 3), check_invariants=True
                )
            for optimizer in (mine, theirs):
                optimizer.param_groups[0]["lr"] = options["lr"] * 2 / (1 + step)
                optimizer.step()
            assert len(mine.state[rows]["idle"]) <= max_idle
            if step == save_at:  # a resumed run
                state = mine.state_dict()
                rows = parameter(rows.detach())
                mine = kind([rows], **options, head=Rows(rows))
                mine.load_state_dict(state)
            if step == write_at:  # what was pending is void from here on
                mine.catch_up()
                with torch.no_grad():
                    for weight in (rows, dense):
                        weight.copy_(start)
        mine.catch_up()
    dense_kind([parameter(start)], **options).load_state_dict(mine.state_dict())
    torch.testing.assert_close(rows, dense, rtol=1e-5, atol=1e-5)


EVENTS = dict(
    dense_at=st.integers(0, 60),
    save_at=st.integers(0, 60),
    write_at=st.integers(0, 60),
    max_idle=st.sampled_from([4096, 7]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=some(15), deadline=None)
@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    decay=st.sampled_from([0.0, 1e-4, 0.1]),
    nesterov=st.booleans(),
    **EVENTS,
)
def test_equals_dense_sgd(momentum, decay, nesterov, **events):
    nesterov = nesterov and momentum > 0
    options = dict(lr=0.1, momentum=momentum, weight_decay=decay, nesterov=nesterov)
    compare(RowSparseSGD, torch.optim.SGD, options, **events)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("phases", [(0.9, 0.0, 0.5), (0.0, 0.9, 0.0)])
def test_momentum_that_is_set_to_0_and_back_is_that_of_torchs_sgd(phases, nesterov):
    """Which keeps the rows' momentum as it is meanwhile."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 3, generator=generator).double()
    rows, dense = parameter(start), parameter(start)
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.02, nesterov=nesterov)
    mine = RowSparseSGD([rows], **options, head=Rows(rows))
    theirs = torch.optim.SGD([dense], **options)
    for step in range(45):
        chosen = torch.randperm(12, generator=generator)[:2].sort().values
        values = torch.randn(2, 3, generator=generator).double()
        for optimizer in (mine, theirs):
            optimizer.param_groups[0]["momentum"] = phases[step // 15]
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        dense.grad = torch.zeros_like(dense).index_add_(0, chosen, values)
        values = as_seen(torch.ones_like(rows), mine, rows)[chosen] * values
        rows.grad = torch.sparse_coo_tensor(chosen[None], values, rows.shape, check_invariants=True)
        mine.step()
        theirs.step()
    mine.catch_up()
    torch.testing.assert_close(rows, dense, rtol=1e-12, atol=1e-12)
    found, wanted = (one.state[p]["momentum_buffer"] for one, p in ((mine, rows), (theirs, dense)))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@settings(max_examples=some(15), deadline=None)
@given(
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.5)]),
    decay=st.sampled_from([0.0, 0.01]),
    eps=st.sampled_from([1e-8, 1e-30]),
    **EVENTS,
)
def test_equals_dense_adam(betas, decay, eps, **events):
    """Gradients are far above epsilon, where an idle step's share of it does not count."""
    options = dict(lr=0.1, betas=betas, weight_decay=decay, eps=eps)
    dense = torch.optim.AdamW if decay else torch.optim.Adam
    compare(RowSparseAdam, dense, options, **events)


@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_adam_with_an_epsilon_that_counts(eps):
    """A step of idle rows as the docstring has it, written out naively in float64."""
    torch.manual_seed(0)
    options = dict(lr=0.1, betas=(0.8, 0.9), weight_decay=0.05, eps=eps)
    rows = parameter(torch.randn(1, 4))
    mine = RowSparseAdam([rows], **options, head=Rows(rows))
    w, m, v = rows.detach().double(), torch.zeros(1, 4).double(), torch.zeros(1, 4).double()
    for step in range(1, 21):
        d = torch.randn(1, 4) if step in (1, 4, 20) else None
        indices = torch.zeros(1, 0 if d is None else 1, dtype=torch.long)
        values = torch.zeros(0, 4) if d is None else d
        rows.grad = torch.sparse_coo_tensor(indices, values, (1, 4), check_invariants=True)
        mine.step()
        c1, c2 = 1 - 0.8**step, 1 - 0.9**step
        m, v = 0.8 * m, 0.9 * v
        if d is not None:
            m, v = m + 0.2 * d, v + 0.1 * d**2
            visited, root = v.clone(), c2**0.5
        share = visited.sqrt() / (visited.sqrt() + eps * root)
        w = w * (1 - 0.1 * 0.05) - 0.1 * (m / c1) / (v / c2).sqrt() * share
    torch.testing.assert_close(rows.detach().double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [RowSparseSGD, RowSparseAdam])
def test_a_write_drops_what_was_pending(kind):
    torch.manual_seed(0)
    rows = parameter(torch.randn(200, 3))
    options = {"momentum": 0.9} if kind is RowSparseSGD else {}
    optimizer = kind([rows], lr=0.1, **options, head=Rows(rows))

    def step(row):
        rows.grad = torch.sparse_coo_tensor(
            torch.tensor([[row]]), torch.randn(1, 3), rows.shape, check_invariants=True
        )
        optimizer.step()

    for row in range(100):
        step(row)
    best = torch.randn(200, 3)
    for write in (lambda: rows.detach().copy_(best), lambda: rows.data.copy_(best)):
        step(0)
        write()
        step(199)
        assert torch.equal(rows[:199], best[:199])
        optimizer.catch_up()
    if kind is RowSparseSGD:  # the momentum is what 100 idle steps have left of it
        state = optimizer.state[rows]["momentum_buffer"]
        assert state[1].norm() < 1e-2


def test_saving_changes_nothing():
    """A checkpoint in the middle, and a run from it: bit for bit the run without."""

    def train(steps, save_at=None):
        torch.manual_seed(0)
        head = QMarginHead(8, 300)
        optimizer = RowSparseSGD(head.parameters(), lr=0.3, momentum=0.9, head=head)
        losses = []
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = head(torch.randn(4, 8), torch.randint(300, (4,)))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step == save_at:
                states = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
                head = QMarginHead(8, 300)
                optimizer = RowSparseSGD(head.parameters(), lr=0.3, momentum=0.9, head=head)
                optimizer.load_state_dict(states[1])
                head.load_state_dict(states[0])
        return losses

    assert train(30) == train(30, save_at=14)


@pytest.mark.parametrize("kind", [RowSparseSGD, RowSparseAdam])
def test_a_closure_has_gradients_and_its_loss_is_the_steps(kind):
    head, other = (QMarginHead(6, 40, 2.0, 5.0, 0.2, seed=0) for _ in range(2))
    x, labels = torch.randn(5, 6), torch.arange(5)
    optimizers = [kind(one.parameters(), lr=0.1, head=one) for one in (head, other)]
    loss = other(x, labels)
    loss.backward()
    optimizers[1].step()

    def closure():
        found = head(x, labels)
        found.backward()
        return found

    assert optimizers[0].step(closure) == loss
    assert torch.equal(head.weight, other.weight)


def test_a_step_warns_of_nothing():
    """torch 2.11 warned once a process that the invariants of the gradient are not checked."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            head = QMarginHead(4, 20)
            optimizer = RowSparseSGD(head.parameters(), 0.1, momentum=0.9, head=head)
            head(torch.randn(2, 4)).q_margin_loss(torch.tensor([3, 7]), 2.0, 5.0, 0.2).backward()
            grad = head.weight.grad
            assert grad.is_sparse
            assert grad.shape == (20, 4)
            assert grad.dense_dim() == 1
            optimizer.step()
    finally:
        torch.set_warn_always(always)


def test_unbound_optimisers_raise():
    head, other = QMarginHead(8, 30), QMarginHead(8, 30, sparse_grad=True)
    with pytest.raises(TypeError, match="head"):
        RowSparseSGD(head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="not among the parameters"):
        RowSparseSGD(other.parameters(), lr=0.1, head=head)
    optimizer = RowSparseSGD(head.parameters(), lr=0.1, head=head)
    optimizer.add_param_group({"params": other.parameters()})
    x, labels = torch.randn(4, 8), torch.arange(4)
    (head(x, labels) + other(x, labels)).backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.bind\(head\)"):
        optimizer.step()
    optimizer.bind(other)
    optimizer.step()
    head.load_state_dict(QMarginHead(8, 30).state_dict(), assign=True)
    head(x, labels).backward()
    with pytest.raises(RuntimeError, match="another weight"):
        optimizer.step()
    RowSparseSGD(head.parameters(), lr=0.1, head=head).step()
    second = RowSparseAdam(head.parameters(), head=head)
    second.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dense_kind"), [(RowSparseSGD, torch.optim.SGD), (RowSparseAdam, torch.optim.AdamW)]
)
def test_hooks_run_once_a_step_whatever_other_optimisers_there_are(kind, dense_kind):
    """torch wraps the step of a class when its first object is made, of the parents as well."""
    dense_kind([parameter(torch.ones(2))], lr=0.1)
    rows = parameter(torch.randn(20, 3))
    optimizer = kind([rows], lr=0.1, head=Rows(rows))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(rows.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(rows.detach().clone()))
    rows.grad = torch.ones(20, 3)
    optimizer.step()
    before, after = seen
    assert (before != after).all()


@pytest.mark.parametrize(
    ("kind", "dense_kind", "setting"),
    [
        (RowSparseSGD, torch.optim.SGD, {"maximize": True}),
        (RowSparseSGD, torch.optim.SGD, {"dampening": 0.1, "momentum": 0.9}),
        (RowSparseAdam, torch.optim.AdamW, {"maximize": True}),
        (RowSparseAdam, torch.optim.AdamW, {"amsgrad": True}),
    ],
)
def test_a_setting_that_rows_cannot_follow_is_refused(kind, dense_kind, setting):
    """Given by a group, or by the state of a dense optimiser; other groups may have it."""
    name = next(iter(setting))
    start, other = torch.randn(20, 3), parameter(torch.zeros(2))
    rows = parameter(start)
    apart = [{"params": [rows]}, {"params": [other], **setting}]
    optimizer = kind(apart, lr=0.1, head=Rows(rows))
    rows.grad, other.grad = torch.ones(20, 3), torch.ones(2)
    optimizer.step()
    dense = parameter(start)
    loaded = kind([dense], lr=0.1, head=Rows(dense))
    loaded.load_state_dict(dense_kind([parameter(start)], lr=0.1, **setting).state_dict())
    dense.grad = torch.ones(20, 3)
    for bad in (kind([{"params": [rows], **setting}], lr=0.1, head=Rows(rows)), loaded):
        with pytest.raises(ValueError, match=f"{name}=.* of the group with the prototypes"):
            bad.step()
    assert torch.equal(dense, start)


def test_training_the_head_with_momentum_learns_as_the_dense_optimiser_does():
    """That the trajectory is the one of the docstring: test_training.py."""
    torch.manual_seed(0)
    head, twin = (QMarginHead(8, 400, sizes=Sizes(screen_from=1)) for _ in range(2))
    twin.load_state_dict(head.state_dict())
    options = dict(lr=0.02, momentum=0.9, weight_decay=1e-3)
    encoder, encoder_twin = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    encoder_twin.load_state_dict(encoder.state_dict())
    mine = RowSparseSGD([*encoder.parameters(), *head.parameters()], **options, head=head)
    theirs = torch.optim.SGD([*encoder_twin.parameters(), *twin.parameters()], **options)
    centres = torch.randn(400, 8)
    first = None
    for _ in range(150):
        labels = torch.randint(400, (32,))
        inputs = centres[labels] + 0.1 * torch.randn(32, 8)
        loss, loss_twin = head(encoder(inputs), labels), twin(encoder_twin(inputs), labels)
        for optimizer, value in ((mine, loss), (theirs, loss_twin)):
            optimizer.zero_grad()
            value.backward()
        assert head.weight.grad.is_sparse
        assert not twin.weight.grad.is_sparse
        mine.step()
        theirs.step()
        first = loss.item() if first is None else first
    assert loss.item() < 0.8 * first
    assert abs(loss.item() - loss_twin.item()) < 0.2 * loss_twin.item()


def test_without_momentum_a_training_with_weight_decay_is_that_of_dense_sgd():
    """Though an idle row is seen with its earlier length: by cosines, to rounding in float64."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(30, 4, generator=generator).double()
    rows, dense = parameter(start), parameter(start)
    mine = RowSparseSGD([rows], lr=0.5, weight_decay=0.1, head=Rows(rows))
    theirs = torch.optim.SGD([dense], lr=0.5, weight_decay=0.1)
    for step in range(60):
        chosen = torch.randperm(30, generator=generator)[:3].sort().values
        x = torch.randn(4, generator=generator).double()
        for weight, optimizer in ((rows, mine), (dense, theirs)):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 0.5 / (1 + step) ** 0.5
            unit = F.normalize(F.embedding(chosen, weight, sparse=weight is rows), dim=1)
            (unit @ x).exp().sum().backward()
            optimizer.step()
        torch.testing.assert_close(F.normalize(rows), F.normalize(dense), rtol=1e-12, atol=1e-12)
    assert (rows.norm(dim=1) > 1.1 * dense.norm(dim=1)).any()
    mine.catch_up()
    torch.testing.assert_close(rows, dense, rtol=1e-12, atol=1e-12)


def test_rows_are_refreshed():
    torch.manual_seed(0)
    head = QMarginHead(8, 3000, sizes=Sizes(screen_from=1))
    optimizer = RowSparseSGD(head.parameters(), lr=0.5, momentum=0.9, head=head)
    for _ in range(3):
        optimizer.zero_grad()
        head(torch.randn(4, 8), torch.randint(3000, (4,))).backward()
        built = head.prototypes()
        optimizer.step()
        kept = head.prototypes()
        assert kept is built  # no step rebuilds all the rows
        fresh = QMarginHead(8, 3000, sizes=Sizes(screen_from=1))
        fresh.weight.data.copy_(head.weight.data)
        torch.testing.assert_close(kept.inverse_norm, fresh.prototypes().inverse_norm)
        screen, made = kept.screen, fresh.prototypes().screen
        assert torch.equal(screen.rows, made.rows)
        assert screen.residual >= made.residual  # a bound, which may be an earlier row's
    seen = head.weight.detach().clone()
    optimizer.catch_up()
    assert not torch.equal(seen, head.weight)
    assert head.prototypes() is kept


def once(head, optimizer, losses):
    losses(0).backward()
    optimizer.step()


def accumulated(head, optimizer, losses):
    losses(0).backward()
    losses(1).backward()
    optimizer.step()


def added(head, optimizer, losses):
    (losses(0) + losses(1)).backward()
    optimizer.step()


def empty_and_accumulated(head, optimizer, losses):
    losses(0).backward()
    (0 * losses(1)).backward()
    optimizer.step()


def clipped(head, optimizer, losses):
    losses(0).backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 0.01)
    optimizer.step()


def made_anew(head, optimizer, losses):
    losses(0).backward()
    head.weight.grad = head.weight.grad * 0.5
    optimizer.step()


def unscaled(head, optimizer, losses):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(losses(0)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize(
    "treated",
    [once, accumulated, added, empty_and_accumulated, clipped, made_anew, unscaled],
)
def test_a_gradient_counts_as_it_is_whatever_was_done_to_it(treated):
    """Against torch's SGD on dense gradients."""
    head, dense = (QMarginHead(6, 40, 2.0, 5.0, 0.2, seed=0) for _ in range(2))
    mine = RowSparseSGD(head.parameters(), lr=0.5, momentum=0.9, head=head)
    theirs = torch.optim.SGD(dense.parameters(), lr=0.5, momentum=0.9)
    for step in range(3):
        for one, optimizer in ((head, mine), (dense, theirs)):

            def losses(part, step=step, one=one):
                generator = torch.Generator().manual_seed(2 * step + part)
                x = torch.randn(5, 6, generator=generator)
                return one(x, torch.randint(40, (5,), generator=generator))

            optimizer.zero_grad()
            treated(one, optimizer, losses)
            assert one.weight.grad.is_sparse == (one is head)
        mine.catch_up()
        torch.testing.assert_close(head.weight, dense.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [QMarginHead, PartialHead])
def test_an_optimisers_step_waits_for_nothing(make):
    """What a head's one backward pass gave is known to be in order; anything else is looked at."""
    head = make(6, 40, alpha=2.0, scale=5.0)
    optimizer = RowSparseSGD(head.parameters(), lr=0.5, momentum=0.9, head=head)
    waits = []
    for passes in (1, 1, 2, 1):
        optimizer.zero_grad()
        for _ in range(passes):
            head(torch.randn(5, 6), torch.randperm(40)[:5]).backward()
        assert head.weight.grad._nnz() > 1
        assert not head.weight.grad.is_coalesced()
        with control_flow(host=False, kernels=False), Counted() as counted:
            optimizer.step()
        waits.append(counted.waits)
    assert waits[:2] == [0, 0]
    assert waits[2] > 0
    assert waits[3] == 0


def test_what_a_head_knows_of_a_gradient():
    head, other = QMarginHead(6, 40, 2.0, 5.0, seed=0), QMarginHead(6, 40, 2.0, 5.0, seed=0)
    optimizers = [RowSparseSGD(one.parameters(), lr=0.5, head=one) for one in (head, other)]
    x, labels = torch.randn(5, 6), torch.arange(5)
    for one in (head, other):
        one(x, labels).backward()
    rows = head.weight.grad._indices()[0]
    assert head.in_order(rows)
    assert not other.in_order(rows)
    assert not copy.deepcopy(head).in_order(rows)
    assert not head.in_order(rows[:-1])
    head.weight.grad._indices()[0, 0] = 7  # by whom it may be
    assert not head.in_order(head.weight.grad._indices()[0])
    del optimizers
