"""Checkpoints that appear whole or not at all; the weights that a run ends or begins with."""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from speechbrain.utils.checkpoints import (
    DEFAULT_LOAD_HOOKS,
    METAFNAME,
    PARAMFILE_EXT,
    Checkpoint,
    Checkpointer,
    get_default_hook,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process

from speechbrain_qmargin.files import fault_of, to_disk, zip_damage
from speechbrain_qmargin.training.internals import (
    HiddenCheckpointer,
    has_statistics,
    load_statistics,
)

__all__ = [
    "AtomicCheckpointer",
    "bare",
    "damage",
    "ends_an_epoch",
    "load_average",
    "load_module",
    "load_weights",
]

logger = logging.getLogger(__name__)

# torch reports a file that cannot be written as RuntimeError
_FULL_DISK = re.compile("PytorchStreamWriter|inline_container|unexpected pos|iostream", re.I)


_TENSORS = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.grad_scaler.GradScaler,
)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, the file first; None if they are as written.

    torch's files are zip archives with a checksum for each entry: truncation and flipped bits are
    found without loading anything.

    Examples
    --------
    >>> checkpointer = AtomicCheckpointer(getfixture("tmp_path"), {"net": torch.nn.Linear(1, 1)})
    >>> checkpoint = checkpointer.save_checkpoint()
    >>> damage(checkpoint) is None
    True
    >>> file = checkpoint.paramfiles["net"]
    >>> _ = file.write_bytes(file.read_bytes()[:100])       # cut off
    >>> damage(checkpoint)
    '...net.ckpt: damaged (File is not a zip file)'
    """
    for path in checkpoint.paramfiles.values():
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if fault := zip_damage(file):
                return f"{file}: damaged ({fault})"
    return None


def _tensors(path: str | Path) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, RuntimeError):
        raise OSError(f"{path}: damaged, or not weights alone; it was not loaded") from None


def _load_tensors(obj: Any, path: Path, end_of_epoch: bool) -> None:
    state = _tensors(path)
    try:
        obj.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: not the state of this {type(obj).__name__} ({_one_line(error)})"
        ) from None


def _naming_the_file(hook: Callable[..., None]) -> Callable[[Any, Path, bool], None]:
    def load(obj: Any, path: Path, end_of_epoch: bool) -> None:
        try:
            hook(obj, path, end_of_epoch)
        except (ValueError, KeyError, TypeError, EOFError) as error:
            raise OSError(f"{path}: damaged ({_one_line(error)})") from None

    return load


def _one_line(error: Exception) -> str:
    return " ".join(fault_of(error).split())[:200]


class AtomicCheckpointer(HiddenCheckpointer):
    """SpeechBrain's Checkpointer, whose checkpoints appear whole or not at all.

    The original writes into the folder that a resuming run would read; killed half-way, it leaves
    a checkpoint that cannot be loaded. This one writes beside it and renames at the end. A
    checkpoint that was damaged since is named in the log, and the one before it is taken. Files of
    weights hold tensors alone: nothing in them is executed.

    Examples
    --------
    >>> net = torch.nn.Linear(1, 1)
    >>> checkpointer = AtomicCheckpointer(getfixture("tmp_path"), {"net": net})
    >>> for weight in (1.0, 2.0):
    ...     _ = torch.nn.init.constant_(net.weight, weight)
    ...     newest = checkpointer.save_checkpoint()
    >>> _ = newest.paramfiles["net"].write_bytes(b"PK")     # damaged
    >>> _ = checkpointer.recover_if_possible()
    >>> net.weight.item()                                   # of the one before
    1.0
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.named: set[Path] = set()  # damaged ones, said once

    def list_checkpoints(self) -> list[Checkpoint]:
        """As SpeechBrain's, without those whose ``CKPT.yaml`` cannot be read."""
        found = []
        for folder in self.checkpoint_folders():
            try:
                checkpoint = self.read_checkpoint(folder)
                if not {"unixtime", "end-of-epoch"} <= set(checkpoint.meta):
                    raise ValueError("no unixtime or end-of-epoch in it")
                found.append(checkpoint)
            except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
                self._say(folder, f"{folder / METAFNAME}: damaged ({_one_line(error)})")
        return found

    def recover_if_possible(self, *args: Any, **kwargs: Any) -> Checkpoint | None:
        """Load the newest checkpoint that is whole; None where there is none.

        Raises
        ------
        OSError
            There are checkpoints, and all are damaged.
        """
        faults = []
        for checkpoint in self.find_checkpoints(*args, **kwargs):
            fault = damage(checkpoint) or self._lacking(checkpoint)
            if fault is None:
                try:
                    self.load_checkpoint(checkpoint)
                    return checkpoint
                except OSError as error:
                    fault = fault_of(error)
            self._say(checkpoint.path, fault)
            faults.append(fault)
        if faults or self.named:
            raise OSError(
                f"{self.checkpoints_dir}: no checkpoint is whole; delete them to begin anew. "
                + "; ".join(faults)
            )
        return None

    def load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """As SpeechBrain's, of tensors alone."""
        for name, obj in self.recoverables.items():
            hook = get_default_hook(obj, DEFAULT_LOAD_HOOKS)
            if isinstance(obj, _TENSORS):
                self.custom_load_hooks.setdefault(name, _load_tensors)
            elif hook is not None:
                self.custom_load_hooks.setdefault(name, _naming_the_file(hook))
        super().load_checkpoint(checkpoint)

    def _lacking(self, checkpoint: Checkpoint) -> str | None:
        for name in self.recoverables:
            optional = self.optional_recoverables.get(name) or "dataloader" in name
            if name not in checkpoint.paramfiles and not optional:
                return f"{checkpoint.path}: {name}{PARAMFILE_EXT} is missing"
        return None

    def _say(self, folder: Path, fault: str) -> None:
        if folder not in self.named:
            self.named.add(folder)
            logger.warning(f"{fault}; the checkpoint before it is taken")

    def save_checkpoint(self, *args, verbosity=logging.INFO, **kwargs):
        """As SpeechBrain's; the folder takes its final name once everything is in it.

        Raises
        ------
        OSError
            It could not be written, with how much room there is; the last whole one is kept.
        """
        if if_main_process():
            for leftover in self.checkpoints_dir.glob(self.PARTIAL + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
        try:
            saved = super().save_checkpoint(*args, verbosity=logging.DEBUG, **kwargs)
        except (OSError, RuntimeError) as error:
            if not isinstance(error, OSError) and not _FULL_DISK.search(str(error)):
                raise
            free = shutil.disk_usage(self.checkpoints_dir).free / 2**20
            raise OSError(
                f"{self.checkpoints_dir}: a checkpoint could not be written ({free:.0f} MiB are "
                f"free; {error}). The last whole one is kept: make room and start again to resume"
            ) from error
        ddp_barrier()  # every process has written its share
        if saved is not None:
            for file in saved.path.rglob("*"):
                if file.is_file():
                    to_disk(file)
            final = saved.path.with_name(saved.path.name.removeprefix(self.PARTIAL))
            saved.path.replace(final)
            logger.log(verbosity, f"saved checkpoint {final}")
            files = {key: final / file.name for key, file in saved.paramfiles.items()}
            saved = Checkpoint(final, saved.meta, files)
        ddp_barrier()  # all see the same checkpoints when they choose which to delete
        return saved


def load_average(
    modules: Mapping[str, Any], checkpointer: Checkpointer, count: int, first_rows: bool = False
) -> list[Checkpoint]:
    """Load the mean of the last `count` end-of-epoch checkpoints into the modules.

    Weights and batch-normalisation statistics are averaged, integers are the newest's. Every
    process averages its own shard of a classifier in shards. With `first_rows` a classifier may
    have fewer classes than its checkpoints, and takes their first ones. Damaged checkpoints are
    named in the log and left out.

    Returns
    -------
    list of Checkpoint
        Those that were averaged, the newest first.

    Raises
    ------
    FileNotFoundError, OSError
        No epoch was finished; no checkpoint of one is whole.

    Examples
    --------
    >>> net = torch.nn.Linear(1, 1)
    >>> checkpointer = AtomicCheckpointer(getfixture("tmp_path"), {"net": net})
    >>> for weight in (1.0, 2.0, 4.0):
    ...     _ = torch.nn.init.constant_(net.weight, weight)
    ...     _ = checkpointer.save_checkpoint()
    >>> len(load_average({"net": net}, checkpointer, 2)), net.weight.item()
    (2, 3.0)
    """
    found = checkpointer.find_checkpoints(ckpt_predicate=ends_an_epoch, max_num_checkpoints=count)
    if not found:
        raise FileNotFoundError(
            f"{checkpointer.checkpoints_dir} holds no checkpoint of a finished epoch"
        )
    faults = {checkpoint.path: damage(checkpoint) for checkpoint in found}
    checkpoints = [checkpoint for checkpoint in found if faults[checkpoint.path] is None]
    for fault in filter(None, faults.values()):
        logger.warning(f"{fault}; the average is that of {len(checkpoints)} epochs")
    if not checkpoints:
        raise OSError("no checkpoint is whole: " + "; ".join(filter(None, faults.values())))
    plain = {name: bare(module) for name, module in modules.items()}
    total: dict[tuple[str, str], Any] = {}
    for checkpoint in reversed(checkpoints):  # the newest last
        for name in plain.keys() & checkpoint.paramfiles.keys():
            load_module(plain[name], checkpoint.paramfiles[name], first_rows)
            for key, value in plain[name].state_dict().items():
                if value.is_floating_point():
                    total[name, key] = total.get((name, key), 0) + value / len(checkpoints)
    states = {name: module.state_dict(keep_vars=True) for name, module in plain.items()}
    with torch.no_grad():
        for (name, key), mean in total.items():
            states[name][key].copy_(mean)
    return checkpoints


def bare(module: Any) -> Any:
    """A module without what wraps it: DDP for several processes, torch.compile.

    Examples
    --------
    >>> net = torch.nn.Linear(1, 1)
    >>> bare(torch.nn.DataParallel(net)) is net, bare(net) is net
    (True, True)
    """
    for wrapper in ("module", "_orig_mod"):
        module = getattr(module, wrapper, module)
    return module


def ends_an_epoch(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a finished epoch.

    Examples
    --------
    >>> checkpointer = AtomicCheckpointer(getfixture("tmp_path"), {"net": torch.nn.Linear(1, 1)})
    >>> ends_an_epoch(checkpointer.save_checkpoint(end_of_epoch=False))
    False
    """
    return checkpoint.meta["end-of-epoch"]


def load_weights(module: Any, path: str | Path) -> None:
    """As :func:`load_module` of a file by itself, whose checksums nobody has compared yet.

    Raises
    ------
    OSError
        As :func:`load_module`.
    ValueError
        The weights are of another module; with the file, and what is missing or too much.

    Examples
    --------
    >>> file, net = getfixture("tmp_path") / "net.ckpt", torch.nn.Linear(1, 1)
    >>> torch.save(net.state_dict(), file)
    >>> load_weights(net, file)
    >>> _ = file.write_bytes(file.read_bytes()[:-9])        # cut off
    >>> load_weights(net, file)
    Traceback (most recent call last):
    OSError: ...net.ckpt: damaged (File is not a zip file)
    """
    if fault := zip_damage(path):
        raise OSError(f"{path}: damaged ({fault})")
    try:
        load_module(module, path)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: weights of another network: {said[:300]}") from error


def load_module(module: Any, path: str | Path, first_rows: bool = False) -> None:
    """Weights of a module from a checkpoint: a file, or a folder for a classifier in shards.

    Raises
    ------
    OSError
        The file is damaged, or holds more than tensors.
    RuntimeError
        The weights are of another module.

    Examples
    --------
    >>> file, net = getfixture("tmp_path") / "net.ckpt", torch.nn.Linear(1, 2, bias=False)
    >>> torch.save({"weight": torch.tensor([[1.0], [2.0], [3.0]])}, file)
    >>> load_module(net, file, first_rows=True)             # two classes of three
    >>> net.weight.tolist()
    [[1.0], [2.0]]
    """
    if Path(path).is_dir():
        module.load_shards(path, first_rows=first_rows)
        return
    state = _tensors(path)
    if has_statistics(module):
        load_statistics(module, state)
        return
    if first_rows:
        sizes = {key: len(value) for key, value in module.state_dict().items() if value.ndim}
        state = {
            key: value[: sizes[key]] if key in sizes else value for key, value in state.items()
        }
    module.load_state_dict(state)
