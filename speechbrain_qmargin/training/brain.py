"""Batch to embedding to loss: the Brains that train and evaluate verifiers.

:class:`VerificationBrain` holds what speech and faces share: the loss with its diagnostics, the
learning rate, validation by EER on identities never trained on, checkpoints, the history. A
subclass says how a batch becomes embeddings: :class:`SpeakerBrain` for waveforms,
:class:`FaceBrain` for images.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch import Tensor, nn
from tqdm import tqdm

from speechbrain_qmargin.communicator import Communicator
from speechbrain_qmargin.data.sampling import SharedOrder
from speechbrain_qmargin.head.shards import ShardedClassifier
from speechbrain_qmargin.loss.base import Loss, value_of
from speechbrain_qmargin.loss.dense import scores_of
from speechbrain_qmargin.loss.device import asked_for
from speechbrain_qmargin.loss.diagnosis import Progress, advice
from speechbrain_qmargin.loss.interface import flat
from speechbrain_qmargin.models import Encoder, ImageEncoder, check_embeddings
from speechbrain_qmargin.models.classifier import prototypes_per_class
from speechbrain_qmargin.training.batch_norm import RunningStatistics
from speechbrain_qmargin.training.checkpoints import bare, ends_an_epoch, load_average
from speechbrain_qmargin.training.extraction import ReadableBatch, extract_dataset
from speechbrain_qmargin.training.freezing import Freezing
from speechbrain_qmargin.training.history import read_history, write_history
from speechbrain_qmargin.training.internals import OpenBrain, ShieldedLoader, skip_to
from speechbrain_qmargin.training.preemption import Preempted, noted_signals
from speechbrain_qmargin.training.processes import scaler_of_shards
from speechbrain_qmargin.training.prototype_reset import PrototypeReset

__all__ = ["FaceBrain", "SpeakerBrain", "VerificationBrain"]

logger = logging.getLogger(__name__)

_NOTHING = {"items_at_once": None, "seconds": 0.0, "stats": [0.0] * 5}
_NO_CLIPPING = 1e9
_LARGEST = 2  # of the statistics, where the largest support stands: no sum


@partial(register_checkpoint_hooks, save_on_main_only=False)
class VerificationBrain(OpenBrain):
    """Trains embeddings with any loss of this package, or SpeechBrain's, and embeds with them.

    Settings
    --------
    compute_cost : callable
        ``loss = compute_cost(outputs, labels, lengths)``. A :class:`speechbrain_qmargin.Loss` gives
        the diagnostics as well.
    lr_schedule : callable
        ``lr = lr_schedule(epoch)`` with the time in epochs, for a batch of `lr_reference_batch`
        samples; it is scaled to the batch in use.
    loss_schedule : dict of callables, optional
        ``{"margin": f}``: before each step the loss's margin is ``f(epoch, its own margin)``.
    head_opt_class : callable, optional
        The optimiser of a classifier in shards; `opt_class` is then that of the other modules.
    average_checkpoints : int
        How many of the last epochs' weights are averaged for :meth:`extract`.
    batch_size, lr_reference_batch : int
    max_grad_norm : float
        To which the gradient's norm is clipped: that of all modules together, a classifier in
        shards with all its shards, or of `clipped_alone`. From 1e9 on nothing is clipped.
    freeze, freeze_epochs : str, int, optional
        See :class:`~speechbrain_qmargin.training.freezing.Freezing`.
    encoder_lr : float, optional
        The encoder's learning rate, relative to the others'. Where it is not 1, the gradient that
        is clipped is the encoder's alone.
    epoch_counter, train_logger : SpeechBrain objects
    output_folder : str
        Where ``history.jsonl`` is written: one record per epoch.

    Raises
    ------
    ValueError
        Settings that do not go together, with the setting; fewer training items than a batch has.

    Notes
    -----
    The settings are read from `hparams`. Batches have ``id`` and, in training,
    ``label_key`` (a PaddedData of labels [B, 1]). `validate` is called with a dict of
    embeddings after each epoch and returns a dict of numbers; None means no validation.
    """

    label_key = "spk_id_encoded"
    clipped_alone: str | None = None

    def __init__(
        self,
        *args: Any,
        validate: Callable[[dict[str, np.ndarray]], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.validate = validate
        self.embeddings: dict[str, np.ndarray] = {}
        head = self.modules["classifier"]
        self._sharded_head = head if isinstance(head, ShardedClassifier) else None
        if self._sharded_head is not None:
            alone, device = self.scaler, str(self.device)
            self.scaler = scaler_of_shards(alone, device, self._sharded_head.comm)
            if self.scaler is not alone and self.checkpointer is not None:
                self.checkpointer.add_recoverable("scaler", self.scaler, optional_load=True)
        schedule = getattr(self.hparams, "loss_schedule", None) or {}
        cost = getattr(self.hparams, "compute_cost", None)  # a Brain that only embeds has none
        self._full = full = {name: value_of(cost, name) for name in schedule}
        if isinstance(cost, Loss):
            cost.to(self.device)
            if self.checkpointer is not None and cost.state_dict():  # running values, counters
                self.checkpointer.add_recoverable("loss", cost)
        self._loss_state, self._loss_asked = set(_state_of(cost)), False
        self._spoilt = False  # whether a loss of this step was not finite
        self._signal: Callable[[], int] = lambda: 0  # that came to this process
        self._ends_by = 0  # the signal that came to one of all
        self._reset = self._prototype_reset()
        encoder = self.modules["embedding_model"]
        self._freezing = Freezing.of(encoder, self.hparams)
        self._freezing.begin(1, self._processes)  # before it is wrapped for several processes
        self._loss_at = lambda epoch: {
            name: change(epoch, full[name]) for name, change in schedule.items()
        }
        self._earlier = _NOTHING  # of this epoch, from before an interruption
        self.epochs_trained = 0  # by this process

    # ---------------------------------------------------------------- batch to loss

    def embed(self, batch, stage: sb.Stage) -> Tensor:
        """Embeddings [B, 1, D] of a batch; for a subclass to define."""
        raise NotImplementedError

    def compute_forward(self, batch, stage):
        batch = batch.to(self.device, non_blocking=True)
        embeddings = self.embed(batch, stage)
        if stage != sb.Stage.TRAIN:
            return embeddings
        outputs = self.modules.classifier(embeddings)
        # a loss of ours may look at the embeddings, which a dense classifier keeps to itself
        ours = isinstance(self.hparams.compute_cost, Loss)
        return scores_of(outputs, embeddings) if ours else outputs

    def compute_objectives(self, predictions, batch, stage):
        if stage != sb.Stage.TRAIN:
            rows = predictions.flatten(1).float().cpu().numpy()
            for name, row in zip(batch.id, rows, strict=True):
                self.embeddings[name] = row
            return torch.zeros(())
        labels = self.labels(batch)
        cost = self.hparams.compute_cost
        if isinstance(cost, Loss):
            rows = cost.checked_rows(predictions, labels, statistics=True)
            loss, stats = rows.loss.mean(), cost.statistics(rows)
            self._stats.append(torch.stack([value.detach() for value in stats]))
            if self._reset is not None and self._resets_now:
                self._reset.observe(predictions.embeddings, flat(labels), rows.target_posterior)
        else:
            loss = cost(predictions, labels, None)
        return loss

    def labels(self, batch) -> Tensor:
        """Labels [B, 1] of a training batch."""
        return getattr(batch, self.label_key).data.to(self.device)

    # ---------------------------------------------------------------- prototypes

    def _prototype_reset(self) -> PrototypeReset | None:
        epochs = getattr(self.hparams, "reset_after_epochs", None)
        if not epochs:
            return None
        head, cost = self.modules["classifier"], self.hparams.compute_cost
        if prototypes_per_class(head) > 1:
            raise ValueError("reset_after_epochs: only with one prototype per class")
        if not isinstance(cost, Loss):
            raise ValueError("reset_after_epochs: for a loss of speechbrain_qmargin, as a3m")
        shards = self._sharded_head
        reset = PrototypeReset(
            len(head.weight) if shards is None else shards.num_classes,
            head.weight.shape[1],
            epochs,
            self.hparams.reset_prototypes,
            Communicator() if shards is None else shards.comm,
            in_shards=shards is not None,
        ).to(self.device)
        hooks: dict[str, Any] = {}
        if shards is not None:
            hooks["custom_save_hook"] = lambda reset, path: reset.save(path)
            hooks["custom_load_hook"] = lambda reset, path, _: reset.load(path)
        self.checkpointer.add_recoverable("prototype_reset", reset, **hooks)
        return reset

    @property
    def _resets_now(self) -> bool:
        assert self._reset is not None
        return self.hparams.epoch_counter.current in self._reset.after_epochs

    def _reset_prototypes(self) -> None:
        if self._reset is None or not self._resets_now:
            return
        head = bare(self.modules["classifier"])
        of_head = "opt_class" if self._sharded_head is None else "head_opt_class"
        optimizer = self.optimizers_dict[of_head]
        found, every = self._reset.apply_to(head.weight, optimizer), self._reset.num_classes
        logger.info(f"prototypes set to the mean of their samples: {found} of {every}")
        self._record["prototypes_reset"] = found

    # ---------------------------------------------------------------- learning rate

    def make_dataloader(self, dataset, stage, **kwargs):
        kwargs.setdefault("collate_fn", PaddedBatch)
        # a copy to a GPU from other memory is slower, and the host waits for it
        kwargs.setdefault("pin_memory", torch.device(self.device).type == "cuda")
        if stage == sb.Stage.TRAIN and kwargs.get("shuffle"):
            # the order of a run of one process: a step trains on the same items, shared out
            seed = int(os.environ.get("SB_GLOBAL_SEED", 563375142))  # SpeechBrain's, without one
            if kwargs.get("drop_last") or not self.distributed_launch:
                rank = self.rank if self.distributed_launch else 0
                sampler = SharedOrder(len(dataset), rank, self._processes, seed)
            else:  # dealt out by SpeechBrain, which repeats some items at the end
                sampler = ReproducibleRandomSampler(dataset, seed=seed)
            kwargs |= {"sampler": sampler, "shuffle": False}
        loader = ShieldedLoader.of(super().make_dataloader(dataset, stage, **kwargs))
        if stage == sb.Stage.TRAIN:
            if len(loader) < self.grad_accumulation_factor:
                raise ValueError(
                    f"batch_size: {len(dataset)} training items make no full batch of "
                    f"{self.hparams.batch_size} x {self.grad_accumulation_factor} (accumulation); "
                    "lower batch_size"
                )
            self._train_loader = loader
        return loader

    def fit(self, *args, **kwargs):
        """SpeechBrain's; told by a signal, it ends after a checkpoint.

        Raises
        ------
        Preempted
            SIGTERM or SIGUSR1 came to one of the processes. All end, after the same step.
        """
        with noted_signals() as self._signal:
            super().fit(*args, **kwargs)

    def on_fit_start(self):
        super().on_fit_start()
        self._freezing.follow(bare(self.modules["embedding_model"]))
        self._running = RunningStatistics(self.modules.values())
        self._share_out_anew()
        batch = self._items_at_once * self.grad_accumulation_factor
        self._lr_scale = batch / self.hparams.lr_reference_batch
        cost = self.hparams.compute_cost
        logger.info(f"loss: {cost.describe() if isinstance(cost, Loss) else cost}")
        logger.info(
            f"learning rate x {self._lr_scale:g}: {self._processes} processes x batch "
            f"{self.hparams.batch_size} x accumulation {self.grad_accumulation_factor} / "
            f"{self.hparams.lr_reference_batch}"
        )
        if self._encoder_lr != 1:
            logger.info(f"the encoder's learning rate is {self._encoder_lr:g} of the classifier's")
        if str(self._freezing):
            logger.info(str(self._freezing))
        epochs = self.hparams.epoch_counter.limit
        for name, last in self._loss_at(epochs).items():
            if not math.isclose(last, self._full[name]):
                logger.warning(
                    f"loss_schedule: {epochs} epochs end with {name} {last:.3g}, on the way to "
                    f"{self._full[name]:.3g}: more epochs, or an earlier end of its schedule"
                )

    @property
    def _processes(self) -> int:
        return torch.distributed.get_world_size() if self.distributed_launch else 1

    @property
    def _encoder_lr(self) -> float:
        factor = getattr(self.hparams, "encoder_lr", 1.0)
        if not isinstance(factor, (int, float)) or not factor > 0:
            raise ValueError(f"encoder_lr: {factor}; a number above 0, 1 for the others' rate")
        return float(factor)

    @property
    def _items_at_once(self) -> int:
        """Items of a forward pass, over all processes."""
        return self._processes * self.hparams.batch_size

    def _share_out_anew(self) -> None:
        """Within an epoch that began with other batches, go on at the item where it stood."""
        before, factor = self._earlier["items_at_once"], self.grad_accumulation_factor
        if self.step and before is not None:
            step = self.step * before // (self._items_at_once * factor) * factor
            if step != self.step or before != self._items_at_once:
                self.step = step
                skip_to(self._train_loader, step)

    @property
    def _time(self) -> float:
        """Epochs trained before the current step, whatever the batch and the processes are."""
        factor = self.grad_accumulation_factor
        begun = max(0, self.step - 1) // factor * factor
        return self.hparams.epoch_counter.current - 1 + begun / len(self._train_loader)

    def _follow_schedules(self) -> None:
        self._loss_now = self._loss_at(self._time)
        if self._loss_now:
            self.hparams.compute_cost.set(**self._loss_now)
        self._lr = self._lr_scale * self.hparams.lr_schedule(self._time)
        for optimizer in self.optimizers_dict.values():
            for group in optimizer.param_groups:
                group["lr"] = self._lr * group.get("lr_factor", 1.0)

    def init_optimizers(self):
        """One optimiser, or two where the classifier is in shards: a rank steps its own shard.

        What the loss learns is a group of its own.
        """
        head, alone = self._sharded_head, self._clipped_alone
        # a head's optimiser steps its own parameters, and its others never move
        of_head = {id(p) for p in head.parameters()} if head is not None else set()
        clipped = self.modules if alone is None else self.modules[alone]
        self._clipped = [p for p in clipped.parameters() if id(p) not in of_head]
        self._init_modules_optimizers(of_head)
        learnt = _learnt_by(getattr(self.hparams, "compute_cost", None))
        if learnt:
            self.optimizer.add_param_group({"params": list(learnt.values())})
        if self._processes > 1:  # no wrapper sees them
            for parameter in learnt.values():
                parameter.register_post_accumulate_grad_hook(_average_gradient)

    @property
    def _clipped_alone(self) -> str | None:
        return self.clipped_alone if self._encoder_lr == 1 else "embedding_model"

    def _init_modules_optimizers(self, of_head: set[int]) -> None:
        head, factor = self._sharded_head, self._encoder_lr
        if head is None and self._clipped_alone is None:
            super().init_optimizers()
            return
        if self.remove_vector_weight_decay:
            raise ValueError(
                "--remove_vector_weight_decay: not with faces, the sparse head or --encoder_lr"
            )
        seen = of_head | {id(p) for p in self._clipped}
        others = [p for p in self.modules.parameters() if id(p) not in seen]
        parts = [part for part in (self._clipped, others) if part]
        groups: list[dict[str, Any]] = [{"params": part} for part in parts]
        if factor != 1:
            groups[0]["lr_factor"] = factor
        self.optimizer = self.opt_class(groups)
        self.optimizers_dict = {"opt_class": self.optimizer}
        self.checkpointer.add_recoverable("optimizer", self.optimizer)
        if head is None:
            return
        head_optimizer = self.hparams.head_opt_class(head.own_parameters())
        self.optimizers_dict["head_opt_class"] = head_optimizer
        self.checkpointer.add_recoverable(
            "classifier",
            head,
            custom_save_hook=lambda head, path: head.save_shards(path, head_optimizer),
            custom_load_hook=lambda head, path, _: head.load_shards(path, head_optimizer),
        )

    def fit_batch(self, batch):
        """SpeechBrain's, but a step whose loss is not finite, in any process, is left out.

        SpeechBrain waits for the loss at the end, when the optimisers have been told to step. Here
        the host has it while a GPU is still at the backward pass, and waits no more often.
        """
        should_step = self.step % self.grad_accumulation_factor == 0
        self.on_fit_batch_start(batch, should_step)
        before = len(self._stats)
        self._running.keep()
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            facts = self._facts(loss)
            self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        value, spoilt, signal = facts()
        self._ends_by = int(signal)
        if spoilt:
            value = torch.full_like(value, torch.nan)  # in all processes
            self._running.restore()
            del self._stats[before:]
        self._spoilt = bool(spoilt) or self._spoilt
        if should_step:
            if self._spoilt:
                self.zero_grad(set_to_none=True)
            else:
                self.optimizers_step()
            self._spoilt = False
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        self.check_loss_isfinite(value)
        if not self._loss_asked:
            self._ask_loss()
        return value

    def _facts(self, loss: Tensor) -> Callable[[], Tensor]:
        """For the host: this process's loss; whether any is not finite, and any signal that came.

        What all have to know comes with the loss, so that nobody waits for it by itself.
        """
        loss = loss.detach().reshape(())
        spoilt, signal = ~loss.isfinite(), loss.new_full((), self._signal())
        facts = torch.stack((loss, spoilt.to(loss.dtype), signal))
        if self._processes > 1:
            torch.distributed.all_reduce(facts[1:], torch.distributed.ReduceOp.MAX)
        return asked_for(facts)

    def _ask_loss(self) -> None:
        """Refuse what a loss makes with its first batch: nobody would train it, or save it."""
        self._loss_asked = True
        cost = self.hparams.compute_cost
        new = sorted(set(_state_of(cost)) - self._loss_state)
        if new:
            raise ValueError(
                f"loss: {type(cost).__name__} has {', '.join(new)} since its first batch. What a "
                "loss keeps or learns is made in its __init__ (or in count_classes): otherwise no "
                "optimiser trains it, and no checkpoint has it"
            )

    def check_loss_isfinite(self, loss):
        """Count a loss that is not finite, once its step is left out.

        Raises
        ------
        ValueError
            One more in this epoch than ``--nonfinite_patience`` allows.
        """
        if bool(loss.isfinite()):
            return
        self.nonfinite_count += 1
        count, patience = self.nonfinite_count, self.nonfinite_patience
        what = (
            f"epoch {self.hparams.epoch_counter.current}, step {self.step}: the loss is not finite"
        )
        if count <= patience:
            logger.warning(
                f"{what}, and the step is left out ({count} of {patience} that "
                "--nonfinite_patience allows in an epoch)"
            )
            return
        raise ValueError(
            f"{what}, as {count} were in this epoch; --nonfinite_patience {patience} allows no "
            "more. The training diverges, or half precision overflows: begin anew with a lower "
            "--lr, a longer warmup, a tighter --max_grad_norm, or --precision bf16 or fp32. After "
            "a fault that will not come again the same command goes on at the last checkpoint"
        )

    def modules_to_compile(self):
        """All but a classifier in shards, which waits for other processes and hides its weight."""
        sharded = self._sharded_head
        return [name for name, module in self.modules.items() if module is not sharded]

    def optimizers_step(self):
        """SpeechBrain's, but one norm is clipped, also where two optimisers step."""
        self._freezing.drop_gradients()
        optimizers = self.freeze_optimizers(self.optimizers_dict)
        for optimizer in optimizers.values():
            self.scaler.unscale_(optimizer)
        if self.max_grad_norm < _NO_CLIPPING:
            self._clip_gradients()
        if self.skip_nonfinite_grads and not self.scaler.is_enabled():
            self.check_gradients()
        for optimizer in optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.optimizer_step += 1

    def _clip_gradients(self) -> None:
        head = None if self._clipped_alone else self._sharded_head
        of_head = [] if head is None else head.own_parameters()
        norm = _norm_of(self._clipped)
        if head is not None:
            norm = (norm**2 + head.comm.sum(_norm_of(of_head) ** 2)).sqrt()
        torch.nn.utils.clip_grads_with_norm_([*self._clipped, *of_head], self.max_grad_norm, norm)

    def freeze_optimizers(self, optimizers):
        """Those with a gradient: a GradScaler refuses one whose parameters are all frozen."""
        return {
            name: optimizer
            for name, optimizer in optimizers.items()
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        }

    def check_gradients(self):
        """SpeechBrain's ``skip_nonfinite_grads``, which cannot read row-sparse gradients."""
        learnt = _learnt_by(getattr(self.hparams, "compute_cost", None))
        head, found, flags = self._sharded_head, [], []
        for name, parameter in (*self.modules.named_parameters(), *learnt.items()):
            grad = parameter.grad
            if grad is not None:
                found.append((name, parameter))
                is_finite = (grad._values() if grad.is_sparse else grad).isfinite().all()
                if head is not None and parameter is head.weight:  # all shards' or none
                    is_finite = ~head.comm.max((~is_finite).byte()).bool()
                flags.append(is_finite)
        finite = torch.stack(flags).tolist() if flags else []  # a GPU is waited for once
        for (name, parameter), is_finite in zip(found, finite, strict=True):
            if not is_finite:
                parameter.grad = None
                logger.warning(f"The gradient of {name} is not finite: this step leaves it out")

    def on_fit_batch_start(self, batch, should_step):
        super().on_fit_batch_start(batch, should_step)
        # A step's randomness is a function of the seed and the step: a resumed run repeats it.
        epoch, rank = self.hparams.epoch_counter.current, getattr(self, "rank", 0)
        seed = np.random.SeedSequence([self.hparams.seed, epoch, self.step, rank])
        seed = int(seed.generate_state(1)[0])
        random.seed(seed)
        torch.manual_seed(seed)
        self._follow_schedules()
        self._freezing.hold()

    def may_save_within_epoch(self) -> bool:
        # between two steps there are gradients that no checkpoint holds
        return self.step % self.grad_accumulation_factor == 0

    def must_save_within_epoch(self) -> bool:
        return self._ends_by > 0

    def on_saved_within_epoch(self) -> None:
        if self._ends_by:
            self._end_by(self._ends_by, f"step {self.step}")

    def _end_by(self, number: int, where: str) -> NoReturn:
        """After a checkpoint of all processes."""
        ddp_barrier()  # the main one has deleted what is older: from here on any may be ended
        end = Preempted(number)
        logger.warning(
            f"{end.name}: the run ends at epoch {self.hparams.epoch_counter.current}, {where}; a "
            "checkpoint is written, and the same command goes on from there"
        )
        raise end

    @mark_as_saver
    def _save(self, path):
        # every process calls it: what is saved are the losses of all
        state = {
            "step": self.step,
            "avg_train_loss": self._mean_loss(self.avg_train_loss),
            "optimizer_step": self.optimizer_step,
            "items_at_once": self._items_at_once,
            "seconds": self._seconds(),
            "stats": self._totals_of_all().tolist(),
        }
        if if_main_process():
            Path(path).write_text(json.dumps(state), encoding="utf-8")

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("step", "avg_train_loss", "optimizer_step"):
            setattr(self, name, state.pop(name))
        largest = state["stats"][_LARGEST]
        state["stats"] = [total / self._processes for total in state["stats"]]  # a share of each
        state["stats"][_LARGEST] = largest
        self._earlier = state

    # ---------------------------------------------------------------- epochs

    def on_stage_start(self, stage, epoch=None):
        self._started = time.perf_counter()
        if stage == sb.Stage.TRAIN:
            self._stats = []
            self._spoilt = False  # what made no whole step is dropped with its epoch
            self._freezing.begin(epoch or 1, self._processes)
            if self.step == 0:
                self._earlier = _NOTHING
                if self._reset is not None:
                    self._reset.begin()
            self._follow_schedules()
        else:
            self.embeddings = {}

    def _seconds(self) -> float:
        return self._earlier["seconds"] + time.perf_counter() - self._started

    def _totals(self) -> Tensor:
        """Of this epoch's batches: their number, and the sums of the loss's statistics [5]."""
        earlier = torch.tensor(self._earlier["stats"], dtype=torch.float64)
        if not self._stats:
            return earlier
        stats = torch.stack(self._stats).cpu().double()
        total = earlier + torch.cat((stats.new_tensor([len(stats)]), stats.sum(0)))
        total[_LARGEST] = max(earlier[_LARGEST], stats[:, _LARGEST - 1].max())
        return total

    def _totals_of_all(self) -> Tensor:
        """The same of the batches of all processes."""
        each = self._over_processes(self._totals()[None])
        total = each.sum(0)
        total[_LARGEST] = each[:, _LARGEST].max()
        return total

    def _mean_loss(self, loss: float) -> float:
        """Over the processes, each with its own."""
        return float(self._over_processes(torch.tensor([loss], dtype=torch.float64)).mean())

    def on_stage_end(self, stage, stage_loss, epoch=None):
        if stage == sb.Stage.TRAIN:
            self._record = {"epoch": epoch, "lr": self._lr}
            self._record["loss"] = self._mean_loss(stage_loss)
            self._record |= {"seconds": self._seconds(), **self._loss_now}
            totals = self._totals_of_all()
            if totals[0]:
                mean = (totals / totals[0]).tolist()
                self._record |= {
                    "support_mean": mean[1],
                    "support_max": int(totals[_LARGEST]),
                    "zero_loss": mean[3],
                    "target_posterior": mean[4],
                }
                self._advise(mean[3])
            self._reset_prototypes()
            # as after the epoch, for its checkpoint
            self.step, self.avg_train_loss, self._stats = 0, 0.0, []
            self._earlier = _NOTHING
            if self.validate is None:
                self._end_epoch({})
        elif stage == sb.Stage.VALID and self.validate is not None:
            self._end_epoch(self.validate(self.embeddings))

    def _advise(self, zero_loss: float) -> None:
        """Once per run, what the epoch says of the loss's settings: in the log and the history."""
        numbers, cost = vars(self.hparams), self.hparams.compute_cost
        if not (numbers.get("out_n_neurons") and numbers.get("embedding_dim")):
            return  # a recipe of one's own
        if self._loss_now != self._full:
            return  # on the way to its settings
        if any("advice" in earlier for earlier in self.history()):
            return
        epochs = self.hparams.epoch_counter
        said = advice(
            cost,
            Progress(
                zero_loss,
                done=epochs.current / epochs.limit,
                num_classes=numbers["out_n_neurons"],
                embedding_dim=numbers["embedding_dim"],
                samples=numbers.get("training_samples"),
                mean_loss=self._record["loss"],
            ),
        )
        if said is not None:
            logger.warning(f"{numbers.get('loss', type(cost).__name__)} is {said}")
            self._record["advice"] = said

    def _over_processes(self, rows: Tensor) -> Tensor:
        """Rows [n, ...] of every process, one below the other."""
        if not self.distributed_launch:
            return rows
        return torch.cat(Communicator().gather_rows(rows.to(self.device)))

    def _end_epoch(self, valid_stats: dict[str, float]) -> None:
        self.epochs_trained += 1
        epoch = self._record["epoch"]
        record = self._record | {f"valid_{key}": value for key, value in valid_stats.items()}
        meta = {key: record[key] for key in ("epoch", "lr")}
        train = {key: record[key] for key in self._record if key not in {*meta, "advice"}}
        steps = getattr(self.hparams.train_logger, "global_step", None)
        if steps is not None:  # TensorBoard's curves go on where they ended
            steps["meta"] = epoch - 1
            steps["train"] = dict.fromkeys(train, epoch - 1)
            steps["valid"] = dict.fromkeys(valid_stats, epoch - 1)
        self.hparams.train_logger.log_stats(meta, train, valid_stats or None)
        if if_main_process():
            write_history(self._history_file, record)
        self.checkpointer.save_and_keep_only(
            meta={"epoch": record["epoch"], **valid_stats},
            num_to_keep=self._averaged,
            ckpt_predicate=ends_an_epoch,
            verbosity=logging.DEBUG,
        )
        self.checkpointer.delete_checkpoints(
            num_to_keep=0,
            ckpt_predicate=lambda found: not ends_an_epoch(found),
            verbosity=logging.DEBUG,
        )
        number = int(self._over_processes(torch.tensor([self._signal()])).max())
        if number:  # it came in the last step or in the validation
            self._end_by(number, "its end")

    @property
    def _averaged(self) -> int:
        return getattr(self.hparams, "average_checkpoints", 1)

    @property
    def _history_file(self) -> Path:
        return Path(self.hparams.output_folder) / "history.jsonl"

    def history(self) -> list[dict]:
        """One record per epoch: loss, learning rate, seconds, support, validation."""
        return read_history(self._history_file)

    def loss_values(self) -> dict[str, float]:
        """The loss's numbers after the last epoch, which may be that of an earlier process."""
        cost = self.hparams.compute_cost
        if not isinstance(cost, Loss):
            return {}
        last = self.history()[-1] if self.history() else {}
        return cost.values() | {name: last[name] for name in self._full if name in last}

    # ---------------------------------------------------------------- embeddings

    def extract(
        self, dataset: Any, faults: dict[str, str] | None = None, **loader_kwargs: Any
    ) -> Mapping[str, np.ndarray]:
        """Embeddings of a dataset, id to float32 [D], with the averaged weights.

        They are kept in ``embeddings/`` of the checkpoints' folder, so an interrupted extraction
        goes on. Over several processes each computes its share, and the main process returns the
        whole, the others nothing.

        Parameters
        ----------
        dataset : dataset with `ids` and `describe`
        faults : dict, optional
            Filled with the items that have no embedding, id to what is wrong: unreadable, or not
            finite.
        **loader_kwargs
            Of the DataLoader.

        Raises
        ------
        OSError
            Without `faults`: those items, named once all others are embedded and kept. Embeddings
            that were written are not there at the end.
        """
        averaged = load_average(self.modules, self.checkpointer, self._averaged)
        model = " ".join(sorted(checkpoint.path.name for checkpoint in averaged))
        folder = Path(self.checkpointer.checkpoints_dir) / "embeddings"
        self.modules.eval()
        options = {**loader_kwargs, "collate_fn": ReadableBatch(), "ckpt_prefix": None}
        hidden = self.noprogressbar or not if_main_process()

        def load(items: Any) -> Any:
            loader = self.make_dataloader(items, sb.Stage.TEST, **options)
            return tqdm(loader, "embeddings", disable=hidden, dynamic_ncols=True)

        with self._without_wrappers(), torch.no_grad():
            return extract_dataset(dataset, folder, model, load, self._embedded, faults)

    def _embedded(self, batch: Any) -> Tensor:
        with self.evaluation_ctx:
            return cast(Tensor, self.compute_forward(batch, sb.Stage.TEST)).flatten(1)

    @contextmanager
    def _without_wrappers(self) -> Iterator[None]:
        """Modules run without their wrapper, whose processes would wait for each other."""
        wrapped = dict(self.modules.items())
        for name, module in wrapped.items():
            self.modules[name] = bare(module)
        try:
            yield
        finally:
            for name, module in wrapped.items():
                self.modules[name] = module


