r"""Triton's kernels of the dense loss: one program a row takes all Newton steps.

The formulas, the levels and the safeguards are those of :mod:`speechbrain_qmargin.loss.solver`,
which is the reference of the tests and runs where Triton does not. What differs is where the
numbers are:

* Up to :func:`resident_classes` classes a row is read once and stays in registers while its level
  is sought.
* A longer row is solved on its first tile. That level is a lower bound, so every class at or below
  its edge is inactive, and in one pass the places of the others are written down; the steps then
  look at them alone. Where they are more than a quarter of the classes, at all.
* The backward pass reads the row again, unless its loss is zero, and writes the gradient. Nothing
  of size B x C is kept.

Sums are of float32 (float64 for float64 logits) within a tile, of float64 over tiles; what there is
one of in a row is float64. Each program owns its row and there are no atomics, so results do not
depend on the order of anything.

Numbers that a schedule may change are passed as the bits of a double: a number would arrive in
float32, and a constant would compile anew.
"""

# Triton's language is not Python's: its types are unknown to checkers
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportMissingImports=false

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechbrain_qmargin.loss.solver import compute_dtype, in_logs
from speechbrain_qmargin.loss.triton_numbers import (
    level_alone,
    log1p,
    moved_on,
    pieces,
    power_of_2,
    powers_of,
)

__all__ = ["Solved", "gradient", "resident_classes", "solve_rows"]

_TILE = 4096  # classes of a longer row at a time
_COLUMNS = 2048  # of the backward pass
_INTEGER_POWERS = 8
_MOST_STEPS = tl.constexpr(256)  # never reached: more than is proved for any row


# --------------------------------------------------------------------------- of one number, float64


@triton.jit
def _double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _target_powers(logit, level, log_q, rate, IN_LOGS: tl.constexpr):
    return powers_of((logit - level) * rate, log_q, 1 / rate, IN_LOGS)


# --------------------------------------------------------------------------- of a tile


@triton.jit
def _factor(log_q, rate, IN_LOGS: tl.constexpr):
    """What Block keeps of log q: (q^(1/k) u)^k = q u^k, whose factors are moderate."""
    if IN_LOGS:
        return log_q
    else:
        return tl.exp(log_q * rate.to(log_q.dtype))


@triton.jit
def _powers(v, factor, level, rate, POWER: tl.constexpr, IN_LOGS: tl.constexpr, Q: tl.constexpr):
    """Two factors of p; POWER is k where that is a small integer, else 0."""
    x = v - (level * rate).to(v.dtype)
    k1 = (1 / rate - 1).to(v.dtype)
    if IN_LOGS:
        there = x > -1
        log_h = log1p(tl.where(there, x, 0.0)) * k1
        if Q:
            log_h += factor
        w = tl.where(there, x + 1, 0.0)
        h = tl.where(there, tl.exp(log_h), 0.0)
    else:
        w = tl.where(x > 0, x, 0.0)
        if Q:
            w *= factor
        if POWER == 1:
            h = tl.where(w > 0, 1.0, 0.0).to(w.dtype)
        elif POWER == 2:
            h = w
        elif POWER == 3:
            h = w * w
        elif POWER == 4:
            h = w * w * w
        elif POWER == 5:
            h = (w * w) * (w * w)
        elif POWER == 6:
            h = (w * w) * (w * w) * w
        elif POWER == 7:
            h = (w * w * w) * (w * w * w)
        elif POWER == 8:
            h = (w * w * w) * (w * w * w) * w
        else:
            there = w > 0
            h = tl.where(there, tl.exp(tl.log(tl.where(there, w, 1.0)) * k1), 0.0)
    return w, h


@triton.jit
def _sums(v, factor, level, rate, POWER: tl.constexpr, IN_LOGS: tl.constexpr, Q: tl.constexpr):
    """S and H of a tile."""
    w, h = _powers(v, factor, level, rate, POWER, IN_LOGS, Q)
    s = tl.sum(h * w, 0).to(tl.float64)
    if Q and not IN_LOGS:
        h *= factor
    return s, tl.sum(h, 0).to(tl.float64)


