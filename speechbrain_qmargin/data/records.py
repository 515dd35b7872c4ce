"""InsightFace's training sets: ``.rec`` with ``.idx``, without MXNet."""

from __future__ import annotations

import logging
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.data.recordio import LENGTH, MAGIC, are_identities, read_record
from speechbrain_qmargin.data.stored import StoredFaces, kept_beside
from speechbrain_qmargin.files import fault_of

__all__ = ["FaceRecords"]

logger = logging.getLogger(__name__)

_BROKEN, _NO_IMAGE = -1, -2


class FaceRecords(StoredFaces):
    """The images of a ``.rec`` file: MS1MV3, WebFace and the like.

    16 bytes an image are held in memory. InsightFace's files say in record 0 which records are
    images. Those of im2rec (WebFace42M) do not, and above 2^24 records the float32 of record 0 is
    rounded: then the labels are read once, from the ``.lst`` beside the file if it fits, else from
    the records' headers (not the images), and kept as ``<name>.rec.index.npz``.

    Parameters
    ----------
    path : path
        The ``.rec``; its ``.idx`` is beside it.
    progress : bool
        Show a bar while the labels are read.

    Attributes
    ----------
    num_classes : int
    broken : dict from str to str
        Records that are no images, and why.

    Raises
    ------
    FileNotFoundError, ValueError
        A file that is missing, is not RecordIO, or whose ``.idx`` belongs to another; it is named.

    Examples
    --------
    >>> from speechbrain_qmargin.data.recordio import write_records
    >>> file, image = getfixture("tmp_path") / "train.rec", b"P5 2 1 255 " + bytes([0, 255])
    >>> write_records(file, [image, image, image], [0, 1, 1])
    >>> stored = FaceRecords(file)
    >>> len(stored), stored.num_classes, stored.name(2), stored.image(2) == (image, 1)
    (3, 2, 'train.rec: record 3', True)
    """

    def __init__(self, path: str | Path, *, progress: bool = True) -> None:
        super().__init__()
        self.path = Path(path)
        files = [self.path, self.path.with_suffix(".idx")]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; a .rec needs its .idx beside it")
        self.files = [*files, *filter(Path.is_file, [self.path.with_suffix(".lst")])]
        index = kept_beside(
            self.path.with_name(self.path.name + ".index.npz"),
            self.files,
            lambda: _index_of_records(self.path, progress),
        )
        self._keys, self._offsets, self._labels = (
            index[name] for name in ("key", "offset", "label")
        )
        self.num_classes = int(index["num_classes"])
        self._check_labels(str(self.path))
        for key, fault in zip(index["broken"], index["fault"], strict=True):
            self.broken[f"{self.path.name}: record {key}"] = str(fault)

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, row: int) -> str:
        return f"{self.path.name}: record {self._keys[row]}"

    def labels(self) -> np.ndarray:
        return self._labels

    def places(self) -> tuple[np.ndarray, ...]:
        return self._keys, self._offsets, self._labels

    def key(self, row: int) -> int:
        return int(self._keys[row])

    def identities(self) -> np.ndarray:
        if len(self._labels):
            return self._labels
        labels, _ = _read_labels(self.path, self._offsets, False)
        return labels

    def image(self, row: int) -> tuple[bytes, int]:
        stream = self.stream(self.path)
        stream.seek(int(self._offsets[row]))
        record = read_record(stream)
        return record.content, int(self._labels[row]) if len(self._labels) else record.identity


def _index_of_records(path: Path, progress: bool) -> dict[str, np.ndarray]:
    """The images of a ``.rec``: key int32, offset int64, label int32, each [N].

    Labels are empty where record 0 says which records are images. Beside them ``num_classes``, and
    ``broken`` keys with a ``fault`` each.
    """
    index = path.with_suffix(".idx")
    try:
        table = np.loadtxt(index, dtype=np.int64, ndmin=2)
        good = table.shape[1] == 2 and len(table) and np.abs(table[:, 0]).max() < 2**31
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"{index}: must have a key and an offset per line")
    keys, offsets = table[:, 0].astype(np.int32), table[:, 1].copy()
    del table
    ordered = np.sort(keys)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(
            f"{index}: {len(twice):,} keys are there again, the first is {twice[0]}; of files that "
            "were joined the records have to be numbered anew"
        )
    found = {"broken": keys[:0], "fault": np.array([], dtype=np.str_)}
    header = _header_of_records(path, offsets[keys == 0])
    if header is not None:
        start, end = header
        images = (keys >= 1) & (keys < start)
        if np.count_nonzero(images) != start - 1:
            logger.warning(
                f"{index} has {np.count_nonzero(images):,} of the {start - 1:,} images that record "
                f"0 of {path.name} counts: is it cut off?"
            )
        labels, count = np.zeros(0, dtype=np.int32), end - start
    else:
        labels = _listed_labels(path, keys, offsets)
        if labels is None:
            labels, faults = _read_labels(path, offsets, progress)
            found = {"broken": keys[list(faults)], "fault": np.array([*faults.values()], np.str_)}
        images = labels >= 0
        labels = labels[images]
        count = int(labels.max(initial=-1)) + 1
        present = len(np.unique(labels))
        if 2 * present < count:
            row = int(np.argmax(labels))
            logger.warning(
                f"{path}: {count:,} identities, of which {present:,} have images: is the label "
                f"{labels[row]} of record {keys[images][row]} broken?"
            )
    if not images.any() or count < 1:
        raise ValueError(f"{path}: it has no images")
    return {
        "key": keys[images],
        "offset": offsets[images],
        "label": labels,
        "num_classes": np.array(count),
        **found,
    }


