# Triton's types are not those of the code inside its kernels
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
r"""The kernels of ``fused`` but those of ``solve_kernels``, written in Triton; alpha > 1.

Each function is one launch, and none makes the host wait. What they compute, and why it is exact,
is said there. Whatever decides or is returned is summed in an order that does not depend on which
thread comes first: atomic additions only count places in a buffer, and its content is summed in
fixed point, where the order does not matter, or after it was sorted.

A loss's numbers come in a tensor of float64 (:func:`numbers`): as arguments Triton would round them
to float32. With ``TRITON_INTERPRET=1`` in the environment before Triton is imported the kernels run
on a CPU, slowly: so they are tested.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechbrain_qmargin.head.prototypes import Prototypes
from speechbrain_qmargin.loss.device import sent
from speechbrain_qmargin.loss.solver import edge
from speechbrain_qmargin.loss.triton_numbers import (
    level_alone,
    pieces,
    power_of_2,
    powers_of,
)

__all__ = [
    "ABSENT",
    "BAD_LABEL",
    "KERNELS",
    "NOT_CONVERGED",
    "NOT_FINITE",
    "embedding_gradient",
    "exact_cosines",
    "mark_segments",
    "numbers",
    "prepare",
    "raise_floors",
    "report",
    "sample_floors",
    "sample_scores",
    "screen",
    "weight_gradient",
    "write_segments",
]

ABSENT = torch.iinfo(torch.int32).max  # in the place of a class; it sorts behind all of them
BAD_LABEL, NOT_FINITE, NOT_CONVERGED = 1, 2, 4  # of a sample's state
_ABSENT = tl.constexpr(ABSENT)
_BAD_LABEL, _NOT_FINITE, _NOT_CONVERGED = (tl.constexpr(2**bit) for bit in range(3))
_FIXED = tl.constexpr(float(2**40))  # of fixed point: a mass is at most 1, a room below 2**23
_REACHED = tl.constexpr(2**40 + 2**30)  # whatever float32 rounded, the mass is at least 1
_REACHED_IN_SUM = tl.constexpr(1.0 + 2.0**-10)  # likewise, of a sum of floats
_ROUNDED = tl.constexpr(0.004)  # more than 2**-8, which bf16 may add to a product or take from it
_INF = tl.constexpr(float("inf"))
_LANES = 128  # of the filter: a thread each


@triton.jit
def _nothing():
    pass


# every Triton says it of a kernel, and each its own way of the setting
_INTERPRETED = tl.constexpr(not isinstance(_nothing, triton.JITFunction))
_BISECTIONS = tl.constexpr(8 if _INTERPRETED.value else 12)  # for a bound: to 0.001 logits at k = 4


@lru_cache(maxsize=64)
def numbers(alpha: float, scale: float, device: torch.device) -> Tensor:
    """[4], float64: alpha - 1, k, scale, and by how much a level is above its edge."""
    above = -edge(0.0, alpha)
    values = [alpha - 1, 1 / (alpha - 1), scale, above]
    return sent(torch.tensor(values, dtype=torch.float64), device)


@lru_cache(maxsize=64)
def _kind(alpha: float) -> dict:
    """What kernels are compiled for: whether levels are tau, and k where it is 1, 2, 3 or 4."""
    k = 1 / (alpha - 1)
    whole = round(k) if abs(k - round(k)) < 1e-12 and 1 <= round(k) <= 4 else 0
    return {"IN_LOGS": edge(0.0, alpha) != 0, "POWER": whole}


# --------------------------------------------------------------------------- shared by kernels


@triton.jit
def _rough_mass(lead, log_q, k, IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr):
    """p within 2**-12 of itself; below 2**-40 it may be less."""
    if HAS_Q or IN_LOGS:
        p, _ = powers_of(lead, log_q, k, IN_LOGS)
    else:
        u = tl.maximum(lead, 0.0).to(tl.float32)
        if POWER > 0:
            p = u
            for _ in tl.static_range(POWER - 1):
                p = p * u
        else:  # k is at most 8, so that float32 is enough
            there = u > 0.0
            p = tl.exp(tl.log(tl.where(there, u, 1.0)) * k.to(tl.float32))
            p = tl.where(there, p, 0.0)
    return p


@triton.jit
def _fixed(mass):
    """In fixed point, rounded down: its sums are the same in any order."""
    return (mass.to(tl.float64) * _FIXED).to(tl.int64)


# --------------------------------------------------------------------------- embeddings


@triton.jit
def _prepare(
    raw, labels, prior, weight, residual, rounded, length, slack, cosine, state, counts, peaks,
    classes, dim, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < dim
    x = tl.load(raw + b * dim + d, mask=inside, other=0.0).to(tl.float64)
    finite = tl.abs(x) < _INF
    unfit = tl.sum((~finite).to(tl.int32), 0) > 0
    x = tl.where(finite, x, 0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)
    unit = x / norm
    few = unit.to(tl.float32).to(tl.bfloat16)
    tl.store(rounded + b * dim + d, few, mask=inside)
    few = few.to(tl.float64)
    lacking, known = unit - few, tl.load(residual).to(tl.float64)
    lacking = tl.sqrt(tl.sum(lacking * lacking, 0))
    length_few = tl.sqrt(tl.sum(few * few, 0))
    # as search.screening_slack; what float32 norms of the rows lack besides
    allowance = (lacking + length_few * known) * (1 + 2.0**-20) + dim * 2.0**-22 * 1.01 + 1e-6
    label = tl.load(labels + b)
    good = (label >= 0) & (label < classes)
    row = tl.where(good, label, 0)
    w = tl.load(weight + row * dim + d, mask=inside, other=0.0).to(tl.float64)
    length_w = tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-12)
    flag = tl.where(good, 0, _BAD_LABEL) + tl.where(unfit, _NOT_FINITE, 0)
    flag += tl.where(tl.abs(tl.load(prior + b)) < _INF, 0, _NOT_CONVERGED)
    tl.store(length + b, norm)
    tl.store(slack + b, allowance)
    tl.store(cosine + b, tl.where(good, tl.sum(unit * (w / length_w), 0), 0.0))
    tl.store(state + b, flag)
    tl.store(counts + b, 0)
    tl.store(peaks + b, 0)


# --------------------------------------------------------------------------- the first floors


@triton.jit
def _least(product, slack):
    """A lower bound of a cosine, from what a product in bf16 was rounded to."""
    wide = product.to(tl.float64)
    return wide - _ROUNDED * tl.abs(wide) - slack


@triton.jit
def _write_floor(b, level, scale, above, k, slack, levels, cuts, IN_LOGS: tl.constexpr):
    """A level, less what arithmetic may have added, and which products may reach its edge."""
    tau = level if IN_LOGS else level + k
    level -= 2.0**-30 * (1.0 + tl.abs(tau))
    tl.store(levels + b, level)
    cut = (level - above) / scale
    cut -= slack + 2.0**-22 * (1.0 + tl.abs(cut))
    tl.store(cuts + b, (cut - _ROUNDED * tl.abs(cut)).to(tl.float32))


@triton.jit
def _sample_floors(
    sampled, labels, cosine, prior, slack, log_q, values, levels, cuts,
    stride, size,
    BLOCK: tl.constexpr, IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    gamma, k = tl.load(values), tl.load(values + 1)
    scale, above = tl.load(values + 2), tl.load(values + 3)
    label, allowance = tl.load(labels + b), tl.load(slack + b)
    own, q_own = tl.load(cosine + b) * scale, tl.load(prior + b)
    i = tl.arange(0, BLOCK).to(tl.int64)  # all of a sample stays in registers
    there = (i < size) & (i * stride != label)
    s = tl.load(sampled + b * size + i, mask=there, other=0.0)
    logit = tl.where(there, _least(s, allowance) * scale, -_INF)
    prior_i = 0.0
    if HAS_Q:
        prior_i = tl.load(log_q + i * stride, mask=there, other=0.0).to(tl.float64)
    low = level_alone(own, q_own, gamma, IN_LOGS)
    low = tl.maximum(low, tl.max(level_alone(logit, prior_i, gamma, IN_LOGS), 0))
    high = tl.maximum(tl.maximum(own, tl.max(logit, 0)) + above, low)
    for _ in range(_BISECTIONS):
        level = 0.5 * (low + high)
        mass = _rough_mass(gamma * (logit - level), prior_i, k, IN_LOGS, POWER, HAS_Q)
        own_mass = _rough_mass(gamma * (own - level), q_own, k, IN_LOGS, 0, True)
        reached = tl.sum(mass, 0) + own_mass >= _REACHED_IN_SUM
        low = tl.where(reached, level, low)
        high = tl.where(reached, high, level)
    _write_floor(b, low, scale, above, k, allowance, levels, cuts, IN_LOGS)


# --------------------------------------------------------------------------- screening


@triton.jit
def _ones(word):
    """How many bits of a word are set; the compiler knows it as one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _lowest_bit(word):
    """The place of the lowest bit that is set; 32 where none is."""
    return _ones((word & (0 - word)) - 1)


