# Triton's types are not those of the code inside its kernels
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
r"""From the cosines of what may be active to levels, losses and entries of the gradient, in Triton.

One program is one sample. In one process :func:`solve` does all of it in one launch. Of shards each
knows its own candidates: :func:`bound` gives the level of the largest ones of all shards, from
which :func:`exchange` goes on, a launch for each step of Newton's method; what it leaves is for the
shards to show each other before the next. :func:`finish` does the rest. The formulas are those of
:mod:`speechbrain_qmargin.loss.solver`, in float64, summed in the order of the classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from speechbrain_qmargin.head.kernels import ABSENT, NOT_CONVERGED, NOT_FINITE, Batch
from speechbrain_qmargin.loss.triton_numbers import level_alone, moved_on, power_of_2, powers_of

__all__ = [
    "KERNELS",
    "MOST_STEPS",
    "Bracket",
    "Solved",
    "bound",
    "exchange",
    "finish",
    "solve",
]

MOST_STEPS = 128  # of Newton's method
_ABSENT, _INF = tl.constexpr(ABSENT), tl.constexpr(float("inf"))
_NOT_FINITE, _NOT_CONVERGED = tl.constexpr(NOT_FINITE), tl.constexpr(NOT_CONVERGED)
_MOST_STEPS = tl.constexpr(MOST_STEPS)
_EPS = tl.constexpr(2.0**-52)
_CHUNK = 512


# --------------------------------------------------------------------------- shared by kernels


@triton.jit
def _numbers(values):
    """alpha - 1, k, scale, and by how much a level is above its edge."""
    return tl.load(values), tl.load(values + 1), tl.load(values + 2), tl.load(values + 3)


@triton.jit
def _powers(lead, log_q, k, IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr):
    """p and q u^(k - 1) of other classes, in float64."""
    if (POWER > 0) and not HAS_Q:
        u = tl.maximum(lead, 0.0)
        h = tl.where(u > 0.0, 1.0, 0.0).to(tl.float64)
        for _ in tl.static_range(POWER - 1):
            h = h * u
        p = h * u
    else:
        p, h = powers_of(lead, log_q, k, IN_LOGS)
    return p, h


@triton.jit
def _candidates(
    kept, cosines, log_q, row, start, n, scale, CHUNK: tl.constexpr, HAS_Q: tl.constexpr
):
    """Classes, logits (-inf where there is none) and log q of a chunk of a sample's candidates."""
    i = start + tl.arange(0, CHUNK)
    there = i < n
    c = tl.load(kept + row + i, mask=there, other=0)
    logit = tl.where(there, tl.load(cosines + row + i, mask=there, other=0.0) * scale, -_INF)
    prior = tl.zeros((CHUNK,), tl.float64)
    if HAS_Q:
        prior = tl.load(log_q + c, mask=there, other=0.0).to(tl.float64)
    return c, logit, prior


@triton.jit
def _moments(
    kept, cosines, log_q, row, n, own, level, gamma, k, scale,
    CHUNK: tl.constexpr, IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr,
):  # fmt: skip
    """Over a sample's candidates at a level: sums of p, of q u^(k - 1), of p times (logit - the
    target's), and how many are active."""
    s, h = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    gap, many = tl.zeros((), tl.float64), tl.zeros((), tl.int32)
    for start in range(0, n, CHUNK):
        _, logit, prior = _candidates(kept, cosines, log_q, row, start, n, scale, CHUNK, HAS_Q)
        p, h_i = _powers(gamma * (logit - level), prior, k, IN_LOGS, POWER, HAS_Q)
        s += tl.sum(p, 0)
        h += tl.sum(h_i, 0)
        gap += tl.sum(tl.where(p > 0.0, p * (logit - own), 0.0), 0)
        many += tl.sum((p > 0.0).to(tl.int32), 0)
    return s, h, gap, many


