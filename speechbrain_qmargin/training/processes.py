"""The processes of a run: joined, and one after the other where files are made."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from speechbrain.utils.distributed import ddp_barrier, ddp_init_group, if_main_process

__all__ = ["main_process_first", "processes"]

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


def main_process_first(function: Callable[[], T]) -> T:
    """Call a function on the main process, then on the others, which find its files in place."""
    if not if_main_process():
        ddp_barrier()
    try:
        return function()
    finally:
        if if_main_process():
            ddp_barrier()
