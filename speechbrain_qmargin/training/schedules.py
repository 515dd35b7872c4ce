"""Learning rates, margins and other schedules as functions of training time, without state.

A schedule is called with the time in epochs (fractions count) and returns the value, so an
interrupted run continues it exactly, and the number of devices does not enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

__all__ = [
    "linear_change",
    "loss_schedule",
    "margin_rise",
    "polynomial_decay",
    "warmup_exponential",
]


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


def margin_rise(epoch: float, full: float, *, start: float, end: float) -> float:
    """0 until epoch `start`, then a rise to `full` at epoch `end`, steep at first.

    ``full * (1 - exp(u ln 1e-3))`` with ``u = (t - start) / (end - start)``: the margin schedule
    of WeSpeaker's VoxCeleb recipe. With ``start = end = 0`` it is `full` throughout.

    Examples
    --------
    >>> [round(margin_rise(t, 0.2, start=20, end=40), 3) for t in (0, 20, 22, 30, 40, 150)]
    [0.0, 0.0, 0.1, 0.194, 0.2, 0.2]
    """
    if epoch >= end:
        return full
    if epoch <= start:
        return 0.0
    return full * -math.expm1((epoch - start) / (end - start) * math.log(1e-3))


def linear_change(epoch: float, full: float, *, initial: float, start: float, end: float) -> float:
    """`initial` until epoch `start`, then a straight line to `full` at epoch `end`.

    For alpha or scale: a training may begin nearer to softmax, whose gradient reaches every class.

    Examples
    --------
    >>> [linear_change(t, 1.5, initial=1.0, start=0, end=4) for t in (0, 2, 4, 9)]
    [1.0, 1.25, 1.5, 1.5]
    """
    if epoch >= end:
        return full
    if epoch <= start:
        return initial
    return initial + (full - initial) * (epoch - start) / (end - start)


def loss_schedule(
    margin: tuple[float, float] = (0, 0),
    alpha: tuple[float | None, float] = (None, 0),
    scale: tuple[float | None, float] = (None, 0),
) -> dict[str, Callable[[float, float], float]]:
    """Schedules of a loss's parameters, ``{"margin": f}`` with ``f(epoch, full)``, from settings.

    Epochs are counted from 1 here, as in the settings of WeSpeaker's recipe: a rise from 20 to 40
    begins with the 20th epoch, at time 19.

    Parameters
    ----------
    margin : (first, last)
        :func:`margin_rise` from 0 to the loss's own; with a `last` of 0 or 1 it is full throughout,
        and a loss need have none.
    alpha, scale : (initial, last)
        :func:`linear_change` from `initial` to the loss's own, which is reached with that epoch;
        an `initial` of None changes nothing.

    Raises
    ------
    ValueError
        A change whose beginning or end is missing, or that ends before it begins.

    Examples
    --------
    >>> found = loss_schedule(margin=(20, 40), alpha=(1.0, 5))
    >>> [round(found["margin"](t, 0.2), 3) for t in (19, 20, 21, 39)]
    [0.0, 0.058, 0.1, 0.2]
    >>> found["alpha"](0, 1.5), found["alpha"](2, 1.5), found["alpha"](4, 1.5)
    (1.0, 1.25, 1.5)
    """
    first, last = margin
    if last < first:
        raise ValueError(f"margin_until_epoch: {last} is before margin_from_epoch: {first}")
    schedule: dict = {}
    if last > 1:
        schedule["margin"] = partial(margin_rise, start=first - 1, end=last - 1)
    for name, (initial, until) in (("alpha", alpha), ("scale", scale)):
        if initial is None and until:
            raise ValueError(f"{name}_until_epoch: {until} wants {name}_initial, to change from")
        if initial is not None:
            if until < 1:
                raise ValueError(f"{name}_until_epoch: {name}_initial wants an epoch from 1 on")
            schedule[name] = partial(linear_change, initial=initial, start=0, end=until - 1)
    return schedule


def polynomial_decay(
    epoch: float, *, peak: float, epochs: float, warmup_epochs: float = 0.0, power: float = 1.0
) -> float:
    """A linear ramp over the first epochs, then ``peak * (1 - u) ** power`` down to 0.

    u runs from 0 at the ramp's end to 1 at the end: with power 1 the linear decay that
    InsightFace's arcface_torch trains with.

    Examples
    --------
    >>> [polynomial_decay(t, peak=0.1, epochs=20) for t in (0, 10, 20)]
    [0.1, 0.05, 0.0]
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    left = max(0.0, epochs - epoch) / (epochs - warmup_epochs)
    return peak * left**power
