# Triton's types are not those of the code inside its kernels
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
"""Kernels of rows of prototypes, written in Triton: what is derived of them, and steps of theirs.

Each function is one launch over the rows it is given, reads and writes each of them once, and
needs no memory besides. The torch code that says the same, and is their reference in the tests, is
``prototypes._derive`` and the ``_glide`` and ``_visit`` of the optimisers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from speechbrain_qmargin.loss.triton_numbers import pieces, power_of_2

__all__ = ["KERNELS", "adam_rows", "derive_rows", "sgd_rows"]

_INF = tl.constexpr(float("inf"))


@triton.jit
def _places(
    rows, first, count, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr
):
    """Some rows, which there are, their elements, those in a gradient, and which there are."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    there = r < count
    c = first + r
    if not ALL:
        c = tl.load(rows + r, mask=there, other=0)
    inside = there[:, None] & (d < dim)[None, :]
    return c, there, c[:, None] * dim + d[None, :], r[:, None] * dim + d[None, :], inside


@triton.jit
def _derive(
    rows, weight, inverse_norm, screen, residual, first, count, dim,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr, SCREENED: tl.constexpr,
):  # fmt: skip
    c, there, at, _, inside = _places(rows, first, count, dim, BLOCK_R, BLOCK_D, ALL)
    w = tl.load(weight + at, mask=inside, other=0.0)
    wide = w.to(tl.float64)
    norm = tl.sqrt(tl.sum(wide * wide, 1)).to(tl.float32)
    inverse = 1.0 / tl.where(norm < 1e-12, 1e-12, norm)  # a maximum would pass NaN over
    tl.store(inverse_norm + c, inverse, mask=there)
    if SCREENED:
        unit = w * inverse[:, None]
        rounded = unit.to(tl.bfloat16)
        tl.store(screen + at, rounded, mask=inside)
        lacking = unit - rounded.to(tl.float32)
        error = tl.sqrt(tl.sum(lacking * lacking, 1)) * (1 + 2.0**-20)
        # a row that is not finite may be anything: every class passes
        error = tl.where(error < _INF, error, _INF)
        most = tl.max(tl.where(there, error, 0.0), 0)
        tl.atomic_max(residual, most, sem="relaxed")  # whatever the order, the same