@triton.jit
def _write_outcome(
    b, kept, cosines, labels, slope, state, log_q, entries, shares, loss, posterior, support,
    residual, own, q_own, level, others, gap, many, failed, here, gamma, k, scale, n, batch, width,
    CHUNK: tl.constexpr, BLOCK_B: tl.constexpr, IN_LOGS: tl.constexpr, POWER: tl.constexpr,
    HAS_Q: tl.constexpr,
):  # fmt: skip
    """The loss as loss.solver.fenchel_young has it, and the entries of the gradient: the target,
    if it is one of these classes (`here`), then the active ones."""
    alone = level_alone(own, q_own, gamma, IN_LOGS)
    p_own, _ = powers_of(gamma * (own - level), q_own, k, IN_LOGS)
    excess = others + p_own - 1.0
    inverse = 1.0 / (1.0 + excess)
    tau = level if IN_LOGS else level + k
    gap += excess * (own - tau)
    value = gamma / (1.0 + gamma) * gap + (level - alone + excess) / (1.0 + gamma)
    value = tl.where(others == 0.0, 0.0, tl.maximum(value, 0.0))
    # a sample that is not finite spoils the batch
    each = tl.arange(0, BLOCK_B)
    states = tl.load(state + each, mask=each < batch, other=0)
    valid = tl.sum(((states & _NOT_FINITE) != 0).to(tl.int32), 0) == 0
    p_own = (p_own * inverse).to(tl.float32)
    rest = 0.0 - others * inverse
    tl.store(loss + b, tl.where(valid, value, float("nan")).to(tl.float32))
    tl.store(posterior + b, p_own)
    tl.store(support + b, (many + (p_own > 0.0).to(tl.int32)).to(tl.float32))
    tl.store(residual + b, rest)
    flag = tl.load(state + b)
    failed = failed | (excess < -0.5)  # as step._check_mass, which says why
    tl.store(state + b, flag | tl.where(failed, _NOT_CONVERGED, 0))

    base = b * (width + 1)
    share = (rest * tl.load(slope + b)).to(tl.float32)
    good = valid & here & (share != 0.0)
    tl.store(shares + base, tl.where(good, share, 0.0))
    label = tl.load(labels + b).to(tl.int32)
    tl.store(entries + base, tl.where(good, label, _ABSENT))
    for start in range(0, width, CHUNK):
        i = start + tl.arange(0, CHUNK)
        c, logit, prior = _candidates(
            kept, cosines, log_q, b * width, start, n, scale, CHUNK, HAS_Q
        )
        p, _h = _powers(gamma * (logit - level), prior, k, IN_LOGS, POWER, HAS_Q)
        share_i = (p * inverse).to(tl.float32)
        good_i = valid & (i < n) & (share_i != 0.0)
        tl.store(shares + base + 1 + i, tl.where(good_i, share_i, 0.0), mask=i < width)
        tl.store(entries + base + 1 + i, tl.where(good_i, c, _ABSENT), mask=i < width)


# --------------------------------------------------------------------------- one process


