"""Tensors out of a checkpoint that holds other objects too: those become nothing.

Lightning's older checkpoints name the classes of their callbacks, which torch's ``weights_only``
refuses with all the rest. Here a name that is not needed for tensors is never imported: in its
place stands a class that does nothing.
"""

from __future__ import annotations

import pickle
import types
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch

__all__ = ["is_program", "read_without_objects"]

# All that a tensor is made of; storages are torch's own matter
_NEEDED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
}


class _Nothing:
    """Whatever an object would have been: it takes everything and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Nothing."""

    def extend(self, values: Any) -> None:
        """Nothing."""


def is_program(path: Path) -> bool:
    """Whether a file is a TorchScript program, whose code ``torch.load`` runs without a word.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> torch.save({"weight": torch.zeros(1)}, folder / "weights.pt")
    >>> with zipfile.ZipFile(folder / "program.pt", "w") as archive:        # as torch.jit.save
    ...     archive.writestr("program/constants.pkl", b"")
    >>> is_program(folder / "weights.pt"), is_program(folder / "program.pt")
    (False, True)
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())


def read_without_objects(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a checkpoint in torch's zip format holds, and the names of what was left out.

    Raises
    ------
    pickle.UnpicklingError, RuntimeError, ValueError
        It is damaged, or of another format.

    Examples
    --------
    >>> from fractions import Fraction
    >>> path = getfixture("tmp_path") / "last.ckpt"
    >>> torch.save({"state_dict": {"weight": torch.ones(2)}, "callback": Fraction(1, 2)}, path)
    >>> found, left_out = read_without_objects(path)
    >>> found["state_dict"], left_out
    ({'weight': tensor([1., 1.])}, ['fractions.Fraction'])
    """
    left_out: set[str] = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _NEEDED:
                return super().find_class(module, name)
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            left_out.add(f"{module}.{name}")
            return _Nothing

    reader = types.ModuleType("reader")
    reader.Unpickler = Unpickler  # type: ignore[attr-defined]  # what torch looks up
    if not zipfile.is_zipfile(path):
        raise pickle.UnpicklingError("not in torch's zip format")
    if is_program(path):
        raise pickle.UnpicklingError("a TorchScript program")
    found = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    return found if isinstance(found, dict) else {}, sorted(left_out)
