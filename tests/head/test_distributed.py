"""Classes in shards: 2 and 4 gloo ranks against one process."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import start
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from speechbrain_qmargin import QMarginLoss, q_margin_loss
from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.head import QMarginHead, RowSparseAdam, RowSparseSGD
from speechbrain_qmargin.head.search import Screening
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.loss.arcface import ArcFaceLoss

DIM = 16
SCREENED = Sizes(screen_from=1000)  # classes of a shard: screening at sizes that cost little
SETTINGS = [(1.0, 16.0, 0.2), (1.25, 32.0, 0.2), (1.5, 10.0, 0.2), (2.0, 5.0, 0.0), (1.5, 0.1, 0.2)]


def batch(rank: int, world: int, classes: int):
    """Uneven batches: rank r has 3 + r samples."""
    generator = torch.Generator().manual_seed(100 * world + rank)
    labels = torch.randint(classes, (3 + rank,), generator=generator)
    return torch.randn(3 + rank, DIM, generator=generator), labels


def near(embeddings, labels, head_weight):
    return (F.normalize(head_weight[labels]) + 0.2 * embeddings).requires_grad_()


def entry(rank, jobs, rendezvous):
    """The jobs in turn, each over the first `world` of the processes."""
    torch.set_num_threads(1)
    for number, (world, job, *arguments) in enumerate(jobs):
        if rank < world:
            method = f"file://{rendezvous}{number}"
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
            job(rank, world, *arguments)
            dist.barrier()
            dist.destroy_process_group()


def alone(classes, *parameters, **options):
    """The head of one process, whatever is initialised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        comm = Communicator.alone()
        return QMarginHead(DIM, classes, *parameters, sizes=SCREENED, group=comm, **options)


def reference(classes, world, parameters, seed=0):
    """The mean over ranks of their mean losses, by one process holding all classes."""
    head = alone(classes, *parameters, seed=seed)
    inputs = []
    for rank in range(world):
        embeddings, labels = batch(rank, world, classes)
        inputs.append((near(embeddings, labels, head.weight.detach()), labels))
    losses = [head(x, y) for x, y in inputs]
    (sum(losses) / world).backward()
    return head, inputs, losses


def gradients(rank, world, classes, parameters):
    head = QMarginHead(DIM, classes, *parameters, seed=0, sizes=SCREENED)
    whole, inputs, losses = reference(classes, world, parameters)
    torch.testing.assert_close(head.weight, whole.weight[head.start : head.stop], rtol=0, atol=0)
    x = inputs[rank][0].detach().requires_grad_()
    loss = QMarginLoss(*parameters)(head(x), inputs[rank][1])
    loss.backward()
    torch.testing.assert_close(loss, losses[rank], rtol=1e-5, atol=1e-6)
    # DDP divides the encoder's gradient by the number of ranks
    assert relative(x.grad / world, inputs[rank][0].grad) < 1e-6
    dense = head.weight.grad.to_dense() if head.weight.grad.is_sparse else head.weight.grad
    theirs = whole.weight.grad.to_dense() if whole.weight.grad.is_sparse else whole.weight.grad
    theirs = theirs[head.start : head.stop]
    assert (dense - theirs).norm() < 1e-6 * whole.weight.grad.to_dense().norm() + 1e-9
    if parameters[1] > 1 and parameters[0] > 1:
        assert torch.equal(dense.any(1), theirs.any(1))
    # evaluation: all cosines on every rank
    cosines = head.eval()(x.detach().unsqueeze(1))
    torch.testing.assert_close(cosines, whole.eval()(inputs[rank][0].detach().unsqueeze(1)))


def arcface(rank, world):
    head = QMarginHead(DIM, 101, seed=0)
    loss = ArcFaceLoss(scale=16.0, margin=0.3)
    whole, inputs, _ = reference(101, world, SETTINGS[2])
    inputs = [(x.detach().requires_grad_(), y) for x, y in inputs]
    whole.weight.grad = None
    wanted = [loss(whole(x), y) for x, y in inputs]
    (sum(wanted) / world).backward()
    x = inputs[rank][0].detach().requires_grad_()
    found = loss(head(x), inputs[rank][1])
    found.backward()
    torch.testing.assert_close(found, wanted[rank], rtol=1e-5, atol=1e-6)
    assert relative(x.grad / world, inputs[rank][0].grad) < 1e-5
    assert relative(head.weight.grad, whole.weight.grad[head.start : head.stop]) < 1e-5


def relative(a, b):
    return float((a - b).norm() / b.norm().clamp(min=1e-9))


def many(rank, world):
    for classes, parameters in [(world, SETTINGS[2]), (997, SETTINGS[1])]:
        gradients(rank, world, classes, parameters)
    for parameters in SETTINGS:
        gradients(rank, world, 101, parameters)
    gradients(rank, world, SCREENED.screen_from * world + 3, SETTINGS[1])


