"""InsightFace's file formats, without MXNet and without executing what a file says.

``.rec`` with ``.idx`` (RecordIO of MXNet) hold training sets, ``.bin`` verification sets; faces are
aligned to 112 x 112 by five landmarks. Shards in webdataset's layout are read beside them. Where
the images lie is found once and kept for all runs, beside the data or in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from speechbrain_qmargin.data.faces import IMAGE_SUFFIXES, SkippedImages, read_image
from speechbrain_qmargin.files import cache_folder, replacing

__all__ = [
    "ARCFACE_TEMPLATE",
    "FaceRecords",
    "FaceShards",
    "Record",
    "align_face",
    "read_bin",
    "read_record",
    "stored_faces",
    "write_records",
]

logger = logging.getLogger(__name__)

MAGIC = 0xCED7230A
_LENGTH = (1 << 29) - 1
_EXACT = 1 << 24  # up to which float32, in which labels and headers are kept, has every integer
_BROKEN, _NO_IMAGE = -1, -2
_INDEX_VERSION = 1  # of what is kept beside the data; raised when that changes
_IN_A_ROW = 100  # broken images, one after the other, that are passed over

# Eyes, nose, corners of the mouth (x, y) in a 112 x 112 image: InsightFace's arcface_dst
ARCFACE_TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


# ------------------------------------------------------------------------------- RecordIO


@dataclass(frozen=True)
class Record:
    """One record: its labels and its bytes (an encoded image; none in header records)."""

    labels: np.ndarray
    content: bytes

    @property
    def identity(self) -> int:
        """The first label; ValueError if no identity has such a number."""
        if not _are_identities(self.labels[:1])[0]:
            raise ValueError(f"its label {self.labels[0]} is no identity's")
        return int(self.labels[0])


def read_record(stream: BinaryIO) -> Record:
    """The record at the stream's position.

    Raises
    ------
    ValueError
        No record begins there, or it is cut off.
    """
    parts, flag = [], -1
    while flag not in (0, 3):
        head = stream.read(8)
        if len(head) < 8:
            raise ValueError("cut off")
        magic, word = struct.unpack("<II", head)
        if magic != MAGIC:
            raise ValueError(f"no record begins here (magic {magic:#x})")
        flag, length = word >> 29, word & _LENGTH
        if (flag in (0, 1)) != (not parts):
            raise ValueError(f"its parts are out of order (flag {flag})")
        part = stream.read(length)
        if len(part) < length:
            raise ValueError("cut off")
        stream.seek(-length % 4, os.SEEK_CUR)
        parts.append(part)
    # a record that contains the magic number is written in parts, without it
    content = struct.pack("<I", MAGIC).join(parts)
    if len(content) < 24:
        raise ValueError("shorter than its header")
    count, label, _, _ = struct.unpack("<IfQQ", content[:24])
    if count == 0:
        return Record(np.array([label], dtype=np.float32), content[24:])
    end = 24 + 4 * count
    if len(content) < end:
        raise ValueError("shorter than its labels")
    return Record(np.frombuffer(content[24:end], dtype="<f4"), content[end:])


def _are_identities(labels: np.ndarray) -> np.ndarray:
    return (labels >= 0) & (labels < _EXACT) & (labels == np.floor(labels))


def write_records(path: str | Path, images: list[bytes], labels: list[int]) -> None:
    """A ``.rec`` and its ``.idx`` as InsightFace lays them out: for tests and conversions.

    Record 0 says where images end and identities begin; images follow, sorted by identity, then a
    record for each identity with its range of images.

    Raises
    ------
    ValueError
        More than 2^24 images and identities, which record 0 would round.
    """
    path = Path(path)
    records = len(images) + len(np.unique(labels)) + 1
    if records > _EXACT:
        raise ValueError(
            f"{path}: {records:,} records, and the float32 of record 0 counts to {_EXACT:,}; "
            "write several files, or shards (.tar)"
        )
    order = np.argsort(labels, kind="stable")
    names, starts = np.unique(np.asarray(labels)[order], return_index=True)
    first = len(images) + 1
    records = [(np.array([first, first + len(names)]), b"")]
    records += [(np.array([labels[i]]), images[i]) for i in order]
    ends = [*starts[1:], len(images)]
    records += [(np.array([a + 1, b + 1]), b"") for a, b in zip(starts, ends, strict=True)]
    with path.open("wb") as rec, path.with_suffix(".idx").open("w") as idx:
        for key, (label, content) in enumerate(records):
            idx.write(f"{key}\t{rec.tell()}\n")
            count = 0 if len(label) == 1 else len(label)
            body = struct.pack("<IfQQ", count, label[0] if not count else 0.0, key, 0)
            body += label.astype("<f4").tobytes() if count else b""
            parts = (body + content).split(struct.pack("<I", MAGIC))
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                flag = 0 if len(parts) == 1 else 3 if last else 1 if number == 0 else 2
                rec.write(struct.pack("<II", MAGIC, flag << 29 | len(part)) + part)
                rec.write(b"\0" * (-len(part) % 4))


# --------------------------------------------------------------------------- images in large files


def stored_faces(path: str | Path) -> FaceRecords | FaceShards | None:
    """What keeps its images inside large files at a path.

    Returns
    -------
    FaceRecords of a ``.rec``, or of the one in a folder (``train.rec`` where there are several);
    FaceShards of a folder of ``.tar`` files; None for anything else, as a folder of images.

    Raises
    ------
    ValueError
        Several ``.rec`` files, none of which is ``train.rec``.
    """
    path = Path(path)
    if path.suffix == ".rec":
        return FaceRecords(path)
    records = sorted(path.glob("*.rec"))
    if len(records) > 1:
        records = [one for one in records if one.name == "train.rec"]
        if not records:
            raise ValueError(f"{path}: several .rec files are there; name the one to train on")
    if records:
        return FaceRecords(records[0])
    return FaceShards(path) if any(path.glob("*.tar")) else None


class _StoredFaces(Dataset):
    """Images inside large files, read as they are asked for; a subclass says how one is read.

    An image that cannot be decoded is listed in `skipped`, and the next one takes its place.
    """

    def __init__(self, image_size: int, flip: bool, seed: int, epoch: Callable[[], int]) -> None:
        self.image_size, self.flip, self.seed, self.epoch = image_size, flip, seed, epoch
        self.num_classes = 0
        self.skipped = SkippedImages()
        self._streams: dict[Path, BinaryIO] = {}
        self._process = -1

    def _stream(self, path: Path) -> BinaryIO:
        if self._process != os.getpid():  # a stream for each worker
            self._streams, self._process = {}, os.getpid()
        if path not in self._streams:
            self._streams[path] = path.open("rb")
        return self._streams[path]

    def __getstate__(self):
        return self.__dict__ | {"_streams": {}, "_process": -1}

    def _image(self, row: int) -> tuple[bytes, int]:
        """(encoded image, label); ValueError or OSError where it is broken."""
        raise NotImplementedError

    def _name(self, row: int) -> str:
        raise NotImplementedError

    def __getitem__(self, row: int) -> dict[str, Any]:
        for step in range(min(len(self), _IN_A_ROW)):
            at = (row + step) % len(self)
            name = self._name(at)
            try:
                content, label = self._image(at)
                image = read_image(content, self.image_size)
                if not 0 <= label < self.num_classes:
                    raise ValueError(f"its label {label} is outside 0 to {self.num_classes - 1}")
            except (OSError, ValueError) as error:
                fault = f"{name}: {error}"
                if self.skipped.add(name, error):
                    logger.warning(f"{name} is skipped, the next takes its place ({error})")
                continue
            if self.flip:
                rng = np.random.default_rng([self.seed, self.epoch(), zlib.crc32(name.encode())])
                image = image.flip(2) if rng.random() < 0.5 else image
            return {"id": name, "image": image, "identity_encoded": torch.tensor([label])}
        raise OSError(f"{step + 1} images in a row cannot be read, the last is {fault}")


def _kept(
    beside: Path, files: Sequence[Path], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays that are made once for all runs and made anew when a file changes.

    They lie at the path `beside` where that can be written, else in the cache folder.
    """
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    state = hashlib.sha256(json.dumps([_INDEX_VERSION, *states]).encode()).hexdigest()
    place = hashlib.sha256(str(beside.resolve()).encode()).hexdigest()[:16]
    places = beside, cache_folder() / "face_indexes" / f"{place}-{beside.name}"
    for file in filter(Path.is_file, places):
        try:
            with np.load(file, allow_pickle=False) as saved:
                if str(saved["state"]) == state:
                    return {key: saved[key] for key in saved.files if key != "state"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            logger.warning(f"{file} cannot be read and is made anew")
    arrays = make()
    for file in places:
        try:
            with replacing(file) as partial, partial.open("wb") as stream:
                np.savez(stream, state=np.array(state), **arrays)
            break
        except OSError as error:
            fault = error
    else:
        logger.warning(f"what was found is not kept for the next run ({fault})")
    return arrays


class FaceRecords(_StoredFaces):
    """The images of a ``.rec`` file: MS1MV3, WebFace and the like.

    16 bytes an image are held in memory. InsightFace's files say in record 0 which records are
    images. Those of im2rec (WebFace42M) do not, and above 2^24 records the float32 of record 0 is
    rounded: then the labels are read once, of the ``.lst`` beside the file if it fits, else of
    the records' headers (not the images), and kept as ``<name>.rec.index.npz``.

    Parameters
    ----------
    path : path
        The ``.rec``; its ``.idx`` is beside it.
    image_size : int
    flip : bool
        Mirror half of the images, as :func:`~speechbrain_qmargin.data.faces.face_dataset`.
    seed : int
    epoch : callable
        Gives the current epoch.
    progress : bool
        Of reading the labels.

    Attributes
    ----------
    num_classes : int
    image_size, flip, seed, epoch
        As above; they may be set later.
    skipped : SkippedImages
        The broken images met so far.

    Raises
    ------
    FileNotFoundError, ValueError
        A file that is missing, is no RecordIO, or whose ``.idx`` is of another: named.

    Examples
    --------
    >>> data = FaceRecords("ms1m-retinaface-t1/train.rec")              # doctest: +SKIP
    >>> data[0]["image"].shape, data.num_classes                        # doctest: +SKIP
    (torch.Size([3, 112, 112]), 93431)
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int = 112,
        *,
        flip: bool = False,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        progress: bool = True,
    ) -> None:
        super().__init__(image_size, flip, seed, epoch)
        self.path = Path(path)
        files = [self.path, self.path.with_suffix(".idx")]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; a .rec needs its .idx beside it")
        files += filter(Path.is_file, [self.path.with_suffix(".lst")])
        index = _kept(
            self.path.with_name(self.path.name + ".index.npz"),
            files,
            lambda: _index_of_records(self.path, progress),
        )
        self._keys, self._offsets, self._labels = (
            index[name] for name in ("key", "offset", "label")
        )
        self.num_classes = int(index["num_classes"])
        for key, fault in zip(index["broken"], index["fault"], strict=True):
            self.skipped.add(f"{self.path.name}: record {key}", fault)
        if self.skipped:
            logger.warning(self.skipped.warning())

    def __len__(self) -> int:
        return len(self._keys)

    def _name(self, row: int) -> str:
        return f"{self.path.name}: record {self._keys[row]}"

    def _image(self, row: int) -> tuple[bytes, int]:
        stream = self._stream(self.path)
        stream.seek(int(self._offsets[row]))
        record = read_record(stream)
        return record.content, int(self._labels[row]) if len(self._labels) else record.identity


def _index_of_records(path: Path, progress: bool) -> dict[str, np.ndarray]:
    """The images of a ``.rec``: key int32, offset int64, label int32, or [0] where record 0 counts.

    Beside them ``num_classes``, and ``broken`` keys with a ``fault`` each.
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
    if record.content or len(labels) != 2 or not _are_identities(labels).all():
        return None
    start, end = map(int, labels)
    return (start, end) if 1 < start < end else None


def _read_labels(
    path: Path, offsets: np.ndarray, progress: bool
) -> tuple[np.ndarray, dict[int, str]]:
    """Labels int32 [N] by the headers of the records, and what is wrong with row n.

    A page of the file is read a record, by several threads, which wait for the disk at once.
    """
    size = path.stat().st_size
    labels = np.full(len(offsets), _BROKEN, dtype=np.int32)
    chunks = range(0, len(offsets), 2**14)
    if size >= 36:

        def read(start: int) -> None:
            # mapped anew for each chunk, so that the pages of earlier ones are given back
            words = np.memmap(path, dtype="<u4", mode="r", shape=(size // 4,))
            if hasattr(mmap, "MADV_RANDOM"):
                words._mmap.madvise(mmap.MADV_RANDOM)
            places = offsets[start : start + 2**14]
            inside = (places >= 0) & (places % 4 == 0) & (places <= size - 36)
            first = np.where(inside, places // 4, 0)
            # magic number, length, then flag, label and two numbers of 64 bits, then more labels
            head = words[first[:, None] + np.arange(9)]
            flag, length, part = head[:, 2], head[:, 1] & _LENGTH, head[:, 1] >> 29
            value = np.where(flag > 0, head[:, 8], head[:, 3]).view(np.float32)
            whole = inside & (head[:, 0] == MAGIC) & (places + 8 + length <= size)
            end = 24 + 4 * flag.astype(np.int64)
            with np.errstate(invalid="ignore"):
                good = whole & (part == 0) & (length >= end) & _are_identities(value)
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
                faults[row] = str(error)
    return labels, faults


def _listed_labels(path: Path, keys: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
    """Labels int32 [N] by im2rec's ``.lst`` (key, label, ..., file); None where it does not fit."""
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
        fits = (listed[at] == keys).all() and _are_identities(values[at]).all()
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


class FaceShards(_StoredFaces):
    """The images of webdataset shards: ``.tar`` files of ``<key>.jpg`` and ``<key>.cls``.

    Plain tar files are read at random by offset, so training shuffles over all shards. Their
    headers are read once; what was found, 20 bytes an image, is held in memory and kept as
    ``shards.index.npz``. 64 shards or more are read by spawned processes, so the script that opens
    them needs its ``if __name__ == "__main__":``.

    Parameters
    ----------
    folder : path
    image_size, flip, seed, epoch, progress
        As :class:`FaceRecords`, and so are the attributes.

    Raises
    ------
    FileNotFoundError, ValueError
        No shards; a shard that is cut off, compressed, or has an image without its ``.cls``: named.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int = 112,
        *,
        flip: bool = False,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        progress: bool = True,
    ) -> None:
        super().__init__(image_size, flip, seed, epoch)
        self.shards = sorted(Path(folder).glob("*.tar"))
        if not self.shards:
            raise FileNotFoundError(f"{folder}: no .tar shards there")
        self._index = _kept(
            Path(folder) / "shards.index.npz",
            self.shards,
            lambda: _index_of_shards(self.shards, progress),
        )
        self.num_classes = int(self._index["label"].max()) + 1

    def __len__(self) -> int:
        return len(self._index["label"])

    def _name(self, row: int) -> str:
        shard = self.shards[int(self._index["shard"][row])].name
        return f"{shard}: the image at byte {self._index['offset'][row]}"

    def _image(self, row: int) -> tuple[bytes, int]:
        at = {key: int(column[row]) for key, column in self._index.items()}
        stream = self._stream(self.shards[at["shard"]])
        stream.seek(at["offset"])
        return stream.read(at["size"]), at["label"]


def _index_of_shards(shards: list[Path], progress: bool) -> dict[str, np.ndarray]:
    """shard int32, offset int64, size int32, label int32, [N] each; many by several processes."""
    with ExitStack() as stack:
        run = map
        if len(shards) >= 64 and (os.cpu_count() or 1) > 1:  # a process takes seconds to start
            jobs = min(8, os.cpu_count())
            pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
            run = stack.enter_context(pool).map
        bar = tqdm(total=len(shards), desc="reading shards", disable=not progress, leave=False)
        stack.enter_context(bar)
        parts = []
        for number, part in enumerate(run(_members, shards)):
            parts.append({"shard": np.full(len(part["label"]), number, dtype=np.int32), **part})
            bar.update()
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if not len(found["label"]):
        raise ValueError(f"{shards[0].parent}: the .tar shards there hold no images")
    return found


def _members(shard: Path) -> dict[str, np.ndarray]:
    """offset, size and label of the images of a tar file, in its order."""
    images, labels = {}, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep them all
                key, _, suffix = member.name.rpartition(".")
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    labels[key] = int(tar.extractfile(member).read())
        missing = [key for key in images if key not in labels]
        if missing:
            raise ValueError(f"{len(missing)} images have no .cls, the first is {missing[0]}")
        offsets, sizes = np.array(list(images.values()), dtype=np.int64).reshape(-1, 2).T
        if sizes.max(initial=0) >= 2**31:
            raise ValueError("an image of more than 2 GB")
        labels = np.array([labels[key] for key in images], dtype=np.int32)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ValueError(f"{shard}: not a plain tar file of images and labels ({error})") from None
    return {"offset": offsets, "size": sizes.astype(np.int32), "label": labels}


# ------------------------------------------------------------------------- verification sets


class _Unpickler(pickle.Unpickler):
    """Builds lists, bytes, booleans and numpy arrays; refuses every other name."""

    _ALLOWED = {  # noqa: RUF012
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        *(
            (f"numpy.{core}.{module}", name)
            for core in ("core", "_core")
            for module, name in (
                ("multiarray", "_reconstruct"),
                ("multiarray", "scalar"),
                ("numeric", "_frombuffer"),
            )
        ),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no such set needs")
        if module.startswith("numpy."):  # numpy 2 renamed core
            core = "numpy._core." if hasattr(np, "_core") else "numpy.core."
            module = core + module.rpartition(".")[2]
        return super().find_class(module, name)


def read_bin(path: str | Path) -> tuple[list[bytes], np.ndarray]:
    """InsightFace's verification set (LFW, CFP-FP, AgeDB-30, ...), without executing the pickle.

    Parameters
    ----------
    path : path
        A pickle of (encoded images, is-same flags), two images a pair.

    Returns
    -------
    list of bytes [2 N], bool array [N]
        Image 2 n and 2 n + 1 are pair n.

    Raises
    ------
    ValueError
        Something else: the file and what is wrong with it are named. A pickle that would call
        anything is refused before it does.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            images, same = _Unpickler(stream, encoding="bytes").load()
        images = [memoryview(one).tobytes() for one in images]  # bytes or arrays
        same = np.array([bool(flag) for flag in same])
    except OSError:
        raise
    except Exception as error:  # unpickling raises anything
        raise ValueError(f"{path}: not a verification set ({error})") from None
    if len(images) != 2 * len(same) or not len(same):
        raise ValueError(f"{path}: {len(images)} images for {len(same)} pairs")
    return images, same


# ---------------------------------------------------------------------------------- alignment


def align_face(image: np.ndarray, landmarks: np.ndarray, size: int = 112) -> np.ndarray:
    """Turn, scale and shift a face so that its landmarks meet ArcFace's template.

    The similarity is Umeyama's (1991) least-squares one; pixels are interpolated bilinearly, what
    lies outside the image is black.

    Parameters
    ----------
    image : uint8 array [H, W, 3]
    landmarks : float array [5, 2]
        x and y of the left and right eye, the nose, the left and right corner of the mouth, as
        seen in the image; the centre of the first pixel is (0, 0).
    size : int
        Height and width of the result; the template is scaled with it.

    Returns
    -------
    uint8 array [size, size, 3]

    Raises
    ------
    ValueError
        Landmarks of another shape, not finite, or all in one point.

    Examples
    --------
    >>> image = np.zeros((112, 112, 3), dtype=np.uint8)
    >>> align_face(image, ARCFACE_TEMPLATE).shape
    (112, 112, 3)
    """
    from PIL import Image

    forward = _similarity(np.asarray(landmarks, dtype=float), ARCFACE_TEMPLATE * (size / 112))
    back = np.linalg.inv(forward)[:2]
    # Pillow's coordinates have pixel centres at one half
    back[:, 2] += 0.5 - 0.5 * (back[:, 0] + back[:, 1])
    aligned = Image.fromarray(image).transform(
        (size, size), Image.Transform.AFFINE, back.reshape(-1), Image.Resampling.BILINEAR
    )
    return np.asarray(aligned)


def _similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The 3 x 3 similarity that takes source [N, 2] nearest to target [N, 2]."""
    if source.shape != target.shape or not np.isfinite(source).all():
        raise ValueError(f"landmarks must be {target.shape}, finite; got {source.shape}")
    centre_s, centre_t = source.mean(0), target.mean(0)
    s, t = source - centre_s, target - centre_t
    spread = np.square(s).sum()
    if spread == 0:
        raise ValueError("the landmarks are all in one point")
    u, values, vt = np.linalg.svd(t.T @ s)
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = (u * sign) @ vt
    scale = (values * sign).sum() / spread
    result = np.eye(3)
    result[:2, :2] = scale * rotation
    result[:2, 2] = centre_t - scale * rotation @ centre_s
    return result
