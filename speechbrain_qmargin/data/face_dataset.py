"""Images as datasets: those of a manifest, of large files, and those to embed."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from speechbrain_qmargin.data.epochs import first_epoch
from speechbrain_qmargin.data.images import read_image
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.data.stored import StoredFaces
from speechbrain_qmargin.files import fault_of

__all__ = ["FaceDataset", "ImageDataset", "StoredDataset"]

logger = logging.getLogger(__name__)

_IN_A_ROW = 100  # broken images, one after the other, that are passed over


def _mirrored(image: Tensor, name: str, seed: int, epoch: int) -> Tensor:
    """Half of the images [3, H, W] are; which, tell seed, epoch and name alone."""
    rng = np.random.default_rng([seed, epoch, zlib.crc32(name.encode())])
    return image.flip(2) if rng.random() < 0.5 else image


class FaceDataset(Dataset):
    """The images of a manifest, to train on. It can be pickled if `epoch` can.

    Parameters
    ----------
    manifest : Manifest
    image_size : int
    labels : mapping from class to int
    flip : bool
        Mirror half of the images. Which ones is a function of (seed, epoch, image) alone, so
        neither the number of workers nor an interruption changes what is trained on.
    seed : int
    epoch : callable
        Gives the current epoch.
    skipped : Skipped, optional
        Where images that cannot be used are listed; the identity's next one, in the order of the
        manifest, takes the place of each.

    Raises
    ------
    OSError
        When an item is read: no image of its identity can be used.

    Examples
    --------
    >>> from PIL import Image
    >>> path = getfixture("tmp_path") / "a.png"
    >>> Image.linear_gradient("L").save(path)
    >>> data = FaceDataset(Manifest.of([Item("ann/a.png", str(path), "ann")]), 112, {"ann": 7})
    >>> data[0]["image"].shape, data[0]["identity_encoded"]
    (torch.Size([3, 112, 112]), tensor([7]))
    """

    def __init__(
        self,
        manifest: Manifest,
        image_size: int,
        labels: Mapping[str, int],
        *,
        flip: bool = False,
        seed: int = 0,
        epoch: Callable[[], int] = first_epoch,
        skipped: Skipped | None = None,
    ) -> None:
        self.manifest, self.image_size, self.flip = manifest, image_size, flip
        self.seed, self.epoch = seed, epoch
        self.skipped = Skipped() if skipped is None else skipped
        self._label_of = np.array([labels[name] for name in manifest.classes], np.int64)

    def __len__(self) -> int:
        return len(self.manifest)

    def class_counts(self) -> np.ndarray:
        """Images of each identity."""
        return np.bincount(self._label_of[self.manifest.labels])

    def __getitem__(self, row: int) -> dict[str, Any]:
        item = self.manifest[row]
        image = self._readable(row, item)
        if self.flip:
            image = _mirrored(image, item.id, self.seed, self.epoch())
        label = int(self._label_of[self.manifest.labels[row]])
        return {"id": item.id, "image": image, "identity_encoded": torch.tensor([label])}

    def _readable(self, row: int, item: Item) -> Tensor:
        try:
            return read_image(item.file, self.image_size)
        except OSError as error:
            self._skip(item, error)
        same = self.manifest.rows_of(int(self.manifest.labels[row]))
        at = int(np.searchsorted(same, row))
        for other in np.roll(same, -at)[1:].tolist():
            instead = self.manifest[other]
            try:
                return read_image(instead.file, self.image_size)
            except OSError as error:
                self._skip(instead, error)
        raise OSError(f"no image of the identity {item.label} can be used: take it out")

    def _skip(self, item: Item, error: OSError) -> None:
        if self.skipped.add(item.id, fault_of(error)):
            logger.warning(f"{error}; its identity's next image takes its place")


class StoredDataset(Dataset):
    """The images of large files, to train on. It can be pickled if `epoch` can.

    Parameters
    ----------
    stored : StoredFaces
    image_size, flip, seed, epoch
        As :class:`FaceDataset`.
    skipped : Skipped, optional
        Where images that cannot be used are listed; the next one takes the place of each.

    Raises
    ------
    OSError
        When an item is read: a hundred images in a row cannot be used.

    Examples
    --------
    >>> from speechbrain_qmargin.data.recordio import write_records
    >>> from speechbrain_qmargin.data.records import FaceRecords
    >>> file, image = getfixture("tmp_path") / "train.rec", b"P5 2 1 255 " + bytes([0, 255])
    >>> write_records(file, [b"broken", image, image], [0, 1, 1])
    >>> data = StoredDataset(FaceRecords(file), 112)
    >>> data[0]["id"], data[0]["identity_encoded"], len(data.skipped)
    ('train.rec: record 2', tensor([1]), 1)
    """

    def __init__(
        self,
        stored: StoredFaces,
        image_size: int,
        *,
        flip: bool = False,
        seed: int = 0,
        epoch: Callable[[], int] = first_epoch,
        skipped: Skipped | None = None,
    ) -> None:
        self.stored, self.image_size, self.flip = stored, image_size, flip
        self.seed, self.epoch = seed, epoch
        self.skipped = Skipped() if skipped is None else skipped
        self.skipped.update(stored.broken)

    def __len__(self) -> int:
        return len(self.stored)

    def class_counts(self) -> np.ndarray | None:
        """Images of each identity; None where the labels are read with the images."""
        return self.stored.class_counts()

    def __getitem__(self, row: int) -> dict[str, Any]:
        stored, step, fault = self.stored, 0, ""
        for step in range(min(len(stored), _IN_A_ROW)):
            at = (row + step) % len(stored)
            name = stored.name(at)
            try:
                content, label = stored.image(at)
                image = read_image(content, self.image_size)
                if not 0 <= label < stored.num_classes:
                    raise ValueError(f"its label {label} is outside 0 to {stored.num_classes - 1}")
            except (OSError, ValueError) as error:
                fault = f"{name}: {fault_of(error)}"
                if self.skipped.add(name, error):
                    logger.warning(f"{name} is skipped, the next takes its place ({error})")
                continue
            if self.flip:
                image = _mirrored(image, name, self.seed, self.epoch())
            return {"id": name, "image": image, "identity_encoded": torch.tensor([label])}
        raise OSError(f"{step + 1} images in a row cannot be read, the last is {fault}")


class ImageDataset(Dataset):
    """Images to embed, each as it is; one that cannot be used raises OSError.

    Parameters
    ----------
    ids : sequence of str
    images : sequence of path or bytes
        Files or their contents.
    image_size : int

    Examples
    --------
    >>> data = ImageDataset(["ann/1.pgm"], [b"P5 2 1 255 " + bytes([7, 9])], 112)
    >>> data[0]["id"], data[0]["image"].shape
    ('ann/1.pgm', torch.Size([3, 112, 112]))
    """

    def __init__(self, ids: Sequence[str], images: Sequence[str | bytes], image_size: int) -> None:
        self.ids, self.images, self.image_size = ids, images, image_size

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self, row: int) -> Mapping[str, Any]:
        """What the embedding of an item depends on; values that are files may change."""
        return {"image": self.images[row]}

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"id": self.ids[row], "image": read_image(self.images[row], self.image_size)}
