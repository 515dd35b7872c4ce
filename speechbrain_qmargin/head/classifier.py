"""The prototypes as a module: the exact loss without logits in training, cosines in evaluation."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from speechbrain_qmargin.communicator import Communicator, named_classes
from speechbrain_qmargin.head import fused, fused_shards, shards
from speechbrain_qmargin.head.binary import BinaryLoss
from speechbrain_qmargin.head.kernel_search import Room, takes
from speechbrain_qmargin.head.optim import RowSparse
from speechbrain_qmargin.head.prototypes import Derived, Mark, Prototypes, are_finite, content
from speechbrain_qmargin.head.refusals import named_shard
from speechbrain_qmargin.head.sizes import Sizes
from speechbrain_qmargin.head.step import Evaluation, HeadLoss, RowsInOrder, Shard, refuse_labels
from speechbrain_qmargin.loss.device import assert_on_device, host_decides
from speechbrain_qmargin.loss.functional import check_loss_parameters, q_margin_objective
from speechbrain_qmargin.loss.interface import (
    BinaryObjective,
    Objective,
    QMarginStats,
    Rows,
    attach,
    completed,
    flat,
    refuse_no_tensor,
)
from speechbrain_qmargin.loss.solver import row_dtype

__all__ = ["HeadOutput", "LookedAt", "QMarginHead"]

# What torch.compile leaves as it is: traced it would take a minute, to break at every decision
_eager = torch.compiler.disable(
    reason="a sparse head's step depends on its values: the graph breaks around it"
)
_BLOCK = 32768  # rows initialised from one seed
_MOST_SUBCENTRES = 255
_ALIKE = (
    "all ranks hold the same prototypes, where each has classes of its own: they were broadcast or "
    "averaged as if they were copies. DistributedDataParallel does so around a module that "
    "contains the head (before wrapping, put the name of the head's weight in it, "
    "'classifier.weight', into that module's list _ddp_params_and_buffers_to_ignore, or wrap the "
    "encoder alone), and so do FullyShardedDataParallel (give it ignored_states), "
    "ZeroRedundancyOptimizer, model averaging, and loops over all parameters: leave the weight out"
)


class LookedAt(NamedTuple):
    """What a step looks at.

    Attributes
    ----------
    shard : Shard
    weight : Tensor
        Its rows, in the graph.
    targets : Tensor, [b]
        This rank's, among the classes of all shards.
    classes : Tensor, [stop - start], or None
        The classes' own names, where the shard has some of them only; None: all of them.
    finite : Tensor, bool, or None
        Whether its rows are finite, and those of the other ranks; None: that was asked before.

    Examples
    --------
    >>> head = QMarginHead(embedding_dim=2, num_classes=3)
    >>> step = head.looked_at(torch.tensor([2]), sizes=[1])
    >>> step.shard.start, step.shard.stop, step.classes is None     # all of its classes
    (0, 3, True)
    """

    shard: Shard
    weight: Tensor
    targets: Tensor
    classes: Tensor | None
    finite: Tensor | None = None


class _Agreement(NamedTuple):
    """What all ranks know of a step before it: their batch sizes, whether all embeddings and all
    prototypes are finite (bools on the device), and whether the kernels run everywhere."""

    sizes: list[int]
    finite: Tensor
    finite_rows: Tensor
    kernels: bool


class QMarginHead(shards.ShardedClassifier):
    r"""Exact classification head for up to millions of classes, with row-sparse gradients.

    The loss and its gradients are those of :func:`~speechbrain_qmargin.q_margin_loss` on the
    cosines of embeddings and prototypes, to float32 rounding; nothing is sampled. Logits of size
    batch x classes are not formed: a step costs one pass over the prototypes at low precision, and
    the work on the active classes. At alpha = 1, or when nearly everything is active, it is
    computed in chunks.

    If ``torch.distributed`` is initialised before the head is made, its classes are split over all
    ranks in contiguous shards. Every rank then calls it at every step, in evaluation too, with
    its own batch of any size and labels in [0, num_classes); `weight` is this rank's shard.

    Parameters
    ----------
    embedding_dim, num_classes : int
        The classes of all ranks together.
    subcentres : int
        Prototypes of each class, of which the nearest counts (Deng et al., ECCV 2020).
    alpha, scale, margin : float
        Settings of the loss ``head(embeddings, labels)``. If SpeechBrain's ``compute_cost``
        evaluates the training output, its own settings count instead.
    sparse_grad : bool, optional
        Whether the gradient of `weight` is sparse: only the rows of active classes and targets.
        None: when an optimiser of rows is bound (:class:`~speechbrain_qmargin.head.RowSparseSGD`,
        :class:`~speechbrain_qmargin.head.RowSparseAdam`), and dense, for any other optimiser,
        otherwise.
    group : ProcessGroup or Communicator, optional
        The ranks that share the classes. None: all.
    seed : int, optional
        Seed of the initial prototypes, which do not depend on the number of ranks. None: drawn from
        torch's generator, on the first rank.
    prototype_std : float
        Standard deviation of their coordinates, which are normal: arcface_torch's, and nearly what
        Xavier's rule gives for 18,000 classes. The loss does not see a prototype's length, SGD
        does: it turns a prototype by a step proportional to 1 / length^2, so long ones learn late.
    sizes : Sizes, optional
        Sizes of the pieces that a step is computed in, and the kernels. None: what suits the device
        of `weight`.

    Attributes
    ----------
    weight : Parameter, [(stop - start) * subcentres, embedding_dim], float32
        Prototypes, those of a class one after the other; their length does not enter the loss.
    start, stop : int
        This rank has the classes from `start` up to, not including, `stop`.
    anchor : Parameter or None
        With ``torch.distributed``, a zero with zero gradient, so that DDP finds a parameter in the
        head, whose `weight` it leaves alone. It is no part of ``state_dict``.

    Raises
    ------
    ValueError
        Ranks that disagree about the sizes, fewer classes than ranks, parameters out of range.
    RuntimeError
        When it is called in training: ``torch.distributed`` was initialised after it was made.

    Notes
    -----
    Beside `weight` live its rows' inverse norms and, from 32,768 classes on, a bf16 copy of the
    unit rows. Both follow `weight`: rows are refreshed by the bound optimiser; any other change is
    noticed and everything is rebuilt. A change through ``weight.data`` is noticed on the CPU where
    it reaches one of 64 evenly spaced rows; call :meth:`written` after one that may not. Neither is
    in the checkpoint, in a copy or in a pickle. Second derivatives raise. ``torch.compile`` leaves
    the head as it is, and compiles what comes before it.

    Embeddings or prototypes that are not finite make the loss NaN, on all ranks, and give no
    gradient (prototypes on a GPU one that is not finite either, as nobody looks there).

    Examples
    --------
    >>> from speechbrain_qmargin.head import RowSparseSGD
    >>> head = QMarginHead(embedding_dim=4, num_classes=1000, alpha=1.5, scale=10, margin=0.2)
    >>> optimizer = RowSparseSGD(head.parameters(), lr=0.1, head=head)
    >>> embeddings = torch.randn(8, 4, requires_grad=True)
    >>> loss = head(embeddings, torch.arange(8))
    >>> loss.backward()
    >>> head.weight.grad.is_sparse
    True
    >>> head.eval()(embeddings.unsqueeze(1)).shape      # cosines, as SpeechBrain's Classifier
    torch.Size([8, 1, 1000])

    In a SpeechBrain recipe::

        classifier: !new:speechbrain_qmargin.head.QMarginHead
            embedding_dim: 192
            num_classes: !ref <out_n_neurons>
        compute_cost: !new:speechbrain_qmargin.QMarginLoss
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        alpha: float = 1.5,
        scale: float = 10.0,
        margin: float = 0.2,
        *,
        subcentres: int = 1,
        sparse_grad: bool | None = None,
        group: Any = None,
        seed: int | None = None,
        prototype_std: float = 0.01,
        sizes: Sizes | None = None,
    ) -> None:
        super().__init__()
        numbers = {"embedding_dim": embedding_dim, "num_classes": num_classes}
        for name, value in (numbers | {"subcentres": subcentres}).items():
            if int(value) != value or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value}")
        if subcentres > _MOST_SUBCENTRES:
            raise ValueError(f"subcentres: {subcentres}, more than {_MOST_SUBCENTRES}")
        check_loss_parameters(alpha, scale, margin)
        if prototype_std is None or not 0 < prototype_std < math.inf:
            raise ValueError(f"prototype_std must be a finite number > 0, got {prototype_std}")
        self.prototype_std = float(prototype_std)
        self.alpha, self.scale, self.margin = float(alpha), float(scale), float(margin)
        self.num_classes, self.sparse_grad = int(num_classes), sparse_grad
        self.subcentres = int(subcentres)
        self.comm = comm = group if isinstance(group, Communicator) else Communicator(group)
        if num_classes < comm.world:
            raise ValueError(f"{num_classes} classes cannot be shared by {comm.world} ranks")
        shape = torch.tensor([embedding_dim, num_classes, subcentres], device=comm.device())
        for rank, other in enumerate(comm.gather_rows(shape)):
            if not torch.equal(shape, other):
                raise ValueError(
                    "shards disagree: (embedding_dim, num_classes, subcentres) is "
                    f"{tuple(shape.tolist())} on rank {comm.rank} and {tuple(other.tolist())} on "
                    f"rank {rank}"
                )
        self.start, self.stop = comm.shard_of(self.num_classes)
        rows = (self.stop - self.start) * self.subcentres
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim, dtype=torch.float32))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.anchor = nn.Parameter(torch.zeros(1)) if distributed else None  # FSDP takes no scalar
        self.register_state_dict_post_hook(_say_shard)
        self.register_load_state_dict_pre_hook(_check_shard)
        # what DDP reads of the module it wraps: its names for gradients and for broadcasts
        self._ddp_params_and_buffers_to_ignore = [".weight", "weight"]
        self._derived, self._room = Derived(sizes), Room()
        self._in_order = RowsInOrder()
        self._optimizer: weakref.ref | None = None
        self.reset_parameters(seed)

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch's; ``fully_shard`` puts its parts of the prototypes in their place so."""
        if isinstance(value, Tensor) and hasattr(value, "device_mesh"):
            raise ValueError(
                f"{type(self).__name__}.{name}: the head shards itself, a part of the classes on "
                "each rank, so fully_shard would mix different classes. Pass the head's parameters "
                "as fully_shard(..., ignored_params=set(head.parameters())), or keep the head "
                "outside the module that is sharded"
            )
        super().__setattr__(name, value)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Normal coordinates of `prototype_std`; the same classes whatever the shards.

        On the meta device nothing is drawn: call it after ``to_empty``.
        """
        if self.weight.is_meta:
            return
        if self.anchor is not None:
            self.anchor.zero_()
        if seed is None:
            drawn = torch.randint(2**31, (1,), device="cpu").to(self.comm.device())
            seed = int(self.comm.from_first(drawn))
        start, stop, every = (
            number * self.subcentres for number in (self.start, self.stop, self.num_classes)
        )
        for first in range(start // _BLOCK * _BLOCK, stop, _BLOCK):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + first // _BLOCK)
            last = min(first + _BLOCK, every)
            shape = last - first, self.weight.shape[1]
            rows = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            low, high = max(start, first), min(stop, last)
            rows = self.prototype_std * rows[low - first : high - first]
            self.weight[low - start : high - start] = rows

    def extra_repr(self) -> str:
        dim = self.weight.shape[1]
        text = f"{dim}, {self.num_classes}, alpha={self.alpha:g}, scale={self.scale:g}, "
        text += f"margin={self.margin:g}"
        text += f", subcentres={self.subcentres}" * (self.subcentres > 1)
        alone = self.comm.world == 1
        return text if alone else f"{text}, classes=[{self.start}, {self.stop})"

    # ---------------------------------------------------------------- optimiser and prototypes

    def own_parameters(self) -> list[nn.Parameter]:
        """What an optimiser of the head's own steps, on each rank its part.

        The others of ``parameters()`` never move and belong to no optimiser, so that its state is
        the same for any number of ranks.
        """
        return [self.weight]

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` steps the rows from now on; its constructor calls this."""
        self._optimizer = weakref.ref(optimizer)

    def is_bound_to(self, optimizer: torch.optim.Optimizer) -> bool:
        return self._optimizer is not None and self._optimizer() is optimizer

    @property
    def may_use_kernels(self) -> bool:
        """Whether ``fused`` and ``kernel_search`` know such a head: each class has one row."""
        return self.subcentres == 1

    @property
    def gives_sparse_grad(self) -> bool:
        """Whether the gradient of `weight` is row-sparse now."""
        bound = self._optimizer is not None and self._optimizer() is not None
        return bound if self.sparse_grad is None else self.sparse_grad

    @property
    def rows_in_order(self) -> RowsInOrder | None:
        """What remembers the rows of a row-sparse gradient; None where it is dense."""
        return self._in_order if self.gives_sparse_grad else None

    def in_order(self, rows: Tensor) -> bool:
        """Whether `rows` [R] are those of the gradient that the last backward pass gave."""
        return self._in_order.holds(rows)

    def prototypes(self) -> Prototypes:
        """The rows with what is derived from them, up to date."""
        self.in_use()
        return self._derived.of(self.weight)

    @property
    def shard(self) -> tuple[int, int, int]:
        """Start, stop and the number of all classes: what states say of a shard.

        ``torch.distributed.checkpoint.state_dict`` looks for an attribute of the state's name.
        """
        return self.start, self.stop, self.num_classes

    def in_use(self) -> None:
        """Refuse prototypes of another type or number; from now on torch's optimisers are watched.

        Raises
        ------
        TypeError, ValueError
        """
        if self.weight.dtype != torch.float32:
            raise TypeError(
                f"QMarginHead keeps float32 prototypes, found {self.weight.dtype}: use autocast "
                "instead of converting the module"
            )
        classes, rows = self.stop - self.start, len(self.weight)
        known = (self.start, self.stop) == self.comm.shard_of(self.num_classes)
        if not known or rows != classes * self.subcentres:
            raise ValueError(
                f"QMarginHead was made for {classes} classes here, of {self.subcentres} rows each, "
                f"and has {rows} rows and num_classes={self.num_classes}: for other classes make "
                "another head, and an optimiser, and copy the rows that stay"
            )
        _heads.add(self)

    def rows_changed(self, rows: Tensor, before: Mark) -> None:
        """The bound optimiser has changed `rows` of the weight, which it found at `before`."""
        self._derived.rows_changed(self.weight, rows, before)

    def written(self) -> None:
        """The weight was changed in a way that may go unnoticed: a few rows, through ``.data``."""
        self._derived.forget()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_optimizer": None}  # that of another weight

    # ---------------------------------------------------------------- forward

    @_eager
    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor | HeadOutput:
        """Loss with labels; without, what ``compute_cost`` takes in training, cosines otherwise.

        Parameters
        ----------
        embeddings : Tensor, [B, D] or [B, 1, D]
            Any length from 1e-12 on and any floating dtype; computed in float32.
        labels : Tensor, [B] or [B, 1], integer, optional

        Returns
        -------
        Tensor or HeadOutput
            Mean loss, a float32 scalar; without labels, in evaluation, cosines [B, 1, C].

        Raises
        ------
        ValueError, TypeError
            Shapes that disagree, labels outside [0, num_classes) or not integers; no tensors; a
            head that was converted to another dtype.
        """
        refuse_no_tensor(embeddings=embeddings)
        if not embeddings.is_floating_point():
            raise TypeError(f"embeddings must be floating point, got {embeddings.dtype}")
        self.in_use()
        if embeddings.ndim == 3 and embeddings.shape[1] == 1:
            embeddings = embeddings.squeeze(1)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"QMarginHead takes embeddings [B, {self.weight.shape[1]}] or "
                f"[B, 1, {self.weight.shape[1]}], got {tuple(embeddings.shape)}"
            )
        if labels is None and not self.training:
            return self._cosines(embeddings)
        self.comm.refuse_if_late(type(self).__name__)
        anchored = None if self.anchor is None else self.anchor * 1
        output = HeadOutput(self, embeddings, anchored)
        if labels is None:
            return output
        loss = output.q_margin_loss(labels, self.alpha, self.scale, self.margin)
        assert isinstance(loss, Tensor)
        return loss

    def looked_at(self, targets: Tensor, sizes: list[int]) -> LookedAt:
        """What a step on targets [b] of this rank looks at: all classes."""
        shard = Shard(
            self.prototypes(),
            self.start,
            self.stop,
            self.num_classes,
            self.comm,
            self.rows_in_order,
            self.subcentres,
        )
        return LookedAt(shard, self.weight, targets, None)

    def rows_are_finite(self) -> Tensor:
        """Whether this rank's prototypes are, a bool on the device: a search would pass one by."""
        return are_finite(self.prototypes().inverse_norm)

    @_eager
    def training_cosines(self, embeddings: Tensor) -> Tensor:
        """[B, C] of embeddings [B, D], in the graph; TypeError where the classes are in shards."""
        if self.comm.world > 1:
            raise TypeError(
                "this loss needs all cosines of a batch, and the classes are in shards: train it "
                "with --head dense, or with one process"
            )
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.all_cosines(_unit(embeddings))

    def all_cosines(self, unit: Tensor) -> Tensor:
        """[B, C] of unit embeddings [B, D] and the classes of this rank, in the graph."""
        cosines = F.linear(unit, F.normalize(self.weight, dim=1))
        if self.subcentres == 1:
            return cosines
        return cosines.unflatten(1, (-1, self.subcentres)).max(2).values

    def _cosines(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            unit = _unit(embeddings)
            if self.comm.world == 1:
                return self.all_cosines(unit).unsqueeze(1)
            sizes = self._agree(embeddings, None, None).sizes
            x = self.comm.gather(unit.detach(), sizes)
            cosines = F.normalize(self.weight.detach(), dim=1) @ x.T
            cosines = cosines.unflatten(0, (-1, self.subcentres)).amax(1)
            counts = [stop - start for start, stop in self.comm.shards(self.num_classes)]
            everything = self.comm.gather(cosines, counts)
            return everything[:, self.comm.own(sizes)].T.unsqueeze(1)

    def _agree(
        self, embeddings: Tensor, labels: Tensor | None, refused: Exception | None
    ) -> _Agreement:
        """What all ranks know of a step before it.

        All ranks raise if one of them has bad input, so that none waits.
        """
        wrong = torch.zeros((), dtype=torch.int64, device=embeddings.device)
        if labels is not None and refused is None:
            wrong = ((labels < 0) | (labels >= self.num_classes)).sum()
        finite = embeddings.detach().float().isfinite().all()
        finite_rows = torch.ones_like(finite)
        if labels is not None and refused is None:
            finite_rows = self.rows_are_finite()
        if self.comm.world == 1:
            if refused is not None:
                raise refused
            if labels is not None:
                _check_range(labels, wrong, self.num_classes)
            return _Agreement([len(embeddings)], finite, finite_rows, False)
        kernels = labels is not None and refused is None and self.may_use_kernels
        kernels = kernels and takes(self.prototypes(), alpha=2.0)
        facts = [len(embeddings), wrong, refused is not None, ~finite, ~finite_rows, not kernels]
        facts.append(content(self.weight))
        facts = torch.stack(
            [torch.as_tensor(fact, device=embeddings.device).long() for fact in facts]
        )
        facts = torch.stack(self.comm.gather_rows(facts)).tolist()
        if refused is not None:
            raise refused
        for rank, (size, wrong_labels, other, *_) in enumerate(facts):
            if not size:
                raise ValueError(f"rank {rank}: an empty batch of embeddings")
            if other:
                raise ValueError(f"rank {rank} refused its input; its own message says why")
            if wrong_labels and labels is not None:
                mine = f" (here: {labels.tolist()})" if rank == self.comm.rank else ""
                raise ValueError(
                    f"rank {rank}: {wrong_labels} labels outside [0, {self.num_classes}){mine}: "
                    "set num_classes (out_n_neurons) to the size of the label encoder"
                )
        sizes, _, _, *infinite, without, contents = zip(*facts, strict=True)
        if len(set(contents)) == 1 and not any(infinite[1]):
            raise RuntimeError(_ALIKE)
        finite, finite_rows = (
            torch.tensor(not any(one), device=embeddings.device) for one in infinite
        )
        return _Agreement(list(sizes), finite, finite_rows, not any(without))

    # ---------------------------------------------------------------- checkpoints

    def _check_bound(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None and not self.is_bound_to(optimizer):
            raise ValueError(
                f"shards hold the state of the RowSparseSGD or RowSparseAdam that steps this head, "
                f"and it is not bound to the {type(optimizer).__name__} given: pass that one, or "
                "none, and each rank saves the state_dict of its optimiser by itself"
            )

    def save_shards(self, folder: str | Path, optimizer: RowSparse | None = None) -> None:
        """Write a checkpoint that any number of ranks can load; every rank calls it.

        Saving changes nothing. The previous checkpoint in the folder is valid until this one is.

        Parameters
        ----------
        folder : path
            Seen by all ranks.
        optimizer : RowSparseSGD or RowSparseAdam, optional
            Its state of the prototypes is saved with them.

        Raises
        ------
        ValueError
            An optimiser that this head is not bound to.
        """
        self._check_bound(optimizer)
        shards.save_shards(
            folder, self.weight, self.num_classes, self.comm, optimizer, subcentres=self.subcentres
        )

    def load_shards(
        self, folder: str | Path, optimizer: RowSparse | None = None, *, first_rows: bool = False
    ) -> None:
        """Read what :meth:`save_shards` wrote on any number of ranks.

        With `first_rows` the head may have fewer classes than the checkpoint, and takes its first
        ones.

        Raises
        ------
        FileNotFoundError, ValueError
            No checkpoint, or one of another size: the message names the folder and both sizes. One
            without an optimiser's state, where there is an `optimizer`; one that this head is not
            bound to.
        """
        self._check_bound(optimizer)
        shards.load_shards(
            folder,
            self.weight,
            self.num_classes,
            self.comm,
            optimizer,
            subcentres=self.subcentres,
            first_rows=first_rows,
        )


@dataclass(eq=False)
class HeadOutput:
    """A batch's training output: what a loss evaluates.

    Attributes
    ----------
    head : QMarginHead
    embeddings : Tensor, [B, D]
        As the head was given them.
    anchored : Tensor or None
        The head's anchor in the graph: DDP looks for tensors in a dataclass's fields.

    Examples
    --------
    >>> head = QMarginHead(embedding_dim=2, num_classes=2)
    >>> _ = head.load_state_dict({"weight": torch.eye(2)})
    >>> output = head(torch.tensor([[1.0, 1.0]]))           # as near to one as to the other
    >>> output.cosines().detach()
    tensor([[0.7071, 0.7071]])
    >>> loss = output.q_margin_loss(torch.tensor([0]), alpha=2.0, scale=1.0, margin=0.0)
    >>> round(loss.item(), 4)                               # (1 - 0.5^2 - 0.5^2) / 2
    0.25
    """

    head: QMarginHead
    embeddings: Tensor
    anchored: Tensor | None = None

    @overload
    def q_margin_loss(
        self,
        targets: Tensor,
        alpha: float,
        scale: float,
        margin: float | Tensor,
        *,
        log_q: Tensor | None = ...,
        reduction: str = ...,
        return_stats: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def q_margin_loss(
        self,
        targets: Tensor,
        alpha: float,
        scale: float,
        margin: float | Tensor,
        *,
        log_q: Tensor | None = ...,
        reduction: str = ...,
        return_stats: Literal[True],
    ) -> tuple[Tensor, QMarginStats]: ...
    def q_margin_loss(
        self,
        targets: Tensor,
        alpha: float,
        scale: float,
        margin: float | Tensor,
        *,
        log_q: Tensor | None = None,
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, QMarginStats]:
        """As :func:`speechbrain_qmargin.q_margin_loss`, for targets [B] or [B, 1].

        Raises
        ------
        ValueError, TypeError
            As that function.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        rows = self._rows(
            targets,
            lambda flat: q_margin_objective(flat, alpha, scale, margin, log_q),
        )
        loss, stats = rows.loss, QMarginStats.of(rows, alpha) if return_stats else None
        if reduction != "none":
            loss = loss.mean() if reduction == "mean" else loss.sum()
        return (loss, stats) if stats is not None else loss

    @property
    def num_classes(self) -> int:
        """Over all shards."""
        return self.head.num_classes

    def cosines(self) -> Tensor:
        """[B, C], in the graph; TypeError where they are not in one place."""
        return self.head.training_cosines(self.embeddings)

    def evaluate(
        self,
        targets: Tensor,
        objective: Objective | BinaryObjective,
        *,
        statistics: bool = False,
    ) -> Rows:
        """See :meth:`speechbrain_qmargin.loss.interface.Scores.evaluate`; exact for all of them.

        Supports come in any case.
        """
        return self._rows(targets, lambda _: objective)

    @_eager
    def _rows(self, targets: Tensor, ask: Callable[[Tensor], Objective | BinaryObjective]) -> Rows:
        head, embeddings, refused = self.head, self.embeddings, None
        objective: Objective | BinaryObjective = Objective(scale=1.0)
        try:
            targets = self._checked(targets)
            objective = completed(ask(targets), targets, head.num_classes)
            log_q = objective.log_q if isinstance(objective, Objective) else None
            if log_q is not None and log_q.requires_grad:
                raise TypeError("the sparse head gives no gradient by log_q: pass log_q.detach()")
        except (ValueError, TypeError) as error:
            refused = error  # raised where all ranks hear of it
        with torch.autocast(embeddings.device.type, enabled=False):
            alone = head.comm.world == 1
            if refused is None and isinstance(objective, Objective) and alone:
                rows = self._fused(targets, objective)
                if rows is not None:
                    return rows
            sizes, finite, finite_rows, kernels = head._agree(embeddings, targets, refused)
            if kernels and isinstance(objective, Objective):
                rows = self._fused(targets, objective, sizes)
                if rows is not None:
                    return rows
            unit = _unit(embeddings)
            raw = embeddings.detach().float()
            shard, weight, names, classes, of_drawn = head.looked_at(targets, sizes)
            finite_rows = finite_rows if of_drawn is None else of_drawn
            if host_decides(unit.device) and not bool(finite_rows):
                return self._no_loss()
            finite = finite & finite_rows
            batch = (unit, weight, self.anchored, names, raw, finite, sizes, shard)
            if isinstance(objective, BinaryObjective):
                loss, posterior = BinaryLoss.apply(*batch, objective, *objective.parameters)
                return Rows(loss, posterior, torch.full_like(posterior, shard.classes))
            log_q, target_log_q = objective.log_q, objective.target_log_q
            if target_log_q is None:
                target_log_q = torch.zeros_like(unit[:, 0], dtype=torch.float64)
            target_log_q = target_log_q.detach().to(unit.device, torch.float64)
            if objective.spread is None:  # of norms it is no more finite than these
                target_log_q = torch.where(finite, target_log_q, 0)
            log_q = None if log_q is None else log_q.to(unit.device)
            spread = objective.spread
            if spread is None:
                spread = _spread(target_log_q, log_q, head.comm)
            if classes is not None and log_q is not None:
                own, log_q = log_q[classes], log_q.new_zeros(shard.classes)
                log_q[shard.start : shard.stop] = own
            asked = replace(objective, log_q=log_q, target_log_q=target_log_q, spread=spread)
            found = Evaluation(*HeadLoss.apply(*batch, asked))
            rows = Rows(found.loss, found.target_posterior, found.support)
            return attach(rows, objective, found.target_cosines, found.residual)

    def _no_loss(self) -> Rows:
        """NaN, without a gradient."""
        graph = self.embeddings.float().sum(1)
        if self.anchored is not None:
            graph = graph + self.anchored
        loss = torch.where(torch.zeros_like(graph, dtype=torch.bool), graph, torch.nan)
        nothing = torch.zeros_like(loss).detach()
        return Rows(loss, nothing, nothing)

    def _fused(
        self, targets: Tensor, objective: Objective, sizes: list[int] | None = None
    ) -> Rows | None:
        """By a few kernels, where that is the way; `sizes` of all ranks' batches, of several."""
        head = self.head
        if not head.may_use_kernels:
            return None
        prototypes = head.prototypes()
        if not takes(prototypes, objective.alpha):
            return None
        raw, target_log_q = self.embeddings.float(), objective.target_log_q
        if target_log_q is None:
            target_log_q = torch.zeros(len(raw), dtype=torch.float64, device=raw.device)
        log_q = objective.log_q
        asked = replace(
            objective,
            target_log_q=target_log_q.detach().to(raw.device, torch.float64),
            log_q=None if log_q is None else log_q.to(raw.device),
        )
        if sizes is None:
            parts = fused.evaluate(raw.detach(), targets, asked, prototypes, head._room)
        else:
            shard = head.looked_at(targets, sizes).shard
            step = fused_shards.evaluate(raw.detach(), targets, asked, shard, head._room, sizes)
            parts = None if step is None else [(slice(0, len(raw)), step)]
        if parts is None:
            return None
        whole = len(parts) == 1  # of which no view is taken: its gradient would be copied
        each = [
            fused.FusedLoss.apply(
                raw if whole else raw[part],
                head.weight,
                self.anchored,
                step,
                prototypes,
                head.rows_in_order,
                head.comm,
                sizes,
            )
            for part, step in parts
        ]
        found = Evaluation(*(each[0] if whole else map(torch.cat, zip(*each, strict=True))))
        rows = Rows(found.loss, found.target_posterior, found.support)
        return attach(rows, objective, found.target_cosines, found.residual)

    def _checked(self, targets: Tensor) -> Tensor:
        batch = len(self.embeddings)
        targets = flat(targets)
        if batch == 0:
            raise ValueError("an empty batch of embeddings")
        if targets.shape != (batch,):
            raise ValueError(f"targets must be [B] = [{batch}], got {tuple(targets.shape)}")
        return targets


def _say_shard(head: QMarginHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The anchor is left out: what torchrun wrote is loaded without it, and the other way round."""
    state.pop(f"{prefix}anchor", None)
    if head.comm.world > 1:
        state[f"{prefix}shard"] = named_shard(*head.shard)


def _check_shard(head: QMarginHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse the classes of another rank: shards have one size and one name."""
    said = state.pop(f"{prefix}shard", None)
    if said is not None and tuple(said.tolist()) != head.shard:
        one, other = named_classes(*said.tolist()), named_classes(*head.shard)
        raise ValueError(
            f"the state is of the classes {one}, and rank {head.comm.rank} holds {other}. "
            "torch.distributed.checkpoint keeps one rank's shard for all; use save_shards and "
            "load_shards, which load on any number of ranks"
        )
    state.pop(f"{prefix}anchor", None)
    if head.anchor is not None:
        state[f"{prefix}anchor"] = head.anchor.detach()


def _unit(embeddings: Tensor) -> Tensor:
    """[B, D] of length 1, float32: beyond 1e19 the square of a length is no float32."""
    return F.normalize(embeddings.to(row_dtype(embeddings)), dim=1).float()


def _spread(target_log_q: Tensor, log_q: Tensor | None, comm: Communicator) -> float:
    """log(q_max / q_min) over the targets of all ranks and the classes."""
    low, high = torch.aminmax(target_log_q)
    if log_q is not None:
        least, most = torch.aminmax(log_q)
    else:
        least = most = torch.zeros_like(low)
    ends = torch.stack((torch.maximum(high, most), -torch.minimum(low, least)))
    spread = float(comm.max(ends).sum())
    if not math.isfinite(spread):
        raise ValueError("margin or log_q is not finite (NaN or inf)")
    return spread


def _check_range(labels: Tensor, wrong: Tensor, num_classes: int) -> None:
    if not host_decides(labels.device):
        assert_on_device(
            wrong == 0, f"a target label is outside [0, {num_classes}), the number of classes"
        )
    elif int(wrong):
        refuse_labels(labels, num_classes)


# ---------------------------------------------------------------- other optimisers

# Heads that were used. An optimiser of torch's is asked before and after its step: some of them
# cannot take sparse gradients, and the fused ones write a parameter without raising its version.
_heads: weakref.WeakSet[QMarginHead] = weakref.WeakSet()


def _held(optimizer: torch.optim.Optimizer) -> list[tuple[QMarginHead, dict]]:
    return [
        (head, group)
        for head in list(_heads)
        if not head.is_bound_to(optimizer)
        for group in optimizer.param_groups
        if any(p is head.weight for p in group["params"])
    ]


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    able = isinstance(optimizer, (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam))
    for head, group in _held(optimizer):
        grad = head.weight.grad
        if grad is None or not grad.is_sparse or isinstance(optimizer, RowSparse):
            continue
        if not able or group.get("weight_decay", 0):
            raise TypeError(
                f"the gradient of QMarginHead's prototypes is row-sparse, which "
                f"{type(optimizer).__name__} cannot take"
                f"{' with weight_decay' if able else ''}: make the head with sparse_grad=False, or "
                "step it with RowSparseSGD or RowSparseAdam"
            )


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for head, _group in _held(optimizer):
        head.written()


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
