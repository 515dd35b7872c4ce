"""What the package needs of SpeechBrain that SpeechBrain does not offer in public.

Attributes and methods with a leading underscore may change with any release of SpeechBrain. They
are read, called and overridden in this module only; the others use its public names.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import speechbrain as sb
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.utils.checkpoints import CKPT_PREFIX, Checkpoint, Checkpointer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from speechbrain_qmargin.data.sampling import SharedOrder
from speechbrain_qmargin.training.batch_norm import synchronised_batch_norm
from speechbrain_qmargin.training.preemption import held_signals, left_to_the_main_process

__all__ = [
    "HiddenCheckpointer",
    "OpenBrain",
    "ShieldedLoader",
    "has_statistics",
    "load_statistics",
    "skip_to",
    "statistics",
]


class OpenBrain(sb.Brain):
    """SpeechBrain's Brain with the decisions that a subclass here makes.

    SpeechBrain sets these attributes from the run's options and its arguments.
    """

    checkpointer: Any
    compile: bool
    compile_module_keys: Any
    distributed_backend: str
    find_unused_parameters: bool
    grad_accumulation_factor: int
    max_grad_norm: float
    modules: Any
    nonfinite_count: int
    nonfinite_patience: int
    noprogressbar: bool
    opt_class: Any
    remove_vector_weight_decay: bool
    scaler: Any
    skip_nonfinite_grads: bool

    def may_save_within_epoch(self) -> bool:
        """Whether a checkpoint between the steps of an epoch could be resumed from now."""
        return True

    def must_save_within_epoch(self) -> bool:
        """Whether there is to be such a checkpoint, whatever the interval; in all processes."""
        return False

    def on_saved_within_epoch(self) -> None:
        """Called in all processes after each such checkpoint."""

    def modules_to_compile(self) -> list[str]:
        """What ``--compile`` compiles where ``--compile_module_keys`` names nothing."""
        return list(self.modules)

    def _compile(self) -> None:
        if self.compile and self.compile_module_keys is None:
            self.compile_module_keys = self.modules_to_compile()
        super()._compile()

    def _should_save_intra_epoch_ckpt(self, *args: Any) -> bool:
        if not self.may_save_within_epoch():
            return False
        return self.must_save_within_epoch() or super()._should_save_intra_epoch_ckpt(*args)

    def _save_intra_epoch_ckpt(self) -> None:
        super()._save_intra_epoch_ckpt()
        self.on_saved_within_epoch()

    def _train_loader_specifics(self, dataset: Any, loader_kwargs: dict) -> dict:
        sampler = loader_kwargs.get("sampler")
        if isinstance(sampler, SharedOrder):  # SpeechBrain's own would share it out again
            self.train_sampler = sampler
            return loader_kwargs
        return super()._train_loader_specifics(dataset, loader_kwargs)

    def _wrap_distributed(self) -> None:
        if self.distributed_launch and self.distributed_backend == "gloo":
            # SpeechBrain's own wrapping uses torch's SyncBatchNorm, which takes CUDA tensors only
            for name, module in self.modules.items():
                if any(p.requires_grad for p in module.parameters()):
                    self.modules[name] = DistributedDataParallel(
                        synchronised_batch_norm(module),
                        find_unused_parameters=self.find_unused_parameters,
                    )
        else:
            super()._wrap_distributed()


class ShieldedLoader(SaveableDataLoader):
    """SpeechBrain's DataLoader, whose workers obey their main process alone, from their birth."""

    @classmethod
    def of(cls, loader: Any) -> Any:
        """The same loader; as it is, where it is of another kind."""
        if type(loader) is SaveableDataLoader and loader.num_workers:
            loader.__class__ = cls
            loader.worker_init_fn = partial(left_to_the_main_process, loader.worker_init_fn)
        return loader

    def __iter__(self) -> Any:
        with held_signals():
            return super().__iter__()


class HiddenCheckpointer(Checkpointer):
    """SpeechBrain's Checkpointer, whose new folders have a prefix that it does not list."""

    PARTIAL = "partial_"

    def _new_checkpoint_dirpath(self) -> Path:
        return self._hidden(super()._new_checkpoint_dirpath())

    def _custom_checkpoint_dirpath(self, name: str) -> Path:
        return self._hidden(super()._custom_checkpoint_dirpath(name))

    def _hidden(self, path: Path) -> Path:
        return path.with_name(self.PARTIAL + path.name)

    def checkpoint_folders(self) -> list[Path]:
        """Every folder that is called a checkpoint, also one that has lost its ``CKPT.yaml``."""
        folders = Path(self.checkpoints_dir).glob(f"{CKPT_PREFIX}*")
        return [folder for folder in folders if folder.is_dir()]

    def read_checkpoint(self, folder: Path) -> Checkpoint:
        """What a checkpoint's folder holds; its weights are not read."""
        return self._construct_checkpoint_objects([folder])[0]


def skip_to(loader: Any, step: int) -> None:
    """Let a SaveableDataLoader begin its next epoch at a batch."""
    loader._speechbrain_recovery_skip_to = step


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is an InputNormalization, which keeps its statistics in no state_dict.

    Examples
    --------
    >>> from speechbrain.processing.features import InputNormalization
    >>> has_statistics(InputNormalization()), has_statistics(nn.BatchNorm1d(2))
    (True, False)
    """
    return hasattr(module, "_statistics_dict")


def statistics(module: Any) -> dict:
    """The statistics of an InputNormalization: count, mean, deviation."""
    return module._statistics_dict()


def load_statistics(module: Any, state: dict) -> None:
    """Give an InputNormalization the statistics of another.

    Examples
    --------
    >>> import torch
    >>> from speechbrain.processing.features import InputNormalization
    >>> one, other = (InputNormalization(norm_type="global", std_norm=False) for _ in range(2))
    >>> _ = one(torch.tensor([[[1.0], [3.0]]]), torch.ones(1))      # it follows in training
    >>> load_statistics(other, statistics(one))
    >>> other.eval()(torch.tensor([[[2.0]]]), torch.ones(1))        # less the mean
    tensor([[[0.]]])
    """
    module._load_statistics_dict(state)
