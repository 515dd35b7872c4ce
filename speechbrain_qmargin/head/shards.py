"""Classifiers whose classes are in shards: their contract, and checkpoints that any ranks load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.files import replacing, write_text
from speechbrain_qmargin.head.optim import RowSparse

__all__ = ["ShardedClassifier", "load_shards", "save_shards", "whole_weight"]

_INDEX = "index.json"


class ShardedClassifier(nn.Module):
    """What a training asks of a classifier whose classes may be in shards over the processes.

    It has an optimiser of its own, by ``head_opt_class``, and writes its own checkpoint;
    :class:`~.QMarginHead` is one.

    Attributes
    ----------
    weight : Parameter, [classes of this rank * subcentres, D]
    comm : Communicator
        Of the ranks that share the classes.
    num_classes : int
        On all ranks together.
    """

    weight: nn.Parameter
    comm: Communicator
    num_classes: int

    def own_parameters(self) -> list[nn.Parameter]:
        """What the optimiser of its own steps, and no other of ``parameters()``."""
        raise NotImplementedError

    def save_shards(
        self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Write a checkpoint; every rank calls it."""
        raise NotImplementedError

    def load_shards(
        self,
        folder: str | Path,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        first_rows: bool = False,
    ) -> None:
        """Read one; with `first_rows` into a classifier of fewer classes, the first ones."""
        raise NotImplementedError


def whole_weight(head: ShardedClassifier) -> Tensor:
    """The prototypes of all ranks [C, D], where each class has one; every rank calls it.

    >>> from speechbrain_qmargin.head import QMarginHead
    >>> whole_weight(QMarginHead(embedding_dim=4, num_classes=10)).shape
    torch.Size([10, 4])
    """
    sizes = [stop - start for start, stop in head.comm.shards(head.num_classes)]
    return head.comm.gather(head.weight.detach(), sizes)


def save_shards(
    folder: str | Path,
    weight: Tensor,
    num_classes: int,
    comm: Communicator,
    optimizer: RowSparse | None = None,
    *,
    subcentres: int = 1,
) -> None:
    """Write the prototypes, or other rows of the classes, and their optimiser's state.

    Every rank calls it.

    Each rank writes its shard under a new name, then the first writes the index that names them:
    until that moment the previous checkpoint in the folder is whole and valid.

    Raises
    ------
    ValueError
        On all ranks, where some of them have an optimiser and some have none.
    OSError
        On all ranks, where the first does not see what the others wrote: the folder is not in a
        file system that their machines share.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> comm, weight, loaded = Communicator(), torch.eye(3), torch.zeros(3, 3)
    >>> save_shards(folder, weight, 3, comm)
    >>> load_shards(folder, loaded, 3, comm)
    >>> torch.equal(loaded, weight)
    True
    """
    folder = Path(folder)
    ranks = comm.gather_rows(torch.tensor([optimizer is not None], device=comm.device()))
    if len({bool(rank) for rank in ranks}) > 1:
        raise ValueError("save_shards: some ranks gave their optimiser, others did not")
    token = torch.randint(2**40, (1,), device=comm.device())
    token = f"{int(comm.gather_rows(token)[0]):x}"
    start, stop = comm.shard_of(num_classes)
    state: dict[str, Any] = {"weight": weight.detach()}
    if optimizer is not None:
        state["optimizer"] = optimizer.rows_state(weight)
    with replacing(folder / f"classes-{start}-{stop}-{token}.pt") as partial:
        torch.save(state, partial)
    comm.barrier()
    shards = [[a, b, f"classes-{a}-{b}-{token}.pt"] for a, b in comm.shards(num_classes)]
    unseen = [name for *_, name in shards if comm.rank == 0 and not (folder / name).is_file()]
    if comm.any(bool(unseen)):
        raise OSError(
            f"{folder}: the shards of some ranks are not there, where the first rank looks. With "
            "several machines the folder has to lie in a file system that all of them share"
        )
    if comm.rank == 0:
        sizes = {"embedding_dim": weight.shape[1], "num_classes": num_classes}
        sizes["subcentres"] = subcentres  # rows of each class; the shards are in classes
        write_text(folder / _INDEX, json.dumps({**sizes, "shards": shards}))
        kept = {name for *_, name in shards}
        for old in folder.glob("classes-*.pt"):
            if old.name not in kept:
                old.unlink()
    comm.barrier()


@torch.no_grad()
def load_shards(
    folder: str | Path,
    weight: Tensor,
    num_classes: int,
    comm: Communicator,
    optimizer: RowSparse | None = None,
    *,
    subcentres: int = 1,
    first_rows: bool = False,
) -> None:
    """Read what :func:`save_shards` wrote on any number of ranks.

    Raises
    ------
    FileNotFoundError, ValueError
        No checkpoint, or one of another size: the message names the folder and both sizes. One
        without an optimiser's state, where there is an `optimizer`; `weight` is then as it was.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> comm, weight = Communicator(), torch.zeros(2, 3)
    >>> save_shards(folder, torch.eye(3), 3, comm)
    >>> load_shards(folder, weight, 2, comm, first_rows=True)       # two classes of three
    >>> weight
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        theirs = (index["embedding_dim"], index.get("subcentres", 1), index["num_classes"])
        stored_shards = [(int(a), int(b), str(name)) for a, b, name in index["shards"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} holds no checkpoint of a head: no {_INDEX}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / _INDEX} is no index of a head's shards: {error}") from None
    ends = [0, *(stop for _, stop, _ in stored_shards)]
    if [start for start, _, _ in stored_shards] != ends[:-1] or ends[-1] != theirs[2]:
        raise ValueError(
            f"{folder / _INDEX} is no index of a head's shards: they do not follow each other from "
            f"0 to {theirs[2]} classes"
        )
    ours = (weight.shape[1], subcentres, num_classes)
    if theirs != ours and not (first_rows and theirs[:2] == ours[:2] and theirs[2] > ours[2]):
        raise ValueError(
            f"{folder}: the checkpoint has (embedding_dim, subcentres, num_classes) = {theirs}, "
            f"this head {ours}"
        )
    first, last = comm.shard_of(num_classes)
    parts = []
    for start, stop, name in stored_shards:
        low, high = max(start, first), min(stop, last)
        if low >= high:
            continue
        stored = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        if optimizer is not None and "optimizer" not in stored:
            raise ValueError(
                f"{folder}: saved without an optimiser's state; load it without one, which then "
                "begins anew"
            )
        rows = (stop - start) * subcentres
        if stored["weight"].shape != (rows, weight.shape[1]):
            raise ValueError(
                f"{folder / name} has prototypes {list(stored['weight'].shape)}, its index says "
                f"{[rows, weight.shape[1]]}"
            )
        here, there = (
            slice((low - origin) * subcentres, (high - origin) * subcentres)
            for origin in (first, start)
        )
        weight[here] = stored["weight"][there].to(weight.device)
        if optimizer is not None:
            state = stored["optimizer"]
            state = {
                key: value[there] if value.ndim and len(value) == rows and key != "idle" else value
                for key, value in state.items()
            }
            parts.append((here, state))
    if optimizer is not None and parts:
        optimizer.load_rows_state(weight, parts)
