r"""The head with its classes in contiguous shards over the processes of ``torch.distributed``.

Every rank searches its own shard for the embeddings of all ranks; tau comes from sums over the
shards. A step exchanges, whatever the number of classes,

1. batch sizes and validity of the input, then the embeddings and labels (one gather each),
2. the target's cosine, the guessed floor, the candidates' peak: one number a sample each,
3. two sums a sample for each Newton step: 3 to 8, at most what ``solver.newton_steps`` proves,
4. three moments a sample; in the backward the loss's gradient, one number a sample, and the
   embeddings' gradient, [B, D].

The gradient of the embeddings is that of this rank's loss, for DDP to average; the prototypes' is
that of the ranks' mean loss, which is what the average would have been.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from speechbrain_qmargin.files import replacing, write_text
from speechbrain_qmargin.head.classifier import (
    HeadOutput,
    QMarginHead,
    _dense_backward,
    _sparse_backward,
)
from speechbrain_qmargin.head.search import (
    _MAX_CANDIDATES,
    Candidates,
    _collect,
    _guess,
    chunked_cosines,
    exact_cosines,
    posterior,
    refined,
    rounding,
    uniform_measure,
)
from speechbrain_qmargin.loss.solver import Block, edge, fenchel_young, single_class_level, solve

__all__ = ["Comm", "ShardedQMarginHead"]

_BLOCK = 32768  # classes initialised from one seed


class Comm:
    """Sums, maxima and gathers over the ranks of a group; `bytes` counts what this rank sent.

    Parameters
    ----------
    group : ProcessGroup, optional
        None: all processes, or this one alone where torch.distributed is not initialised.

    Examples
    --------
    >>> comm = Comm()
    >>> comm.world, comm.rank, comm.shard_of(10)
    (1, 0, (0, 10))
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.bytes = group, 0
        self.world, self.rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def shard_of(self, num_classes: int, rank: int | None = None) -> tuple[int, int]:
        """[start, stop) of a rank: contiguous, sizes differ by one at most."""
        rank = self.rank if rank is None else rank
        return rank * num_classes // self.world, (rank + 1) * num_classes // self.world

    def _reduce(self, tensor: Tensor, op) -> Tensor:
        if self.world > 1:
            tensor = tensor.contiguous().clone()
            self.bytes += tensor.numel() * tensor.element_size()
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM) if self.world > 1 else tensor

    def max(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX) if self.world > 1 else tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        if self.world == 1:
            return flag
        return bool(self.max(torch.tensor(float(flag), device=device)))

    def gather(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenation over the ranks of [n_r, ...], n_r = sizes[rank]."""
        if self.world == 1:
            return tensor
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        self.bytes += padded.numel() * padded.element_size()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """One tensor of the same shape from every rank."""
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        self.bytes += tensor.numel() * tensor.element_size()
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts

    def device(self) -> torch.device:
        """Where the group's backend wants its tensors."""
        nccl = self.world > 1 and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.group)


# --------------------------------------------------------------------------- tau over the shards


def _reduced_level(
    logits: Tensor, target: Tensor, alpha: float, log_q: float, classes: int, comm: Comm
) -> Tensor:
    """Level [B] of the candidates [B, K] of all shards and the target's logit [B]."""
    block = Block(logits * (alpha - 1), alpha)
    return _solve(block.sums, logits.amax(1), target, alpha, log_q, classes, comm)


def _solve(local_sums, peak, target, alpha, log_q, classes, comm) -> Tensor:
    def sums(level: Tensor) -> tuple[Tensor, Tensor]:
        s, slope = comm.sum(torch.stack(local_sums(level))).to(level.dtype)
        return s, slope

    # all ranks see the same sums, so they stop at the same step
    peak = comm.max(peak).to(target.dtype)
    measure = uniform_measure(target, alpha, log_q)
    lower = single_class_level(peak, alpha)
    return solve(sums, target, measure, lower, peak, classes, abs(log_q))


