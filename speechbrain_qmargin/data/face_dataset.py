"""Folders of images as a dataset."""

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
from speechbrain_qmargin.files import fault_of

__all__ = ["FaceDataset", "ImageDataset"]

logger = logging.getLogger(__name__)


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
            crc = zlib.crc32(item.id.encode())
            if np.random.default_rng([self.seed, self.epoch(), crc]).random() < 0.5:
                image = image.flip(2)
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
