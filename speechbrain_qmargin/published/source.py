"""Where a model was published to: a file or a folder, looked at without executing anything."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from ruamel.yaml.error import YAMLError
from torch import Tensor, nn

from speechbrain_qmargin.files import refuse_yaml_bomb, zip_damage
from speechbrain_qmargin.published.inert import is_program, read_without_objects

__all__ = ["Source", "first_keys", "fit", "parts_below", "read_tensors", "without_prefix"]

# What training scripts wrap a state in, and what wrappers put before its keys
_WRAPPERS = ("state_dict_backbone", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


class _Damaged(ValueError):
    """Of a file whose checksums are not those of its content: no other reader helps."""


def read_tensors(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds: tensors, numbers and containers of them, nothing that runs.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; it is damaged, or holds objects.

    Examples
    --------
    >>> from fractions import Fraction
    >>> path = getfixture("tmp_path") / "last.ckpt"
    >>> torch.save({"weight": torch.ones(2), "epoch": 3}, path)
    >>> read_tensors(path)
    {'weight': tensor([1., 1.]), 'epoch': 3}
    >>> torch.save({"weight": torch.ones(2), "callback": Fraction(1, 2)}, path)
    >>> read_tensors(path)
    Traceback (most recent call last):
    ValueError: ...last.ckpt: not a checkpoint of weights alone, or damaged; nothing of it was ...
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if is_program(path):
        raise ValueError(
            f"{path}: a TorchScript program (torch.jit.save), which is not loaded since its code "
            "would run; give the weights (torch.save of a state_dict)"
        )
    fault = zip_damage(path)
    try:
        if fault:
            raise ValueError(fault)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, EOFError, zipfile.BadZipFile, RuntimeError, ValueError, KeyError,
    ) as error:  # fmt: skip
        text = " ".join(str(error).split())  # torch's, without what it says of running code
        text = text.rpartition("WeightsUnpickler error: ")[2].partition(" Please use ")[0]
        kind = _Damaged if fault else ValueError
        raise kind(
            f"{path}: not a checkpoint of weights alone, or damaged; nothing of it was loaded "
            f"({text[:160]})"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a dictionary of weights")
    return found


class Source:
    """A path, followed to what it means, and read once.

    A folder of Huggingface's cache (``models--owner--name``) means its current snapshot, whose
    links are followed.

    Parameters
    ----------
    path : path

    Attributes
    ----------
    path : Path
        A file, or a folder that holds files.

    Raises
    ------
    FileNotFoundError, ValueError
        There is nothing; a cache of several snapshots of which none is current.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> state = {"module.conv.weight": torch.ones(1).half(), "module.steps": torch.tensor(7)}
    >>> torch.save({"state_dict": state, "epoch": 3}, folder / "model.pt")
    >>> Source(folder / "model.pt").state
    {'conv.weight': tensor([1.]), 'steps': tensor(7)}
    >>> Source(folder).weights("best.pt", "model.pt").name
    'model.pt'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _snapshot(Path(path))
        self.left_out: list[str] = []  # objects in checkpoints that hold more than weights
        self._states: dict[Path, dict[str, Tensor]] = {}
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")

    @property
    def folder(self) -> Path:
        """The folder itself, or that of the file."""
        return self.path if self.path.is_dir() else self.path.parent

    def file(self, *names: str) -> Path | None:
        """The first of some files of the folder that is there."""
        return next((self.folder / one for one in names if (self.folder / one).is_file()), None)

    def weights(self, *names: str) -> Path | None:
        """The file that was named, or the first of some that its folder holds."""
        return self.path if self.path.is_file() else self.file(*names)

    def yaml(self, *names: str) -> tuple[Path, dict] | None:
        """The first of some YAMLs of the folder, as plain data; tags are refused.

        Raises
        ------
        ValueError
            It is not a YAML of plain data.
        """
        path = self.file(*names)
        if path is None:
            return None
        try:
            text = path.read_text(encoding="utf-8")
            refuse_yaml_bomb(text)
            tree = yaml.safe_load(text)
        except (yaml.YAMLError, YAMLError, ValueError) as error:
            raise ValueError(
                f"{path}: not plain YAML ({' '.join(str(error).split())[:160]})"
            ) from None
        return (path, tree) if isinstance(tree, dict) else None

    @property
    def state(self) -> dict[str, Tensor]:
        """The weights of the file, empty for a folder; without what wraps them."""
        return self.state_of(self.path) if self.path.is_file() else {}

    def state_of(self, path: Path) -> dict[str, Tensor]:
        """The weights of a file: float32, without what training scripts put around them.

        Raises
        ------
        ValueError
            No weights in it, or weights that are not finite.
        """
        if path not in self._states:
            try:
                found = read_tensors(path)
            except _Damaged:
                raise
            except ValueError as refused:
                try:
                    found, objects = read_without_objects(path)
                except Exception:  # damaged in one of many ways
                    raise refused from None
                self.left_out += objects
            self._states[path] = _state_of(path, found)
        return self._states[path]