def _header_of_records(path: Path, offset: np.ndarray) -> tuple[int, int] | None:
    """Where images end and identities end by record 0; None if it does not say, or rounded."""
    if not len(offset):
        return None
    try:
        with path.open("rb") as stream:
            stream.seek(int(offset[0]))
            record = read_record(stream)
    except ValueError:
        return None
    labels = record.labels
    if record.content or len(labels) != 2 or not are_identities(labels).all():
        return None
    start, end = map(int, labels)
    return (start, end) if 1 < start < end else None


def _read_labels(
    path: Path, offsets: np.ndarray, progress: bool
) -> tuple[np.ndarray, dict[int, str]]:
    """Labels int32 [N] by the headers of the records, and what is wrong with row n.

    One page of the file is read for each record, by several threads, which share the waiting.
    """
    size = path.stat().st_size
    labels = np.full(len(offsets), _BROKEN, dtype=np.int32)
    chunks = range(0, len(offsets), 2**14)
    if size >= 36:

        def read(start: int) -> None:
            # mapped anew for each chunk, so that the pages of earlier ones are given back
            words = np.memmap(path, dtype="<u4", mode="r", shape=(size // 4,))
            if hasattr(mmap, "MADV_RANDOM"):
                words._mmap.madvise(mmap.MADV_RANDOM)  # pyright: ignore[reportAttributeAccessIssue]
            places = offsets[start : start + 2**14]
            inside = (places >= 0) & (places % 4 == 0) & (places <= size - 36)
            first = np.where(inside, places // 4, 0)
            # magic number, length, then flag, label and two numbers of 64 bits, then more labels
            head = words[first[:, None] + np.arange(9)]
            flag, length, part = head[:, 2], head[:, 1] & LENGTH, head[:, 1] >> 29
            value = np.where(flag > 0, head[:, 8], head[:, 3]).view(np.float32)
            whole = inside & (head[:, 0] == MAGIC) & (places + 8 + length <= size)
            end = 24 + 4 * flag.astype(np.int64)
            with np.errstate(invalid="ignore"):
                good = whole & (part == 0) & (length >= end) & are_identities(value)
            found = np.where(good, value, _BROKEN).astype(np.int32)
            found[whole & (part == 0) & (flag > 0) & (length == end)] = _NO_IMAGE
            labels[start : start + 2**14] = found

        with (
            ThreadPoolExecutor(16) as pool,
            tqdm(
                total=len(chunks), desc="reading labels", disable=not progress, leave=False
            ) as bar,
        ):
            for _ in pool.map(read, chunks):
                bar.update()
    doubtful = np.flatnonzero(labels == _BROKEN)  # or written in parts
    if 2 * len(doubtful) > len(labels):
        raise ValueError(
            f"{path}: no images begin at {len(doubtful):,} of the {len(labels):,} offsets of its "
            ".idx: is one of them cut off, or of another file?"
        )
    faults = {}
    with path.open("rb") as stream:
        for row in doubtful.tolist():
            try:
                stream.seek(int(offsets[row]))
                labels[row] = read_record(stream).identity
            except (OSError, ValueError) as error:
                faults[row] = fault_of(error)
    return labels, faults


def _listed_labels(path: Path, keys: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
    """Labels int32 [N] from im2rec's ``.lst`` (key, label, ..., file); None if it does not fit."""
    listing = path.with_suffix(".lst")
    if not listing.is_file():
        return None
    try:
        if not listing.stat().st_size:
            raise ValueError("empty")
        listed, values = np.loadtxt(
            listing, delimiter="\t", comments=None, usecols=(0, 1), ndmin=2, encoding="latin-1"
        ).T
        order = np.argsort(listed)
        at = order[np.searchsorted(listed, keys, sorter=order).clip(max=len(order) - 1)]
        fits = (listed[at] == keys).all() and are_identities(values[at]).all()
    except (ValueError, IndexError):
        fits = False
    if fits:
        labels = values[at].astype(np.int32)
        some = np.unique(np.linspace(0, len(keys) - 1, 1000).astype(int))
        read, faults = _read_labels(path, offsets[some], False)
        same = read == labels[some]
        same[[*faults]] = True
        fits = same.all()
    if not fits:
        logger.warning(f"{listing} does not fit {path.name}; the labels are read from that")
        return None
    return labels