@triton.jit
def _line(table, since, c, there, number, WIDTH: tl.constexpr):
    line = tl.load(since + c, mask=there, other=0).to(tl.int64)
    return tl.load(table + line * WIDTH + number, mask=there, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _visited(since, c, there, present):
    tl.debug_barrier()  # all have read the lines they had
    tl.store(since + c, tl.zeros_like(c).to(tl.int32) + present, mask=there)


@triton.jit
def _sgd(
    rows, values, weight, momentum, since, table, present, lr, mu, decay, count, dim,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, KEPT: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, DECAY: tl.constexpr, GLIDE: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    c, there, at, given, inside = _places(rows, 0, count, dim, BLOCK_R, BLOCK_D, False)
    w = tl.load(weight + at, mask=inside, other=0.0)
    step = tl.load(values + given, mask=inside, other=0.0)
    b = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if KEPT:
        b = tl.load(momentum + at, mask=inside, other=0.0)
    if GLIDE:
        ww, wb = _line(table, since, c, there, 0, 4), _line(table, since, c, there, 1, 4)
        old = w
        w = w * ww + b * wb
        b = b * _line(table, since, c, there, 3, 4) + old * _line(table, since, c, there, 2, 4)
        step = step / tl.where(there[:, None] & (wb == 0.0), ww, 1.0)
    if DECAY:
        step += w * decay
    if MOMENTUM:
        b = b * mu + step
        step = step + b * mu if NESTEROV else b
    if KEPT:
        tl.store(momentum + at, b, mask=inside)
    tl.store(weight + at, w - step * lr, mask=inside)
    if MARK:
        _visited(since, c, there, present)


@triton.jit
def _adam(
    rows, values, weight, mean, square, since, table, present, kept, gain, fade, gain_of_square,
    eps, rate, root_c2, count, dim,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, GLIDE: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    c, there, at, given, inside = _places(rows, 0, count, dim, BLOCK_R, BLOCK_D, False)
    w = tl.load(weight + at, mask=inside, other=0.0)
    g = tl.load(values + given, mask=inside, other=0.0)
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    if GLIDE:
        below = tl.sqrt(v) + _line(table, since, c, there, 4, 5) * eps
        unit = m / tl.where(m == 0.0, 1.0, below)
        w = w * _line(table, since, c, there, 0, 5) - unit * _line(table, since, c, there, 3, 5)
        m = m * _line(table, since, c, there, 1, 5)
        v = v * _line(table, since, c, there, 2, 5)
    m = m + (g - m) * gain
    v = v * fade + g * g * gain_of_square
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    w = w * kept - rate * (m / (tl.sqrt(v) / root_c2 + eps))
    tl.store(weight + at, w, mask=inside)
    if MARK:
        _visited(since, c, there, present)


# --------------------------------------------------------------------------- launches

KERNELS = (_derive, _sgd, _adam)


def _blocks(count: int, dim: int) -> tuple[tuple[int], dict]:
    block = power_of_2(dim)
    together = max(1, 2048 // block)
    return (pieces(count, together),), {"BLOCK_R": together, "BLOCK_D": block}


def derive_rows(
    weight: Tensor, inverse_norm: Tensor, screen: Tensor | None, residual: Tensor | None,
    rows: slice | Tensor,
) -> None:  # fmt: skip
    """1/norm of some rows; what they are of unit length in bf16, and the most that this lacks.

    Parameters
    ----------
    weight : Tensor, [C, D], float32
    inverse_norm : Tensor, [C]
        Written.
    screen : Tensor, [C, D], bf16, and residual : Tensor, zero-dimensional; or None
        Written; `residual` only ever grows.
    rows : slice, or Tensor, [R], int64
    """
    everything = isinstance(rows, slice)
    first, stop = (rows.start, rows.stop) if everything else (0, len(rows))
    count = min(stop, len(weight)) - first if everything else stop
    if not count:
        return
    grid, blocks = _blocks(count, weight.shape[1])
    _derive[grid](
        weight if everything else rows, weight, inverse_norm, weight if screen is None else screen,
        inverse_norm if residual is None else residual, first, count, weight.shape[1],
        ALL=everything, SCREENED=screen is not None, **blocks,
    )  # fmt: skip


def sgd_rows(
    weight: Tensor, momentum: Tensor | None, rows: Tensor, values: Tensor, since: Tensor,
    table: Tensor | None, present: int | None, *, lr: float, mu: float, decay: float,
    nesterov: bool,
) -> None:  # fmt: skip
    """SGD's step of some rows, their idle steps before it, in place.

    Parameters
    ----------
    weight, momentum : Tensor, [C, D], float32
        No momentum: None.
    rows : Tensor, [R], int64
        No row twice.
    values : Tensor, [R, D]
        Their gradient.
    since : Tensor, [C], int32
        A row's line of the table; `present` is written there, unless it is None.
    table : Tensor, [n, 4], float64, or None
        See ``RowSparse``. None: no row has idle steps.
    """
    if not len(rows):
        return
    grid, blocks = _blocks(len(rows), weight.shape[1])
    _sgd[grid](
        rows, values, weight, weight if momentum is None else momentum, since,
        weight if table is None else table, present or 0, lr, mu, decay, len(rows),
        weight.shape[1], KEPT=momentum is not None, MOMENTUM=mu != 0, NESTEROV=nesterov,
        DECAY=decay != 0, GLIDE=table is not None, MARK=present is not None, **blocks,
    )  # fmt: skip


def adam_rows(
    weight: Tensor, mean: Tensor, square: Tensor, rows: Tensor, values: Tensor, since: Tensor,
    table: Tensor | None, present: int | None, *, lr: float, betas: tuple[float, float], eps: float,
    decay: float, c1: float, root_c2: float,
) -> None:  # fmt: skip
    """AdamW's step of some rows, their idle steps before it, in place; as :func:`sgd_rows`.

    Parameters
    ----------
    mean, square : Tensor, [C, D]
        The moments.
    table : Tensor, [n, 5], float64, or None
    c1, root_c2 : float
        1 - b1^t, and the root of 1 - b2^t.
    """
    if not len(rows):
        return
    grid, blocks = _blocks(len(rows), weight.shape[1])
    b1, b2 = betas
    # differences are taken here: on a device numbers arrive in float32
    _adam[grid](
        rows, values, weight, mean, square, since, weight if table is None else table,
        present or 0, 1 - lr * decay, 1 - b1, b2, 1 - b2, eps, lr / c1, root_c2, len(rows),
        weight.shape[1],
        GLIDE=table is not None, MARK=present is not None, **blocks,
    )  # fmt: skip
