"""What the flow of control may ask of a device, and whether Triton's kernels run on it.

On a CPU a loop looks at its values and ends when it is done. On a GPU that would make the host wait
for the device, so a number of steps is taken that is known before. Both ways are the same code,
and :func:`control_flow` lets the one run on the other's device: the tests count a GPU's launches on
a CPU with it.

Two environment variables, read once:

``QMARGIN_KERNELS=0``
    The torch path instead of Triton's kernels.
``QMARGIN_STEPS=all``
    On a GPU without the kernels the proved number of Newton's steps instead of a few and an
    assertion that they were enough.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "STEPS_VARIABLE",
    "add_rows",
    "all_steps",
    "asked_for",
    "assert_on_device",
    "control_flow",
    "host_decides",
    "kernels_run",
    "refuse_unless",
    "sent",
    "usable_device",
]

KERNELS_VARIABLE = "QMARGIN_KERNELS"
STEPS_VARIABLE = "QMARGIN_STEPS"
_LONGEST_MESSAGE = 254  # bytes that torch has room for in the launch of a device-side assertion


@dataclass
class _Forced:
    host: bool | None = None
    kernels: bool | None = None


_forced = _Forced()
_wanted = os.environ.get(KERNELS_VARIABLE, "1") != "0"
_all_steps = os.environ.get(STEPS_VARIABLE) == "all"
_triton = importlib.util.find_spec("triton") is not None


def usable_device(name: str | torch.device) -> torch.device:
    """The device of a name, once it is known that a tensor can be there.

    Raises
    ------
    ValueError
        No device's name, or one that this machine, or this torch, does not have.

    Examples
    --------
    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"device: {name} cannot be used here ({why}); cpu can") from None
    return device


def host_decides(device: torch.device) -> bool:
    """Whether the host may look at values of tensors there: on a CPU.

    Examples
    --------
    >>> host_decides(torch.device("cpu")), host_decides(torch.device("cuda"))
    (True, False)
    >>> with control_flow(host=False):
    ...     host_decides(torch.device("cpu"))
    False
    """
    return device.type == "cpu" if _forced.host is None else _forced.host


def kernels_run(device: torch.device) -> bool:
    """Whether Triton's kernels take the place of the torch path: on CUDA, if Triton is installed.

    Examples
    --------
    >>> kernels_run(torch.device("cpu"))
    False
    """
    if _forced.kernels is not None:
        return _forced.kernels
    return _wanted and _triton and device.type == "cuda"


def assert_on_device(condition: Tensor, message: str) -> None:
    """Have the device stop if the condition does not hold there; the host does not wait for it.

    Parameters
    ----------
    condition : Tensor, one element
    message : str
        At most 254 bytes, which is what CUDA takes.

    Raises
    ------
    ValueError
        If the message is longer, on any device, so that it shows without a GPU.
    RuntimeError
        If the condition does not hold: on a CPU at once, on CUDA where the host next waits.

    Examples
    --------
    >>> assert_on_device(torch.ones(2).amax() <= 1, "a cosine is beyond 1")
    """
    length = len(message.encode())
    if length > _LONGEST_MESSAGE:
        raise ValueError(
            f"the message of a device-side assertion has {length} bytes and may have "
            f"{_LONGEST_MESSAGE}: {message}"
        )
    torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage]


def refuse_unless(condition: Tensor, error: type[Exception], message: str) -> None:
    """Raise where the host looks at values; elsewhere see :func:`assert_on_device`.

    Parameters
    ----------
    condition : Tensor, one element
    error : exception
        What a host raises if the condition does not hold.
    message : str
        At most 254 bytes.

    Examples
    --------
    >>> refuse_unless(torch.tensor(True), ValueError, "a mass is lost")
    """
    if not host_decides(condition.device):
        assert_on_device(condition, message)
    elif not bool(condition):
        raise error(message)


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add rows to those of `total` at `index`, in an order that does not change.

    ``index_add_`` on a GPU adds as its threads come.

    Examples
    --------
    >>> total = torch.zeros(3)
    >>> add_rows(total, torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 3.0]))
    >>> total
    tensor([2., 0., 4.])
    """
    if total.device.type == "cuda":
        total.index_put_((index,), rows, accumulate=True)  # which sorts
    else:
        total.index_add_(0, index, rows)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A copy of values of the host, for which it does not wait.

    Examples
    --------
    >>> sent(torch.ones(2), torch.device("cpu"))
    tensor([1., 1.])
    """
    if device.type == "cuda":
        values = values.cpu().pin_memory()
    return values.to(device, non_blocking=True)


def asked_for(values: Tensor) -> Callable[[], Tensor]:
    """Values for the host, whose copy is on its way: work that a GPU is given after it goes on.

    Returns
    -------
    callable
        Gives the values on the host, which waits for what the GPU was given before the copy.

    Examples
    --------
    >>> found = asked_for(torch.ones(2))        # ... and here the device is given more to do
    >>> found()
    tensor([1., 1.])
    """
    copy = values.to("cpu", non_blocking=values.device.type == "cuda")
    if values.device.type != "cuda":
        return lambda: copy
    done = torch.cuda.current_stream(values.device).record_event()

    def found() -> Tensor:
        done.synchronize()
        return copy

    return found


def all_steps() -> bool:
    """Whether the user wants the proved number of Newton's steps everywhere."""
    return _all_steps


@contextmanager
def control_flow(*, host: bool | None = None, kernels: bool | None = None) -> Iterator[None]:
    """Another device's flow of control within.

    Parameters
    ----------
    host : bool, optional
        What :func:`host_decides` answers: False is a GPU's flow.
    kernels : bool, optional
        What :func:`kernels_run` answers. On a CPU the kernels need Triton's interpreter
        (``TRITON_INTERPRET=1`` in the environment before they are imported).

    Examples
    --------
    >>> cpu = torch.device("cpu")
    >>> with control_flow(host=False, kernels=True):        # a GPU's flow, on a CPU
    ...     host_decides(cpu), kernels_run(cpu)
    (False, True)
    >>> host_decides(cpu), kernels_run(cpu)
    (True, False)
    """
    before = _forced.host, _forced.kernels
    _forced.host = before[0] if host is None else host
    _forced.kernels = before[1] if kernels is None else kernels
    try:
        yield
    finally:
        _forced.host, _forced.kernels = before
