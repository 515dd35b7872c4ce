"""A corpus is a manifest: what is recorded where, by whom, in columns.

This is all that the recipes know of a corpus. Strings are packed into bytes and numbers lie in
arrays, so that a million recordings take a hundred megabytes; :meth:`Manifest.kept_in` moves them
into a file that the processes which load data map and share, whichever way they are started.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from speechbrain_qmargin.files import replacing
from speechbrain_qmargin.tables import composed_name

__all__ = ["Item", "Manifest", "Texts"]

_FORMAT = "speechbrain_qmargin manifest 1"
_ALIGNMENT = 64
_ROWS = 1 << 16  # copied at once: what a selection needs beside its result


class Texts(Sequence[str]):
    """Strings as one array of UTF-8 bytes and one of where each begins.

    Parameters
    ----------
    content : uint8 array [bytes]
    offsets : int64 array [N + 1]
        String n is ``content[offsets[n] : offsets[n + 1]]``.

    Examples
    --------
    >>> texts = Texts.of(["ann/1.wav", "bob/2.wav"])
    >>> texts[1], len(texts), texts.content.nbytes
    ('bob/2.wav', 2, 18)
    >>> list(texts.take(np.array([1, 1])))
    ['bob/2.wav', 'bob/2.wav']
    """

    __slots__ = ("_bytes", "_ends", "content", "offsets")

    def __init__(self, content: np.ndarray, offsets: np.ndarray) -> None:
        self.content, self.offsets = content, offsets
        # views give Python's numbers, twice as fast as numpy's scalars
        self._bytes, self._ends = memoryview(content.data), memoryview(offsets.data)

    @classmethod
    def of(cls, strings: Iterable[str]) -> Texts:
        """Pack strings; those that are not valid Unicode are refused (UnicodeEncodeError)."""
        content, offsets = bytearray(), array("q", [0])
        for one in strings:
            content += one.encode()
            offsets.append(len(content))
        return cls(np.frombuffer(content, np.uint8), np.frombuffer(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[n] for n in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = index % len(self)
        return bytes(self._bytes[self._ends[index] : self._ends[index + 1]]).decode()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _ROWS):
            ends = self.offsets[start : start + _ROWS + 1].tolist()
            block = bytes(self._bytes[ends[0] : ends[-1]])
            first = ends[0]
            for one, end in pairwise(ends):
                yield block[one - first : end - first].decode()

    def __reduce__(self):
        return Texts, (self.content, self.offsets)

    def take(self, rows: np.ndarray) -> Texts:
        """The strings of some rows, in their order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        content = np.empty(offsets[-1], np.uint8)
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            first, last = offsets[start], offsets[min(start + _ROWS, len(rows))]
            # where each byte comes from: its string's place there less its place here
            shift = np.repeat(self.offsets[rows[part]] - offsets[:-1][part], lengths[part])
            content[first:last] = self.content[shift + np.arange(first, last)]
        return Texts(content, offsets)


class Item(NamedTuple):
    """One row of a manifest.

    Attributes
    ----------
    id : str
        As trial lists write it.
    file : str
    label : str
        The speaker or identity.
    start, duration : float
        Seconds of the file where the item begins and that it lasts; of an image 0. A duration that
        is not known is NaN.
    part : bool
        Whether it is a stretch of the file and not the whole.

    Examples
    --------
    >>> Item("ann/1.wav", "/data/ann/1.wav", "ann").duration
    nan
    >>> corpus = Manifest.of([Item("ann--2", "/data/ann/1.wav", "ann", 1.5, 3.0, part=True)])
    >>> corpus[0].start, corpus[0].duration
    (1.5, 3.0)
    """

    id: str
    file: str
    label: str
    start: float = 0.0
    duration: float = float("nan")
    part: bool = False