class SpeakerBrain(VerificationBrain):
    """Waveforms to embeddings, as SpeechBrain's VoxCeleb recipe does.

    `modules` has ``compute_features``, ``mean_var_norm``, ``embedding_model`` and ``classifier``;
    `hparams` may have ``wav_augment`` (SpeechBrain's Augmenter). Batches have ``sig``.
    """

    def compute_forward(self, batch, stage):
        self._padded = bool((batch.sig.lengths < 1).any())  # asked before it is on a GPU
        return super().compute_forward(batch, stage)

    def embed(self, batch, stage):
        signals, lengths = batch.sig
        padded = self._padded
        if stage == sb.Stage.TRAIN and getattr(self.hparams, "wav_augment", None) is not None:
            signals, lengths = self.hparams.wav_augment(signals, lengths)
            padded = True  # perhaps
        features = self.modules.compute_features(signals)
        features = self.modules.mean_var_norm(features, lengths)
        # Masks of crops of one length would cost ResNet34 half of its memory again
        model = cast(Encoder, self.modules["embedding_model"])
        return check_embeddings(model(features, lengths if padded else None), len(features))

    def labels(self, batch):
        labels = super().labels(batch)
        if getattr(self.hparams, "wav_augment", None) is not None:
            labels = self.hparams.wav_augment.replicate_labels(labels)
        return labels


