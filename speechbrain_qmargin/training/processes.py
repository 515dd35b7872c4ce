"""The processes of a run: joined, and one after the other where files are made."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from speechbrain.utils.distributed import (
    ddp_barrier,
    ddp_broadcast,
    ddp_init_group,
    if_main_process,
)
from torch.amp.grad_scaler import GradScaler

from speechbrain_qmargin.communicator import Communicator

__all__ = [
    "deterministic_algorithms",
    "made_by_main_process",
    "main_process_first",
    "processes",
    "refuse_one_gpu_for_all",
    "scaler_of_shards",
]

T = TypeVar("T")


@contextmanager
def processes(run_opts: Any) -> Iterator[None]:
    """The processes that torchrun started, joined for the time of a run.

    To leave NCCL's group is to wait for the others. After an error they wait for this process in
    a collective of their own, so neither would end, and the error would not be seen: the group is
    left to the end of the process, upon which torchrun ends the others.

    Examples
    --------
    >>> with processes({}):         # of one process nothing is joined
    ...     torch.distributed.is_initialized()
    False
    """
    ddp_init_group(run_opts)
    done = False
    try:
        yield
        ddp_barrier()  # none leaves while another still needs it
        done = True
    finally:
        together = torch.distributed.is_initialized()
        if together and (done or torch.distributed.get_backend() != "nccl"):
            gc.collect()  # what still holds the group would end its threads too late
            torch.distributed.destroy_process_group()


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """On a GPU every sum in an order that does not change within, if that is wanted; slower.

    torch raises where an operation has no such algorithm. To be entered before anything is
    computed on a GPU.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def scaler_of_shards(scaler: GradScaler, device: str, comm: Communicator) -> GradScaler:
    """A scaler of gradients for ranks that each have parameters of their own.

    torch's own looks at a rank's gradients alone: where one shard's overflows, that rank leaves out
    its step and halves its scale, and from then on DDP averages gradients of different scales.

    Parameters
    ----------
    scaler : GradScaler
        As SpeechBrain makes it. It is returned as it is if it is not enabled, or one rank has all.
    device : str
    comm : Communicator
        Of the ranks that step together.

    Examples
    --------
    >>> scaler = GradScaler("cpu")
    >>> scaler_of_shards(scaler, "cpu", Communicator()) is scaler       # of one rank
    True
    """
    if comm.world == 1 or not scaler.is_enabled():
        return scaler
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(device, init_scale=scaler.get_scale(), process_group=comm.group)


def refuse_one_gpu_for_all(device: str) -> None:
    """``--device cuda`` is that of every process that torchrun starts on a machine.

    Raises
    ------
    ValueError

    Examples
    --------
    >>> refuse_one_gpu_for_all("cuda:0")  # of one process
    """
    many = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if many > 1 and device.startswith("cuda"):
        raise ValueError(
            f"--device {device}: {many} processes would share one GPU, which NCCL refuses. Leave "
            "it out: under torchrun each takes the GPU of its number"
        )


_made: list[Any] | None = None  # by the main process, in order; None outside main_process_first


def main_process_first(function: Callable[[], T]) -> T:
    """Call a function on the main process, then on the others, which find its files in place.

    What it asks :func:`made_by_main_process` for the others have from the main process.

    Examples
    --------
    >>> main_process_first(lambda: "the files are made")
    'the files are made'
    """
    global _made
    _made = [] if if_main_process() else ddp_broadcast(None)
    try:
        return function()
    finally:
        if if_main_process():  # after an error too, which the others will meet
            ddp_broadcast(_made)
        _made = None


def made_by_main_process(function: Callable[[], T]) -> T:
    """What the main process makes, on all: a scan of a million files is done once.

    To be called within :func:`main_process_first`, by all processes in the same order; elsewhere
    the function is called. The others have a copy, by pickle. Where the main process failed they
    call the function, and meet its error.

    Examples
    --------
    >>> main_process_first(lambda: made_by_main_process(lambda: ["ann", "bob"]))
    ['ann', 'bob']
    """
    if _made and not if_main_process():
        return _made.pop(0)
    result = function()
    if _made is not None and if_main_process():
        _made.append(result)
    return result