@triton.jit
def _listed(places, start, count, listed, BLOCK: tl.constexpr):
    """Places of the classes [start, start + BLOCK) of a list, or of all, and which there are."""
    i = start + tl.arange(0, BLOCK)
    there = i < count
    if listed:
        i = tl.load(places + i, mask=there, other=0)
    return i, there


@triton.jit
def _scores(row, log_q, places, there, label, origin, factor, DTYPE: tl.constexpr, Q: tl.constexpr):
    """factor times (cosine less origin) of some classes, -inf where there is none; their log q."""
    use = there & (places != label)
    c = tl.load(row + places, mask=use, other=0.0).to(DTYPE)
    z = tl.where(use, (c - origin) * factor, float("-inf"))
    if Q:
        return z, tl.load(log_q + places, mask=use, other=0.0).to(DTYPE)
    else:
        return z, z


@triton.jit
def _list_sums(
    row,
    log_q,
    places,
    count,
    listed,
    label,
    origin,
    factor,
    level,
    rate,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    POWER: tl.constexpr,
    IN_LOGS: tl.constexpr,
    Q: tl.constexpr,
):
    s = tl.zeros((), tl.float64)
    h = tl.zeros((), tl.float64)
    for start in range(0, count, BLOCK):
        at, there = _listed(places, start, count, listed, BLOCK)
        v, q = _scores(row, log_q, at, there, label, origin, factor, DTYPE, Q)
        more = _sums(v, _factor(q, rate, IN_LOGS) if Q else q, level, rate, POWER, IN_LOGS, Q)
        s += more[0]
        h += more[1]
    return s, h


# --------------------------------------------------------------------------- the level of a row


