"""Which epoch it is, for the processes that load data: what they are sent can be pickled."""

from __future__ import annotations

from typing import Any

__all__ = ["CurrentEpoch", "first_epoch"]


def first_epoch() -> int:
    """Always 0: for datasets whose items do not change.

    Examples
    --------
    >>> first_epoch()
    0
    """
    return 0


class CurrentEpoch:
    """The epoch of SpeechBrain's EpochCounter, asked for when it is needed.

    Examples
    --------
    >>> from speechbrain.utils.epoch_loop import EpochCounter
    >>> counter = EpochCounter(limit=2)
    >>> now = CurrentEpoch(counter)
    >>> [now() for _ in counter]
    [1, 2]
    """

    def __init__(self, counter: Any) -> None:
        self._counter = counter

    def __call__(self) -> int:
        return self._counter.current