def _search(x, labels, cos_y, prototypes, parameters, classes, comm):
    """As ``search.search``, for candidates in shards. None on all ranks if too many on one."""
    alpha, scale, margin = parameters
    log_q, target = -scale * margin, cos_y * scale
    floor = _guess(x, labels, target, prototypes, alpha, scale, log_q)
    floor = comm.max(floor)
    found = _collect(x, labels, floor / scale, prototypes)
    if comm.any(found is None, x.device):
        return None
    level = _reduced_level(found.cosines * scale, target, alpha, log_q, classes, comm)
    proved = edge(level, alpha) - rounding(level, alpha, scale, x.shape[1])
    failed = (proved < floor).nonzero().squeeze(1)
    if not failed.numel():
        return found, level
    again = _collect(x[failed], labels[failed], proved[failed] / scale, prototypes)
    width = 0 if again is None else max(found.cosines.shape[1], again.cosines.shape[1])
    if comm.any(again is None or width * x.shape[0] > _MAX_CANDIDATES, x.device):
        return None
    cosines = found.cosines.new_full((x.shape[0], width), -torch.inf)
    names = torch.zeros_like(cosines, dtype=torch.int64)
    for whole, first, second, filler in (
        (cosines, found.cosines, again.cosines, -torch.inf),
        (names, found.classes, again.classes, 0),
    ):
        whole[:, : first.shape[1]] = first
        whole[failed] = filler
        whole[failed, : second.shape[1]] = second
    level[failed] = _reduced_level(
        cosines[failed] * scale, target[failed], alpha, log_q, classes, comm
    )
    return Candidates(cosines, names), level


def _dense_level(x, labels, cos_y, prototypes, parameters, classes, comm) -> Tensor:
    """As ``search.dense_level``, with the classes in shards."""
    alpha, scale, margin = parameters
    target = cos_y * scale  # float64

    def chunks():
        return (cosines for _, cosines in chunked_cosines(x, labels, prototypes))

    if alpha == 1:
        total = torch.full_like(target, -torch.inf).double()
        for cosines in chunks():
            total = torch.logaddexp(total, torch.logsumexp(cosines * scale, 1).double())
        peak = comm.max(total)
        peak = torch.where(peak.isfinite(), peak, 0)
        total = comm.sum(torch.exp(total - peak)).log() + peak
        return torch.logaddexp(total, target - scale * margin)
    peak = torch.full_like(target, -torch.inf)
    for cosines in chunks():
        peak = torch.maximum(peak, cosines.amax(1) * scale)

    def sums(level: Tensor) -> tuple[Tensor, ...]:
        total = torch.zeros(2, level.shape[0], dtype=torch.float64, device=level.device)
        for cosines in chunks():
            total += torch.stack(Block(cosines.mul_(scale * (alpha - 1)), alpha).sums(level))
        return total.unbind()

    return _solve(sums, peak, target, alpha, -scale * margin, classes, comm)


