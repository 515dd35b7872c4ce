"""InsightFace's file formats, without MXNet and without executing what a file says.

``.rec`` with ``.idx`` (RecordIO of MXNet) hold training sets, ``.bin`` verification sets; faces are
aligned to 112 x 112 by five landmarks. Shards in webdataset's layout are read beside them.
"""

from __future__ import annotations

import logging
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from speechbrain_qmargin.data.faces import IMAGE_SUFFIXES, read_image
from speechbrain_qmargin.files import replacing

__all__ = [
    "ARCFACE_TEMPLATE",
    "FaceRecords",
    "FaceShards",
    "Record",
    "align_face",
    "read_bin",
    "read_record",
    "write_records",
]

logger = logging.getLogger(__name__)

MAGIC = 0xCED7230A
_LENGTH = (1 << 29) - 1

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


def write_records(path: str | Path, images: list[bytes], labels: list[int]) -> None:
    """A ``.rec`` and its ``.idx`` as InsightFace lays them out: for tests and conversions.

    Record 0 says where images end and identities begin; images follow, sorted by identity, then a
    record for each identity with its range of images.
    """
    path = Path(path)
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


class _StoredFaces(Dataset):
    """Images inside large files, read as they are asked for; a subclass says how one is read.

    An image that cannot be decoded is named in a warning, and the next one takes its place.
    """

    def __init__(self, image_size: int, flip: bool, seed: int, epoch: Callable[[], int]) -> None:
        self.image_size, self.flip, self.seed, self.epoch = image_size, flip, seed, epoch
        self.num_classes = 0
        self.skipped: set[str] = set()
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
        for step in range(len(self)):
            at = (row + step) % len(self)
            name = self._name(at)
            try:
                content, label = self._image(at)
                image = read_image(content, self.image_size)
                if not 0 <= label < self.num_classes:
                    raise ValueError(f"its label {label} is outside 0 to {self.num_classes - 1}")
            except (OSError, ValueError) as error:
                if name not in self.skipped:
                    self.skipped.add(name)
                    logger.warning(f"{name} is skipped, the next takes its place ({error})")
                continue
            if self.flip:
                rng = np.random.default_rng([self.seed, self.epoch(), zlib.crc32(name.encode())])
                image = image.flip(2) if rng.random() < 0.5 else image
            return {"id": name, "image": image, "identity_encoded": torch.tensor([label])}
        raise ValueError("no image can be decoded")


class FaceRecords(_StoredFaces):
    """The images of a ``.rec`` file: MS1MV3, WebFace and the like.

    Of 42 M images the offsets are kept, 8 bytes each.

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

    Attributes
    ----------
    num_classes : int

    Raises
    ------
    FileNotFoundError, ValueError
        A file that is missing or is no RecordIO; with file and line.

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
    ) -> None:
        super().__init__(image_size, flip, seed, epoch)
        self.path = Path(path)
        index = self.path.with_suffix(".idx")
        for file in (self.path, index):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; a .rec needs its .idx beside it")
        try:
            table = np.loadtxt(index, dtype=np.int64, ndmin=2)
        except ValueError as error:
            raise ValueError(f"{index}: must have a key and an offset per line ({error})") from None
        if table.shape[1] != 2 or not len(table):
            raise ValueError(f"{index}: must have a key and an offset per line")
        self._keys, self._offsets = table.T
        first = np.flatnonzero(self._keys == 0)
        header = self._read(int(first[0])) if len(first) else None
        if header is not None and len(header.labels) == 2 and not header.content:
            start, end = (int(value) for value in header.labels)
            images = (self._keys >= 1) & (self._keys < start)
            self.num_classes = end - start
        else:  # no header record: every record is an image
            images = np.ones(len(table), dtype=bool)
            labels = [int(self._read(row).labels[0]) for row in range(len(table))]
            self.num_classes = max(labels) + 1
        self._keys, self._offsets = self._keys[images], self._offsets[images]

    def __len__(self) -> int:
        return len(self._keys)

    def _read(self, row: int) -> Record:
        stream = self._stream(self.path)
        stream.seek(int(self._offsets[row]))
        return read_record(stream)

    def _name(self, row: int) -> str:
        return f"{self.path.name}: record {self._keys[row]}"

    def _image(self, row: int) -> tuple[bytes, int]:
        record = self._read(row)
        return record.content, int(record.labels[0])


class FaceShards(_StoredFaces):
    """The images of webdataset shards: ``.tar`` files of ``<key>.jpg`` and ``<key>.cls``.

    Plain tar files are read at random by offset, so training shuffles over all shards. Their
    headers are read once; `index` keeps what was found, and is made anew when a shard changes.

    Parameters
    ----------
    folder : path
    image_size, flip, seed, epoch
        As :class:`FaceRecords`.
    index : path, optional
        An ``.npz`` file for the offsets and labels, 20 bytes an image.
    progress : bool

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
        index: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(image_size, flip, seed, epoch)
        self.shards = sorted(Path(folder).glob("*.tar"))
        if not self.shards:
            raise FileNotFoundError(f"{folder}: no .tar shards there")
        states = [(shard.stat().st_size, shard.stat().st_mtime_ns) for shard in self.shards]
        found = None
        if index is not None and Path(index).is_file():
            with np.load(index, allow_pickle=False) as saved:
                if saved["states"].tolist() == [list(state) for state in states]:
                    found = {key: saved[key] for key in ("shard", "offset", "size", "label")}
        if found is None:
            shards = tqdm(self.shards, "reading shards", disable=not progress, leave=False)
            rows = [row for number, shard in enumerate(shards) for row in _members(number, shard)]
            columns = zip(*rows, strict=True)
            found = {
                key: np.array(column, dtype=np.int64)
                for key, column in zip(("shard", "offset", "size", "label"), columns, strict=True)
            }
            if index is not None:
                with replacing(Path(index)) as partial, partial.open("wb") as stream:
                    np.savez(stream, states=np.array(states), **found)
        self._index = found
        self.num_classes = int(found["label"].max()) + 1

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


def _members(number: int, shard: Path) -> list[tuple[int, int, int, int]]:
    """(shard, offset, size, label) of the images of a tar file, in its order."""
    images, labels = {}, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    labels[key] = int(tar.extractfile(member).read())
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"{shard}: not a plain tar file of images and labels ({error})") from None
    missing = [key for key in images if key not in labels]
    if missing:
        raise ValueError(f"{shard}: {len(missing)} images have no .cls, the first is {missing[0]}")
    return [(number, *place, labels[key]) for key, place in images.items()]


# ------------------------------------------------------------------------- verification sets


class _Unpickler(pickle.Unpickler):
    """Builds lists, bytes, booleans and numpy arrays; refuses every other name."""

    _ALLOWED = {  # noqa: RUF012
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        *(
            (f"numpy.{core}.multiarray", name)
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no such set needs")
        if module.startswith("numpy.") and not hasattr(np, "_core"):
            module = "numpy.core.multiarray"
        elif module.startswith("numpy."):
            module = "numpy._core.multiarray"
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
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a verification set ({error})") from None
    images = [one.tobytes() if isinstance(one, np.ndarray) else bytes(one) for one in images]
    same = np.array([bool(flag) for flag in same])
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
