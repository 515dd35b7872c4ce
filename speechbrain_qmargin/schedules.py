"""Learning-rate schedules as functions of training time, without state.

A schedule is called with the time in epochs (fractions count) and returns the value, so an
interrupted run continues it exactly, and the number of devices does not enter.
"""

from __future__ import annotations

import math

__all__ = ["warmup_exponential"]


def warmup_exponential(
    epoch: float, *, peak: float, final: float, epochs: float, warmup_epochs: float = 0.0
) -> float:
    """Exponential decay from `peak` to `final`, times a linear ramp over the first epochs.

    ``lr(t) = min(1, t / warmup_epochs) * peak * exp((t / epochs) * ln(final / peak))``: the
    schedule of WeSpeaker's VoxCeleb recipe, which the paper trains with.

    Parameters
    ----------
    epoch : float
        Time t since the start of training, in epochs.
    peak, final : float
        Learning rates > 0.
    epochs, warmup_epochs : float
        Length of the training and of the ramp.

    Examples
    --------
    >>> at = lambda t: warmup_exponential(t, peak=0.1, final=1e-4, epochs=10, warmup_epochs=2)
    >>> [round(at(t), 5) for t in (0, 1, 2, 10)]
    [0.0, 0.02506, 0.02512, 0.0001]
    """
    ramp = min(1.0, epoch / warmup_epochs) if warmup_epochs > 0 else 1.0
    return ramp * peak * math.exp(epoch / epochs * math.log(final / peak))
