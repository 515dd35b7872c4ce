"""RecordIO of MXNet, as InsightFace's ``.rec`` files are written: one record in, one out."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

__all__ = ["EXACT", "LENGTH", "MAGIC", "Record", "are_identities", "read_record", "write_records"]

MAGIC = 0xCED7230A
LENGTH = (1 << 29) - 1
"""The bits of a part's second word that are its length; those above say which part it is."""
EXACT = 1 << 24
"""Up to which float32, in which labels and headers are kept, has every integer."""


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes
    ----------
    labels : float32 array [L]
        Of an image its identity, perhaps with more behind it.
    content : bytes
        An encoded image; none in header records.

    Examples
    --------
    >>> Record(np.array([7.0]), b"an encoded image").identity
    7
    """

    labels: np.ndarray
    content: bytes

    @property
    def identity(self) -> int:
        """The first label; ValueError if no identity has such a number."""
        if not are_identities(self.labels[:1])[0]:
            raise ValueError(f"its label {self.labels[0]} is not an identity's")
        return int(self.labels[0])


def read_record(stream: BinaryIO) -> Record:
    """The record at the stream's position.

    Raises
    ------
    ValueError
        No record begins there, or it is cut off.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "train.rec"
    >>> write_records(file, [b"an image"], [0])
    >>> with file.open("rb") as stream:
    ...     header, image = read_record(stream), read_record(stream)
    >>> image.identity, image.content
    (0, b'an image')
    """
    parts, flag = [], -1
    while flag not in (0, 3):
        head = stream.read(8)
        if len(head) < 8:
            raise ValueError("cut off")
        magic, word = struct.unpack("<II", head)
        if magic != MAGIC:
            raise ValueError(f"no record begins here (magic {magic:#x})")
        flag, length = word >> 29, word & LENGTH
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


def are_identities(labels: np.ndarray) -> np.ndarray:
    """Which labels [N] are numbers of identities: whole, from 0 on, exact in float32; bool [N].

    Examples
    --------
    >>> are_identities(np.array([0, 93430, 2.5, -1, 2.0**24]))
    array([ True,  True, False, False, False])
    """
    return (labels >= 0) & (labels < EXACT) & (labels == np.floor(labels))


def write_records(path: str | Path, images: list[bytes], labels: list[int]) -> None:
    """A ``.rec`` and its ``.idx`` as InsightFace lays them out: for tests and conversions.

    Record 0 says where images end and identities begin; images follow, sorted by identity, then a
    record for each identity with its range of images.

    Raises
    ------
    ValueError
        Labels that are not 0 to C - 1 of C identities, as record 0 counts them; more than 2^24
        images and identities, which it would round.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "train.rec"
    >>> write_records(path, [b"one", b"two", b"three"], [0, 1, 0])
    >>> with path.open("rb") as stream:
    ...     header, *images = [read_record(stream) for _ in range(4)]
    >>> header.labels.tolist(), [(one.identity, one.content) for one in images]
    ([4.0, 6.0], [(0, b'one'), (0, b'three'), (1, b'two')])
    """
    path = Path(path)
    identities = np.unique(labels)
    if len(identities) and (identities[0], identities[-1]) != (0, len(identities) - 1):
        raise ValueError(
            f"{path}: labels from {identities[0]} to {identities[-1]} of {len(identities):,} "
            "identities; number them from 0, without gaps"
        )
    records = len(images) + len(identities) + 1
    if records > EXACT:
        raise ValueError(
            f"{path}: {records:,} records, and the float32 of record 0 counts to {EXACT:,}; "
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
