r"""The alpha-softargmax with alpha as a tensor: one for each row, or one that is learnt.

Everything is in float64. With the class that alone would reach highest as origin, its q as the unit
of q and its :math:`A = q^{1-\alpha}` as the unit of the logits (the posterior of :math:`\theta, q`
is that of :math:`\theta / A, q / q_i`), the level is the distance :math:`\delta \ge 0` of tau from
its value for that class alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from speechbrain_qmargin.loss.solver import jacobian, row_dtype

__all__ = ["softargmax_of_orders"]

_MOST_STEPS = 200
_LEAST_RATE = 1e-10  # of alpha - 1: below, the posterior is the softmax to more than 1e-9
_SERIES_BELOW = 1e-2


def softargmax_of_orders(logits: Tensor, alpha: Tensor, log_q: Tensor | None) -> Tensor:
    """p [..., C] of logits [..., C], alpha [..., 1], all >= 1, and log q as the logits or None.

    Differentiable, and twice, in all three. At alpha = 1 the derivative by alpha is the one to the
    right.

    Examples
    --------
    >>> logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> softargmax_of_orders(logits, torch.tensor([[1.0], [2.0]]), None)    # softmax, sparsemax
    tensor([[0.7311, 0.2689],
            [1.0000, 0.0000]])
    """
    return _SoftargmaxOfOrders.apply(logits, alpha, log_q)


def _posterior(logits: Tensor, rate: Tensor, log_q: Tensor) -> Tensor:
    k = 1 / rate
    alone = logits - torch.expm1(-rate * log_q) / rate
    place = alone.argmax(-1, keepdim=True)
    log_unit = -rate * log_q.gather(-1, place)
    log_q = log_q - log_q.gather(-1, place)
    z = (logits - logits.gather(-1, place)) * torch.exp(-log_unit)
    peak, total = z.amax(-1, keepdim=True), torch.logsumexp(log_q, -1, keepdim=True)
    lower = torch.zeros_like(peak)
    # no u is larger than where all the mass would lie at the largest logit
    upper = (peak - torch.expm1(-rate * total) / rate).clamp(min=0)

    def at(level: Tensor) -> tuple[Tensor, Tensor]:
        log_u = torch.log1p((rate * (z - level)).clamp(min=-1))
        p = torch.exp(log_q + k * log_u)
        slope = torch.where(p > 0, torch.exp(log_q + (k - 1) * log_u), 0)
        return p, slope.sum(-1, keepdim=True)

    level = lower
    eps = torch.finfo(level.dtype).eps
    for step in range(_MOST_STEPS):
        p, slope = at(level)
        mass = p.sum(-1, keepdim=True)
        lower = torch.where(mass >= 1, level, lower)
        upper = torch.where(mass >= 1, upper, level)
        done = (upper - lower <= 4 * eps * upper) | ((mass - 1).abs() <= 4 * eps)
        if bool(done.all()):
            break
        log_mass = mass.log()
        proposed = (
            level + torch.expm1(log_mass * rate) / rate * torch.exp(log_mass * (1 - rate)) / slope
        )
        usable = (proposed > lower) & (proposed < upper) & (step % 3 != 2)
        proposed = torch.where(usable, proposed, lower + 0.5 * (upper - lower))
        level = torch.where(done, level, proposed)
    p, _ = at(level)
    return p / p.sum(-1, keepdim=True)


class _SoftargmaxOfOrders(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, alpha: Tensor, log_q: Tensor | None) -> Tensor:
        exact = row_dtype(logits)
        rate = (alpha.to(exact) - 1).clamp(min=_LEAST_RATE)
        z = logits.to(exact)
        prior = torch.zeros_like(z) if log_q is None else log_q.to(exact)
        return _posterior(z - z.amax(-1, keepdim=True), rate, prior).to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        p, alpha, log_q = ctx.saved_tensors
        exact = row_dtype(p)
        posterior, g = p.to(exact), gradients[0].to(exact)
        rate = (alpha.to(exact) - 1).clamp(min=_LEAST_RATE)
        prior = torch.zeros_like(posterior) if log_q is None else log_q.to(exact)
        h, centred = jacobian(posterior, g, 1 + rate, prior)
        by_alpha = by_log_q = None
        if ctx.needs_input_grad[1]:
            # dp = k^2 p (1 - log u - 1 / u) - h dtau, where log u = (alpha - 1) log(p / q)
            active = posterior > 0
            log_u = rate * (torch.where(active, posterior, 1).log() - prior)
            moved = torch.where(active, posterior * _curvature(log_u) / rate.square(), 0)
            by_alpha = (moved * centred).sum(-1, keepdim=True).to(alpha.dtype)
        if log_q is not None and ctx.needs_input_grad[2]:
            by_log_q = (posterior * centred).to(log_q.dtype)
        return (h * centred).to(p.dtype), by_alpha, by_log_q


def _curvature(x: Tensor) -> Tensor:
    """1 - x - exp(-x), which is -x^2 / 2 and rounding near 0."""
    small = x.abs() < _SERIES_BELOW
    near = torch.where(small, x, 0)
    series = torch.zeros_like(x)
    for power in range(9, 1, -1):
        series = series * near + (-1) ** (power + 1) / math.factorial(power)
    far = torch.where(small, 1, x)
    return torch.where(small, series * near.square(), -torch.expm1(-far) - far)
