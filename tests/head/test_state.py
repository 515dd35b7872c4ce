"""State that cannot lie: whatever is done to a head and its optimiser, the loss is the weight's."""

import copy
import io
import math
import pickle
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import start
from ranks import on_ranks
from speechbrain import Brain
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from speechbrain_qmargin import make_loss, q_margin_loss
from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.head import PartialHead, QMarginHead, RowSparseAdam, RowSparseSGD
from speechbrain_qmargin.head.sizes import Sizes

CLASSES, DIM = 600, 8
LABELS = torch.arange(12)
PARAMETERS = (1.5, 10.0, 0.2)


def make(**options):
    torch.manual_seed(0)
    # with a copy in few bits, whose staleness would lose classes
    return QMarginHead(DIM, CLASSES, *PARAMETERS, sizes=Sizes(screen_from=1), **options)


def embeddings(seed=1):
    return torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(seed))


def true_loss(head, x):
    """Of the weight as it is."""
    cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(head.weight).T
    return q_margin_loss(cosines.detach(), LABELS, *PARAMETERS)


def assert_true(head, x=None):
    x = embeddings() if x is None else x
    torch.testing.assert_close(head.train()(x, LABELS).detach(), true_loss(head, x))


def trained(kind=RowSparseSGD, steps=8, **options):
    """A head with glides pending."""
    head = make()
    options = {"momentum": 0.9, "weight_decay": 0.01} if kind is RowSparseSGD else options
    optimizer = kind(head.parameters(), lr=0.3, **options, head=head)
    run(head, optimizer, steps)
    return head, optimizer


def run(head, optimizer, steps, seed=0):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = head(embeddings(100 * seed + step), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(head):
    return head.weight.detach().clone()


@pytest.mark.parametrize("kind", [RowSparseSGD, RowSparseAdam])
@pytest.mark.parametrize("how", ["load_state_dict", "load_shards", "data", "copy_"])
def test_rows_loaded_under_a_live_optimiser_stay_what_was_loaded(kind, how, tmp_path):
    head, optimizer = trained(kind)
    best = make()
    torch.nn.init.normal_(best.weight)
    best.save_shards(tmp_path)
    if how == "load_state_dict":
        head.load_state_dict(best.state_dict())
    elif how == "load_shards":
        head.load_shards(tmp_path)
    elif how == "data":
        head.weight.data.copy_(best.weight.data)
    else:
        with torch.no_grad():
            head.weight.copy_(best.weight)
    assert_true(head)
    optimizer.catch_up()
    assert torch.equal(head.weight, best.weight)
    before = weights(head)
    optimizer.zero_grad()
    head(embeddings(), LABELS).backward()
    touched = head.weight.grad.coalesce().indices()[0]
    optimizer.step()
    idle = torch.ones(CLASSES, dtype=torch.bool)
    idle[touched] = False
    assert idle.any()
    assert torch.equal(head.weight[idle], before[idle])
    assert_true(head)


def test_a_write_between_backward_and_step_is_noticed():
    """The step refreshes its own rows alone: the others' norms and bits would be the old ones."""
    head, optimizer = trained()
    optimizer.zero_grad()
    head(embeddings(), LABELS).backward()
    with torch.no_grad():
        head.weight.copy_(torch.randn(CLASSES, DIM))
    optimizer.step()
    assert_true(head)


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("kind", [RowSparseSGD, RowSparseAdam])
def test_a_run_that_is_set_back_repeats_itself(kind, head_first):
    """In place, as SpeechBrain recovers: nothing that is pending is lost, whichever is first."""
    head, optimizer = trained(kind)
    states = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    wanted, end = run(head, optimizer, 5, seed=1), weights(head)
    pairs = list(zip((head, optimizer), states, strict=True))
    for one, state in pairs if head_first else reversed(pairs):
        one.load_state_dict(state)
    assert run(head, optimizer, 5, seed=1) == wanted
    assert torch.equal(head.weight, end)


@pytest.mark.parametrize("kind", [RowSparseSGD, RowSparseAdam])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_head_and_optimiser_goes_on_as_the_original(kind, way):
    head, optimizer = trained(kind)
    pair = (head, optimizer)
    if way == "deepcopy":
        twin, its = copy.deepcopy(pair)
    elif way == "pickle":
        twin, its = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        twin, its = torch.load(file, weights_only=False)
    assert twin.gives_sparse_grad
    assert run(twin, its, 5, seed=1) == run(head, optimizer, 5, seed=1)
    assert torch.equal(twin.weight, head.weight)
    best = make().state_dict()
    twin.load_state_dict(best)  # what was pending in the copy is dropped as well
    its.catch_up()
    assert torch.equal(twin.weight, best["weight"])


def test_a_copy_of_the_head_alone_is_the_same_function_and_unbound():
    head, _ = trained()
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), AveragedModel(head).module):
        assert torch.equal(twin.state_dict()["weight"], head.weight)
        assert not twin.gives_sparse_grad
        twin.weight.grad = None
        assert_true(twin)
        twin(embeddings(), LABELS).backward()
        assert not twin.weight.grad.is_sparse
        torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1).step()
        assert_true(twin)
    averaged = AveragedModel(head, avg_fn=lambda old, new, n: new)
    averaged.update_parameters(head)
    assert_true(averaged.module)


