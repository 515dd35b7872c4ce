"""Images inside large files: what records and shards share.

Where the images lie is found once and kept for all runs, beside the data or in the cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from speechbrain_qmargin.files import cache_folder, fault_of, json_digest, load_arrays, replacing

__all__ = ["StoredFaces", "kept_beside"]

logger = logging.getLogger(__name__)

_INDEX_VERSION = 2  # of what is kept beside the data; raised when that changes


class StoredFaces:
    """Images inside large files, read as they are asked for; a subclass says how one is read.

    To train on them: :class:`~speechbrain_qmargin.data.face_dataset.StoredDataset`. It can be
    pickled.

    Attributes
    ----------
    num_classes : int
        Set by the subclass: labels are below it.
    files : sequence of Path
        Set by the subclass: what the images are read from.
    broken : dict from str to str
        What was found that is no image: its name, and why; none of the rows.

    Examples
    --------
    >>> class InMemory(StoredFaces):
    ...     def __init__(self, images):
    ...         super().__init__()
    ...         self.images, self.num_classes = images, len(images)
    ...     def __len__(self):
    ...         return len(self.images)
    ...     def labels(self):
    ...         return np.arange(len(self.images))
    ...     def name(self, row):
    ...         return f"image {row}"
    ...     def image(self, row):
    ...         return self.images[row], row
    >>> InMemory([b"one", b"two"]).class_counts()
    array([1, 1])
    """

    def __init__(self) -> None:
        self.num_classes = 0
        self.files: Sequence[Path] = ()
        self.broken: dict[str, str] = {}
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

    def places(self) -> Sequence[np.ndarray]:
        """Columns [N] that say where the images lie and whose they are."""
        return (self.labels(),)

    def content(self) -> str:
        """What the images are, in whatever folder: numbers, and a digest of what is cheap to read.

        That is all of :meth:`places`, and 16 of the images with their labels, the first and the
        last among them.
        """
        digest = hashlib.sha256()
        for column in self.places():
            digest.update(np.ascontiguousarray(column).data)
        for row in np.unique(np.linspace(0, len(self) - 1, 16).astype(int)):
            with suppress(OSError, ValueError):
                image, label = self.image(int(row))
                digest.update(image + b" of %d" % label)
        return (
            f"{len(self)} images of {self.num_classes} identities, sha256:{digest.hexdigest()[:16]}"
        )

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
