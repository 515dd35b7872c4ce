"""Batch normalisation over the processes of a CPU run, where torch has none; a batch taken back.

``torch.nn.SyncBatchNorm`` takes CUDA tensors only. With this one, training over gloo ranks is the
computation of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["RunningStatistics", "synchronised_batch_norm"]


class _Sum(torch.autograd.Function):
    """Sum over the processes; so is the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


class _SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or dist.get_world_size() == 1:
            return super().forward(x)
        others = [dim for dim in range(x.ndim) if dim != 1]
        wide = x if x.dtype == torch.float64 else x.float()
        count = _Sum.apply(wide.new_tensor(x.numel() // x.shape[1]))
        mean = _Sum.apply(wide.sum(others, keepdim=True)) / count
        centred = wide - mean
        var = _Sum.apply(centred.square().sum(others, keepdim=True)) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None  # where there are running statistics
                self.num_batches_tracked += 1
                step = self.momentum
                if step is None:
                    step = 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.flatten(), step)
                self.running_var.lerp_(var.flatten() * count / (count - 1), step)
        y = centred * torch.rsqrt(var + self.eps)
        if self.affine:
            shape = [1, -1] + [1] * (x.ndim - 2)
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def synchronised_batch_norm(module: nn.Module) -> nn.Module:
    """Make every BatchNorm of a module, in place, share its statistics over all processes.

    Parameters, buffers and their names stay. Each process may have a batch of another size.

    Examples
    --------
    >>> net = synchronised_batch_norm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    >>> [name for name, _ in net[1].named_buffers()]
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            part.__class__ = _SynchronisedBatchNorm  # type: ignore[reportAttributeAccessIssue] # on purpose
    return module


class RunningStatistics:
    """Running means and variances, which can take a batch back that was no good.

    One activation that is not finite would stay in them for good, and in every embedding.

    Parameters
    ----------
    modules : iterable of Module
        Their batch normalisations are meant.

    Examples
    --------
    >>> norm = nn.BatchNorm1d(1)
    >>> statistics = RunningStatistics([norm])
    >>> statistics.keep()
    >>> _ = norm(torch.tensor([[1.0], [torch.nan]]))
    >>> norm.running_mean
    tensor([nan])
    >>> statistics.restore()
    >>> norm.running_mean
    tensor([0.])
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        parts = [part for module in modules for part in module.modules()]
        norms = [part for part in parts if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        each = [one for norm in norms for one in (norm.running_mean, norm.running_var)]
        self._now = [one for one in each if one is not None]
        self._before = [one.clone() for one in self._now]

    def keep(self) -> None:
        """Before a batch."""
        _copy(self._before, self._now)

    def restore(self) -> None:
        """After it."""
        _copy(self._now, self._before)


def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    if to:
        # some hundred of them in a launch or two
        torch._foreach_copy_(to, of)  # pyright: ignore[reportPrivateImportUsage]
