"""What torch cannot do with a row-sparse gradient, done or said with the way out.

``clip_grad_value_`` and SpeechBrain's ``skip_nonfinite_grads`` meet the gradients between the
backward pass and the optimiser's step, where no hook of a head is called. They fail in operators
that torch has for no sparse tensor; these are given kernels here, which raise. The norm that
``clip_grad_norm_`` takes is one of them in torch 2.7, and gets a kernel that computes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__: list[str] = []


def _refusing(name: str, who: str) -> Callable:
    def refuse(*_args: object) -> None:
        raise NotImplementedError(
            f"{name} cannot take a row-sparse gradient, as that of QMarginHead's prototypes is "
            f"under RowSparseSGD or RowSparseAdam ({who}). Make the head with sparse_grad=False, "
            "or leave its weight out; torch.nn.utils.clip_grad_norm_ takes it"
        )

    return refuse


_CLIPS = "clip_grad_value_"
_library = torch.library.Library("aten", "IMPL")
for _operator, _who in {
    "clamp_": _CLIPS,
    "clamp_min_": _CLIPS,
    "ne.Scalar": "isfinite, in SpeechBrain's skip_nonfinite_grads",
}.items():
    for _backend in ("SparseCPU", "SparseCUDA"):
        _library.impl(_operator, _refusing(_operator, _who), _backend)


def _norm(grad: Tensor, order: float = 2, *_args: object, dtype: torch.dtype | None = None):
    return torch.linalg.vector_norm(grad.coalesce().values(), order, dtype=dtype)


try:
    torch.linalg.vector_norm(torch.zeros(1, device="cpu").to_sparse())
except NotImplementedError:
    for _backend in ("SparseCPU", "SparseCUDA"):
        _library.impl("linalg_vector_norm", _norm, _backend)
