"""The processes of a run: joined, and one after the other where files are made."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from speechbrain.utils.distributed import ddp_barrier, ddp_init_group, if_main_process

__all__ = ["deterministic_algorithms", "main_process_first", "processes"]

T = TypeVar("T")


@contextmanager
def processes(run_opts: Any) -> Iterator[None]:
    """The processes that torchrun started, joined for the time of a run."""
    ddp_init_group(run_opts)
    try:
        yield
        ddp_barrier()  # none leaves while another still needs it
    finally:
        if torch.distributed.is_initialized():
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
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def main_process_first(function: Callable[[], T]) -> T:
    """Call a function on the main process, then on the others, which find its files in place."""
    if not if_main_process():
        ddp_barrier()
    try:
        return function()
    finally:
        if if_main_process():
            ddp_barrier()
