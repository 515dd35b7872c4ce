"""Checkpoints that appear whole or not at all; the weights that a run ends or begins with."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch import Tensor

from speechbrain_qmargin.training.internals import HiddenCheckpointer

__all__ = [
    "AtomicCheckpointer",
    "bare",
    "ends_an_epoch",
    "load_average",
    "load_module",
    "load_pretrained",
]

logger = logging.getLogger(__name__)

# torch reports a file that cannot be written as RuntimeError
_FULL_DISK = re.compile("PytorchStreamWriter|inline_container|unexpected pos|iostream", re.I)


class AtomicCheckpointer(HiddenCheckpointer):
    """SpeechBrain's Checkpointer, whose checkpoints appear whole or not at all.

    The original writes into the folder that a resuming run would read; killed half-way, it leaves
    a checkpoint that cannot be loaded. This one writes beside it and renames at the end.
    """

    def save_checkpoint(self, *args, verbosity=logging.INFO, **kwargs):
        """As SpeechBrain's; the folder takes its final name once everything is in it."""
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
            final = saved.path.with_name(saved.path.name.removeprefix(self.PARTIAL))
            saved.path.replace(final)
            logger.log(verbosity, f"saved checkpoint {final}")
            files = {key: final / file.name for key, file in saved.paramfiles.items()}
            saved = Checkpoint(final, saved.meta, files)
        ddp_barrier()  # all see the same checkpoints when they choose which to delete
        return saved


def load_average(modules, checkpointer, count: int, first_rows: bool = False) -> int:
    """Load the mean of the last `count` end-of-epoch checkpoints into the modules.

    Weights and batch-normalisation statistics are averaged, integers are the newest's. Every
    process averages its own shard of a classifier in shards. With `first_rows` a classifier may
    have fewer classes than its checkpoints, and takes their first ones.

    Returns
    -------
    int
        How many there were.

    Raises
    ------
    FileNotFoundError
        No epoch was finished.
    """
    checkpoints = checkpointer.find_checkpoints(
        ckpt_predicate=ends_an_epoch, max_num_checkpoints=count
    )
    if not checkpoints:
        raise FileNotFoundError(
            f"{checkpointer.checkpoints_dir} holds no checkpoint of a finished epoch"
        )
    plain = {name: bare(module) for name, module in modules.items()}
    total: dict[tuple, Tensor] = {}
    for checkpoint in reversed(checkpoints):  # the newest last
        for name in plain.keys() & checkpoint.paramfiles.keys():
            load_module(plain[name], checkpoint.paramfiles[name], first_rows)
            for key, value in plain[name].state_dict().items():
                if value.is_floating_point():
                    total[name, key] = total.get((name, key), 0) + value / len(checkpoints)
    with torch.no_grad():
        for (name, key), mean in total.items():
            plain[name].state_dict(keep_vars=True)[key].copy_(mean)
    return len(checkpoints)


def bare(module: Any) -> Any:
    """A module without what wraps it: DDP for several processes, torch.compile."""
    for wrapper in ("module", "_orig_mod"):
        module = getattr(module, wrapper, module)
    return module


def ends_an_epoch(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a finished epoch."""
    return checkpoint.meta["end-of-epoch"]


def load_module(module, path: str | Path, first_rows: bool = False) -> None:
    """Weights of a module from a checkpoint: a file, or a folder for a classifier in shards."""
    if Path(path).is_dir():
        module.load_shards(path, first_rows=first_rows)
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    if first_rows:
        sizes = {key: len(value) for key, value in module.state_dict().items() if value.ndim}
        state = {
            key: value[: sizes[key]] if key in sizes else value for key, value in state.items()
        }
    module.load_state_dict(state)


def load_pretrained(hparams: dict) -> None:
    """Start from the weights of the finished run in ``pretrained``, its epochs averaged.

    ``pretrained_classes`` says what becomes of its prototypes: ``keep``, for the same classes;
    ``first``, for as many as there are now (the copies of speakers at other speeds come last and
    are dropped); ``none``, a new classifier. A run that has checkpoints of its own ignores this.

    Raises
    ------
    FileNotFoundError, ValueError
        No finished epoch there; another model or other classes there than here.
    """
    source, classes = hparams["pretrained"], hparams["pretrained_classes"]
    if source is None or hparams["checkpointer"].list_checkpoints():
        return
    if classes not in ("keep", "first", "none"):
        raise ValueError(f"pretrained_classes: {classes!r}; choose keep, first or none")
    save = Path(source) / "save"
    names = ["embedding_model"] + ["classifier"] * (classes != "none")
    modules = {name: hparams[name] for name in names}
    if not save.is_dir():
        raise FileNotFoundError(f"pretrained: {source} is no run's output folder (no save/ in it)")
    if classes != "none":
        there, here = (
            Path(folder, "label_encoder.txt") for folder in (save, hparams["save_folder"])
        )
        labels = [path.read_text() if path.is_file() else None for path in (there, here)]
        if labels[0] != labels[1]:
            raise ValueError(
                f"{source} was trained on other classes than these ({there} and {here} differ); "
                "give --pretrained_classes none for a new classifier"
            )
    if not Path(source, "results.json").is_file():
        logger.warning(f"pretrained: {source} is not finished; its last epochs so far are taken")
    checkpointer = Checkpointer(save)
    try:
        count = load_average(
            modules, checkpointer, len(checkpointer.list_checkpoints()), classes == "first"
        )
    except RuntimeError as error:
        raise ValueError(
            f"pretrained: {source} was trained with another model or other sizes (--model, --size, "
            f"--channels, ...) than this run; see its experiment.yaml. {str(error)[:300]}"
        ) from error
    logger.info(f"starting from {source}: {', '.join(names)}, {count} epochs averaged")