def sent(_, head, expected):
    torch.set_num_threads(1)
    assert_true(head)
    assert torch.equal(head.weight.detach(), expected)


def test_a_head_is_sent_to_a_process():
    head, _ = trained()
    start(sent, copy.deepcopy(head), weights(head), number=1)


def test_assign_replaces_the_parameter_and_the_optimiser_says_so():
    head, optimizer = trained()
    head.load_state_dict(make().state_dict(), assign=True)
    head(embeddings(), LABELS).backward()
    with pytest.raises(RuntimeError, match="assign=True"):
        optimizer.step()
    assert_true(head)
    again = RowSparseSGD(head.parameters(), lr=0.1, head=head)
    run(head, again, 2)
    assert_true(head)


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=3.0, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.Adadelta(p, lr=100.0),
        lambda p: torch.optim.SGD(p, lr=3.0, momentum=0.9, weight_decay=0.01),
    ],
)
def test_any_optimiser_takes_dense_gradients_and_its_writes_are_noticed(optimiser):
    head = make()
    optimizer = optimiser(head.parameters())
    for step in range(5):
        optimizer.zero_grad()
        head(embeddings(step), LABELS).backward()
        optimizer.step()
    assert_true(head)


def test_dense_gradients_are_the_sparse_ones():
    rows, full = make(sparse_grad=True), make(sparse_grad=False)
    for head in (rows, full):
        head(embeddings(), LABELS).backward()
    assert rows.weight.grad.is_sparse
    assert torch.equal(rows.weight.grad.to_dense(), full.weight.grad)
    torch.nn.utils.clip_grad_value_(full.parameters(), 1e-3)
    assert full.weight.grad.abs().max() <= 1e-3


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "NAdam", "Adadelta", "SGD"])
def test_an_optimiser_that_cannot_take_rows_is_told_the_remedy(name):
    head = make(sparse_grad=True)
    options = {"weight_decay": 0.1} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(head.parameters(), lr=0.1, **options)
    head(embeddings(), LABELS).backward()
    with pytest.raises(TypeError, match="sparse_grad=False, or step it with RowSparseSGD"):
        optimizer.step()


