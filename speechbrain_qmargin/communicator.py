"""What the ranks of a process group tell each other; alone, nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Communicator", "named_classes"]


def named_classes(start: int, stop: int, num_classes: int) -> str:
    """How messages name a rank's part of the classes.

    >>> named_classes(0, 5, 10)
    '[0, 5) of 10'
    """
    return f"[{start}, {stop}) of {num_classes}"


def _processes() -> int:
    """How many ``torch.distributed`` has; 0 where it is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0


class Communicator:
    """Sums, maxima, gathers and decisions over the ranks of a group; with one rank, no-ops.

    A copy of a head shares its communicator: process groups are not copied.

    Parameters
    ----------
    group : ProcessGroup, optional
        None: all processes, or this one alone where torch.distributed is not initialised.

    Attributes
    ----------
    world, rank : int
    bytes, calls : int
        What this rank has sent so far, and in how many collectives.

    Examples
    --------
    >>> comm = Communicator()
    >>> comm.world, comm.rank, comm.shard_of(10)
    (1, 0, (0, 10))
    """

    _before_others = False  # whether it was made before there could be others

    def __init__(self, group: Any = None) -> None:
        self.group, self.bytes, self.calls = group, 0, 0
        self.world, self.rank = 1, 0
        self._before_others = group is None and not _processes()
        if _processes():
            self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)

    @classmethod
    def alone(cls) -> Communicator:
        """Of one rank, whatever there is."""
        comm = cls.__new__(cls)
        comm.group, comm.bytes, comm.calls, comm.world, comm.rank = None, 0, 0, 1, 0
        return comm

    def refuse_if_late(self, who: str) -> None:
        """Where it was made before ``torch.distributed`` was initialised: it knows of no others.

        Raises
        ------
        RuntimeError
            There are others now, each with the same classes, that nothing would keep equal.

        Examples
        --------
        >>> Communicator().refuse_if_late("QMarginHead")        # alone, as when it was made
        """
        if self._before_others and _processes() > 1:
            raise RuntimeError(
                f"{who} was made before torch.distributed was initialised, and has all classes in "
                "each of the processes, where they would drift apart: make it after "
                "init_process_group, which splits its classes over the ranks (or, for one that "
                "trains on its own process alone, with group=Communicator.alone())"
            )

    def __deepcopy__(self, memo: dict) -> Communicator:
        return self

    def __getstate__(self) -> dict:
        if self.group is not None:
            raise TypeError("a head with a process group of its own cannot be pickled")
        return self.__dict__

    def shard_of(self, num_classes: int, rank: int | None = None) -> tuple[int, int]:
        """[start, stop) of a rank: contiguous, sizes differ by one at most."""
        rank = self.rank if rank is None else rank
        return rank * num_classes // self.world, (rank + 1) * num_classes // self.world

    def shards(self, num_classes: int) -> list[tuple[int, int]]:
        """[start, stop) of all ranks."""
        return [self.shard_of(num_classes, rank) for rank in range(self.world)]

    def own(self, sizes: list[int]) -> slice:
        """This rank's rows of what has sizes[r] rows of every rank r, one after the other.

        Examples
        --------
        >>> Communicator().own([3])
        slice(0, 3, None)
        """
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the ranks, elementwise."""
        return self._reduced(tensor, dist.ReduceOp.SUM) if self.world > 1 else tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Over the ranks, elementwise; exact, so the same everywhere."""
        return self._reduced(tensor, dist.ReduceOp.MAX) if self.world > 1 else tensor

    def max_and_flags(self, tensor: Tensor, *flags: bool) -> tuple[Tensor, list[bool]]:
        """The maximum [B], float64, and whether a flag is set on some rank, in one exchange."""
        if self.world == 1:
            return tensor, list(flags)
        packed = torch.cat([tensor, tensor.new_tensor(flags)])
        packed = self.max(packed)
        return packed[: len(tensor)], [bool(flag) for flag in packed[len(tensor) :].tolist()]

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        if self.world == 1:
            return flag
        return bool(self.max(torch.tensor(float(flag), device=self.device())))

    def settled(self, done: Tensor) -> bool:
        """Whether the first rank finds all `done`: a loop's end is decided once."""
        return bool(self.from_first(done.all()))

    def from_first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, everywhere."""
        if self.world == 1:
            return tensor
        whole = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone()
        self.calls += 1
        if self.rank == 0:
            self.bytes += whole.numel() * whole.element_size()
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        dist.broadcast(whole, src=first, group=self.group)
        return whole.to(tensor.dtype)

    def gather(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenation over the ranks of [n_r, ...], n_r = sizes[rank]."""
        if self.world == 1:
            return tensor
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = self.gather_rows(padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_all(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Concatenations over the ranks of [n_r, ...], all of one n_r, which each rank knows alone.

        Examples
        --------
        >>> Communicator().gather_all(torch.tensor([5.0, 7.0]))     # alone: its own
        (tensor([5., 7.]),)
        """
        if self.world == 1:
            return tensors
        own = torch.tensor([len(tensors[0])], device=tensors[0].device)
        sizes = [int(size) for size in self.gather_rows(own)]
        return tuple(self.gather(tensor, sizes) for tensor in tensors)

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """One tensor of the same shape from every rank."""
        if self.world == 1:
            return [tensor]
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        dist.all_gather(parts, tensor, group=self.group)
        return parts

    def sum_of_own(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """This rank's rows of the sum of [sum(sizes), ...] over the ranks.

        Each rank gets its part alone where the backend has that (NCCL).
        """
        if self.world == 1:
            return tensor
        if dist.get_backend(self.group) != "nccl":
            return self.sum(tensor)[self.own(sizes)]
        most = max(sizes)
        padded = tensor.new_zeros((self.world, most, *tensor.shape[1:]))
        for part, rows in zip(padded, tensor.split(sizes), strict=True):
            part[: len(rows)] = rows
        own = torch.empty_like(padded[0])
        self.calls += 1
        self.bytes += padded.numel() * padded.element_size()
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=self.group)
        return own[: sizes[self.rank]]

    def device(self) -> torch.device:
        """Where the group's backend wants its tensors."""
        nccl = self.world > 1 and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def barrier(self) -> None:
        """Wait for all."""
        if self.world > 1:
            dist.barrier(group=self.group)

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        tensor = tensor.contiguous().clone()
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor
