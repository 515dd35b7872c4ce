"""Images inside large files: what records and shards share.

Where the images lie is found once and kept for all runs, beside the data or in the cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from speechbrain_qmargin.data.images import read_image
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.files import cache_folder, fault_of, json_digest, load_arrays, replacing

__all__ = ["StoredFaces", "kept_beside"]

logger = logging.getLogger(__name__)

_INDEX_VERSION = 2  # of what is kept beside the data; raised when that changes
_IN_A_ROW = 100  # broken images, one after the other, that are passed over


class StoredFaces(Dataset):
    """Images inside large files, read as they are asked for; a subclass says how one is read.

    An image that cannot be used is listed in `skipped`, and the next one takes its place. It can be
    pickled if `epoch` can.

    Parameters
    ----------
    image_size : int
        Pixels; an item's ``image`` is float32 [3, image_size, image_size] in [-1, 1].
    flip : bool
        Mirror half of the images, others in every epoch.
    seed : int
    epoch : callable
        Gives the current epoch.

    Attributes
    ----------
    num_classes : int
        Set by the subclass: labels are below it.
    skipped : Skipped
        The broken images met so far.
    files : sequence of Path
        Set by the subclass: what the images are read from.

    Examples
    --------
    >>> class InMemory(StoredFaces):
    ...     def __init__(self, images):
    ...         super().__init__(image_size=112, flip=False, seed=0, epoch=lambda: 0)
    ...         self.images, self.num_classes = images, len(images)
    ...     def __len__(self):
    ...         return len(self.images)
    ...     def labels(self):
    ...         return np.arange(len(self.images))
    ...     def name(self, row):
    ...         return f"image {row}"
    ...     def image(self, row):
    ...         return self.images[row], row
    >>> data = InMemory([b"broken", b"P5 2 1 255 " + bytes([0, 255])])
    >>> data[0]["id"], data[0]["identity_encoded"], len(data.skipped)
    ('image 1', tensor([1]), 1)
    """

    def __init__(self, image_size: int, flip: bool, seed: int, epoch: Callable[[], int]) -> None:
        self.image_size, self.flip, self.seed, self.epoch = image_size, flip, seed, epoch
        self.num_classes = 0
        self.skipped = Skipped()
        self.files: Sequence[Path] = ()
        self._streams: dict[Path, BinaryIO] = {}
        self._process = -1

    def stream(self, path: Path) -> BinaryIO:
        """A file, open; of many files those that were read last stay open."""
        if self._process != os.getpid():  # a stream for each worker
            self._streams, self._process = {}, os.getpid()
        stream = self._streams.pop(path, None)
        if stream is None:
            while len(self._streams) >= _most_open():
                self._streams.pop(next(iter(self._streams))).close()
            stream = path.open("rb")
        self._streams[path] = stream
        return stream

    def __getstate__(self):
        return self.__dict__ | {"_streams": {}, "_process": -1}

    def image(self, row: int) -> tuple[bytes, int]:
        """(encoded image, label); ValueError or OSError where it is broken."""
        raise NotImplementedError

    def name(self, row: int) -> str:
        """What messages call an image."""
        raise NotImplementedError

    def key(self, row: int) -> int:
        """What tells an image from the others of its identity."""
        return row

    def identities(self) -> np.ndarray:
        """The label of every image, int [len(self)]; below 0 where it cannot be read."""
        return self.labels()

    def __len__(self) -> int:
        raise NotImplementedError

    def state(self) -> str:
        """What is another when a file has another name, size or time."""
        return _state_of(self.files)

    def class_counts(self) -> np.ndarray | None:
        """Images of each identity; None where the labels are read with the images."""
        labels = self.labels()
        return np.bincount(labels, minlength=self.num_classes) if len(labels) else None

    def labels(self) -> np.ndarray:
        """The label of every image, int [N]; [0] where they are read with the images."""
        raise NotImplementedError

    def _check_labels(self, what: str) -> None:
        """Refuse more classes than the images can be of: one flipped bit asks for a terabyte."""
        most = 10 * len(self) + 1000
        if self.num_classes > most:
            raise ValueError(
                f"{what}: labels up to {self.num_classes - 1:,} for {len(self):,} images, which "
                f"cannot be of more than {most:,} identities: a label is damaged, or they have to "
                "be numbered anew from 0"
            )

    def __getitem__(self, row: int) -> dict[str, Any]:
        step, fault = 0, ""
        for step in range(min(len(self), _IN_A_ROW)):
            at = (row + step) % len(self)
            name = self.name(at)
            try:
                content, label = self.image(at)
                image = read_image(content, self.image_size)
                if not 0 <= label < self.num_classes:
                    raise ValueError(f"its label {label} is outside 0 to {self.num_classes - 1}")
            except (OSError, ValueError) as error:
                fault = f"{name}: {fault_of(error)}"
                if self.skipped.add(name, error):
                    logger.warning(f"{name} is skipped, the next takes its place ({error})")
                continue
            if self.flip:
                rng = np.random.default_rng([self.seed, self.epoch(), zlib.crc32(name.encode())])
                image = image.flip(2) if rng.random() < 0.5 else image
            return {"id": name, "image": image, "identity_encoded": torch.tensor([label])}
        raise OSError(f"{step + 1} images in a row cannot be read, the last is {fault}")


def _most_open() -> int:
    """How many files a process keeps open at a time: half of those it may."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if most == resource.RLIM_INFINITY else max(1, most // 2)


def kept_beside(
    beside: Path, files: Sequence[Path], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays that are made once for all runs and made anew when a file changes.

    They lie at the path `beside` where that can be written, else in the cache folder.

    Parameters
    ----------
    beside : path
        An ``.npz``.
    files : sequence of paths
        What the arrays are of: made anew when the name, size or time of one changes.
    make : callable
        Gives the arrays, none of which may be called ``state``.

    Raises
    ------
    FileNotFoundError
        One of the files is not there.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "a.tar").write_bytes(b"images")
    >>> index, files = folder / "index.npz", [folder / "a.tar"]
    >>> kept_beside(index, files, lambda: {"offset": np.array([512])})
    {'offset': array([512])}
    >>> kept_beside(index, files, lambda: 1 / 0)  # is not asked again
    {'offset': array([512])}
    """
    state = _state_of(files)
    place = hashlib.sha256(str(beside.resolve()).encode()).hexdigest()[:16]
    places = beside, cache_folder() / "face_indexes" / f"{place}-{beside.name}"
    for file in filter(Path.is_file, places):
        try:
            saved = load_arrays(file, "an index")
            if isinstance(saved, dict) and str(saved.pop("state")) == state:
                return saved
        except (OSError, ValueError, KeyError) as error:
            logger.warning(f"{file} cannot be read ({fault_of(error)}) and is made anew")
    arrays = make()
    fault: OSError | None = None
    for file in places:
        try:
            with replacing(file) as partial, partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, state=np.array(state), **arrays)
            break
        except OSError as error:
            fault = error
    else:
        logger.warning(f"what was found is not kept for the next run ({fault})")
    return arrays


def _state_of(files: Sequence[Path]) -> str:
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json_digest([_INDEX_VERSION, *states])