class FaceBrain(VerificationBrain):
    """Aligned images to embeddings.

    `modules` has ``embedding_model`` and ``classifier``. Batches have ``image``, [B, 3, H, W] in
    [-1, 1]. With ``hparams.test_flip`` an embedding outside training is the sum of the image's and
    its mirror image's, the field's usual test; ``hparams.channels_last`` is for GPUs.

    Examples
    --------
    >>> from speechbrain.dataio.batch import PaddedBatch
    >>> convolution = nn.Conv2d(3, 8, kernel_size=32)       # as large as the image
    >>> network = nn.Sequential(convolution, nn.Flatten(), nn.Unflatten(1, (1, 8)))
    >>> brain = FaceBrain(
    ...     modules={"embedding_model": network, "classifier": nn.Identity()},
    ...     hparams={"test_flip": True, "channels_last": False},
    ...     run_opts={"device": "cpu"},
    ... )
    >>> batch = PaddedBatch([{"id": "ann/1", "image": torch.ones(3, 32, 32)}])
    >>> twice = brain.embed(batch, sb.Stage.TEST)           # an image and its mirror image, equal
    >>> torch.allclose(twice, 2 * brain.embed(batch, sb.Stage.TRAIN))
    True
    """

    label_key = "identity_encoded"
    clipped_alone = "embedding_model"  # as arcface_torch

    def embed(self, batch, stage):
        images = batch.image.data
        if self.hparams.channels_last and images.is_cuda:  # torch 2.14 corrupts memory on the CPU
            images = images.contiguous(memory_format=torch.channels_last)
        model = cast(ImageEncoder, self.modules["embedding_model"])
        embeddings = check_embeddings(model(images), len(images))
        if stage != sb.Stage.TRAIN and self.hparams.test_flip:
            embeddings = embeddings + model(images.flip(-1))
        return embeddings


def _norm_of(parameters: list[nn.Parameter]) -> Tensor:
    """Of their gradients; 0 where there are none."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.to(parameters[0].device)


def _learnt_by(loss: Any) -> dict[str, nn.Parameter]:
    """What a loss of ours learns itself; SpeechBrain's learn nothing."""
    named = loss.named_parameters(prefix="loss") if isinstance(loss, Loss) else ()
    return {name: p for name, p in named if p.requires_grad}


def _state_of(loss: Any) -> list[str]:
    """Names of what a loss of ours keeps or learns."""
    return list(loss.state_dict()) if isinstance(loss, Loss) else []


def _average_gradient(parameter: nn.Parameter) -> None:
    """Over the processes; where it is the same in all of them already, it stays."""
    assert parameter.grad is not None
    torch.distributed.all_reduce(parameter.grad)
    parameter.grad /= torch.distributed.get_world_size()