def _state_of(path: Path, found: Mapping[str, Any]) -> dict[str, Tensor]:
    for name in _WRAPPERS:
        if isinstance(inner := found.get(name), dict) and any(map(torch.is_tensor, inner.values())):
            found = inner
            break
    state = {key: value for key, value in found.items() if torch.is_tensor(value)}
    if not state:
        raise ValueError(
            f"{path}: no weights in it; its keys are {', '.join(map(str, [*found][:4]))}"
        )
    while any(all(key.startswith(prefix) for key in state) for prefix in _PREFIXES):
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value.float() if value.is_floating_point() else value
             for key, value in state.items()}  # fmt: skip
    broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise ValueError(f"{path}: {broken[0]} and {len(broken) - 1} others are not finite")
    return state


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it.

    Examples
    --------
    >>> without_prefix({"net.weight": torch.ones(1), "head.weight": torch.zeros(1)}, "net.")
    {'weight': tensor([1.])}
    """
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def parts_below(state: Iterable[str], prefix: str) -> int:
    """How many numbered or named parts there are below a prefix.

    Examples
    --------
    >>> parts_below(["layer1.0.weight", "layer1.0.bias", "layer1.1.weight", "fc.weight"], "layer1.")
    2
    """
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def fit(module: nn.Module, state: Mapping[str, Tensor], path: Path, network: str) -> None:
    """Load weights strictly: every entry is there, none is left over, all have their shape.

    Counters of batches are the exception: old files have none.

    Raises
    ------
    ValueError
        What differs, the first key of each kind.

    Examples
    --------
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> fit(layer, {"weight": torch.tensor([[2.0]])}, Path("net.pt"), "one layer")
    >>> layer.weight.item()
    2.0
    >>> fit(layer, {"weight": torch.ones(1, 2)}, Path("net.pt"), "one layer")
    Traceback (most recent call last):
    ValueError: net.pt: not the weights of one layer: 1 have another shape, the first is weight, ...
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    other = [key for key in own if key in state and state[key].shape != own[key].shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} entries are missing, the first is {missing[0]}")
    if extra:
        faults.append(f"{len(extra)} are not the network's, the first is {extra[0]}")
    if other:
        key = other[0]
        faults.append(
            f"{len(other)} have another shape, the first is {key}, {list(state[key].shape)} "
            f"instead of {list(own[key].shape)}"
        )
    if faults:
        raise ValueError(f"{path}: not the weights of {network}: {'; '.join(faults)}")
    module.load_state_dict({**own, **state})
    module.eval()


def first_keys(state: Iterable[str], count: int = 3) -> str:
    """Some keys, for a message.

    Examples
    --------
    >>> first_keys({"a": 1, "b": 2, "c": 3}, 2)
    'a, b'
    """
    return ", ".join(list(state)[:count])


def _snapshot(path: Path) -> Path:
    """The current snapshot of a folder of Huggingface's cache; any other path as it is."""
    if not (path / "snapshots").is_dir():
        return path
    current = path / "refs" / "main"
    if current.is_file():
        chosen = path / "snapshots" / current.read_text(encoding="utf-8").strip()
        if chosen.is_dir():
            return chosen
    found = sorted(one for one in (path / "snapshots").iterdir() if one.is_dir())
    if len(found) != 1:
        raise ValueError(
            f"{path}: {len(found)} snapshots and no refs/main that names one; give the path of "
            f"one, {path}/snapshots/..."
        )
    return found[0]