@pytest.mark.parametrize("who", ["foreach", "one by one", "SpeechBrain"])
def test_clipping_by_value_and_speechbrains_check_are_told_the_remedy(who):
    """They come between backward pass and step; a norm can be clipped."""
    head = make(sparse_grad=True)
    head(embeddings(), LABELS).backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1e-3)
    assert head.weight.grad.to_dense().norm() == pytest.approx(1e-3)
    look = {
        "foreach": lambda: torch.nn.utils.clip_grad_value_(head.parameters(), 1.0, foreach=True),
        "one by one": lambda: torch.nn.utils.clip_grad_value_(head.parameters(), 1.0, False),
        "SpeechBrain": lambda: Brain.check_gradients(SimpleNamespace(modules=head)),  # pyright: ignore
    }[who]
    with pytest.raises(NotImplementedError, match=r"row-sparse gradient.*sparse_grad=False"):
        look()


def test_plain_sgd_takes_rows():
    head = make(sparse_grad=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    run(head, optimizer, 3)
    assert_true(head)


def test_a_cache_made_under_inference_mode():
    head = make()
    optimizer = RowSparseSGD(head.parameters(), lr=0.3, head=head)
    with torch.inference_mode():
        head(embeddings(), LABELS)
        head.eval()(embeddings())
    head.train()
    run(head, optimizer, 3)
    with torch.inference_mode():
        assert_true(head)


def test_torch_compile_leaves_the_head_as_it_is():
    """Traced, its step took a minute; the encoder before it is one graph."""
    torch.compiler.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), make())
    head = model[1]
    x = embeddings()
    for taken in (lambda x: model(x).q_margin_loss(LABELS, *PARAMETERS), model.eval()):
        model.train(taken is not model)
        found = []
        for function in (taken, torch.compile(taken, backend=backend)):
            model.zero_grad()
            value = function(x)
            value.sum().backward()
            found.append([value.detach(), head.weight.grad.to_dense(), model[0].weight.grad])
        torch.testing.assert_close(*found)
    assert 1 <= len(graphs) <= 2  # of the encoder
    assert not any("qmargin" in str(node.target) for g in graphs for node in g.graph.nodes)


def test_second_derivatives_raise():
    head = make()
    x = embeddings().requires_grad_()
    loss = head(x, LABELS)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("name", ["qmargin", "arcface", "sphereface2"])
def test_it_is_checkpointed(name):
    """In torch's own way, which lets each saved tensor be asked for once."""
    x, found = embeddings().requires_grad_(), []
    for way in (lambda f, *inputs: f(*inputs), partial(checkpoint, use_reentrant=False)):
        head, loss = make(), make_loss(name)
        value = way(lambda x, head=head, loss=loss: loss(head(x), LABELS), x)
        value.backward()
        found.append((value, head.weight.grad, x.grad))
        x.grad = None
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_it_is_made_without_memory():
    """As for FSDP and large models: on the meta device, then drawn where it is to be."""
    with torch.device("meta"):
        head = QMarginHead(DIM, CLASSES, *PARAMETERS)
    assert head.weight.is_meta
    head = head.to_empty(device="cpu")
    head.reset_parameters(seed=3)
    assert torch.equal(head.weight, QMarginHead(DIM, CLASSES, seed=3).weight)
    assert_true(head)