def traffic(rank, world):
    sent = []
    for classes in (1000, 100_000):
        head = QMarginHead(DIM, classes, 1.5, 10.0, 0.2, seed=0)
        head.comm.bytes = 0
        x, labels = batch(rank, world, classes)
        head(x.requires_grad_(), labels).backward()
        sent.append(head.comm.bytes)
    # a Newton step more or less aside
    assert abs(sent[1] - sent[0]) <= 8 * 2 * 8 * 9, sent
    assert sent[1] < 16384


def ddp(rank, world):
    """Encoder under DDP, accumulation over two batches, the head's own rows: as one process."""
    classes, parameters = 203, (1.5, 10.0, 0.2)

    def encoder():
        torch.manual_seed(1)
        return torch.nn.Linear(DIM, DIM)

    mine = encoder()
    model = torch.nn.parallel.DistributedDataParallel(mine)
    head = QMarginHead(DIM, classes, *parameters, seed=0)
    wrapped = torch.nn.parallel.DistributedDataParallel(head, find_unused_parameters=True)
    optimizer = RowSparseSGD(
        [*mine.parameters(), *head.parameters()], lr=0.5, momentum=0.9, head=head
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    single, (whole, _, _) = encoder(), reference(classes, world, parameters)
    whole.weight.grad = None
    theirs = RowSparseSGD(
        [*single.parameters(), *whole.parameters()], lr=0.5, momentum=0.9, head=whole
    )
    for step in range(3):
        for part in range(2):
            x, y = batch(rank, world, classes)
            loss = QMarginLoss(*parameters)(wrapped(model(x + part + step)), y) / 2
            scaler.scale(loss).backward()
            total = 0
            for other in range(world):
                x, y = batch(other, world, classes)
                total = total + whole(single(x + part + step), y) / world / 2
            total.backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        theirs.step()
        theirs.zero_grad()
    optimizer.catch_up()
    theirs.catch_up()
    assert relative(mine.weight, single.weight) < 1e-5
    assert relative(head.weight, whole.weight[head.start : head.stop]) < 1e-5


def train(head, optimizer, rank, world, steps, classes):
    """The samples of a step are dealt to the ranks, unevenly: the same step in every world."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(classes, (8,), generator=generator)
        x = torch.randn(8, DIM, generator=generator)
        mine = slice(0, 8 - world + 1) if rank == 0 else slice(8 - rank, 9 - rank)
        output = head(x[mine])
        loss = output.q_margin_loss(
            labels[mine], head.alpha, head.scale, head.margin, reduction="sum"
        )
        (loss * world).backward()
        optimizer.step()
        optimizer.zero_grad()


def stage(rank, world, folder, load, steps):
    classes = 103
    head = QMarginHead(DIM, classes, 1.5, 10.0, 0.2, seed=0)
    optimizer = RowSparseSGD(head.parameters(), lr=0.05, momentum=0.9, head=head)
    if load:
        head.load_shards(folder, optimizer)
    train(head, optimizer, rank, world, steps, classes)
    head.save_shards(folder, optimizer)


def prototypes_in(folder):
    index = json.loads((folder / "index.json").read_text())
    parts = [torch.load(folder / name, weights_only=True) for *_, name in index["shards"]]
    assert len(list(folder.glob("classes-*.pt"))) == len(parts)
    return torch.cat([part["weight"] for part in parts])


def test_a_killed_rank_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    head = QMarginHead(DIM, 50)
    head.save_shards(tmp_path)
    before = prototypes_in(tmp_path)
    with torch.no_grad():
        head.weight.neg_()

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Communicator, "barrier", killed)  # after the shard, before the index
    with pytest.raises(KeyboardInterrupt):
        head.save_shards(tmp_path)
    monkeypatch.undo()
    other = QMarginHead(DIM, 50, seed=5)
    other.load_shards(tmp_path)
    assert torch.equal(other.weight, before)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("parameters", [*SETTINGS[1:4], (3.0, 4.0, 0.1)])
def test_in_shards_each_gradient_is_exact_relative_to_itself(parameters, prior):
    """Against all cosines in float64. What shards show each other is of float32, and a bound."""
    torch.manual_seed(1)
    weight, labels = torch.randn(400, DIM), torch.randint(400, (60,))
    noise = torch.linspace(0.02, 1, 60)[:, None] * torch.randn(60, DIM)
    x = F.normalize(weight[labels]) + noise
    log_q = 3 * torch.randn(400) - 6 if prior else None

    def step(comm):
        head = QMarginHead(DIM, 400, group=comm)
        with torch.no_grad():
            head.weight.copy_(weight[head.start : head.stop])
        mine = x.split(20)[comm.rank].clone().requires_grad_()
        own = labels.split(20)[comm.rank]
        loss = head(mine).q_margin_loss(own, *parameters, log_q=log_q, reduction="none")
        loss.sum().backward()
        return loss.detach(), mine.grad

    found = [torch.cat(parts) for parts in zip(*on_ranks(3, step), strict=True)]
    x = x.double().requires_grad_()
    cosines = F.normalize(x, dim=1) @ F.normalize(weight.double(), dim=1).T
    loss = q_margin_loss(cosines, labels, *parameters, log_q=log_q, reduction="none")
    loss.sum().backward()
    active = x.grad.norm(dim=1) > 1e-6
    assert 20 < active.sum() <= 60
    for one, wanted in zip(found, (loss.detach()[:, None], x.grad), strict=True):
        error = (one.view_as(wanted) - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert float(error[active].max()) < 1e-6


@pytest.mark.parametrize("early", [None, 0, 1])
@pytest.mark.parametrize(
    ("kind", "dense_kind", "options"),
    [
        (RowSparseSGD, torch.optim.SGD, {"momentum": 0.9}),
        (RowSparseAdam, torch.optim.AdamW, {"betas": (0.8, 0.9)}),
    ],
)
def test_a_resumed_optimiser_in_other_shards_is_torchs_dense_one(
    kind, dense_kind, options, early, tmp_path
):
    """`early`: the rank that alone brought its rows up to date half-way, as a reset does."""
    classes, halfway, options = 12, 5, {"lr": 0.1, "weight_decay": 0.01, **options}

    def gradient(step):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(classes, generator=generator)[:3].sort().values
        return rows, torch.randn(3, DIM, generator=generator)

    def train(comm, first, last, folder):
        head = QMarginHead(DIM, classes, seed=0, group=comm)
        optimizer = kind(head.parameters(), **options, head=head)
        if first:
            head.load_shards(folder, optimizer)
        for step in range(first, last):
            rows, values = gradient(step)
            mine = (rows >= head.start) & (rows < head.stop)
            place = (rows[mine] - head.start).unsqueeze(0)
            head.weight.grad = torch.sparse_coo_tensor(
                place, values[mine], head.weight.shape, check_invariants=True
            )
            optimizer.step()
            if step == 2 and comm.rank == early:
                optimizer.catch_up()
        if not first:  # as many lines of idle steps as rows, where there was no catching up
            assert len(optimizer.state[head.weight]["idle"]) == (3 if comm.rank == early else 6)
            head.save_shards(folder, optimizer)
        optimizer.catch_up()
        return head.weight.detach()

    weight = torch.nn.Parameter(QMarginHead(DIM, classes, seed=0).weight.detach())
    dense = dense_kind([weight], **options)
    for step in range(2 * halfway):
        rows, values = gradient(step)
        weight.grad = torch.zeros_like(weight).index_copy_(0, rows, values)
        dense.step()
    on_ranks(2, lambda comm: train(comm, 0, halfway, tmp_path))
    for world in (1, 2, 3):
        found = on_ranks(world, lambda comm: train(comm, halfway, 2 * halfway, tmp_path))
        torch.testing.assert_close(torch.cat(found), weight.detach(), rtol=1e-5, atol=1e-5)


def test_prototypes_begin_the_same_in_any_shards_and_no_two_alike():
    def initial(comm):
        return QMarginHead(2, 35_000, subcentres=2, seed=3, group=comm).weight.detach()

    (whole,) = on_ranks(1, initial)
    assert len(whole.unique(dim=0)) == 70_000
    assert torch.equal(torch.cat(on_ranks(3, initial)), whole)


def test_shards_that_the_first_rank_does_not_see_are_no_checkpoint(tmp_path):
    """As on two machines whose folders are called alike: found out when it is resumed from."""

    def save(comm):
        head = QMarginHead(DIM, 50, group=comm, seed=0)
        with pytest.raises(OSError, match="a file system that all of them share"):
            head.save_shards(tmp_path / f"machine{comm.rank}")

    on_ranks(2, save)
    assert not list(tmp_path.rglob("index.json"))


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    QMarginHead(DIM, 50).save_shards(tmp_path)
    with pytest.raises(ValueError, match=r"\(16, 1, 50\), this head \(16, 1, 51\)"):
        QMarginHead(DIM, 51).load_shards(tmp_path)


def test_a_checkpoint_that_lacks_classes_is_refused(tmp_path):
    """They would stay as they were drawn; and a file of one row would be everybody's prototype."""
    head = QMarginHead(DIM, 50)
    head.save_shards(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    name = index["shards"][0][2]
    for shards in ([[0, 20, name], [30, 50, name]], [[0, 40, name]], []):
        (tmp_path / "index.json").write_text(json.dumps({**index, "shards": shards}))
        with pytest.raises(ValueError, match="do not follow each other from 0 to 50"):
            head.load_shards(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index))
    torch.save({"weight": head.weight.detach()[:1].clone()}, tmp_path / name)
    with pytest.raises(ValueError, match=r"prototypes \[1, 16\], its index says \[50, 16\]"):
        head.load_shards(tmp_path)


def bad_input(rank, world):
    head = QMarginHead(DIM, 50)
    x, labels = batch(rank, world, 50)
    if rank == 1:
        labels[0] = 50
    with pytest.raises(ValueError, match=r"rank 1: 1 labels outside \[0, 50\)"):
        head(x, labels)
    x, labels = batch(rank, world, 50)
    with pytest.raises(ValueError, match="an empty batch"):
        head(x[: 0 if rank == 1 else 3], labels[: 0 if rank == 1 else 3])
    with pytest.raises(
        (ValueError, TypeError), match=r"rank 1 refused|must be integer class labels"
    ):
        head(x, labels.double() if rank == 1 else labels)
    # SpeechBrain counts losses that are not finite, on each rank: it is the same on all of them
    x, labels = batch(rank, world, 50)
    if rank == 1:
        x[1, 2] = torch.nan
    head.weight.grad = None
    loss = head(x.requires_grad_(), labels)
    loss.backward()
    assert loss.isnan()
    assert not head.weight.grad.any()
    whole = torch.nn.ModuleDict({"classifier": QMarginHead(DIM, 50, seed=0)})
    torch.nn.parallel.DistributedDataParallel(whole)
    with pytest.raises(RuntimeError, match="DistributedDataParallel does so around a module"):
        whole["classifier"](torch.randn(3, DIM), torch.arange(3))
    with pytest.raises(ValueError, match="shards disagree"):
        QMarginHead(DIM, 50 + 2 * rank)


def fully_sharded(rank, world):
    """FSDP would cut each rank's shard into parts for all ranks: of unequal sizes here."""
    mesh = init_device_mesh("cpu", (world,))

    def model():
        return torch.nn.Sequential(torch.nn.Linear(DIM, DIM), QMarginHead(DIM, 51, seed=0))

    whole = model()
    with pytest.raises(ValueError, match=r"QMarginHead\.weight: .* ignored_params=set\(head\.par"):
        fully_shard(whole, mesh=mesh)
    whole = model()
    fully_shard(whole, mesh=mesh, ignored_params=set(whole[1].parameters()))
    x, labels = batch(rank, world, 51)
    whole(x).q_margin_loss(labels, *SETTINGS[2]).backward()
    assert whole[1].weight.grad.any()


def copied(rank, world, folder, copy):
    if rank == 0:
        shutil.copytree(folder, copy)


@pytest.mark.slow
def test_2_to_4_ranks_are_one_process(tmp_path):
    """One start of the processes, which is most of the time, for all that ranks can show."""
    folder, copy, alone = (tmp_path / name for name in ("checkpoint", "copy", "alone"))
    jobs = [
        (4, many),
        (4, stage, folder, False, 2),
        (1, copied, folder, copy),
        (3, stage, copy, True, 2),
        *((2, job) for job in (many, arcface, traffic, ddp, bad_input, fully_sharded)),
    ]
    start(entry, jobs, str(tmp_path / "rendezvous"), number=4)
    stage(0, 1, alone, False, 2)
    halfway = prototypes_in(alone)
    stage(0, 1, alone, True, 2)
    expected = prototypes_in(alone)
    assert relative(halfway, expected) > 1e-3
    torch.testing.assert_close(prototypes_in(folder), halfway, rtol=1e-4, atol=1e-5)
    stage(0, 1, folder, True, 2)
    torch.testing.assert_close(prototypes_in(folder), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prototypes_in(copy), expected, rtol=1e-4, atol=1e-5)


def test_alone_it_is_the_head():
    parameters = (1.25, 32.0, 0.2)
    head = QMarginHead(DIM, 500, *parameters, seed=0)
    whole, [(x, labels)], _ = reference(500, 1, parameters)
    mine = x.detach().requires_grad_()
    head(mine, labels).backward()
    assert relative(head.weight.grad.to_dense(), whole.weight.grad.to_dense()) < 1e-6
    assert relative(mine.grad, x.grad) < 1e-6


@torch.no_grad()
def test_a_shard_where_no_row_survives():
    """As for all shards but one when the embeddings are near their prototypes."""
    head = QMarginHead(DIM, 40_000)
    axis = torch.eye(DIM)[:1]
    head.weight.copy_(axis + 0.05 * torch.randn_like(head.weight))
    screening = Screening(-axis, torch.tensor([0.5]), head.prototypes())
    assert screening.survivors(slice(0, 40_000)).numel() == 0
