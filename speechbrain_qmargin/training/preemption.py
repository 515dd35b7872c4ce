"""Signals by which a scheduler announces that it takes the machine away.

Slurm, Kubernetes and whoever sells spare machines send SIGTERM and, some seconds later, SIGKILL;
``sbatch --signal=USR1@300`` sends SIGUSR1 earlier. A handler only notes them: what is half done
when one comes, a step or a file, is done first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Preempted", "held_signals", "left_to_the_main_process", "noted_signals"]

_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
]  # Windows has no SIGUSR1
_TELLS_SENDERS = hasattr(signal, "sigwaitinfo")  # not macOS, nor Windows


class Preempted(SystemExit):
    """A run has ended because of a signal, after a checkpoint.

    Where nobody catches it the process ends with 128 and the signal's number, as shells and
    schedulers expect: 143 for SIGTERM.

    Examples
    --------
    >>> Preempted(signal.SIGTERM).code, Preempted(signal.SIGTERM).name
    (143, 'SIGTERM')
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Within, SIGTERM and SIGUSR1 are noted, and end nothing.

    A handler that somebody else has set stays, and so do all outside the main thread. A signal
    that nobody has obeyed at the end is sent again.

    Yields
    ------
    callable
        Gives the number of the signal that came last; 0: none.

    Examples
    --------
    >>> try:
    ...     with noted_signals() as came:
    ...         before = came()
    ...         signal.raise_signal(signal.SIGTERM)
    ...         raise Preempted(came())         # once everything is saved
    ... except Preempted as end:
    ...     before, end.code
    (0, 143)
    """
    came = 0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal came
        came = number

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [one for one in _SIGNALS if signal.getsignal(one) == signal.SIG_DFL]
    for one in ours:
        signal.signal(one, note)
    try:
        yield lambda: came
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)
    if came:
        signal.raise_signal(came)


@contextmanager
def held_signals() -> Iterator[None]:
    """Within, they wait, for this thread and the processes that it forks.

    Examples
    --------
    >>> with held_signals():
    ...     signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    True
    """
    if not _TELLS_SENDERS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def left_to_the_main_process(then: Callable[[int], Any] | None, worker: int) -> None:
    """Have a DataLoader's worker obey its main process alone, as the first of what it does.

    Schedulers send signals to every process of a job. A worker that dies of one makes torch raise
    in the main process, wherever that is. Ignored altogether they would leave a worker that the
    main process ends, and waits for, at its own end. Forked within :func:`held_signals`, a worker
    does not die of one before it comes here.

    Parameters
    ----------
    then : callable, optional
        What else it does, a `worker_init_fn`.
    worker : int
        Its number.
    """
    if _TELLS_SENDERS:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # of the thread below too
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _obey(parent: int) -> None:
    while signal.sigwaitinfo(_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
