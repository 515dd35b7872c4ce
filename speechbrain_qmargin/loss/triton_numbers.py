# Triton's types are not those of the code inside its kernels
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportMissingImports=false
r"""What the kernels of the dense loss and those of the head compute of float64 numbers.

The formulas are those of :mod:`speechbrain_qmargin.loss.solver`; `rate` is alpha - 1, k = 1 / rate,
and `IN_LOGS` is :func:`~speechbrain_qmargin.loss.solver.in_logs` of alpha.
"""

import triton
import triton.language as tl

__all__ = ["expm1", "level_alone", "log1p", "moved_on", "pieces", "power_of_2", "powers_of"]


def power_of_2(size: int, least: int = 16, most: int = 2**20) -> int:
    """The next power of two from `size` on, within bounds. Triton's own takes the host 0.01 ms.

    Examples
    --------
    >>> power_of_2(1), power_of_2(512), power_of_2(513), power_of_2(513, most=128)
    (16, 512, 1024, 128)
    """
    return min(most, max(least, 1 << (size - 1).bit_length()))


def pieces(size: int, each: int) -> int:
    """How many pieces of `each` cover `size`. Triton's own takes the host 0.01 ms.

    Examples
    --------
    >>> pieces(8, 4), pieces(9, 4)
    (2, 3)
    """
    return -(-size // each)


@triton.jit
def expm1(x):
    u = tl.exp(x)
    lead = u - 1
    near = lead == 0
    low = lead == -1
    beyond = u == float("inf")
    safe = tl.where(near | low | beyond, 2.0, u)
    exact = tl.where(near | low | beyond, 0.0, lead) * x / tl.log(safe)
    return tl.where(near, x, tl.where(low | beyond, lead, exact))


@triton.jit
def log1p(x):
    u = 1 + x
    lead = u - 1
    near = lead == 0
    return tl.where(near, x, tl.log(u) * x / tl.where(near, 1.0, lead))


@triton.jit
def level_alone(logit, log_q, rate, IN_LOGS: tl.constexpr):
    """single_class_level: the level at which a class alone holds mass 1."""
    if IN_LOGS:
        return logit - expm1(-log_q * rate) / rate
    else:
        return logit - tl.exp(-log_q * rate) / rate


@triton.jit
def powers_of(lead, log_q, k, IN_LOGS: tl.constexpr):
    """p and q u^(k - 1), of lead = (alpha - 1) (logit - level)."""
    if IN_LOGS:
        there = lead > -1
        log_u = log1p(tl.where(there, lead, 0.0))
    else:
        there = lead > 0
        log_u = tl.log(tl.where(there, lead, 1.0))
    p = tl.where(there, tl.exp(log_u * k + log_q), 0.0)
    return p, tl.where(there, tl.exp(log_u * (k - 1) + log_q), 0.0)


@triton.jit
def moved_on(level, lower, upper, s, h, rate, step, eps_mass, SAFE: tl.constexpr):
    """One step of solver.newton: the next level and bracket, and whether the row is done."""
    log_s = tl.log(s)
    delta = expm1(log_s * rate) / rate * tl.exp(log_s * (1 - rate)) / h
    noise = tl.abs(level) * 8.8817841970012523e-16
    proposed = level + delta
    if SAFE:
        lower = tl.where(s >= 1, level, lower)
        upper = tl.where(s >= 1, upper, level)
        done = (upper - lower <= noise) | (tl.abs(s - 1) <= 4 * eps_mass)
        usable = (proposed > lower) & (proposed < upper) & (step % 3 != 2)
        proposed = tl.where(usable, proposed, lower + 0.5 * (upper - lower))
    else:
        # from the left every true step is forward; a step back is rounding
        done = (delta > noise + 4 * eps_mass * s / h) == 0
    return tl.where(done, level, proposed), lower, upper, done
