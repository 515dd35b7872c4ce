"""The prototypes and what is derived from them: inverse norms, a bf16 copy; kept up to date."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Derived", "Mark", "Prototypes", "mark"]

ROWS_AT_ONCE = 8192
# Below this many classes a float32 product costs less than finding out what to skip
SCREEN_FROM = 32768
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
    content = 0
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        rows = weight.detach()[:: max(1, weight.shape[0] // _SAMPLED)]
        content = int(rows.view(torch.int32).sum(dtype=torch.int64))
    return Mark(weight.data_ptr(), weight.device, weight._version, content)


class Prototypes(NamedTuple):
    """What a search reads: rows [C, D] float32, 1/norm [C], unit rows in bf16 [C, D], their error.

    `residual` bounds ||w/||w|| - bf16 row|| over the rows (zero-dimensional).
    """

    weight: Tensor
    inverse_norm: Tensor
    screen: Tensor | None
    residual: Tensor

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


class Derived:
    """The :class:`Prototypes` of a weight, rebuilt when it was written, refreshed row by row."""

    def __init__(self) -> None:
        self._kept: Prototypes | None = None
        self._mark: Mark | None = None

    def __getstate__(self) -> dict:
        return {}  # a copy of the weight has its own

    def __setstate__(self, state: dict) -> None:
        self.__init__()

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
                screened = rows.shape[0] >= SCREEN_FROM
                screen = torch.empty_like(rows, dtype=torch.bfloat16) if screened else None
                norms = rows.new_empty(rows.shape[0])
                self._kept = Prototypes(rows, norms, screen, rows.new_zeros(()))
                for start in range(0, rows.shape[0], ROWS_AT_ONCE):
                    _derive(self._kept, slice(start, start + ROWS_AT_ONCE))
            self._mark = found
        return self._kept

    def rows_changed(self, weight: Tensor, rows: Tensor, before: Mark) -> None:
        """`rows` were just changed, by one who found the weight at `before`."""
        if self._kept is not None and self._mark == before:
            with torch.inference_mode(False), torch.no_grad():
                for part in rows.split(ROWS_AT_ONCE):
                    _derive(self._kept, part)
            self._mark = mark(weight)


def _derive(kept: Prototypes, rows: slice | Tensor) -> None:
    weight, inverse_norm, screen, residual = kept
    values = weight[rows]
    inverse = values.norm(dim=1).clamp_(min=1e-12).reciprocal_()
    inverse_norm[rows] = inverse
    if screen is not None and values.numel():
        unit = values * inverse.unsqueeze(1)
        rounded = unit.bfloat16()
        screen[rows] = rounded
        error = (unit - rounded.float()).norm(dim=1).amax() * (1 + 2**-20)
        torch.maximum(residual, error, out=residual)
