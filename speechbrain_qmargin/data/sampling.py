"""The order of training items: every speaker equally often, or all at random, shared out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["BalancedSampler", "SharedOrder"]

_AT_ONCE = 2**16  # numbers that become Python's


class BalancedSampler(Sampler[int]):
    """Equally many items of every class per epoch, in rounds that have each class once.

    A batch no larger than the number of classes thus has a class at most twice. A class with fewer
    items than rounds has some again, and each further time the item is another *draw* of it:
    index ``draw * len(classes) + item``, which
    :class:`~speechbrain_qmargin.data.speech_dataset.SpeechDataset` answers with another crop, speed
    and augmentation.

    The order is a function of (seed, epoch). It is the whole run's: over several processes
    SpeechBrain's Brain deals it out (DistributedSamplerWrapper), every rank its own items.

    Parameters
    ----------
    classes : sequence or array [N]
        The class of every item of the dataset, in its order.
    seed : int
    epoch : callable, optional
        Gives the current epoch; without it, :meth:`set_epoch` says it.
    rounds : int, optional
        Items of each class per epoch; by default as many as keep the epoch's size (the mean, up).
    distinct_draws : bool
        False gives plain indices, for datasets that know no draws.

    Raises
    ------
    ValueError
        No items, or `rounds` below 1.

    Examples
    --------
    >>> sampler = BalancedSampler(["a", "a", "a", "b"], rounds=2)
    >>> order = list(sampler)
    >>> sum(index % 4 == 3 for index in order), len(order)
    (2, 4)
    """

    def __init__(
        self,
        classes: Sequence,
        *,
        seed: int = 0,
        epoch: Callable[[], int] | None = None,
        rounds: int | None = None,
        distinct_draws: bool = True,
    ) -> None:
        if not len(classes):
            raise ValueError("classes: there are no items to sample")
        _, codes, counts = np.unique(classes, return_inverse=True, return_counts=True)
        order = np.argsort(codes, kind="stable")
        self._items = np.split(order, np.cumsum(counts)[:-1])
        self._size = len(classes)
        self.rounds = -(-self._size // len(counts)) if rounds is None else rounds
        if self.rounds < 1:
            raise ValueError(f"rounds: {rounds}, at least 1 is needed")
        self.seed, self._epoch, self._given = seed, 0, epoch
        self._distinct = distinct_draws

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; without effect where `epoch` was given as a callable."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.rounds * len(self._items)

    def __iter__(self) -> Iterator[int]:
        epoch = self._epoch if self._given is None else self._given()
        rng = np.random.default_rng([self.seed, epoch])
        table = np.empty((len(self._items), self.rounds), dtype=np.int64)
        for row, items in zip(table, self._items, strict=True):
            for draw, start in enumerate(range(0, self.rounds, len(items))):
                part = rng.permutation(items)[: self.rounds - start]
                row[start : start + len(part)] = part + draw * self._size * self._distinct
        for column in table.T:
            yield from rng.permutation(column).tolist()


class SharedOrder(Sampler[int]):
    """One process's items of a random order of all of them, the same order in every process.

    Item n of the order is process n % `processes`'s, so that a step trains on the items of one
    process's step with the whole batch; those at the end that do not go round are left out. The
    order is that of SpeechBrain's ReproducibleRandomSampler. Its numbers are not Python's until
    they are needed, which for 42 million items are gigabytes in each process.

    Parameters
    ----------
    items : int
        In all.
    rank, processes : int
    seed : int

    Examples
    --------
    >>> orders = [SharedOrder(7, rank, 2) for rank in (0, 1)]
    >>> [len(order) for order in orders], len({*orders[0], *orders[1]})
    ([3, 3], 6)
    """

    def __init__(self, items: int, rank: int, processes: int, seed: int = 0) -> None:
        self.items, self.rank, self.processes, self.seed = items, rank, processes, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.items // self.processes

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self._epoch)
        order = torch.randperm(self.items, generator=generator)
        own = order[self.rank : len(self) * self.processes : self.processes].clone()
        del order
        for part in own.split(_AT_ONCE):
            yield from part.tolist()
