"""Ranks as threads of one process: what shards do, without the start of processes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from speechbrain_qmargin.communicator import Communicator


class Threads(Communicator):
    """One of the ranks that share a barrier and a place each."""

    def __init__(self, rank, barrier, places, device):
        super().__init__()
        self.world, self.rank = len(places), rank
        self._barrier, self._places, self._device = barrier, places, device

    def gather_rows(self, tensor):
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        self._places[self.rank] = tensor.clone()
        self._barrier.wait(60)
        parts = list(self._places)
        self._barrier.wait(60)
        return parts

    def from_first(self, tensor):
        return self.gather_rows(tensor)[0]

    def device(self):
        return self._device

    def sum_of_own(self, tensor, sizes):
        return self.sum(tensor)[self.own(sizes)]

    def barrier(self):
        self._barrier.wait(60)

    def _reduced(self, tensor, op):
        parts = torch.stack(self.gather_rows(tensor))
        return parts.sum(0) if op == dist.ReduceOp.SUM else parts.amax(0)


def on_ranks(world, function, device="cpu"):
    """What `function(communicator)` gives on each rank; the first error of a rank is raised.

    Each has its backward pass in its own thread: on a GPU autograd has one for all of them, where
    the first that waits for the others would wait for ever.
    """
    barrier, places = threading.Barrier(world), [None] * world

    def one(rank):
        try:
            with torch.autograd.set_multithreading_enabled(False):
                return function(Threads(rank, barrier, places, torch.device(device)))
        except Exception:
            barrier.abort()  # the others wait for nothing
            raise

    with ThreadPoolExecutor(world) as pool:
        found = [pool.submit(one, rank) for rank in range(world)]
    errors = [each.exception() for each in found if each.exception()]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [each.result() for each in found]