class _ShardedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit, weight, anchor, labels, raw, head, parameters, moved):
        """Loss [B], target posterior [B], support [B] of this rank's embeddings [B, D].

        unit: of unit length; raw: float32, of any length.
        """
        alpha, scale, margin = parameters
        comm, prototypes = head.comm, head.prototypes()
        sizes = head._batch_sizes(unit, labels)
        offset = sum(sizes[: comm.rank])
        own = slice(offset, offset + sizes[comm.rank])
        raw, labels = comm.gather(raw, sizes), comm.gather(labels, sizes)
        x = F.normalize(raw, dim=1)
        exact = F.normalize(raw.double(), dim=1)
        scored = exact if alpha > 1 else x
        here = (labels >= head.start) & (labels < head.stop)
        labels = torch.where(here, labels - head.start, -1)
        mine = here.nonzero().squeeze(1)
        cos_y = torch.zeros_like(exact[:, 0])
        cos_y[mine] = exact_cosines(exact, mine, labels[mine], prototypes)
        cos_y = comm.sum(cos_y)
        cos_y, slope = (cos_y, 1.0) if moved is None else moved(cos_y)
        found = None
        if alpha > 1:
            found = _search(
                x, labels, cos_y.float(), prototypes, parameters, head.num_classes, comm
            )
        if found is not None:
            candidates = refined(exact, *found, prototypes, alpha, scale)
            logits, log_q = candidates.cosines * scale, -scale * margin
            level = _reduced_level(logits, cos_y * scale, alpha, log_q, head.num_classes, comm)
        moments = torch.zeros(3, x.shape[0], dtype=torch.float64, device=x.device)

        def add(p: Tensor, cosines: Tensor) -> None:
            lead = (cosines - cos_y.unsqueeze(1)).masked_fill_(p == 0, 0)
            gap = torch.linalg.vecdot(p.double(), lead)
            moments.add_(torch.stack((p.sum(1), gap, (p > 0).sum(1))))

        if found is not None:
            p = posterior(logits, level, alpha)
            add(p, candidates.cosines)
        else:
            level = _dense_level(
                scored, labels, cos_y, prototypes, parameters, head.num_classes, comm
            )
            for _, cosines in chunked_cosines(scored, labels, prototypes):
                add(posterior(cosines * scale, level, alpha), cosines)
        others, gap, support = comm.sum(moments)
        z_y = cos_y * scale
        measure = uniform_measure(z_y, alpha, -scale * margin)
        solution = fenchel_young(measure, z_y, level, others, gap * scale)
        loss, p_y = solution.loss.float(), solution.target_posterior.float()
        inverse_total = solution.inverse_total
        g_y = (solution.residual * slope).float()
        support = (support + (p_y > 0)).float()
        ctx.entries = None
        if found is not None:
            samples, place = p.nonzero(as_tuple=True)
            ctx.entries = (
                torch.cat([samples, mine]),
                torch.cat([candidates.classes[samples, place], labels[mine]]),
                torch.cat([(p[samples, place] * inverse_total[samples]).float(), g_y[mine]]),
            )
        ctx.save_for_backward(x, scored, labels, level, inverse_total, g_y)
        ctx.prototypes, ctx.parameters = prototypes, parameters
        ctx.comm, ctx.sizes, ctx.own = comm, sizes, own
        ctx.weight, ctx.key = weight, weight._version
        outputs = loss[own], p_y[own], support[own]
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.weight._version != ctx.key:
            raise RuntimeError(
                "the prototypes were changed between the forward and the backward of the head"
            )
        comm = ctx.comm
        upstream = comm.gather(grad_loss, ctx.sizes) * ctx.parameters[1]
        gradients = _sparse_backward if ctx.entries is not None else _dense_backward
        grad_unit, grad_weight = gradients(ctx, upstream)
        if grad_unit is not None:
            grad_unit = comm.sum(grad_unit)[ctx.own]
        if grad_weight is not None:
            values = grad_weight._values() if grad_weight.is_sparse else grad_weight
            values.div_(comm.world)
        anchor = torch.zeros_like(grad_loss.sum())
        return grad_unit, grad_weight, anchor, None, None, None, None, None


class _ShardedOutput(HeadOutput):
    def _losses(self, unit, targets, parameters, moved=None):
        head = self.head
        raw = self.embeddings.detach().float()
        return _ShardedLoss.apply(
            unit, head.weight, head.anchor, targets, raw, head, parameters, moved
        )


