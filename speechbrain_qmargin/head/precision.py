"""How exact a float32 product is, which is a matter of global switches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["exact_accumulation", "product_roundoff"]

# unit roundoff of what a product's factors are rounded to before they are multiplied
_ROUNDOFF = {"ieee": 0.0, "none": 0.0, "highest": 0.0, "tf32": 2.0**-11, "high": 2.0**-11}
_COARSEST = 2.0**-8  # bf16


def product_roundoff(device: torch.device) -> float:
    """By how much, relatively, each factor of a float32 product may be rounded before it.

    Zero for true float32. The largest that any switch in force allows, whether or not the device
    makes use of it: ``torch.set_float32_matmul_precision``, ``torch.backends.*.fp32_precision``,
    ``torch.backends.cuda.matmul.allow_tf32`` (which importing SpeechBrain turns on).

    Examples
    --------
    >>> product_roundoff(torch.device("cpu"))
    0.0
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    holders = (torch.backends, backend, getattr(backend, "matmul", None))
    names = [getattr(holder, "fp32_precision", None) for holder in holders]
    if names[-1] is None:  # before torch 2.9 there was one switch for all devices
        names.append(torch.get_float32_matmul_precision())
        if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            names.append("tf32")
    return max(_ROUNDOFF.get(name, _COARSEST) for name in names if isinstance(name, str))


@contextmanager
def exact_accumulation(device: torch.device) -> Iterator[None]:
    """Sums of bf16 products in float32: on a GPU torch may otherwise add parts of them in bf16.

    Examples
    --------
    >>> ones = torch.ones(1, 300, dtype=torch.bfloat16)
    >>> with exact_accumulation(ones.device):
    ...     ones @ ones.T
    tensor([[300.]], dtype=torch.bfloat16)
    """
    if device.type != "cuda":
        yield
        return
    switch = torch.backends.cuda.matmul
    before = switch.allow_bf16_reduced_precision_reduction
    switch.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        switch.allow_bf16_reduced_precision_reduction = before
