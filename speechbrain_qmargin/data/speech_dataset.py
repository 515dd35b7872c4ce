"""Recordings as a dataset: crops to train on, whole recordings to embed."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from speechbrain_qmargin.data.audio import read_audio
from speechbrain_qmargin.data.augment import Augment
from speechbrain_qmargin.data.epochs import first_epoch
from speechbrain_qmargin.data.manifest import Item, Manifest, Texts
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.files import fault_of

__all__ = ["SpeechDataset"]

logger = logging.getLogger(__name__)

_TRIES = 20  # recordings of a speaker, until it is said that none can be read


class SpeechDataset(Dataset):
    """The recordings of a manifest.

    Everything random about an item is a function of (seed, epoch, utterance) alone, so neither the
    number of workers nor an interruption changes what is trained on. An index ``draw * len(self) +
    item``, as :class:`~speechbrain_qmargin.data.sampling.BalancedSampler` gives, is the item with
    other randomness. It can be pickled if `epoch` and `augment` can, and then takes little memory
    in a worker: a manifest that is kept in a file is sent as its path.

    Parameters
    ----------
    manifest : Manifest
    sample_rate : int
        Hz.
    crop : float, optional
        Seconds of a random crop; shorter recordings are repeated. A crop of another utterance of
        the speaker, the same in every run, takes the place of one that cannot be read, and a
        warning names the file; after 20 of them, or all, OSError. None gives whole recordings, and
        OSError for one that cannot be read.
    labels : mapping from class to int, optional
        With it, items also carry ``spk_id_encoded``.
    seed : int
    epoch : callable
        Gives the current epoch.
    speeds : sequence of float
        Each item is played at one of them, drawn anew in every epoch. Speaker ``k`` of C at the
        i-th speed is class ``i * C + k``, so there are ``len(speeds) * C`` classes, those of the
        first speed before the others: begin with 1.0.
    augment : callable, optional
        ``augment(signal, rng, speaker)``, e.g. of
        :func:`~speechbrain_qmargin.data.augment.room_and_noise`.
    skipped : Skipped, optional
        Where the recordings are listed whose place others have taken.

    Attributes
    ----------
    ids : Texts [N]

    Raises
    ------
    ValueError
        Several `speeds` of which 1.0 is not the first.

    Examples
    --------
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "a.wav"
    >>> soundfile.write(path, np.zeros(8000), 16000)
    >>> manifest = Manifest.of([Item("ann/a.wav", str(path), "ann", 0.0, 0.5)])
    >>> item = SpeechDataset(manifest, 16000, crop=0.2, labels={"ann": 7})[0]
    >>> item["id"], item["sig"].shape, item["spk_id_encoded"]
    ('ann/a.wav', torch.Size([3200]), tensor([7]))
    """

    def __init__(
        self,
        manifest: Manifest,
        sample_rate: int,
        *,
        crop: float | None = None,
        labels: Mapping[str, int] | None = None,
        seed: int = 0,
        epoch: Callable[[], int] = first_epoch,
        speeds: Sequence[float] = (1.0,),
        augment: Augment | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        if len(speeds) > 1 and speeds[0] != 1.0:
            raise ValueError(
                f"speeds: {speeds} must begin with 1.0, whose classes are the speakers"
            )
        self.manifest, self.sample_rate, self.crop = manifest, sample_rate, crop
        self.seed, self.epoch, self.speeds, self.augment = seed, epoch, tuple(speeds), augment
        self.skipped = Skipped(what="recordings") if skipped is None else skipped
        self._label_of, self._classes = None, 0
        if labels is not None:
            self._label_of = np.array([labels[name] for name in manifest.classes], np.int64)
            self._classes = len(labels)

    @property
    def ids(self) -> Texts:
        return self.manifest.ids

    def __len__(self) -> int:
        return len(self.manifest)

    def class_counts(self) -> np.ndarray:
        """Items of each class [classes]; the copies at other speeds count as their speaker does.

        Raises
        ------
        ValueError
            A dataset without labels.
        """
        if self._label_of is None:
            raise ValueError("labels: this dataset has none")
        own = np.bincount(self._label_of[self.manifest.labels], minlength=self._classes)
        return np.tile(own / len(self.speeds), len(self.speeds))

    def describe(self, row: int) -> Mapping[str, Any]:
        """What the embedding of an item depends on; values that are files may change."""
        item = self.manifest[row]
        return {"wav": item.file, "start": item.start, "duration": item.duration}

    def label(self, index: int) -> int:
        """The class of an item in this epoch."""
        draw, row = divmod(index, len(self))
        return self._label(self.manifest.ids[row], row, draw)

    def _label(self, name: str, row: int, draw: int) -> int:
        if self._label_of is None:
            raise ValueError("labels: this dataset has none")
        own = int(self._label_of[self.manifest.labels[row]])
        return own + self._classes * self._speed(name, draw)

    def _rng(self, name: str, draw: int, *purpose: int) -> np.random.Generator:
        crc = zlib.crc32(name.encode())
        return np.random.default_rng([self.seed, self.epoch(), crc, draw, *purpose])

    def _speed(self, name: str, draw: int) -> int:
        if len(self.speeds) == 1:
            return 0
        return int(self._rng(name, draw, 1).integers(len(self.speeds)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw, row = divmod(index, len(self)) if index >= 0 else (0, index % len(self))
        item = self.manifest[row]
        speed = self.speeds[self._speed(item.id, draw)]
        if self.crop is not None:
            signal = self._readable_crop(item, row, draw, speed)
        else:
            signal = self._whole(item, speed)
        if self.augment is not None:
            signal = self.augment(signal, self._rng(item.id, draw, 2), item.label)
        found: dict[str, Any] = {"id": item.id, "sig": signal}
        if self._label_of is not None:
            found["spk_id_encoded"] = torch.tensor([self._label(item.id, row, draw)])
        return found

    def _whole(self, item: Item, speed: float) -> torch.Tensor:
        """A recording, or the stretch of it that a row of the manifest is."""
        length = item.duration / speed if item.part else None
        return read_audio(item.file, self.sample_rate, item.start, length, speed)

    def _cropped(self, name: str, chosen: Item, draw: int, speed: float) -> torch.Tensor:
        crop = self.crop or 0.0
        reach = max(0.0, chosen.duration - crop * speed)
        start = self._rng(name, draw).uniform(0, reach)
        length = min(crop, chosen.duration / speed) if chosen.part else crop
        signal = read_audio(chosen.file, self.sample_rate, chosen.start + start, length, speed)
        wanted = round(crop * self.sample_rate)
        if signal.numel() < wanted:
            signal = signal.repeat(-(-wanted // signal.numel()))
        return signal[:wanted]

    def _readable_crop(self, item: Item, row: int, draw: int, speed: float) -> torch.Tensor:
        """A crop of the utterance, or of another one of the speaker where it cannot be read."""
        chosen, tried = item, [row]
        while True:
            try:
                return self._cropped(item.id, chosen, draw, speed)
            except OSError as error:
                fault = fault_of(error)
                same = self.manifest.rows_of(int(self.manifest.labels[row]))
                left = same[~np.isin(same, tried)]
                if not len(left) or len(tried) == _TRIES:
                    raise OSError(
                        f"{fault}; {len(tried)} utterances of {item.label} were tried"
                    ) from error
                if self.skipped.add(chosen.id, fault):
                    logger.warning(f"{fault}; another utterance of {item.label} is taken instead")
                rng = self._rng(item.id, draw, 3, len(tried))
                tried.append(int(left[int(rng.integers(len(left)))]))
                chosen = self.manifest[tried[-1]]