def test_torchs_default_dtype_changes_no_prototype():
    wanted = QMarginHead(DIM, CLASSES, seed=3).weight
    torch.set_default_dtype(torch.float64)
    try:
        head = QMarginHead(DIM, CLASSES, *PARAMETERS, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(head.weight, wanted)
    assert_true(head)


@pytest.mark.parametrize("kind", [RowSparseSGD, RowSparseAdam])
def test_an_optimiser_keeps_its_tables_on_the_host(kind):
    """Whatever torch's default device is."""
    found = []
    for place in (nullcontext(), torch.device("meta")):
        head = make()
        options = {"momentum": 0.9} if kind is RowSparseSGD else {}
        optimizer = kind(head.parameters(), lr=0.1, head=head, **options)
        batches = [embeddings(seed) for seed in range(3)]
        with place:
            for x in batches:
                optimizer.zero_grad()
                head(x, LABELS).backward()
                optimizer.step()
            optimizer.catch_up()
        found.append(head.weight)
    assert torch.equal(*found)


@pytest.mark.parametrize("size", [1e-11, 1e18, 1e20, 1e30])
@pytest.mark.parametrize("name", ["qmargin", "arcface", "sphereface2"])
def test_embeddings_of_any_length(name, size):
    """The square of 1e20 is no float32."""
    head, loss, x = make(), make_loss(name), embeddings()
    found = []
    for factor in (1.0, size):
        scaled = (factor * x).requires_grad_()
        value = loss(head.train()(scaled), LABELS)
        (gradient,) = torch.autograd.grad(value, scaled)
        found.append((value, factor * gradient, head.eval()(scaled)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_converted_head_is_refused_in_evaluation_too(dtype):
    head = make().to(dtype).eval()
    with pytest.raises(TypeError, match=f"float32 prototypes, found {dtype}: use autocast"):
        head(embeddings())


def test_a_head_that_is_wrapped_is_bound():
    """As DistributedDataParallel wraps it."""
    head = make()
    wrapper = SimpleNamespace(module=head)
    optimizer = RowSparseSGD(head.parameters(), lr=0.1, head=wrapper)
    head(embeddings(), LABELS).backward()
    assert head.weight.grad.is_sparse
    optimizer.step()
    assert_true(head)


def test_its_state_is_the_same_under_torchrun_and_without(monkeypatch):
    """With a process group there is a parameter for DDP to see."""
    alone = make()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    launched = torch.nn.Sequential(make())
    assert len(list(launched.parameters())) == 2
    assert launched.state_dict().keys() == {"0.weight"}
    with torch.no_grad():
        launched[0].weight.mul_(-2)
    alone.load_state_dict(copy.deepcopy(launched[0]).state_dict())
    assert torch.equal(alone.weight, launched[0].weight)
    launched.load_state_dict({"0.weight": alone.weight + 1, "0.anchor": torch.ones(())})  # of old
    pickled = pickle.loads(pickle.dumps(launched))
    for head in (launched[0], pickled[0]):
        assert torch.equal(head.weight, alone.weight + 1)
        assert head.anchor == 0
        assert head.state_dict().keys() == {"weight"}
    alone.load_state_dict({"weight": alone.weight, "anchor": torch.zeros(())})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", [RowSparseSGD, RowSparseAdam])
@pytest.mark.parametrize("named", [False, True])
def test_torchs_distributed_checkpoint_resumes_one_process(kind, named, tmp_path):
    """Though the optimiser's table of idle steps has other lines, and goes where those are."""

    def states(head, optimizer):
        model = {"model": head.state_dict()}
        if named:
            return {**model, "optimizer": get_optimizer_state_dict(head, optimizer)}
        return {**model, "optimizer": optimizer.state_dict()}

    head, optimizer = trained(kind)
    dcp.save(states(head, optimizer), checkpoint_id=tmp_path / "checkpoint")
    losses = run(head, optimizer, 5, seed=1)
    twin, its = trained(kind, steps=3)
    loaded = states(twin, its)
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint")
    twin.load_state_dict(loaded["model"])
    if named:
        set_optimizer_state_dict(twin, its, loaded["optimizer"])
    else:
        its.load_state_dict(loaded["optimizer"])
    assert run(twin, its, 5, seed=1) == losses
    optimizer.catch_up()
    its.catch_up()
    assert torch.equal(twin.weight, head.weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_distributed_checkpoint_refuses_to_write_a_shard(tmp_path):
    """It would write one rank's, and end in other sizes, or in that one's on all, when it loads."""

    def save(comm):
        head = make(group=comm, seed=0)
        optimizer = RowSparseSGD(head.parameters(), lr=0.3, momentum=0.9, head=head)
        run(head, optimizer, 3, seed=comm.rank)
        found = []
        for name, state in {"head": head.state_dict(), "sgd": optimizer.state_dict()}.items():
            with pytest.raises(
                CheckpointException, match=r"head\.save_shards\(folder, optimizer\)"
            ):
                dcp.save({name: state}, checkpoint_id=tmp_path / f"{name}{comm.rank}", no_dist=True)
            torch.save(copy.deepcopy(state), tmp_path / f"{name}{comm.rank}.pt")
            found.append(torch.load(tmp_path / f"{name}{comm.rank}.pt", weights_only=True))
        head.load_state_dict(found[0])
        optimizer.load_state_dict(found[1])
        run(head, optimizer, 1, seed=comm.rank)
        return found[0]["shard"].tolist()

    assert on_ranks(2, save) == [[0, 300, 600], [300, 600, 600]]


def test_another_ranks_shard_is_refused():
    """As of one file for all ranks, whose tensors have one size."""

    def rank_state(communicator):
        head = make(group=communicator)
        own = copy.deepcopy(head.state_dict())
        head.load_state_dict(own)
        assert torch.equal(head.weight, own["weight"])
        first = {key: communicator.gather_rows(value)[0] for key, value in own.items()}
        if communicator.rank:
            with pytest.raises(ValueError, match=r"of the classes \[0, .*, and rank 1 holds \["):
                head.load_state_dict(first)
        assert torch.equal(head.weight, own["weight"])
        return own

    first, _ = on_ranks(2, rank_state)
    with pytest.raises(ValueError, match="keeps one rank's shard for all"):
        make().load_state_dict(first)


def broadcast(comm, weight):
    weight.data.copy_(comm.gather_rows(weight.data)[0])


def averaged(comm, weight):
    weight.data.copy_(torch.stack(comm.gather_rows(weight.data)).mean(0))


@pytest.mark.parametrize("spoil", [broadcast, averaged])
def test_shards_that_become_copies_are_refused_at_any_step(spoil):
    """By DDP around a trained head, ZeroRedundancyOptimizer, model averaging, a resumed loop."""

    def train(comm):
        head = make(group=comm, seed=0)
        optimizer = RowSparseSGD(head.parameters(), lr=0.3, momentum=0.9, head=head)
        run(head, optimizer, 3, seed=comm.rank)
        spoil(comm, head.weight)
        x = embeddings(comm.rank)
        for call in (lambda: head.train()(x, LABELS), lambda: head.eval()(x)):
            with pytest.raises(RuntimeError, match="all ranks hold the same prototypes"):
                call()

    on_ranks(2, train)


def test_the_optimisers_state_of_another_shard_is_refused_until_the_own_is_loaded(tmp_path):
    """As when the first rank saves for all: of as many rows, it would fit."""

    def resume(comm):
        head = make(group=comm, seed=0)
        optimizer = RowSparseSGD(head.parameters(), lr=0.3, momentum=0.9, head=head)
        run(head, optimizer, 3, seed=comm.rank)
        head.save_shards(tmp_path, optimizer)
        momentum = optimizer.state[head.weight]["momentum_buffer"].clone()
        if comm.rank == 0:
            first.append(copy.deepcopy(optimizer.state_dict()))
        comm.barrier()
        optimizer.load_state_dict(first[0])
        head.weight.grad = torch.zeros_like(head.weight)
        if comm.rank:
            match = r"of the classes \[0, 300\) of 600, 300 rows, and the head has \[300, 600\)"
            for call in (
                optimizer.step,
                optimizer.catch_up,
                partial(optimizer.rows_state, head.weight),
            ):
                with pytest.raises(ValueError, match=match):
                    call()
        head.load_shards(tmp_path, optimizer)
        assert torch.equal(optimizer.state[head.weight]["momentum_buffer"], momentum)
        optimizer.step()

    first = []
    on_ranks(2, resume)


@pytest.mark.parametrize(
    ("kind", "other", "missing"),
    [
        (RowSparseSGD, torch.optim.AdamW, "momentum, nesterov"),
        (RowSparseAdam, torch.optim.SGD, "betas, eps"),
    ],
)
def test_the_state_of_another_kind_of_optimiser_is_refused(kind, other, missing):
    head, optimizer = trained(kind)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=f"{kind.__name__}: .* another kind.* {missing}"):
        optimizer.load_state_dict(other(head.parameters(), lr=0.1).state_dict())
    assert optimizer.state_dict()["param_groups"] == before
    run(head, optimizer, 1)


@pytest.mark.parametrize("kind", [RowSparseSGD, RowSparseAdam])
@pytest.mark.parametrize("classes", [CLASSES - 100, CLASSES + 100])
@pytest.mark.parametrize("said", [True, False])
def test_the_optimisers_state_of_another_number_of_classes_is_refused(kind, classes, said):
    """The rows that both have would take the other classes' momentum."""
    _, optimizer = trained(kind)
    state = optimizer.state_dict()
    if not said:  # as of an older version, or of a dense optimiser
        state = copy.deepcopy(state)
        del state["state"][0]["shard"]
    head = QMarginHead(DIM, classes, *PARAMETERS)
    fresh = kind(head.parameters(), lr=0.3, head=head)
    fresh.load_state_dict(state)
    head(embeddings(), LABELS).backward()
    before = weights(head)
    with pytest.raises(ValueError, match=f"600 rows, and the head has .*, {classes} rows. For an"):
        fresh.step()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("classes", [CLASSES - 100, CLASSES + 100])
@pytest.mark.parametrize("kind", [QMarginHead, PartialHead])
def test_classes_that_are_added_or_taken_away_in_place_are_refused(kind, classes, told):
    """The loss was that of neither number."""
    head = kind(DIM, CLASSES)
    head.weight = torch.nn.Parameter(torch.randn(classes, DIM))
    if told:
        head.num_classes = classes
    match = f"{classes} rows and num_classes={head.num_classes}: for other classes make another"
    for call in (lambda: head.train()(embeddings(), LABELS), lambda: head.eval()(embeddings())):
        with pytest.raises(ValueError, match=match):
            call()


def test_shards_are_saved_and_loaded_with_the_heads_own_optimiser(tmp_path):
    """Another's state was saved as none, and none was loaded, without a word."""
    head, optimizer = trained()
    _, others = trained()
    dense = torch.optim.AdamW(head.parameters())
    for other in (others, dense):
        name = type(other).__name__
        for call in (head.save_shards, head.load_shards):
            with pytest.raises(ValueError, match=f"not bound to the {name} given: pass that one"):
                call(tmp_path, other)
    head.save_shards(tmp_path)
    twin = make()
    its, before = RowSparseSGD(twin.parameters(), lr=0.3, head=twin), weights(twin)
    with pytest.raises(ValueError, match="saved without an optimiser's state; load it without"):
        twin.load_shards(tmp_path, its)
    assert torch.equal(twin.weight, before)
    twin.load_shards(tmp_path)
    assert torch.equal(twin.weight, head.weight)
    twin.load_state_dict(head.state_dict(), assign=True)
    head.save_shards(tmp_path, optimizer)
    for call in (twin.save_shards, twin.load_shards):
        with pytest.raises(RuntimeError, match="assign=True"):
            call(tmp_path, its)


def test_torchs_distributed_state_dict_knows_what_a_shard_says():
    """It looks for an attribute of each name."""

    def state(comm):
        model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), make(group=comm))
        found = get_model_state_dict(model)
        assert found.keys() == model.state_dict().keys()
        return torch.as_tensor(found["1.shard"]).tolist()

    assert on_ranks(2, state) == [[0, 300, 600], [300, 600, 600]]


def test_a_head_that_is_older_than_the_processes_is_refused(monkeypatch):
    """Each would train all classes on its own batches, and nothing would keep them equal."""
    head, x = make(), embeddings()
    mine = make(group=Communicator.alone())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    for call in (lambda: head(x, LABELS), lambda: head(x)):
        with pytest.raises(RuntimeError, match=r"before torch.distributed was init.*make it"):
            call()
    assert head.eval()(x).shape == (12, 1, CLASSES)
    assert_true(mine)


def test_bad_input():
    for other in (torch.zeros(2, DIM, dtype=torch.int64), torch.zeros(2, DIM).cfloat()):
        with pytest.raises(TypeError, match=f"floating point, got {other.dtype}"):
            make()(other, LABELS[:2])
    with pytest.raises(TypeError, match=r"no gradient by log_q: pass log_q\.detach\(\)"):
        make()(embeddings()).q_margin_loss(
            LABELS, *PARAMETERS, log_q=torch.zeros(CLASSES, requires_grad=True)
        )
    head = make()
    with pytest.raises(TypeError, match=r"integer class labels, got torch\.float32"):
        head(embeddings(), LABELS.float())
    with pytest.raises(ValueError, match="empty batch"):
        head(torch.zeros(0, DIM), LABELS[:0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_embeddings_that_are_not_finite_give_a_loss_that_is_not_and_no_gradient(value, alpha):
    """For SpeechBrain's patience with such losses to decide, not the head."""
    head, optimizer = trained()
    before = weights(head)
    x = embeddings()
    x[3, 2] = value
    optimizer.zero_grad()
    loss = head(x.requires_grad_()).q_margin_loss(LABELS, alpha, 10.0, 0.2)
    loss.backward()
    assert loss.isnan()
    assert not head.weight.grad.to_dense().any()
    assert not x.grad[x.detach().isfinite().all(1)].any()  # the other samples'
    optimizer.param_groups[0]["momentum"] = 0
    optimizer.step()
    torch.testing.assert_close(head.weight.detach().norm(), before.norm(), rtol=0.1, atol=0)
    assert head.weight.isfinite().all()
    run(head, optimizer, 2)
    assert_true(head)


def test_no_warning_in_a_step():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(steps=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 3.0])
@pytest.mark.parametrize("screened", [False, True])
def test_a_prototype_that_is_not_finite_is_not_passed_over(value, alpha, screened):
    """Whose class it is no matter: a comparison with NaN is false, so a search would not see it."""
    head = make() if screened else QMarginHead(DIM, CLASSES)
    with torch.no_grad():
        head.weight[77, 2] = value
    x = embeddings().requires_grad_()
    loss = head(x).q_margin_loss(LABELS, alpha, 10.0, 0.2)
    loss.backward()
    assert loss.isnan()
    assert head.weight.grad is None
    assert not x.grad.any()
    with torch.no_grad():
        head.weight[77] = 1.0
    assert head(x).q_margin_loss(LABELS, alpha, 10.0, 0.2).isfinite()


def test_ranks_agree_that_a_prototype_is_not_finite():
    def step(comm):
        head = QMarginHead(DIM, CLASSES, group=comm, seed=0)
        if comm.rank == 1:
            with torch.no_grad():
                head.weight[-1, 0] = torch.nan
        return head(embeddings(comm.rank), LABELS).item()

    assert all(math.isnan(loss) for loss in on_ranks(3, step))


@pytest.mark.parametrize("classes", [100, 600])
def test_prototypes_that_change_places_are_noticed(classes):
    """All 64 rows that are looked at are the same ones, in another order."""
    torch.manual_seed(0)
    head = QMarginHead(DIM, classes, *PARAMETERS)
    with torch.no_grad():
        head.weight.mul_(torch.rand(classes, 1) * 3 + 0.1)  # the cache has their lengths
    assert_true(head)
    stride = max(1, classes // 64)
    order = torch.arange(classes)
    order[::stride] = order[::stride].flip(0)
    head.weight.data.copy_(head.weight.data[order])
    assert_true(head)
    head.weight.data.copy_(head.weight.data.flip(1))
    assert_true(head)
