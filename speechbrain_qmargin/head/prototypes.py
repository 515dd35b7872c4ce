"""The prototypes and what is derived from them: inverse norms, a copy in few bits; up to date."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from speechbrain_qmargin.head.sizes import Sizes, constants
from speechbrain_qmargin.loss.device import host_decides, kernels_run

__all__ = [
    "Derived",
    "Mark",
    "Prototypes",
    "Screen",
    "are_finite",
    "content",
    "int8_product",
    "mark",
    "screen_dtype",
    "to_int8",
]

_SAMPLED = 64  # rows whose content is looked at


class Mark(NamedTuple):
    """The state of a tensor: if it is the same twice, nothing was written in between."""

    pointer: int
    device: torch.device
    version: int
    content: int


def mark(weight: Tensor) -> Mark:
    """Where a tensor [C, D] is, its version, and what 64 of its rows hold.

    A write by torch raises the version; one through ``.data``, a fused optimiser or a broadcast
    does not, but as a rule writes all rows. On a GPU the content is not looked at: the host would
    wait.

    Examples
    --------
    >>> weight = torch.zeros(100, 2)
    >>> before = mark(weight)
    >>> _ = weight.data.fill_(1)
    >>> mark(weight) == before
    False
    """
    looked_at = host_decides(weight.device) and weight.dtype == torch.float32
    held = int(content(weight)) if looked_at else 0
    return Mark(weight.data_ptr(), weight.device, weight._version, held)


def content(weight: Tensor) -> Tensor:
    """A number, int64, of what 64 rows of a tensor [C, D], float32, hold; on its device.

    Examples
    --------
    >>> one, other = (content(row.unsqueeze(0)) for row in torch.eye(2))
    >>> one == other                    # where a value stands counts
    tensor(False)
    """
    rows = weight.detach()[:: max(1, weight.shape[0] // _SAMPLED)]
    return (rows.view(torch.int32) * _keys(*rows.shape, rows.device)).sum(dtype=torch.int64)


@lru_cache(maxsize=8)
def _keys(rows: int, dim: int, device: torch.device) -> Tensor:
    """Odd numbers, so that rows that change places change the sum too."""
    return torch.arange(1, 2 * rows * dim, 2, dtype=torch.int32, device=device).view(rows, dim)


class Screen(NamedTuple):
    """The unit rows in few bits: row j is `factor` [j] times `rows` [j], up to its residual.

    Attributes
    ----------
    rows : Tensor, [C, D]
        bf16, where the processor multiplies it fast; int8, where it multiplies that fast; else the
        float32 prototypes themselves.
    factor : Tensor, [C], or None
        None: 1.
    residual : Tensor, zero-dimensional
        Bounds the length of what a unit row lacks, in units of its factor.

    Examples
    --------
    >>> prototypes = Derived(Sizes(screen_from=1, screen=torch.int8)).of(torch.tensor([[3.0, 4.0]]))
    >>> screen = prototypes.screen
    >>> screen.rows                     # (0.6, 0.8) in units of 0.8 / 127
    tensor([[ 95, 127]], dtype=torch.int8)
    >>> screen.factor * screen.rows
    tensor([[0.5984, 0.8000]])
    """

    rows: Tensor
    factor: Tensor | None
    residual: Tensor


class Prototypes(NamedTuple):
    """What a search reads of the classes, and how much of it at a time.

    Attributes
    ----------
    weight : Tensor, [C, D], float32
    inverse_norm : Tensor, [C], float32
        1 / norm of each row.
    screen : Screen or None
        From 32,768 classes on, or for ``fused`` of any number.
    sizes : Sizes

    Examples
    --------
    >>> prototypes = Derived().of(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    >>> prototypes.inverse_norm
    tensor([0.2000, 0.5000])
    >>> prototypes.unit(slice(0, 1))
    tensor([[0.6000, 0.8000]])
    >>> prototypes.are_screened         # there are two only
    False
    """

    weight: Tensor
    inverse_norm: Tensor
    screen: Screen | None
    sizes: Sizes = Sizes()

    @property
    def are_screened(self) -> bool:
        """Whether ``search`` looks at few bits first."""
        return self.screen is not None and len(self.weight) >= self.sizes.screen_from

    def unit(self, rows: Tensor | slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of unit length."""
        if dtype == torch.float64:
            unit = self.weight[rows].double()
            length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
            return unit.div_(length.clamp_(min=1e-12))
        if isinstance(rows, slice):
            return self.weight[rows] * self.inverse_norm[rows].unsqueeze(1)
        unit = self.weight.index_select(0, rows)
        return unit.mul_(self.inverse_norm.index_select(0, rows).unsqueeze(1))


def are_finite(inverse_norm: Tensor) -> Tensor:
    """Whether the rows of these inverse norms are: a zero-dimensional bool.

    Examples
    --------
    >>> are_finite(1 / torch.tensor([[3.0, 4.0], [0.0, torch.inf]]).norm(dim=1))
    tensor(False)
    """
    low, high = torch.aminmax(inverse_norm)  # NaN propagates
    return (low > 0) & (high < float("inf"))


class Derived:
    """The :class:`Prototypes` of a weight, rebuilt when it was written, refreshed row by row.

    Examples
    --------
    >>> derived, weight = Derived(), torch.tensor([[3.0, 4.0]])
    >>> derived.of(weight).inverse_norm
    tensor([0.2000])
    >>> _ = weight.mul_(2)
    >>> derived.of(weight).inverse_norm
    tensor([0.1000])
    """

    def __init__(self, sizes: Sizes | None = None) -> None:
        self.sizes = sizes
        self._kept: Prototypes | None = None
        self._mark: Mark | None = None

    def __getstate__(self) -> dict:
        return {"sizes": self.sizes}  # a copy of the weight has its own

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["sizes"])

    def sizes_on(self, device: torch.device) -> Sizes:
        """Those that were given, else the device's."""
        return self.sizes or constants(device)

    def forget(self) -> None:
        """All is built anew when it is next needed."""
        self._mark = None

    def of(self, weight: Tensor) -> Prototypes:
        """Up to date with `weight` [C, D], float32."""
        found = mark(weight)
        if self._kept is None or self._mark != found:
            # what inference mode makes could not be used in training
            with torch.inference_mode(False), torch.no_grad():
                rows = weight.detach()
                norms = rows.new_empty(rows.shape[0])
                sizes = self.sizes_on(weight.device)
                screened = sizes.fused or len(rows) >= sizes.screen_from
                screen = _empty_screen(rows, norms, sizes.screen) if screened else None
                self._kept = Prototypes(rows, norms, screen, sizes)
                step = sizes.fit(sizes.rows, 8 * rows.shape[1])
                for start in range(0, rows.shape[0], step):
                    _derive(self._kept, slice(start, start + step))
            self._mark = found
        return self._kept

    def rows_changed(self, weight: Tensor, rows: Tensor, before: Mark) -> None:
        """`rows` were just changed, by one who found the weight at `before`."""
        if self._kept is not None and self._mark == before:
            with torch.inference_mode(False), torch.no_grad():
                sizes = self._kept.sizes
                at_once = sizes.fit(sizes.rows, 8 * weight.shape[1])
                if _by_kernel(self._kept):  # which needs no memory for a piece
                    at_once = max(1, len(rows))
                for part in rows.split(at_once):
                    _derive(self._kept, part)
            self._mark = mark(weight)


