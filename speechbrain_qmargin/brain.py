"""Batch to embedding to loss: the Brains that train and evaluate verifiers.

:class:`VerificationBrain` holds what speech and faces share: the loss with its diagnostics, the
learning rate, validation by EER on identities never trained on, checkpoints, the history. A
subclass says how a batch becomes embeddings; :class:`SpeakerBrain` does so for waveforms.
"""

from __future__ import annotations

import json
import logging
import random
import time
from pathlib import Path

import numpy as np
import speechbrain as sb
import torch
from speechbrain.utils.distributed import if_main_process
from torch import Tensor

from speechbrain_qmargin.files import write_text

__all__ = ["SpeakerBrain", "VerificationBrain"]

logger = logging.getLogger(__name__)


class VerificationBrain(sb.Brain):
    """Trains embeddings with any loss of the family and compares them by cosine.

    Reads from `hparams`:

    compute_cost : callable
        ``loss = compute_cost(outputs, labels, lengths)``; a `with_stats` method, where it has one,
        is used for the diagnostics.
    lr_schedule : callable
        ``lr = lr_schedule(epoch)`` with the time in epochs, for a batch of `lr_reference_batch`
        samples; it is scaled to the batch that is used.
    batch_size, lr_reference_batch : int
    epoch_counter, train_logger : SpeechBrain objects
    output_folder : str
        Where ``history.jsonl`` is written: one record an epoch.

    Batches have ``id`` and, in training, ``label_key`` (a PaddedData of labels [B, 1]).
    `validate` is called with a dict of embeddings after each epoch and returns a dict of numbers;
    None means no validation.
    """

    label_key = "spk_id_encoded"

    def __init__(self, *args, validate=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.validate = validate
        self.embeddings: dict[str, np.ndarray] = {}

    # ---------------------------------------------------------------- batch to loss

    def embed(self, batch, stage: sb.Stage) -> Tensor:
        """Embeddings [B, 1, D] of a batch; for a subclass to define."""
        raise NotImplementedError

    def compute_forward(self, batch, stage):
        batch = batch.to(self.device)
        embeddings = self.embed(batch, stage)
        return self.modules.classifier(embeddings) if stage == sb.Stage.TRAIN else embeddings

    def compute_objectives(self, predictions, batch, stage):
        if stage != sb.Stage.TRAIN:
            rows = predictions.flatten(1).float().cpu().numpy()
            self.embeddings.update(zip(batch.id, rows, strict=True))
            return torch.zeros(())
        labels = self.labels(batch)
        cost = self.hparams.compute_cost
        if hasattr(cost, "with_stats"):
            loss, stats = cost.with_stats(predictions, labels)
            self._stats.append(torch.stack([value.detach() for value in stats]))
        else:
            loss = cost(predictions, labels, None)
        return loss

    def labels(self, batch) -> Tensor:
        """Labels [B, 1] of a training batch."""
        return getattr(batch, self.label_key).data.to(self.device)

    # ---------------------------------------------------------------- learning rate

    def make_dataloader(self, dataset, stage, **kwargs):
        loader = super().make_dataloader(dataset, stage, **kwargs)
        if stage == sb.Stage.TRAIN:
            steps = len(loader) / self.grad_accumulation_factor
            if steps < 1:
                raise ValueError(
                    f"batch_size: {len(dataset)} training items make no full batch of "
                    f"{self.hparams.batch_size}; lower batch_size"
                )
            self._steps_per_epoch = steps
        return loader

    def on_fit_start(self):
        super().on_fit_start()
        world = torch.distributed.get_world_size() if self.distributed_launch else 1
        batch = world * self.hparams.batch_size * self.grad_accumulation_factor
        self._lr_scale = batch / self.hparams.lr_reference_batch
        logger.info(f"loss: {self.hparams.compute_cost}")
        logger.info(
            f"learning rate x {self._lr_scale:g}: {world} processes x batch "
            f"{self.hparams.batch_size} x accumulation {self.grad_accumulation_factor} / "
            f"{self.hparams.lr_reference_batch}"
        )

    def on_fit_batch_start(self, batch, should_step):
        super().on_fit_batch_start(batch, should_step)
        # A step's randomness is a function of the seed and the step: a resumed run repeats it.
        epoch, rank = self.hparams.epoch_counter.current, getattr(self, "rank", 0)
        seed = np.random.SeedSequence([self.hparams.seed, epoch, self.step, rank])
        seed = int(seed.generate_state(1)[0])
        random.seed(seed)
        torch.manual_seed(seed)
        if should_step:
            self._lr = self._lr_scale * self.hparams.lr_schedule(
                self.optimizer_step / self._steps_per_epoch
            )
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr

    # ---------------------------------------------------------------- epochs

    def on_stage_start(self, stage, epoch=None):
        self._started = time.perf_counter()
        if stage == sb.Stage.TRAIN:
            self._stats = []
        else:
            self.embeddings = {}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        seconds = time.perf_counter() - self._started
        if stage == sb.Stage.TRAIN:
            self._record = {"epoch": epoch, "lr": self._lr, "loss": stage_loss, "seconds": seconds}
            if self._stats:
                stats = torch.stack(self._stats).double()
                mean = stats.mean(0).tolist()
                self._record |= {
                    "support_mean": mean[0],
                    "support_max": int(stats[:, 1].max()),
                    "zero_loss": mean[2],
                    "target_posterior": mean[3],
                }
            self.step, self.avg_train_loss = 0, 0.0  # as after the epoch, for its checkpoint
            if self.validate is None:
                self._end_epoch({})
        elif stage == sb.Stage.VALID:
            self._end_epoch(self.validate(self.embeddings))

    def _end_epoch(self, valid_stats: dict[str, float]) -> None:
        record = self._record | {f"valid_{key}": value for key, value in valid_stats.items()}
        meta = {key: record[key] for key in ("epoch", "lr")}
        train = {key: record[key] for key in self._record if key not in meta}
        self.hparams.train_logger.log_stats(meta, train, valid_stats or None)
        if if_main_process():
            history = [old for old in self.history() if old["epoch"] < record["epoch"]]
            text = "".join(json.dumps(entry) + "\n" for entry in [*history, record])
            write_text(self._history_file, text)
        self.checkpointer.save_and_keep_only(
            meta={"epoch": record["epoch"], **valid_stats},
            num_to_keep=1,
            verbosity=logging.DEBUG,
        )

    @property
    def _history_file(self) -> Path:
        return Path(self.hparams.output_folder) / "history.jsonl"

    def history(self) -> list[dict]:
        """One record an epoch: loss, learning rate, seconds, support, validation."""
        if not self._history_file.is_file():
            return []
        lines = self._history_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    # ---------------------------------------------------------------- embeddings

    def extract(self, dataset, **loader_kwargs) -> dict[str, np.ndarray]:
        """Embeddings of a dataset, id to float32 [D], with the newest checkpoint."""
        self.evaluate(dataset, test_loader_kwargs=dict(loader_kwargs))
        return self.embeddings


class SpeakerBrain(VerificationBrain):
    """Waveforms to embeddings, as SpeechBrain's VoxCeleb recipe does.

    `modules` has ``compute_features``, ``mean_var_norm``, ``embedding_model`` and ``classifier``;
    `hparams` may have ``wav_augment`` (SpeechBrain's Augmenter). Batches have ``sig``.
    """

    def embed(self, batch, stage):
        signals, lengths = batch.sig
        if stage == sb.Stage.TRAIN and getattr(self.hparams, "wav_augment", None) is not None:
            signals, lengths = self.hparams.wav_augment(signals, lengths)
        features = self.modules.compute_features(signals)
        features = self.modules.mean_var_norm(features, lengths)
        return self.modules.embedding_model(features, lengths)

    def labels(self, batch):
        labels = super().labels(batch)
        if getattr(self.hparams, "wav_augment", None) is not None:
            labels = self.hparams.wav_augment.replicate_labels(labels)
        return labels