@triton.jit
def _level_of_tile(
    v, factor, z_y, prior, lower, upper, rate, eps_mass,
    POWER: tl.constexpr, IN_LOGS: tl.constexpr, SAFE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    level = lower
    going = 1
    step = 0
    while going > 0:
        s, h = _sums(v, factor, level, rate, POWER, IN_LOGS, Q)
        p_y, h_y = _target_powers(z_y, level, prior, rate, IN_LOGS)
        level, lower, upper, done = moved_on(
            level, lower, upper, s + p_y, h + h_y, rate, step, eps_mass, SAFE
        )
        step += 1
        going = tl.where(done | (step >= _MOST_STEPS), 0, 1)
    return level


@triton.jit
def _level_of_list(
    row, log_q, places, count, listed, label, origin, factor,
    z_y, prior, lower, upper, rate, eps_mass,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    POWER: tl.constexpr, IN_LOGS: tl.constexpr, SAFE: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    level = lower
    going = 1
    step = 0
    while going > 0:
        s, h = _list_sums(
            row, log_q, places, count, listed, label, origin, factor, level, rate,
            DTYPE, BLOCK, POWER, IN_LOGS, Q,
        )  # fmt: skip
        p_y, h_y = _target_powers(z_y, level, prior, rate, IN_LOGS)
        level, lower, upper, done = moved_on(
            level, lower, upper, s + p_y, h + h_y, rate, step, eps_mass, SAFE
        )
        step += 1
        going = tl.where(done | (step >= _MOST_STEPS), 0, 1)
    return level, step


@triton.jit
def _best(c, log_q, there, scale, rate, DTYPE: tl.constexpr, SOFTMAX: tl.constexpr,
          IN_LOGS: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    """Of the class that alone reaches highest: its score, cosine, and own level less its logit.

    The score is -inf where the tile has no class.
    """
    none = float("-inf")
    if Q:
        exact = log_q.to(tl.float64)
        own = exact
        if not SOFTMAX:
            own = level_alone(tl.zeros_like(exact), exact, rate, IN_LOGS)
        score = tl.where(there, own.to(DTYPE) + scale.to(DTYPE) * c, none)
        place = tl.argmax(score, 0)
        at = tl.arange(0, c.shape[0]) == place
        best = tl.max(score, 0)
        return best, tl.max(tl.where(at, c, none), 0), tl.max(tl.where(at, own, none), 0)
    else:
        best = tl.max(tl.where(there, c, none), 0)
        zero = tl.zeros((), tl.float64)
        if SOFTMAX:
            return best, best, zero
        else:
            return best, best, level_alone(zero, zero, rate, IN_LOGS)


@triton.jit
def _moments(v, f, level, rate, POWER: tl.constexpr, IN_LOGS: tl.constexpr, Q: tl.constexpr):
    """Of a tile's posterior p before it is divided by its sum: sum p, sum p v and its support."""
    w, h = _powers(v, f, level, rate, POWER, IN_LOGS, Q)
    p = h * w
    mass = tl.sum(p, 0).to(tl.float64)
    share = tl.sum(tl.where(p > 0, p * v, 0.0), 0).to(tl.float64)
    return mass, share, tl.sum((p > 0).to(tl.int32), 0)


@triton.jit
def _solve_kernel(
    cosines, targets, moved, prior, log_q, places, loss, posterior, kept, counts,
    rows, classes, stride, q_stride, capacity, alpha_bits, scale_bits, limit_bits,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
    POWER: tl.constexpr, IN_LOGS: tl.constexpr, SAFE: tl.constexpr, SOFTMAX: tl.constexpr,
    Q: tl.constexpr, MOVED: tl.constexpr, PRIOR: tl.constexpr, CHECK: tl.constexpr,
    SUPPORT: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    cosines += number.to(tl.int64) * stride
    if Q:
        log_q += number.to(tl.int64) * q_stride
    places += number.to(tl.int64) * capacity
    alpha, scale = _double(alpha_bits), _double(scale_bits)
    rate = alpha - 1
    eps_mass = 2.220446049250313e-16 if DTYPE == tl.float64 else 1.1920928955078125e-07  # noqa: SIM300
    label = tl.load(targets + number).to(tl.int32)
    inside = (label >= 0) & (label < classes)
    if MOVED:
        cos_y = tl.load(moved + number).to(tl.float64)
    else:
        cos_y = tl.load(cosines + tl.where(inside, label, 0)).to(tl.float64)
    log_q_y = tl.zeros((), tl.float64)
    if PRIOR:
        log_q_y = tl.load(prior + number).to(tl.float64)

    # the first tile, in registers
    at = tl.arange(0, BLOCK)
    there = at < classes
    c = tl.load(cosines + at, mask=there, other=0.0).to(DTYPE)
    lq = c
    use = there & (at != label)
    if Q:
        lq = tl.load(log_q + at, mask=use, other=0.0).to(DTYPE)
    bad = tl.zeros((), tl.int32)
    if CHECK:
        most = _double(limit_bits).to(DTYPE)
        bad += tl.sum((there & (tl.abs(c) > most)).to(tl.int32), 0)
    # a maximum passes NaN over
    spoilt = tl.sum((c != c).to(tl.int32), 0)
    spoilt += (cos_y != cos_y).to(tl.int32) + (log_q_y != log_q_y).to(tl.int32)
    read = tl.sum(there.to(tl.int32), 0)
    best, origin, own = _best(c, lq, use, scale, rate, DTYPE, SOFTMAX, IN_LOGS, Q)
    highest = tl.max(tl.where(use, c, float("-inf")), 0)
    has = best > float("-inf")
    origin = tl.where(has, origin, cos_y.to(DTYPE))
    own = tl.where(has, own, float("-inf"))
    factor = scale.to(DTYPE)
    if not SOFTMAX:
        factor = (scale * rate).to(DTYPE)
    v = tl.where(use, (c - origin) * factor, float("-inf"))

    others = tl.zeros((), tl.float64)
    gap = tl.zeros((), tl.float64)
    support = tl.zeros((), tl.int32)
    if SOFTMAX:
        # sums relative to their largest term, whose logit is `peak`
        if Q:
            v += lq
        most_v = tl.max(v, 0)
        some = most_v > float("-inf")
        safe = tl.where(some, most_v, 0.0)
        total = tl.sum(tl.exp(v - safe), 0).to(tl.float64)
        peak = tl.where(some, origin.to(tl.float64) * scale + most_v.to(tl.float64), float("-inf"))
        if not RESIDENT:
            for start in range(BLOCK, classes, BLOCK):
                i = start + at
                there = i < classes
                more = tl.load(cosines + i, mask=there, other=0.0).to(DTYPE)
                use = there & (i != label)
                more_q = more
                if Q:
                    more_q = tl.load(log_q + i, mask=use, other=0.0).to(DTYPE)
                if CHECK:
                    bad += tl.sum((there & (tl.abs(more) > most)).to(tl.int32), 0)
                spoilt += tl.sum((more != more).to(tl.int32), 0)
                read += tl.sum(there.to(tl.int32), 0)
                b, o, _ = _best(more, more_q, use, scale, rate, DTYPE, SOFTMAX, IN_LOGS, Q)
                origin = tl.where(b > best, o, origin)
                best = tl.maximum(best, b)
                v = tl.where(use, (more - origin) * factor, float("-inf"))
                if Q:
                    v += more_q
                most_v = tl.max(v, 0)
                some = most_v > float("-inf")
                safe = tl.where(some, most_v, 0.0)
                here = origin.to(tl.float64) * scale + safe.to(tl.float64)
                higher = tl.where(some, tl.maximum(peak, here), peak)
                lift = tl.where(higher > float("-inf"), higher, 0.0)
                added = tl.exp(here - lift) * tl.sum(tl.exp(v - safe), 0).to(tl.float64)
                total = total * tl.exp(peak - lift) + tl.where(some, added, 0.0)
                peak = higher
        z_y = (cos_y - origin.to(tl.float64)) * scale
        alone = z_y + log_q_y
        lse = peak - origin.to(tl.float64) * scale + tl.log(tl.where(total > 0, total, 1.0))
        top = tl.maximum(lse, alone)
        level = top + tl.log(tl.exp(lse - top) + tl.exp(alone - top))
        others = tl.exp(lse - level)
        if SUPPORT:
            for start in range(0, classes, BLOCK):
                i = start + at
                use = (i < classes) & (i != label)
                z = tl.load(cosines + i, mask=use, other=0.0).to(DTYPE)
                z = (z - origin) * factor - level.to(DTYPE)
                if Q:
                    z += tl.load(log_q + i, mask=use, other=0.0).to(DTYPE)
                support += tl.sum((use & (tl.exp(z) > 0)).to(tl.int32), 0)
        p_y = tl.exp(alone - level)
        value = tl.where(p_y > 0.5, log1p(others / tl.where(p_y > 0.5, p_y, 1.0)), level - alone)
        inverse_total = 1 / (others + p_y)
    else:
        f = v
        if Q:
            f = _factor(lq, rate, IN_LOGS)
        z_y = (cos_y - origin.to(tl.float64)) * scale
        lower = tl.maximum(own, level_alone(z_y, log_q_y, rate, IN_LOGS))
        peak = (highest - origin).to(tl.float64) * scale
        upper = tl.maximum(tl.where(has, peak, float("-inf")), z_y)
        level = _level_of_tile(
            v, f, z_y, log_q_y, lower, upper, rate, eps_mass, POWER, IN_LOGS, SAFE, Q
        )
        if RESIDENT:
            others, gap, support = _moments(v, f, level, rate, POWER, IN_LOGS, Q)
        else:
            first = origin
            tau = level if IN_LOGS else level + 1 / rate
            floor = tau - 1 / rate - 3.814697265625e-06 * (scale + 1 + tl.abs(tau))
            floor = (floor / scale).to(DTYPE)
            count = tl.zeros((), tl.int32)
            for start in range(0, classes, BLOCK):
                i = start + at
                there = i < classes
                more = c
                if start > 0:
                    more = tl.load(cosines + i, mask=there, other=0.0).to(DTYPE)
                    if CHECK:
                        bad += tl.sum((there & (tl.abs(more) > most)).to(tl.int32), 0)
                    spoilt += tl.sum((more != more).to(tl.int32), 0)
                    read += tl.sum(there.to(tl.int32), 0)
                use = there & (i != label)
                more_q = more
                if Q:
                    more_q = tl.load(log_q + i, mask=use, other=0.0).to(DTYPE)
                b, o, a = _best(more, more_q, use, scale, rate, DTYPE, SOFTMAX, IN_LOGS, Q)
                origin = tl.where(b > best, o, origin)
                own = tl.where(b > best, a, own)
                best = tl.maximum(best, b)
                highest = tl.maximum(highest, tl.max(tl.where(use, more, float("-inf")), 0))
                keep = use & (more - first > floor)
                place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
                tl.store(places + place, i, mask=keep & (place < capacity))
                count += tl.sum(keep.to(tl.int32), 0)
            tl.debug_barrier()
            listed = count <= capacity
            count = tl.where(listed, count, classes)
            shift = (first.to(tl.float64) - origin.to(tl.float64)) * scale
            z_y = (cos_y - origin.to(tl.float64)) * scale
            lower = tl.maximum(own, level_alone(z_y, log_q_y, rate, IN_LOGS))
            lower = tl.maximum(lower, level + shift)
            peak = (highest - origin).to(tl.float64) * scale
            upper = tl.maximum(tl.where(best > float("-inf"), peak, float("-inf")), z_y)
            if count <= BLOCK:  # once more in registers
                i, there = _listed(places, 0, count, listed, BLOCK)
                v, more_q = _scores(cosines, log_q, i, there, label, origin, factor, DTYPE, Q)
                f = _factor(more_q, rate, IN_LOGS) if Q else more_q
                level = _level_of_tile(
                    v, f, z_y, log_q_y, lower, upper, rate, eps_mass, POWER, IN_LOGS, SAFE, Q
                )
                mass, share, active = _moments(v, f, level, rate, POWER, IN_LOGS, Q)
                others += mass
                gap += share
                support += active
                read += count
            else:
                level, steps = _level_of_list(
                    cosines, log_q, places, count, listed, label, origin, factor,
                    z_y, log_q_y, lower, upper, rate, eps_mass,
                    DTYPE, BLOCK, POWER, IN_LOGS, SAFE, Q,
                )  # fmt: skip
                for start in range(0, count, BLOCK):
                    i, there = _listed(places, start, count, listed, BLOCK)
                    v, more_q = _scores(cosines, log_q, i, there, label, origin, factor, DTYPE, Q)
                    f = _factor(more_q, rate, IN_LOGS) if Q else more_q
                    mass, share, active = _moments(v, f, level, rate, POWER, IN_LOGS, Q)
                    others += mass
                    gap += share
                    support += active
                read += count * (steps + 1)
        alone = level_alone(z_y, log_q_y, rate, IN_LOGS)
        p_y, _ = _target_powers(z_y, level, log_q_y, rate, IN_LOGS)
        tau = level if IN_LOGS else level + 1 / rate
        excess = others + p_y - 1
        inverse_total = 1 / (1 + excess)
        gap = gap / rate - others * z_y + excess * (z_y - tau)
        value = (1 - 1 / alpha) * gap + (level - alone + excess) / alpha
        value = tl.where(others == 0, 0.0, tl.where(value < 0, 0.0, value))

    inverse_total = tl.where(spoilt > 0, float("nan"), inverse_total)
    value = tl.where(spoilt > 0, float("nan"), value)
    tl.store(loss + number, value.to(loss.dtype.element_ty))
    p_y *= inverse_total
    tl.store(posterior + number, p_y.to(posterior.dtype.element_ty))
    tl.store(kept + number, 0 - others * inverse_total)
    tl.store(kept + rows + number, inverse_total)
    tl.store(kept + 2 * rows + number, level)
    tl.store(kept + 3 * rows + number, origin.to(tl.float64))
    tl.store(counts + number, support + (p_y.to(posterior.dtype.element_ty) > 0).to(tl.int32))
    tl.store(counts + rows + number, bad)
    tl.store(counts + 2 * rows + number, read)


@triton.jit
def _gradient_kernel(
    cosines, targets, log_q, kept, factors, out,
    rows, classes, stride, q_stride, alpha_bits, scale_bits,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, POWER: tl.constexpr, IN_LOGS: tl.constexpr,
    SOFTMAX: tl.constexpr, Q: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cosines += number.to(tl.int64) * stride
    alpha, scale = _double(alpha_bits), _double(scale_bits)
    rate = alpha - 1
    label = tl.load(targets + number).to(tl.int32)
    residual = tl.load(kept + number)
    inverse_total = tl.load(kept + rows + number)
    level = tl.load(kept + 2 * rows + number)
    origin = tl.load(kept + 3 * rows + number).to(DTYPE)
    there = i < classes
    # a row without other active classes is not read
    use = (i < tl.where(tl.abs(residual) > 0, classes, 0)) & (i != label)
    c = tl.load(cosines + i, mask=use, other=0.0).to(DTYPE)
    lq = c
    if Q:
        lq = tl.load(log_q + number.to(tl.int64) * q_stride + i, mask=use, other=0.0).to(DTYPE)
    if SOFTMAX:
        z = (c - origin) * scale.to(DTYPE)
        if Q:
            z += lq
        p = tl.exp(z - level.to(DTYPE))
    else:
        v = (c - origin) * (scale * rate).to(DTYPE)
        f = v
        if Q:
            f = _factor(lq, rate, IN_LOGS)
        w, h = _powers(v, f, level, rate, POWER, IN_LOGS, Q)
        p = h * w
    own = tl.zeros((), DTYPE)
    if not MOVED:
        own = residual.to(DTYPE)
    g = tl.where(use, p * inverse_total.to(DTYPE), own)
    g *= tl.load(factors + number).to(DTYPE)
    out += number.to(tl.int64) * classes
    tl.store(out + i, g.to(out.dtype.element_ty), mask=there)


# --------------------------------------------------------------------------- from torch

KERNELS = (_solve_kernel, _gradient_kernel)


class Solved(NamedTuple):
    """Of each row.

    Attributes
    ----------
    loss, posterior : Tensor, [B], float32 (float64 for float64 logits)
        The loss and the target's posterior.
    kept : Tensor, [4, B], float64
        p_y - 1 without the rounding of that difference, what the other posteriors are multiplied
        by, the level, and the cosine it is relative to.
    counts : Tensor, [3, B], int32
        Active classes, cosines beyond the limit, and how many cosines were read.
    """

    loss: Tensor
    posterior: Tensor
    kept: Tensor
    counts: Tensor


def resident_classes(dtype: torch.dtype) -> int:
    """Up to so many classes a row stays in registers; twice as many would not fit."""
    return 8192 if dtype == torch.float64 else 16384


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


def _power(alpha: float) -> int:
    """k = 1 / (alpha - 1) where it is a small integer to rounding, else 0."""
    if alpha == 1:
        return 0
    k = round(1 / (alpha - 1))
    return k if 1 <= k <= _INTEGER_POWERS and abs(k * (alpha - 1) - 1) < 1e-15 else 0


def _constants(dtype: torch.dtype, alpha: float) -> dict[str, Any]:
    return {
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "POWER": _power(alpha),
        "IN_LOGS": in_logs(alpha),
        "SOFTMAX": alpha == 1,
    }


def _in_a_row(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same with their elements one after the other, as kernels read them."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _solve_rows(cosines, targets, moved, prior, log_q, alpha, scale, limit, support):
    targets, moved, prior, log_q = _in_a_row(targets, moved, prior, log_q)
    loss, posterior, kept, counts = _outputs(cosines)
    rows, classes = cosines.shape
    resident = classes <= resident_classes(cosines.dtype)
    block = power_of_2(classes) if resident else _TILE
    capacity = 0 if resident else max(_TILE, classes // 4)
    places = counts if resident else counts.new_empty(rows, capacity)
    _solve_kernel[(rows,)](
        cosines, targets, moved, prior, log_q, places, loss, posterior, kept, counts,
        rows, classes, cosines.stride(0), 0 if log_q is None else _row_stride(log_q), capacity,
        _bits(alpha), _bits(scale), _bits(0.0 if limit is None else limit),
        BLOCK=block, RESIDENT=resident, SAFE=alpha > 2, Q=log_q is not None,
        MOVED=moved is not None, PRIOR=prior is not None, CHECK=limit is not None,
        SUPPORT=support, **_constants(cosines.dtype, alpha), num_warps=_warps(block),
    )  # fmt: skip
    return loss, posterior, kept, counts


def _outputs(cosines: Tensor) -> Solved:
    rows, dtype = cosines.shape[0], compute_dtype(cosines)
    return Solved(
        cosines.new_empty(rows, dtype=dtype),
        cosines.new_empty(rows, dtype=dtype),
        cosines.new_empty(4, rows, dtype=torch.float64),
        cosines.new_empty(3, rows, dtype=torch.int32),
    )


def _row_stride(log_q: Tensor) -> int:
    return log_q.stride(0) if log_q.ndim == 2 else 0


_solve_op = torch.library.custom_op(
    "speechbrain_qmargin::solve_rows",
    _solve_rows,
    mutates_args=(),
    schema="(Tensor cosines, Tensor targets, Tensor? moved, Tensor? prior, Tensor? log_q, "
    "float alpha, float scale, float? limit, bool support) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_solve_op.register_fake
def _(cosines, targets, moved, prior, log_q, alpha, scale, limit, support):
    return tuple(_outputs(cosines))


def _gradient(cosines, targets, log_q, kept, factors, alpha, scale, moved, dtype):
    targets, log_q, kept, factors = _in_a_row(targets, log_q, kept, factors)
    out = cosines.new_empty(cosines.shape, dtype=dtype)
    rows, classes = cosines.shape
    block = power_of_2(classes, most=_COLUMNS)
    _gradient_kernel[(rows, pieces(classes, block))](
        cosines, targets, log_q, kept, factors, out,
        rows, classes, cosines.stride(0), 0 if log_q is None else _row_stride(log_q),
        _bits(alpha), _bits(scale),
        BLOCK=block, Q=log_q is not None, MOVED=moved, **_constants(cosines.dtype, alpha),
        num_warps=_warps(block),
    )  # fmt: skip
    return out


_gradient_op = torch.library.custom_op(
    "speechbrain_qmargin::gradient",
    _gradient,
    mutates_args=(),
    schema="(Tensor cosines, Tensor targets, Tensor? log_q, Tensor kept, Tensor factors, "
    "float alpha, float scale, bool moved, ScalarType dtype) -> Tensor",
)


@_gradient_op.register_fake
def _(cosines, targets, log_q, kept, factors, alpha, scale, moved, dtype):
    return cosines.new_empty(cosines.shape, dtype=dtype)


def solve_rows(
    cosines: Tensor,
    targets: Tensor,
    alpha: float,
    scale: float,
    *,
    moved: Tensor | None = None,
    prior: Tensor | None = None,
    log_q: Tensor | None = None,
    limit: float | None = None,
    support: bool = False,
) -> Solved:
    """The Fenchel-Young loss of each row, in one launch; without a graph.

    Where a cosine is NaN, or `moved` or `prior` is, the row's loss, posterior and gradient are NaN.

    Parameters
    ----------
    cosines : Tensor, [B, C], floating point
        -inf stands for an absent class. bf16 and fp16 are computed in float32. The last dimension
        is contiguous.
    targets : Tensor, [B], integer
        The targets' places. -1 where the row does not have it; then `moved` is given.
    alpha, scale : float
        Order, >= 1, and scale.
    moved : Tensor, [B], optional
        Cosines that take the place of the targets'.
    prior : Tensor, [B], optional
        log q of the targets. None: zeros.
    log_q : Tensor, [C] or [B, C], optional
        log q of the other classes. None: zeros.
    limit : float, optional
        Cosines above it in absolute value are counted; NaN is not.
    support : bool
        Whether active classes are counted at alpha = 1, for which the row is read once more.
    """
    solve = _solve_op if _seen(cosines) else _solve_rows
    return Solved(*solve(cosines, targets, moved, prior, log_q, alpha, scale, limit, support))


def _seen(*tensors: Tensor) -> bool:
    """Whether an operator has to be seen, as by torch.compile, fake tensors, vmap or a trace.

    Calling one costs the host 0.1 ms.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(x) is not Tensor or not _has_memory(x) for x in tensors)
    )


def _has_memory(tensor: Tensor) -> bool:
    """Not where it is batched, by vmap or by torch.autograd.grad."""
    try:
        tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def gradient(
    cosines: Tensor,
    targets: Tensor,
    solved: Tensor,
    factors: Tensor,
    alpha: float,
    scale: float,
    *,
    moved: bool = False,
    log_q: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(p - e_y) times a factor a row, [B, C], in one launch; without a graph.

    Parameters
    ----------
    cosines, targets, alpha, scale, log_q
        As :func:`solve_rows` was given.
    solved : Tensor, [4, B]
        Its `kept`.
    factors : Tensor, [B]
        The loss's gradient times the scale.
    moved : bool
        The targets' entries are zero: their cosines are elsewhere.
    dtype : torch.dtype, optional
        Of the result; None: that of the cosines.
    """
    dtype = cosines.dtype if dtype is None else dtype
    of = _gradient_op if _seen(cosines, factors) else _gradient
    return of(cosines, targets, log_q, solved, factors, alpha, scale, moved, dtype)