def screen_dtype(device: torch.device) -> torch.dtype:
    """In what a product is cheapest: bf16 on GPUs and where the processor has it, else int8, else
    float32.

    Examples
    --------
    >>> screen_dtype(torch.device("cuda"))
    torch.bfloat16
    """
    if device.type != "cpu":
        return torch.bfloat16
    has = {
        name: bool(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)())
        for name in ("amx_tile", "avx512_bf16", "vnni", "avx512_vnni")
    }
    if has["amx_tile"] or has["avx512_bf16"]:
        return torch.bfloat16
    if (has["vnni"] or has["avx512_vnni"]) and _int8_is_exact():
        return torch.int8
    return torch.float32


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """int32 [N, M] of int8 [N, K] and [K, M].

    Examples
    --------
    >>> a = torch.tensor([[100, 100]], dtype=torch.int8)
    >>> int8_product(a, a.T)
    tensor([[20000]], dtype=torch.int32)
    """
    return torch._int_mm(a, b)  # pyright: ignore[reportPrivateImportUsage]


@lru_cache(maxsize=1)
def _int8_is_exact() -> bool:
    """Without VNNI, sums of int8 products may saturate."""
    ones = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    return bool((int8_product(ones, ones) == 64 * 127 * 127).all())


def _empty_screen(rows: Tensor, inverse_norm: Tensor, dtype: torch.dtype | None) -> Screen:
    dtype, residual = dtype or screen_dtype(rows.device), rows.new_zeros(())
    if dtype == torch.float32 or rows.shape[1] == 1:  # torch 2.14's int8 product is wrong there
        return Screen(rows, inverse_norm, residual)
    factor = torch.empty_like(inverse_norm) if dtype == torch.int8 else None
    return Screen(torch.empty_like(rows, dtype=dtype), factor, residual)


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(integers, factors): each row is its factor times integers of at most 127.

    Examples
    --------
    >>> integers, factors = to_int8(torch.tensor([[0.5, -1.0]]))
    >>> integers
    tensor([[  64, -127]], dtype=torch.int8)
    """
    factors = rows.abs().amax(1).clamp_(min=1e-30) / 127
    return (rows / factors.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8), factors


def _by_kernel(kept: Prototypes) -> bool:
    """Whether rows are derived in one launch."""
    weight, screen = kept.weight, kept.screen
    known = screen is None or screen.rows is weight or screen.rows.dtype == torch.bfloat16
    return known and weight.is_contiguous() and kernels_run(weight.device)


def _derive(kept: Prototypes, rows: slice | Tensor) -> None:
    weight, inverse_norm, screen, _ = kept
    if screen is not None and screen.rows is weight:
        screen = None
    if _by_kernel(kept):
        from speechbrain_qmargin.head.row_kernels import derive_rows

        copy = (None, None) if screen is None else (screen.rows, screen.residual)
        derive_rows(weight, inverse_norm, *copy, rows)
        return
    values = weight[rows]
    inverse = values.norm(dim=1).clamp_(min=1e-12).reciprocal_()
    inverse_norm[rows] = inverse
    if screen is None or not values.numel():
        return
    unit = values * inverse.unsqueeze(1)
    if screen.factor is None:
        rounded = unit.bfloat16()
        screen.rows[rows] = rounded
        error = (unit - rounded.float()).norm(dim=1)
    else:
        integers, factors = to_int8(unit)
        screen.rows[rows], screen.factor[rows] = integers, factors
        error = (unit / factors.unsqueeze(1) - integers.float()).norm(dim=1)
    torch.maximum(screen.residual, error.amax() * (1 + 2**-20), out=screen.residual)