@triton.jit
def _filter(
    products, labels, cuts, found, counts, start, size, stride, room, LANES: tl.constexpr,
):  # fmt: skip
    # a sample's next 32 * LANES classes: a bit for each, 8 neighbours to a lane at a time
    each = tl.cdiv(size, 32 * LANES)
    b = (tl.program_id(0) // each).to(tl.int64)
    first = tl.program_id(0) % each * (32 * LANES)
    cut = tl.load(cuts + b)
    lane, e = tl.arange(0, LANES), tl.arange(0, 8)
    row = products + b * stride + first
    bits = tl.zeros((LANES,), tl.uint32)
    for g in tl.static_range(4):
        i = g * (8 * LANES) + (lane[:, None] * 8 + e[None, :])
        # up to the stride, which is a multiple of what is read at once; the size may be none
        s = tl.load(row + i, mask=first + i < stride, other=0.0).to(tl.float32)
        # a product that is not a number is kept: nothing is known of its class
        keep = ((s < cut) == 0) & (first + i < size)
        few = keep.to(tl.uint32) << (g * 8 + e).to(tl.uint32)[None, :]
        bits |= tl.sum(few, 1).to(tl.uint32)
    # without the target, where it is among them
    own = tl.load(labels + b) - (start + first)
    here = (own >= 0) & (own < 32 * LANES)
    own = tl.where(here, own, 0).to(tl.int32)
    its = tl.full((LANES,), 1, tl.uint32) << (own // (8 * LANES) * 8 + own % 8).to(tl.uint32)
    bits ^= bits & tl.where(here & (own % (8 * LANES) // 8 == lane), its, 0)
    # one addition for all of them; then each lane writes its next one
    many = _ones(bits)
    upto = tl.cumsum(many, 0)
    total, most = tl.sum(many, 0), tl.max(many, 0)
    if most > 0:
        place = tl.atomic_add(counts + b, total, sem="relaxed") + upto - many
        for _ in range(0, most):
            more = bits != 0
            j = _lowest_bit(bits)
            its_i = j // 8 * (8 * LANES) + lane * 8 + j % 8
            product = tl.load(row + its_i, mask=more, other=0.0).to(tl.float32)
            low = product.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
            key = ((start + first + its_i).to(tl.int64) << 32) | low
            tl.store(found + b * room + place, key, mask=more & (place < room))
            bits &= bits - 1
            place += 1


@triton.jit
def _product_of(key):
    """The float32 in the lower half of what `_filter` wrote."""
    return (key & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _raise_floors(
    found, counts, peaks, cosine, prior, slack, log_q, values, levels, cuts, kept, room, width,
    CHUNK: tl.constexpr, FINAL: tl.constexpr,
    IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    gamma, k = tl.load(values), tl.load(values + 1)
    scale, above = tl.load(values + 2), tl.load(values + 3)
    allowance = tl.load(slack + b)
    own, q_own = tl.load(cosine + b) * scale, tl.load(prior + b)
    total = tl.load(counts + b)
    n = tl.minimum(total, room)
    tl.store(peaks + b, tl.maximum(tl.load(peaks + b), total))
    low, high = tl.load(levels + b), own
    low = tl.maximum(low, level_alone(own, q_own, gamma, IN_LOGS))
    offset = tl.arange(0, CHUNK)
    row = found + b * room
    for start in range(0, n, CHUNK):
        there = start + offset < n
        key = tl.load(row + start + offset, mask=there, other=0)
        logit = tl.where(there, _least(_product_of(key), allowance) * scale, -_INF)
        prior_i = 0.0
        if HAS_Q:
            prior_i = tl.load(log_q + (key >> 32), mask=there, other=0.0).to(tl.float64)
        low = tl.maximum(low, tl.max(level_alone(logit, prior_i, gamma, IN_LOGS), 0))
        high = tl.maximum(high, tl.max(logit, 0))
    high = tl.maximum(high + above, low)
    for _ in range(_BISECTIONS):
        level = 0.5 * (low + high)
        mass = _fixed(_rough_mass(gamma * (own - level), q_own, k, IN_LOGS, 0, True))
        for start in range(0, n, CHUNK):
            there = start + offset < n
            key = tl.load(row + start + offset, mask=there, other=0)
            logit = _least(_product_of(key), allowance) * scale
            lead = tl.where(there, gamma * (logit - level), -_INF)
            prior_i = 0.0
            if HAS_Q:
                prior_i = tl.load(log_q + (key >> 32), mask=there, other=0.0).to(tl.float64)
            more = _rough_mass(lead, prior_i, k, IN_LOGS, POWER, HAS_Q)
            mass += tl.sum(_fixed(more), 0)
        reached = mass >= _REACHED
        low = tl.where(reached, level, low)
        high = tl.where(reached, high, level)
    _write_floor(b, low, scale, above, k, allowance, levels, cuts, IN_LOGS)
    tl.debug_barrier()
    cut = tl.load(cuts + b)
    many = 0
    for start in range(0, n, CHUNK):
        there = start + offset < n
        key = tl.load(row + start + offset, mask=there, other=0)
        keep = there & ((_product_of(key) < cut) == 0)
        place = many + tl.cumsum(keep.to(tl.int32), 0) - 1
        if FINAL:
            out = kept + b * width + place
            tl.store(out, (key >> 32).to(tl.int32), mask=keep & (place < width))
        else:
            tl.debug_barrier()
            tl.store(row + place, key, mask=keep)
            tl.debug_barrier()
        many += tl.sum(keep.to(tl.int32), 0)
    tl.store(counts + b, many)
    if FINAL:
        for start in range(many, width, CHUNK):
            i = start + offset
            tl.store(kept + b * width + i, tl.full((CHUNK,), _ABSENT, tl.int32), mask=i < width)


# --------------------------------------------------------------------------- what may be active


@triton.jit
def _exact_cosines(
    raw, length, weight, kept, counts, out, dim, width,
    BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n, own_length = tl.minimum(tl.load(counts + b), width), tl.load(length + b)
    for start in range(tl.program_id(1) * BLOCK_I, n, tl.num_programs(1) * BLOCK_I):
        i, d = start + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
        c = tl.load(kept + b * width + i, mask=i < width, other=_ABSENT).to(tl.int64)
        there = c != _ABSENT
        product = tl.zeros((BLOCK_I, BLOCK_D), tl.float64)
        square = tl.zeros((BLOCK_I, BLOCK_D), tl.float64)
        for first in range(0, dim, BLOCK_D):
            inside = d < dim - first
            x = tl.load(raw + b * dim + first + d, mask=inside, other=0.0).to(tl.float64)
            x = tl.where(tl.abs(x) < _INF, x, 0.0)
            at = c[:, None] * dim + (first + d)[None, :]
            w = tl.load(weight + at, mask=there[:, None] & inside[None, :], other=0.0)
            w = w.to(tl.float64)
            product += w * x[None, :]
            square += w * w
        norm = tl.maximum(tl.sqrt(tl.sum(square, 1)), 1e-12)
        cosine = tl.sum(product, 1) / (norm * own_length)
        tl.store(out + b * width + i, cosine, mask=there)


# --------------------------------------------------------------------------- segments


@triton.jit
def _mark_segments(ordered, flags, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < size
    c = tl.load(ordered + i, mask=there, other=_ABSENT)
    before = tl.load(ordered + i - 1, mask=there & (i > 0), other=-1)
    tl.store(flags + i, ((c != before) & (c != _ABSENT)).to(tl.int32), mask=there)


@triton.jit
def _write_segments(ordered, numbered, rows, starts, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < size
    c = tl.load(ordered + i, mask=there, other=_ABSENT)
    before = tl.load(ordered + i - 1, mask=there & (i > 0), other=-1)
    after = tl.load(ordered + i + 1, mask=i + 1 < size, other=_ABSENT)
    number = tl.load(numbered + i, mask=there, other=0).to(tl.int64)
    first = there & (c != before) & (c != _ABSENT)
    tl.store(rows + number - 1, c.to(tl.int64), mask=first)
    tl.store(starts + number - 1, i, mask=first)
    final = there & (c != _ABSENT) & (after == _ABSENT)
    tl.store(starts + number, i + 1, mask=final)


@triton.jit
def _report(peaks, counts, state, numbered, out, batch, size, BLOCK_B: tl.constexpr):
    b = tl.arange(0, BLOCK_B)
    there = b < batch
    states = tl.load(state + b, mask=there, other=0)
    tl.store(out, tl.max(tl.load(peaks + b, mask=there, other=0), 0).to(tl.int64))
    tl.store(out + 1, tl.max(tl.load(counts + b, mask=there, other=0), 0).to(tl.int64))
    for bit in tl.static_range(3):
        tl.store(out + 2 + bit, tl.max((states >> bit) & 1, 0).to(tl.int64))
    tl.store(out + 5, tl.load(numbered + size - 1).to(tl.int64))


# --------------------------------------------------------------------------- gradients


@triton.jit
def _embedding_gradient(
    raw, length, weight, inverse_norm, entries, shares, counts, upstream, values, out, dim, width,
    upstream_stride, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < dim
    n = tl.minimum(tl.load(counts + b), width) + 1
    base = b * (width + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, n, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        c = tl.load(entries + base + i, mask=i < n, other=_ABSENT).to(tl.int64)
        there = c != _ABSENT
        g = tl.load(shares + base + i, mask=there, other=0.0)
        g = g * tl.load(inverse_norm + c, mask=there, other=0.0)
        mask = there[:, None] & inside[None, :]
        w = tl.load(weight + c[:, None] * dim + d[None, :], mask=mask, other=0.0)
        total += tl.sum(w * g[:, None], 0)
    norm = tl.load(length + b)
    x = tl.load(raw + b * dim + d, mask=inside, other=0.0).to(tl.float64)
    unit = tl.where(tl.abs(x) < _INF, x, 0.0) / norm
    wide = total.to(tl.float64)
    radial = tl.where(norm > 1e-12, tl.sum(wide * unit, 0), 0.0)
    factor = tl.load(upstream + b * upstream_stride).to(tl.float64) * tl.load(values + 2) / norm
    # zero, not NaN, where there is no gradient
    factor = tl.where(tl.sum(tl.abs(total), 0) > 0.0, factor, 0.0)
    tl.store(out + b * dim + d, ((wide - unit * radial) * factor).to(tl.float32), mask=inside)


@triton.jit
def _weight_gradient(
    raw, length, weight, inverse_norm, order, shares, rows, starts, upstream, values, out,
    dim, width, upstream_stride, factor, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < dim
    total = tl.zeros((BLOCK_D,), tl.float32)
    scale = tl.load(values + 2).to(tl.float32) * factor
    for i in range(tl.load(starts + r), tl.load(starts + r + 1)):
        entry = tl.load(order + i)
        b = entry // (width + 1)
        g = tl.load(shares + entry) * (tl.load(upstream + b * upstream_stride) * scale)
        g = (g.to(tl.float64) / tl.load(length + b)).to(tl.float32)
        total += g * tl.load(raw + b * dim + d, mask=inside, other=0.0)
    c = tl.load(rows + r)
    inverse = tl.load(inverse_norm + c)
    w = tl.load(weight + c * dim + d, mask=inside, other=0.0) * inverse
    radial = tl.sum(total * w, 0)
    tl.store(out + r * dim + d, (total - w * radial) * inverse, mask=inside)


# --------------------------------------------------------------------------- launches

KERNELS = (
    _prepare, _sample_floors, _filter, _raise_floors, _exact_cosines,
    _mark_segments, _write_segments, _report, _embedding_gradient, _weight_gradient,
)  # fmt: skip


class Batch(NamedTuple):
    """A batch as kernels read and write it; of B samples in float64 unless said.

    Attributes
    ----------
    raw : Tensor, [B, D], float32
        Embeddings of any length.
    labels : Tensor, [B], int64
        Rows of the prototypes. Others are noted in `state`.
    prior : Tensor, [B]
        log q of the targets.
    log_q : Tensor, [C], or None
    values : Tensor, [4], and alpha : float
        See :func:`numbers`.
    rounded : Tensor, [B, D], bf16
        Of unit length but for rounding.
    length, slack, cosine : Tensor, [B]
        Of the embeddings; by how much a product with a row of the screen may differ from the
        cosine; of the targets.
    levels, cuts : Tensor, [B]
        A lower bound of the level; in float32, below which product a class is proved inactive.
    state, counts, peaks : Tensor, [B], int32
        Flags; classes found, and the most there were at a time.
    """

    raw: Tensor
    labels: Tensor
    prior: Tensor
    log_q: Tensor | None
    values: Tensor
    alpha: float
    rounded: Tensor
    length: Tensor
    slack: Tensor
    cosine: Tensor
    levels: Tensor
    cuts: Tensor
    state: Tensor
    counts: Tensor
    peaks: Tensor

    def rows(self, part: slice) -> Batch:
        """The same for some samples, whose kernels write into this batch."""
        of_all = {"log_q": self.log_q, "values": self.values, "alpha": self.alpha}
        return Batch(
            *(each if name in of_all else each[part] for name, each in self._asdict().items())
        )

    def measure(self) -> tuple[Tensor, dict]:
        """log q of the classes, or anything, and what kernels are compiled for."""
        kind = {**_kind(self.alpha), "HAS_Q": self.log_q is not None}
        return self.values if self.log_q is None else self.log_q, kind


def prepare(
    raw: Tensor, labels: Tensor, prior: Tensor, log_q: Tensor | None, alpha: float, scale: float,
    prototypes: Prototypes,
) -> Batch:  # fmt: skip
    """A batch with its targets' cosines and what the screening is to allow for."""
    assert prototypes.screen is not None
    raw, labels, prior = raw.contiguous(), labels.contiguous(), prior.contiguous()
    log_q = None if log_q is None else log_q.contiguous()
    (batch, dim), device = raw.shape, raw.device
    doubles = torch.empty(4, batch, dtype=torch.float64, device=device)
    integers = torch.empty(3, batch, dtype=torch.int32, device=device)
    made = Batch(
        raw, labels, prior, log_q, numbers(alpha, scale, device), alpha,
        torch.empty(batch, dim, dtype=torch.bfloat16, device=device),
        *doubles, torch.empty(batch, device=device), *integers,
    )  # fmt: skip
    _prepare[(batch,)](
        raw, labels, prior, prototypes.weight, prototypes.screen.residual, made.rounded,
        made.length, made.slack, made.cosine, made.state, made.counts, made.peaks,
        len(prototypes.weight), dim, BLOCK_D=power_of_2(dim),
    )  # fmt: skip
    return made


def sample_scores(batch: Batch, prototypes: Prototypes, stride: int) -> Tensor:
    """Products [B, S], bf16, with every `stride`-th row of the screen."""
    assert prototypes.screen is not None
    return batch.rounded @ prototypes.screen.rows[::stride].T


def sample_floors(batch: Batch, sampled: Tensor, stride: int) -> None:
    """Levels and cuts of the targets and every `stride`-th class."""
    log_q, kind = batch.measure()
    _sample_floors[(len(sampled),)](
        sampled, batch.labels, batch.cosine, batch.prior, batch.slack, log_q, batch.values,
        batch.levels, batch.cuts, stride, sampled.shape[1],
        BLOCK=power_of_2(sampled.shape[1]), num_warps=16, **kind,
    )  # fmt: skip


def screen(batch: Batch, prototypes: Prototypes, part: slice, found: Tensor) -> None:
    """Adds the classes of a part that may be active to `found` [B, room], int64, in any order.

    The upper half of a number is the class, the lower its product's bits. Beyond the room they are
    counted only. Two launches for each piece of products.
    """
    assert prototypes.screen is not None
    samples, rows = len(batch.raw), prototypes.screen.rows
    step = prototypes.sizes.rows_of_products(samples)
    # rows begin where 16 numbers are read at once, whatever the number of classes
    step = step // 16 * 16
    stride = min(step, 16 * pieces(part.stop - part.start, 16))
    products = rows.new_empty(samples, stride)
    for start in range(part.start, part.stop, step):
        size = min(step, part.stop - start)
        torch.mm(batch.rounded, rows[start : start + size].T, out=products[:, :size])
        _filter[(samples * pieces(size, 32 * _LANES),)](
            products, batch.labels, batch.cuts, found, batch.counts, start, size, stride,
            found.shape[1], LANES=_LANES,
        )  # fmt: skip


def raise_floors(batch: Batch, found: Tensor, kept: Tensor | None = None) -> None:
    """Levels and cuts of what was found, which is thinned out; at last into `kept`.

    That is [B, width], int32, in any order and filled up with ABSENT; `batch.counts` may exceed it.
    """
    log_q, kind = batch.measure()
    _raise_floors[(len(found),)](
        found, batch.counts, batch.peaks, batch.cosine, batch.prior, batch.slack, log_q,
        batch.values, batch.levels, batch.cuts, found if kept is None else kept, found.shape[1],
        found.shape[1] if kept is None else kept.shape[1],
        CHUNK=power_of_2(found.shape[1], most=1024), FINAL=kept is not None, **kind,
    )  # fmt: skip


def exact_cosines(batch: Batch, prototypes: Prototypes, kept: Tensor) -> Tensor:
    """[B, width], float64, where there is a class."""
    out = torch.empty(kept.shape, dtype=torch.float64, device=kept.device)
    dim, width, pairs = batch.raw.shape[1], kept.shape[1], 16
    # a few programs a sample: most of the room is empty
    _exact_cosines[(len(kept), min(8, pieces(width, pairs)))](
        batch.raw, batch.length, prototypes.weight, kept, batch.counts, out, dim, width,
        BLOCK_I=pairs, BLOCK_D=power_of_2(dim, most=128),
    )  # fmt: skip
    return out


def mark_segments(ordered: Tensor) -> Tensor:
    """1 where another class begins, else 0, of classes [N] in order; 0 where it is ABSENT."""
    flags = torch.empty_like(ordered)
    _mark_segments[(pieces(len(ordered), 1024),)](ordered, flags, len(ordered), BLOCK=1024)
    return flags


def write_segments(ordered: Tensor, numbered: Tensor) -> tuple[Tensor, Tensor]:
    """The classes, and where each begins and the last one ends; [N] and [N + 1], int64.

    Parameters
    ----------
    ordered, numbered : Tensor, [N]
        Classes, and the cumulative sum of their marks, the number of which is filled.
    """
    size = len(ordered)
    rows = torch.empty(size, dtype=torch.int64, device=ordered.device)
    starts = torch.empty(size + 1, dtype=torch.int64, device=ordered.device)
    _write_segments[(pieces(size, 1024),)](ordered, numbered, rows, starts, size, BLOCK=1024)
    return rows, starts


def report(batch: Batch, numbered: Tensor) -> Tensor:
    """[6], int64: the largest of `peaks` and `counts`, three flags, the number of segments."""
    out = torch.empty(6, dtype=torch.int64, device=numbered.device)
    _report[(1,)](
        batch.peaks, batch.counts, batch.state, numbered, out, len(batch.state), len(numbered),
        BLOCK_B=power_of_2(len(batch.state)),
    )  # fmt: skip
    return out


def embedding_gradient(
    batch: Batch, prototypes: Prototypes, entries: Tensor, shares: Tensor, upstream: Tensor
) -> Tensor:
    """[B, D], by the embeddings as they were given; upstream [B] is that of the losses."""
    out = torch.empty_like(batch.raw)
    (samples, dim), width = batch.raw.shape, entries.shape[1] - 1
    block = power_of_2(dim)
    _embedding_gradient[(samples,)](
        batch.raw, batch.length, prototypes.weight, prototypes.inverse_norm, entries, shares,
        batch.counts, upstream, batch.values, out, dim, width, upstream.stride(0),
        BLOCK_I=max(1, min(64, 32768 // block)), BLOCK_D=block, num_warps=16,
    )  # fmt: skip
    return out


def weight_gradient(
    batch: Batch, prototypes: Prototypes, order: Tensor, shares: Tensor, rows: Tensor,
    starts: Tensor, upstream: Tensor, factor: float,
) -> Tensor:  # fmt: skip
    """[R, D], by the prototypes `rows` [R], of entries in the order of their classes; times factor.

    Parameters
    ----------
    order : Tensor, [N], int64
        Where the entries are in `shares`, class by class.
    starts : Tensor, [R + 1]
        Where each class begins.
    """
    dim = batch.raw.shape[1]
    out = torch.empty(len(rows), dim, device=batch.raw.device)
    if len(rows):
        _weight_gradient[(len(rows),)](
            batch.raw, batch.length, prototypes.weight, prototypes.inverse_norm, order, shares,
            rows, starts, upstream, batch.values, out, dim, shares.shape[1] - 1,
            upstream.stride(0), factor, BLOCK_D=power_of_2(dim),
        )  # fmt: skip
    return out