class ShardedQMarginHead(QMarginHead):
    r"""A :class:`~speechbrain_qmargin.head.QMarginHead` whose classes are shared by all ranks.

    Every rank calls it at every step, with its own batch of any size and labels in
    [0, num_classes). `weight` is this rank's part; give it to this rank's optimiser and leave it
    out of DDP's broadcasts (done by itself where DDP wraps the head).

    Parameters
    ----------
    embedding_dim, num_classes, alpha, scale, margin
        As for ``QMarginHead``; `num_classes` over all ranks.
    group : ProcessGroup, optional
    seed : int
        Of the initial prototypes, which do not depend on the number of ranks.

    Attributes
    ----------
    start, stop : int
        The classes of this rank: contiguous shards whose sizes differ by at most one.
    anchor : Parameter
        Zero, with zero gradient: what DDP wants to see of the head.

    Raises
    ------
    ValueError
        Ranks that disagree about the sizes, fewer classes than ranks.

    Examples
    --------
    >>> head = ShardedQMarginHead(embedding_dim=4, num_classes=1000)     # one process: one shard
    >>> head(torch.randn(8, 4), torch.arange(8)).backward()
    >>> head.start, head.stop, head.weight.grad.is_sparse
    (0, 1000, True)
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        alpha: float = 1.5,
        scale: float = 10.0,
        margin: float = 0.2,
        group: Any = None,
        seed: int = 0,
    ) -> None:
        comm = Comm(group)
        if num_classes < comm.world:
            raise ValueError(f"{num_classes} classes cannot be shared by {comm.world} ranks")
        start, stop = comm.shard_of(num_classes)
        super().__init__(embedding_dim, stop - start, alpha, scale, margin)
        self.comm, self.start, self.stop = comm, start, stop
        self.num_classes = int(num_classes)
        sizes = torch.tensor([embedding_dim, num_classes], device=comm.device())
        for rank, other in enumerate(comm.gather_rows(sizes)):
            if not torch.equal(sizes, other):
                raise ValueError(
                    "shards disagree: (embedding_dim, num_classes) is "
                    f"{tuple(sizes.tolist())} on rank {comm.rank} and {tuple(other.tolist())} on "
                    f"rank {rank}"
                )
        self.anchor = nn.Parameter(torch.zeros(()))
        # what DDP reads of the module it wraps: its names for gradients and for broadcasts
        self._ddp_params_and_buffers_to_ignore = [".weight", "weight"]
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        for first in range(self.start // _BLOCK * _BLOCK, self.stop, _BLOCK):
            # one generator a block: the same classes whatever the shards
            generator = torch.Generator().manual_seed(seed * 1_000_003 + first // _BLOCK)
            last = min(first + _BLOCK, self.num_classes)
            rows = torch.randn(last - first, self.weight.shape[1], generator=generator)
            low, high = max(self.start, first), min(self.stop, last)
            rows = F.normalize(rows[low - first : high - first], dim=1)
            self.weight[low - self.start : high - self.start] = rows

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, classes=[{self.start}, {self.stop}) of {self.num_classes}"

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor | HeadOutput:
        """As ``QMarginHead``; in evaluation, too, every rank calls it: cosines of all classes."""
        output = super().forward(embeddings)
        if isinstance(output, Tensor):
            if self.comm.world == 1:
                return output
            unit = F.normalize(embeddings.reshape(-1, embeddings.shape[-1]).float(), dim=1)
            sizes = self._batch_sizes(unit, None)
            x = self.comm.gather(unit.detach(), sizes)
            cosines = F.normalize(self.weight.detach(), dim=1) @ x.T
            bounds = [self.comm.shard_of(self.num_classes, r) for r in range(self.comm.world)]
            everything = self.comm.gather(cosines, [b - a for a, b in bounds])
            offset = sum(sizes[: self.comm.rank])
            return everything[:, offset : offset + unit.shape[0]].T.unsqueeze(1)
        output = _ShardedOutput(self, output.embeddings)
        if labels is None:
            return output
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        return output.q_margin_loss(labels, self.alpha, self.scale, self.margin)

    def _batch_sizes(self, unit: Tensor, labels: Tensor | None) -> list[int]:
        """Of all ranks; every rank raises if one of them has bad input, so that none waits."""
        bad = torch.zeros((), dtype=torch.int64, device=unit.device)
        if labels is not None:
            bad = ((labels < 0) | (labels >= self.num_classes)).sum()
        infinite = (~unit.isfinite().all(1)).sum()
        facts = torch.stack((torch.full_like(bad, unit.shape[0]), bad, infinite))
        facts = torch.stack(self.comm.gather_rows(facts)).tolist()
        for rank, (_, bad_labels, not_finite) in enumerate(facts):
            if bad_labels:
                mine = f" (here: {labels.tolist()})" if rank == self.comm.rank else ""
                raise ValueError(
                    f"rank {rank}: {bad_labels} labels outside [0, {self.num_classes}){mine}: set "
                    "num_classes (out_n_neurons) to the size of the label encoder"
                )
            if not_finite:
                raise ValueError(
                    f"rank {rank}: {not_finite} embeddings are not finite (NaN or inf). Look for "
                    "a diverged model, a silent or empty recording, or fp16 overflow"
                )
        return [size for size, *_ in facts]

    # ---------------------------------------------------------------- checkpoints

    def save_shards(self, folder: str | Path, optimizer=None) -> None:
        """Write a checkpoint that any number of ranks can load; every rank calls it.

        Each rank writes its shard under a new name, then the first writes the index that names
        them: until that moment the previous checkpoint in the folder is whole and valid.

        Parameters
        ----------
        folder : path
            Seen by all ranks.
        optimizer : RowSparseSGD, optional
            Its momentum of the prototypes is saved with them.
        """
        folder = Path(folder)
        self._catch_up()
        token = torch.randint(2**40, (1,), device=self.weight.device)
        token = f"{int(self.comm.gather_rows(token)[0]):x}"
        state = {"weight": self.weight.detach()}
        if optimizer is not None:
            optimizer.catch_up()
            buffer = optimizer.state.get(self.weight, {}).get("momentum_buffer")
            state |= {} if buffer is None else {"momentum": buffer}
        with replacing(folder / f"classes-{self.start}-{self.stop}-{token}.pt") as partial:
            torch.save(state, partial)
        self.comm.barrier()
        if self.comm.rank == 0:
            bounds = [self.comm.shard_of(self.num_classes, r) for r in range(self.comm.world)]
            shards = [[a, b, f"classes-{a}-{b}-{token}.pt"] for a, b in bounds]
            sizes = {"embedding_dim": self.weight.shape[1], "num_classes": self.num_classes}
            write_text(folder / "index.json", json.dumps({**sizes, "shards": shards}))
            kept = {name for *_, name in shards}
            for old in folder.glob("classes-*.pt"):
                if old.name not in kept:
                    old.unlink()
        self.comm.barrier()

    @torch.no_grad()
    def load_shards(self, folder: str | Path, optimizer=None, *, first_rows: bool = False) -> None:
        """Read what :meth:`save_shards` wrote on any number of ranks.

        With `first_rows` the head may have fewer classes than the checkpoint, and takes its first
        ones.

        Raises
        ------
        ValueError
            A checkpoint of another size; it names the folder and both sizes.
        """
        folder = Path(folder)
        index = json.loads((folder / "index.json").read_text())
        theirs = (index["embedding_dim"], index["num_classes"])
        ours = (self.weight.shape[1], self.num_classes)
        fits = theirs == ours or (first_rows and theirs[0] == ours[0] and theirs[1] > ours[1])
        if not fits:
            raise ValueError(
                f"{folder}: the checkpoint has (embedding_dim, num_classes) = {theirs}, this head "
                f"{ours}"
            )
        momentum = None
        for start, stop, name in index["shards"]:
            low, high = max(start, self.start), min(stop, self.stop)
            if low >= high:
                continue
            stored = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            here, there = (
                slice(low - self.start, high - self.start),
                slice(low - start, high - start),
            )
            self.weight[here] = stored["weight"][there].to(self.weight.device)
            if optimizer is not None and "momentum" in stored:
                momentum = torch.zeros_like(self.weight) if momentum is None else momentum
                momentum[here] = stored["momentum"][there].to(self.weight.device)
        if momentum is not None:
            optimizer.catch_up()
            optimizer.state[self.weight]["momentum_buffer"] = momentum
