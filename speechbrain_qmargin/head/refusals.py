"""What torch cannot do with a head's gradient or shards, done or said with the way out.

``clip_grad_value_`` and SpeechBrain's ``skip_nonfinite_grads`` meet the gradients between the
backward pass and the optimiser's step, where no hook of a head is called. They fail in operators
that torch has for no sparse tensor; these are given kernels here, which raise. The norm that
``clip_grad_norm_`` takes is one of them in torch 2.7, and gets a kernel that computes it.

``torch.distributed.checkpoint`` takes tensors of one name for copies and would keep one rank's
shard; ``fully_shard`` would cut each rank's shard into parts of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["named_shard"]


class _NamedShard(Tensor):
    """To ``torch.distributed.checkpoint``, which asks how it is written, a word; else a tensor."""

    def __create_write_items__(self, name: str, _: object) -> list[Any]:
        raise ValueError(
            f"{name}: torch.distributed.checkpoint would keep the first rank's shard of the head, "
            "and its optimiser's, for all ranks. Leave them out of its state and write them with "
            "head.save_shards(folder, optimizer), which head.load_shards reads on any number of "
            "ranks"
        )

    def __deepcopy__(self, memo: dict) -> Tensor:
        return named_shard(*self.tolist())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def named_shard(start: int, stop: int, num_classes: int) -> Tensor:
    """The entry of a state that says whose classes it holds: [3], int64.

    ``torch.distributed.checkpoint`` refuses to write it, unless the shard is all there is.

    Examples
    --------
    >>> named_shard(0, 10, 10)
    tensor([ 0, 10, 10])
    >>> named_shard(5, 10, 10).tolist()
    [5, 10, 10]
    """
    said = torch.tensor([start, stop, num_classes], device="cpu")
    return said if stop - start == num_classes else said.as_subclass(_NamedShard)


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
