"""Processes beside that of the tests, from a server that has imported already what they need.

A process that is spawned takes five seconds of a processor to import torch and SpeechBrain; one
that the server forks takes none. ``conftest.py`` tells the server what to import.
"""

import os
import resource
import socket
from contextlib import contextmanager

import torch.multiprocessing as mp
from scripts import train


def start(function, *arguments, number):
    """``function(rank, *arguments)`` in processes; what one raises is raised here."""
    mp.start_processes(function, arguments, nprocs=number, start_method="forkserver")


def train_together(recipe, yaml, *options, number):
    """A recipe over several gloo processes, as torchrun starts them."""
    start(_ranks_run, recipe, yaml, options, number, free_port(), number=number)


@contextmanager
def no_more_open_files():
    """As where a process has as many as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest number that a file could have
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _ranks_run(rank, recipe, yaml, options, number, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train(recipe, yaml, "--distributed_backend=gloo", *options)