@triton.jit
def _solve(
    kept, counts, cosines, labels, cosine, slope, prior, state, log_q, values, levels,
    entries, shares, loss, posterior, support, residual,
    batch, width,
    CHUNK: tl.constexpr, BLOCK_B: tl.constexpr, SAFEGUARDED: tl.constexpr,
    IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    gamma, k, scale, above = _numbers(values)
    own, q_own = tl.load(cosine + b) * scale, tl.load(prior + b)
    n = tl.minimum(tl.load(counts + b), width)
    low = tl.maximum(tl.load(levels + b), level_alone(own, q_own, gamma, IN_LOGS))
    high, unknown = own, 0
    for start in range(0, n, CHUNK):
        _, logit, prior_i = _candidates(
            kept, cosines, log_q, b * width, start, n, scale, CHUNK, HAS_Q
        )
        unknown += tl.sum((logit != logit).to(tl.int32), 0)
        low = tl.maximum(low, tl.max(level_alone(logit, prior_i, gamma, IN_LOGS), 0))
        high = tl.maximum(high, tl.max(logit, 0))
    high = tl.maximum(high + above, low)
    level, step, going = low, 0, 1
    while going != 0:
        s, h = powers_of(gamma * (own - level), q_own, k, IN_LOGS)
        for start in range(0, n, CHUNK):
            _, logit, prior_i = _candidates(
                kept, cosines, log_q, b * width, start, n, scale, CHUNK, HAS_Q
            )
            p, h_i = _powers(gamma * (logit - level), prior_i, k, IN_LOGS, POWER, HAS_Q)
            s += tl.sum(p, 0)
            h += tl.sum(h_i, 0)
        level, low, high, ended = moved_on(level, low, high, s, h, gamma, step, _EPS, SAFEGUARDED)
        step += 1
        going = tl.where(ended | (step >= _MOST_STEPS), 0, 1)
    failed = (step >= _MOST_STEPS) | ~(tl.abs(level) < _INF) | (unknown > 0)
    others, _h, gap, many = _moments(
        kept, cosines, log_q, b * width, n, own, level, gamma, k, scale,
        CHUNK, IN_LOGS, POWER, HAS_Q,
    )  # fmt: skip
    _write_outcome(
        b, kept, cosines, labels, slope, state, log_q, entries, shares, loss, posterior, support,
        residual, own, q_own, level, others, gap, many, failed, True, gamma, k, scale, n, batch,
        width, CHUNK, BLOCK_B, IN_LOGS, POWER, HAS_Q,
    )  # fmt: skip


# --------------------------------------------------------------------------- shards


@triton.jit
def _bound(
    shown, cosine, prior, values, levels, lows, highs, world, batch, row,
    SHOWN: tl.constexpr, SAFEGUARDED: tl.constexpr,
    IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    gamma, k, scale, above = _numbers(values)
    own, q_own = tl.load(cosine + b) * scale, tl.load(prior + b)
    low, high = level_alone(own, q_own, gamma, IN_LOGS), own
    i = tl.arange(0, SHOWN)
    for rank in range(0, world):
        at = shown + (rank * batch + b) * row
        logit, prior_i = tl.load(at + i) * scale, 0.0
        if HAS_Q:
            prior_i = tl.load(at + SHOWN + 2 + i)
        low = tl.maximum(low, tl.load(at + SHOWN))
        low = tl.maximum(low, tl.max(level_alone(logit, prior_i, gamma, IN_LOGS), 0))
        high = tl.maximum(high, tl.max(logit, 0))
    high = tl.maximum(high + above, low)
    tl.store(highs + b, high)
    level, step, going = low, 0, 1
    while going != 0:
        s, h = powers_of(gamma * (own - level), q_own, k, IN_LOGS)
        for rank in range(0, world):
            at = shown + (rank * batch + b) * row
            logit, prior_i = tl.load(at + i) * scale, 0.0
            if HAS_Q:
                prior_i = tl.load(at + SHOWN + 2 + i)
            p, h_i = _powers(gamma * (logit - level), prior_i, k, IN_LOGS, POWER, HAS_Q)
            s += tl.sum(p, 0)
            h += tl.sum(h_i, 0)
        level, low, high, ended = moved_on(level, low, high, s, h, gamma, step, _EPS, SAFEGUARDED)
        step += 1
        going = tl.where(ended | (step >= _MOST_STEPS), 0, 1)
    tau = level if IN_LOGS else level + k
    level -= 2.0**-30 * (1.0 + tl.abs(tau))  # more than arithmetic may have added
    tl.store(levels + b, level)
    tl.store(lows + b, level)


@triton.jit
def _exchange(
    parts, kept, counts, cosines, cosine, prior, log_q, values, levels, lows, highs, out,
    step, world, batch, width,
    CHUNK: tl.constexpr, FIRST: tl.constexpr, SAFEGUARDED: tl.constexpr,
    IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    gamma, k, scale, _above = _numbers(values)
    own, q_own = tl.load(cosine + b) * scale, tl.load(prior + b)
    level, ended = tl.load(levels + b), 0.0
    if not FIRST:
        s, h = powers_of(gamma * (own - level), q_own, k, IN_LOGS)
        for rank in range(0, world):
            s += tl.load(parts + rank * 5 * batch + b)
            h += tl.load(parts + (rank * 5 + 1) * batch + b)
        low, high = tl.load(lows + b), tl.load(highs + b)
        level, low, high, done = moved_on(level, low, high, s, h, gamma, step, _EPS, SAFEGUARDED)
        ended = tl.where(done, 1.0, 0.0)
        tl.debug_barrier()  # all have read what is written
        tl.store(lows + b, low)
        tl.store(highs + b, high)
        tl.store(levels + b, level)
    n = tl.minimum(tl.load(counts + b), width)
    s, h, gap, many = _moments(
        kept, cosines, log_q, b * width, n, own, level, gamma, k, scale,
        CHUNK, IN_LOGS, POWER, HAS_Q,
    )  # fmt: skip
    tl.store(out + b, s)
    tl.store(out + batch + b, h)
    tl.store(out + 2 * batch + b, gap)
    tl.store(out + 3 * batch + b, many.to(tl.float64))
    tl.store(out + 4 * batch + b, ended)


@triton.jit
def _finish(
    parts, kept, counts, cosines, labels, cosine, slope, prior, state, log_q, values, levels,
    entries, shares, loss, posterior, support, residual,
    world, classes, batch, width,
    CHUNK: tl.constexpr, BLOCK_B: tl.constexpr,
    IN_LOGS: tl.constexpr, POWER: tl.constexpr, HAS_Q: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    gamma, k, scale, _above = _numbers(values)
    own, q_own = tl.load(cosine + b) * scale, tl.load(prior + b)
    level, label = tl.load(levels + b), tl.load(labels + b)
    others, gap = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    many = tl.zeros((), tl.int32)
    for rank in range(0, world):
        at = parts + rank * 5 * batch + b
        others += tl.load(at)
        gap += tl.load(at + 2 * batch)
        many += tl.load(at + 3 * batch).to(tl.int32)
    failed = ~(tl.abs(level) < _INF)
    _write_outcome(
        b, kept, cosines, labels, slope, state, log_q, entries, shares, loss, posterior, support,
        residual, own, q_own, level, others, gap, many, failed, (label >= 0) & (label < classes),
        gamma, k, scale, tl.minimum(tl.load(counts + b), width), batch, width,
        CHUNK, BLOCK_B, IN_LOGS, POWER, HAS_Q,
    )  # fmt: skip


# --------------------------------------------------------------------------- launches

KERNELS = (_solve, _bound, _exchange, _finish)


class Solved(NamedTuple):
    """What :func:`solve` and :func:`finish` give.

    Attributes
    ----------
    loss, posterior, support : Tensor, [B], float32
        The posterior is the target's.
    residual : Tensor, [B], float64
        The target's posterior less one.
    entries : Tensor, [B, width + 1], int32
        Classes with a gradient, the target first; ABSENT elsewhere.
    shares : Tensor, [B, width + 1], float32
        The gradient by their logits.
    """

    loss: Tensor
    posterior: Tensor
    support: Tensor
    residual: Tensor
    entries: Tensor
    shares: Tensor

    @classmethod
    def empty_for(cls, kept: Tensor) -> Solved:
        """To be written, for candidates [B, width]."""
        (samples, width), device = kept.shape, kept.device
        return cls(
            *torch.empty(3, samples, device=device),
            torch.empty(samples, dtype=torch.float64, device=device),
            torch.empty(samples, width + 1, dtype=torch.int32, device=device),
            torch.empty(samples, width + 1, device=device),
        )


class Bracket(NamedTuple):
    """Levels [B] of a batch, and between what they may move; float64, written by kernels."""

    levels: Tensor
    lows: Tensor
    highs: Tensor


def solve(batch: Batch, kept: Tensor, cosines: Tensor, slope: Tensor) -> Solved:
    """Level, posteriors and loss, all of a sample in one program.

    Parameters
    ----------
    kept, cosines : Tensor, [B, width]
    slope : Tensor, [B], float64
        Of the targets' cosines, by what they were before they moved.
    """
    log_q, kind = batch.measure()
    samples, width = kept.shape
    made = Solved.empty_for(kept)
    _solve[(samples,)](
        kept, batch.counts, cosines, batch.labels, batch.cosine, slope, batch.prior, batch.state,
        log_q, batch.values, batch.levels, made.entries, made.shares, made.loss, made.posterior,
        made.support, made.residual, samples, width,
        CHUNK=_CHUNK, BLOCK_B=power_of_2(samples), SAFEGUARDED=batch.alpha > 2, **kind,
    )  # fmt: skip
    return made


def bound(batch: Batch, shown: Tensor) -> Bracket:
    """Lower bounds of the levels, from the largest candidates of all shards and the targets.

    They hold nearly all mass, so that from their level Newton's method needs few steps.

    Parameters
    ----------
    shown : Tensor, [ranks, B, n + 2 or, with a reference measure, 2 n + 2], float64
        Cosines (-inf where there is none), a lower bound of the shard's own, something else, and
        the log q of these classes; n is a power of two.
    """
    _, kind = batch.measure()
    world, samples, row = shown.shape
    each = row - 2 if batch.log_q is None else (row - 2) // 2
    made = Bracket(*torch.empty(3, samples, dtype=torch.float64, device=shown.device))
    _bound[(samples,)](
        shown, batch.cosine, batch.prior, batch.values, made.levels, made.lows, made.highs,
        world, samples, row, SHOWN=each, SAFEGUARDED=batch.alpha > 2, **kind,
    )  # fmt: skip
    return made


def exchange(
    batch: Batch, kept: Tensor, cosines: Tensor, bracket: Bracket, parts: Tensor | None, step: int
) -> Tensor:
    """A step of Newton's method, and what this shard's candidates amount to after it.

    Parameters
    ----------
    bracket : Bracket
        Written.
    parts : Tensor, [ranks, 5, B], or None
        What this function gave on all shards; None: there was no step yet, and none is taken.

    Returns
    -------
    Tensor, [5, B], float64
        Over this shard's candidates the sums of p, of q u^(k - 1), of p times (logit - the
        target's), and how many are active; and whether the sample was done before the step, which
        then was none.
    """
    log_q, kind = batch.measure()
    samples, width = kept.shape
    out = torch.empty(5, samples, dtype=torch.float64, device=kept.device)
    _exchange[(samples,)](
        out if parts is None else parts, kept, batch.counts, cosines, batch.cosine, batch.prior,
        log_q, batch.values, *bracket, out, step, 1 if parts is None else len(parts), samples,
        width, CHUNK=_CHUNK, FIRST=parts is None, SAFEGUARDED=batch.alpha > 2, **kind,
    )  # fmt: skip
    return out


def finish(
    batch: Batch, kept: Tensor, cosines: Tensor, slope: Tensor, levels: Tensor, parts: Tensor,
    classes: int,
) -> Solved:  # fmt: skip
    """As :func:`solve`, of a shard with `classes`, at levels and with sums [ranks, 5, B] of all."""
    log_q, kind = batch.measure()
    samples, width = kept.shape
    made = Solved.empty_for(kept)
    _finish[(samples,)](
        parts, kept, batch.counts, cosines, batch.labels, batch.cosine, slope, batch.prior,
        batch.state, log_q, batch.values, levels, made.entries, made.shares, made.loss,
        made.posterior, made.support, made.residual, len(parts), classes, samples, width,
        CHUNK=_CHUNK, BLOCK_B=power_of_2(samples), **kind,
    )  # fmt: skip
    return made