@dataclass(frozen=True, eq=False)
class Manifest:
    """Recordings or images in columns, sorted by id.

    Attributes
    ----------
    ids, files : Texts [N]
        Ids are distinct; a file may be in several rows (segments).
    classes : Texts [C]
        Speakers or identities, sorted.
    labels : int32 array [N]
        Index into `classes`.
    start, duration : float64 arrays [N]
        Seconds; a duration that nobody has measured is NaN.
    part : bool array [N]
        Which rows are stretches of their files.
    faults : dict from id to str
        What the corpus has and cannot be used, and why; not in the columns.
    path : Path or None
        The file that the columns are mapped from. Such a manifest is pickled as its path.

    Examples
    --------
    >>> manifest = Manifest.of([Item("bob/1", "b.wav", "bob", 0.0, 2.5), Item("ann/1", "a.wav",
    ...                         "ann", 1.0, 2.0)])
    >>> manifest[0]
    Item(id='ann/1', file='a.wav', label='ann', start=1.0, duration=2.0, part=False)
    >>> manifest.row("bob/1"), manifest.class_of_id["bob/1"], manifest.rows_of(1)
    (1, 'bob', array([1]))
    >>> shared = manifest.kept_in(getfixture("tmp_path") / "train.manifest")
    >>> shared[1] == manifest[1], list(shared.classes)
    (True, ['ann', 'bob'])
    """

    ids: Texts
    files: Texts
    classes: Texts
    labels: np.ndarray
    start: np.ndarray
    duration: np.ndarray
    part: np.ndarray
    faults: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    digest: str = ""

    # ---------------------------------------------------------------- making one

    @classmethod
    def of(cls, items: Iterable[Item], faults: Mapping[str, str] | None = None) -> Manifest:
        """Columns of rows in any order.

        Raises
        ------
        ValueError
            An id that occurs twice; it is named.
        """
        ids, files = bytearray(), bytearray()
        ends = array("q", [0]), array("q", [0])
        codes, seconds, parts = array("i"), (array("d"), array("d")), bytearray()
        names: dict[str, int] = {}
        for item in items:
            ids += item.id.encode()
            files += item.file.encode()
            ends[0].append(len(ids))
            ends[1].append(len(files))
            codes.append(names.setdefault(composed_name(item.label), len(names)))
            seconds[0].append(item.start)
            seconds[1].append(item.duration)
            parts.append(item.part)
        classes = sorted(names)
        place = np.empty(len(classes), np.int32)
        for number, name in enumerate(classes):
            place[names[name]] = number
        found = cls(
            ids=Texts(np.frombuffer(ids, np.uint8), np.frombuffer(ends[0], np.int64)),
            files=Texts(np.frombuffer(files, np.uint8), np.frombuffer(ends[1], np.int64)),
            classes=Texts.of(classes),
            labels=place[np.frombuffer(codes, np.int32)],
            start=np.frombuffer(seconds[0], np.float64),
            duration=np.frombuffer(seconds[1], np.float64),
            part=np.frombuffer(parts, np.bool_),
            faults=dict(faults or {}),
        )
        return found._sorted()

    def _sorted(self) -> Manifest:
        """By id; most corpora are listed so already."""
        before, in_order = None, True
        for name in self.ids:
            if before is not None and name <= before:
                in_order = False
                break
            before = name
        if in_order:
            return self
        ids = list(self.ids)
        order = np.array(sorted(range(len(ids)), key=ids.__getitem__), np.int64)
        for one, other in pairwise(order.tolist()):
            if ids[one] == ids[other]:
                raise ValueError(f"{ids[one]}: there are two recordings with this id")
        return self.take(order)

    @staticmethod
    def joined(manifests: Sequence[Manifest]) -> Manifest:
        """All rows of several; ids that recur are refused (ValueError)."""
        if len(manifests) == 1:
            return manifests[0]
        faults = {name: fault for one in manifests for name, fault in one.faults.items()}
        return Manifest.of((item for one in manifests for item in one), faults)

    def take(self, rows: np.ndarray) -> Manifest:
        """The rows of ascending indices (or of a mask), with the classes that they have."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        if len(rows) == len(self) and len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        present, labels = np.unique(self.labels[rows], return_inverse=True)
        return Manifest(
            ids=self.ids.take(rows),
            files=self.files.take(rows),
            classes=self.classes.take(present),
            labels=labels.astype(np.int32),
            start=self.start[rows],
            duration=self.duration[rows],
            part=self.part[rows],
        )

    # ---------------------------------------------------------------- reading

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _fast(self) -> tuple:
        """Views that give Python's numbers."""
        numbers = self.labels, self.start, self.duration, self.part
        return tuple(memoryview(column.data) for column in numbers)

    def __getitem__(self, row: int) -> Item:
        labels, start, duration, part = self._fast
        own = self.classes[labels[row]]  # packed: a list of millions in each worker takes a lot
        return Item(self.ids[row], self.files[row], own, start[row], duration[row], part[row])

    def __iter__(self) -> Iterator[Item]:
        classes = list(self.classes)
        columns = self.labels, self.start, self.duration, self.part
        texts = zip(self.ids, self.files, strict=True)
        for begin in range(0, len(self), _ROWS):
            block = (column[begin : begin + _ROWS].tolist() for column in columns)
            for label, *rest in zip(*block, strict=True):
                name, file = next(texts)
                yield Item(name, file, classes[label], *rest)

    def row(self, name: str) -> int:
        """The row of an id; KeyError if there is none."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.ids[middle] < name:
                low = middle + 1
            else:
                high = middle
        if low == len(self) or self.ids[low] != name:
            raise KeyError(name)
        return low

    @property
    def class_of_id(self) -> Mapping[str, str]:
        """From id to class, without a dictionary's memory."""
        return _ClassOfId(self)

    @cached_property
    def _by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows in the order of their classes, and where each class begins and the last ends."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return np.argsort(self.labels, kind="stable"), np.append(0, np.cumsum(counts))

    def rows_of(self, label: int) -> np.ndarray:
        """The rows of one class, by its index in `classes`, ascending."""
        order, begins = self._by_class
        return order[begins[label] : begins[label + 1]]

    def rows_by_class(self) -> dict[str, np.ndarray]:
        """The rows of every class, ascending."""
        return {name: self.rows_of(label) for label, name in enumerate(self.classes)}

    def evenly(self, count: int | None) -> Manifest:
        """At most `count` items of each class, evenly spread over its rows; all for None."""
        if count is None:
            return self
        rows = [
            rows[np.arange(min(count, len(rows))) * len(rows) // max(1, min(count, len(rows)))]
            for rows in self.rows_by_class().values()
        ]
        return self.take(np.sort(np.concatenate([np.zeros(0, np.int64), *rows])))

    # ---------------------------------------------------------------- a file that processes share

    def _columns(self) -> dict[str, np.ndarray]:
        numbers = ("labels", "start", "duration", "part")
        columns = {name: getattr(self, name) for name in numbers}
        for name in ("ids", "files", "classes"):
            texts = getattr(self, name)
            columns |= {f"{name}.content": texts.content, f"{name}.offsets": texts.offsets}
        return columns

    def kept_in(self, path: str | Path) -> Manifest:
        """The same, mapped from a file, which is written unless it holds just this already."""
        path, columns, digest = Path(path), self._columns(), hashlib.sha256()
        for name, column in columns.items():
            digest.update(f"{name} {column.dtype.str} {len(column)}\n".encode())
            digest.update(np.ascontiguousarray(column).data)
        about = {
            "format": _FORMAT,
            "digest": digest.hexdigest(),
            "columns": {name: [one.dtype.str, len(one)] for name, one in columns.items()},
        }
        try:
            return Manifest.load(path, digest.hexdigest())
        except (OSError, ValueError):
            with replacing(path) as partial, partial.open("wb") as stream:
                header = json.dumps(about).encode()
                stream.write(header.ljust(_aligned(len(header) + 1) - 1) + b"\n")
                for column in columns.values():
                    stream.write(np.ascontiguousarray(column).data)
                    stream.write(b"\0" * (_aligned(stream.tell()) - stream.tell()))
        return Manifest.load(path, digest.hexdigest())

    @staticmethod
    def load(path: str | Path, digest: str = "") -> Manifest:
        """A manifest of :meth:`kept_in`, mapped from its file.

        Raises
        ------
        ValueError
            The file is no such manifest, is cut off, or is not the one with this digest.
        """
        path = Path(path)
        with path.open("rb") as stream:
            try:
                header = stream.readline(1 << 16)
                about = json.loads(header)
                if about["format"] != _FORMAT:
                    raise ValueError(about["format"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}: not a manifest") from None
            if digest and about["digest"] != digest:
                raise ValueError(f"{path}: has changed; it is another corpus now")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        columns: dict[str, np.ndarray] = {}
        at = len(header)
        for name, (dtype, count) in about["columns"].items():
            if at + np.dtype(dtype).itemsize * count > len(mapped):
                raise ValueError(f"{path}: cut off")
            columns[name] = np.frombuffer(mapped, dtype, count, at)
            at = _aligned(at + columns[name].nbytes)

        def texts(name: str) -> Texts:
            return Texts(columns[f"{name}.content"], columns[f"{name}.offsets"])

        return Manifest(
            ids=texts("ids"),
            files=texts("files"),
            classes=texts("classes"),
            labels=columns["labels"],
            start=columns["start"],
            duration=columns["duration"],
            part=columns["part"],
            path=path,
            digest=about["digest"],
        )

    def __reduce__(self) -> Any:
        if self.path is not None:
            return Manifest.load, (self.path, self.digest)
        texts, numbers = (
            (self.ids, self.files, self.classes),
            (self.start, self.duration, self.part),
        )
        return Manifest, (*texts, self.labels, *numbers, dict(self.faults))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _ClassOfId(Mapping[str, str]):
    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def __getitem__(self, name: str) -> str:
        row = self._manifest.row(name)
        return self._manifest.classes[int(self._manifest.labels[row])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.ids)

    def __len__(self) -> int:
        return len(self._manifest)
