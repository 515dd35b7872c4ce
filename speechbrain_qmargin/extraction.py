"""Embeddings of a long extraction on their way to one file: kept as they come, so it can go on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np

from speechbrain_qmargin.embeddings import Embeddings, load_embeddings, save_embeddings
from speechbrain_qmargin.files import fault_of, write_text

__all__ = [
    "PART_SECONDS",
    "EmbeddingParts",
    "Inputs",
    "Sink",
    "collect",
    "content_key",
    "extract_into",
    "extract_items",
    "folder_of_model",
    "read_ahead",
]

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
Item = TypeVar("Item")
Read = TypeVar("Read")

PART_SECONDS, PART_SIZE = 60, 5000  # what an interruption may cost; what is held in memory


@dataclass(frozen=True)
class Inputs:
    """Recordings or images by id.

    Attributes
    ----------
    items : mapping from id to whatever `content` takes
    content : callable
        From an item to its file or its bytes; threads may call it.
    faults : dict from id to str
        What cannot be used, found without decoding.
    named : str
        What the ids are, for people.
    state : str
        What is another when the items' contents may be, where the items do not say it.

    Examples
    --------
    >>> images = Inputs({"ann/1.png": b"a file's content", "bob/1.png": b"another's"}, bytes)
    >>> images.content(images.items["bob/1.png"])
    b"another's"
    """

    items: Mapping[str, Any]
    content: Callable[[Any], str | Path | bytes] = Path
    faults: dict[str, str] = field(default_factory=dict)
    named: str = ""
    state: str = ""


class Sink(Protocol):
    """Where :func:`extract_into` puts embeddings.

    Examples
    --------
    >>> class Memory(dict):
    ...     def add(self, name, embedding):
    ...         self[name] = embedding
    ...     def flush(self):
    ...         pass
    ...     def note_faults(self, faults):
    ...         pass
    >>> kept = Memory()
    >>> extract_into(kept, [(["a", "b"], [[1.0], [2.0]])], np.array)
    {}
    >>> kept
    {'a': array([1.], dtype=float32), 'b': array([2.], dtype=float32)}
    """

    def add(self, name: str, embedding: np.ndarray) -> None:
        """Keep an embedding [D]."""

    def flush(self) -> None:
        """Write what waits."""

    def note_faults(self, faults: dict[str, str]) -> None:
        """Keep why some have no embedding."""


class EmbeddingParts:
    """A folder of embeddings of one model, written whole file by whole file.

    Several processes may write into one folder, each under its own `writer`, 0 first. A part that
    was damaged since is named in the log and left out: what it held is embedded again.

    Parameters
    ----------
    folder : path
    model : str
        What tells the model from others, such as a digest of its weights, and the data, where ids
        alone do not.
    writer : int

    Attributes
    ----------
    done : set of str
        The ids that were there when the folder was opened.

    Raises
    ------
    ValueError
        The folder holds embeddings of another model or of other data.

    Examples
    --------
    >>> parts = EmbeddingParts(getfixture("tmp_path") / "parts", "model 1")
    >>> parts.add("id10001/a/1", np.ones(4, dtype=np.float32))
    >>> parts.flush()
    >>> EmbeddingParts(parts.folder, "model 1").done
    {'id10001/a/1'}
    """

    def __init__(self, folder: str | Path, model: str, writer: int = 0) -> None:
        self.folder, self.writer = Path(folder), writer
        self.waiting: dict[str, np.ndarray] = {}
        about = self.folder / "model.json"
        if not about.is_file() or not self._files():  # whatever else was tried gave nothing
            write_text(about, json.dumps({"model": model}))
        elif _model_of(about) != model:
            raise ValueError(
                f"{self.folder} holds embeddings of another model or of other data; delete it, or "
                "write elsewhere"
            )
        self.done: set[str] = set()
        for file in self._files():
            loaded = _load(file)
            self.done.update(loaded.ids if loaded is not None else ())
        self._faults = self.folder / f"faults_{writer}.json"
        for old in self.folder.glob("faults_*.json") if writer == 0 else [self._faults]:
            old.unlink(missing_ok=True)  # they are tried again
        self._written = time.monotonic()

    def _files(self, writer: str = "*") -> list[Path]:
        return sorted(self.folder.glob(f"part_{writer}_*.npz"))

    def add(self, name: str, embedding: np.ndarray) -> None:
        """Keep an embedding [D]; on the disk after a minute or some thousands at the latest."""
        self.waiting[name] = embedding
        if len(self.waiting) >= PART_SIZE or time.monotonic() - self._written > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self.waiting:
            files = self._files(str(self.writer))
            number = int(files[-1].stem.rsplit("_", 1)[1]) + 1 if files else 0
            save_embeddings(self.folder / f"part_{self.writer}_{number:06d}.npz", self.waiting)
            self.waiting, self._written = {}, time.monotonic()

    def note_faults(self, faults: dict[str, str]) -> None:
        """Keep why some have no embedding, for :meth:`faults`."""
        if faults:
            write_text(self._faults, json.dumps(faults))

    def faults(self) -> dict[str, str]:
        """Id to what is wrong with it, of every writer since it opened the folder."""
        found: dict[str, str] = {}
        for file in sorted(self.folder.glob("faults_*.json")):
            found.update(json.loads(file.read_text(encoding="utf-8")))
        return found

    def gathered(self, order: Iterable[str]) -> Mapping[str, np.ndarray]:
        """All that are there, of every writer, in an order of ids; ids without one are left out.

        They lie in a file of the folder: memory holds one part at a time.
        """
        place: dict[str, tuple[int, int]] = {}
        files, dim = self._files(), 0
        for number, file in enumerate(files):
            loaded = _load(file)
            if loaded is not None:
                dim = loaded.matrix.shape[1]
                place.update((name, (number, row)) for row, name in enumerate(loaded.ids))
        names = [name for name in order if name in place]
        if not names:
            return {}
        source = np.array([place.pop(name) for name in names])
        for old in self.folder.glob("gathered_*.npy"):  # who has one open, keeps it
            with suppress(OSError):  # Windows does not part with that
                old.unlink()
        whole = self.folder / f"gathered_{uuid4().hex[:12]}.npy"
        matrix = np.lib.format.open_memmap(whole, "w+", np.dtype(np.float32), (len(names), dim))
        for number, file in enumerate(files):
            (rows,) = np.nonzero(source[:, 0] == number)
            if len(rows):
                matrix[rows] = load_embeddings(file).matrix[source[rows, 1]]
        return Embeddings(names, matrix)


def folder_of_model(folder: str | Path, model: str, *, alone: bool = True) -> Path:
    """Where a model's parts lie in a folder that nobody has named: no other model is in the way.

    Parameters
    ----------
    folder : path
    model : str
        What tells the model from others.
    alone : bool
        Whether those of other models are deleted.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> parts = EmbeddingParts(folder_of_model(folder, "model 1"), "model 1")
    >>> place = folder_of_model(folder, "model 2")
    >>> place.parent == folder, list(folder.iterdir())
    (True, [])
    """
    own = Path(folder) / f"{zlib.crc32(model.encode()):08x}"
    if alone:
        for other in set(Path(folder).glob("*")) - {own}:
            shutil.rmtree(other, ignore_errors=True)
    return own


def extract_into(
    parts: Sink,
    batches: Iterable[tuple[Sequence[str], Any]],
    embed: Callable[[Any], Any],
    faults: dict[str, str] | None = None,
) -> dict[str, str]:
    """Embed batches into a folder of parts; whatever ends it, what was embedded is kept.

    Parameters
    ----------
    parts : EmbeddingParts or another sink
        What it has already is not to be in `batches`.
    batches : iterable of (ids, inputs)
    embed : callable
        From the inputs of a batch to embeddings [len(ids), D], a tensor or an array.
    faults : dict from id to str, optional
        What could not be read, filled while `batches` are drawn.

    Returns
    -------
    dict from id to str
        `faults`, and the ids whose embedding is not finite. The folder keeps them.

    Examples
    --------
    >>> parts = EmbeddingParts(getfixture("tmp_path") / "parts", "model 1")
    >>> double = lambda rows: 2 * np.array(rows)
    >>> extract_into(parts, [(["a", "b"], [[1.0], [np.inf]]), (["c"], [[2.0]])], double)
    {'b': 'its embedding is not finite'}
    >>> parts.gathered(["c", "b", "a"]).ids
    ['c', 'a']
    """
    found = {} if faults is None else faults
    try:
        for ids, inputs in batches:
            rows = embed(inputs)
            rows = np.asarray(rows.float().cpu() if hasattr(rows, "cpu") else rows, np.float32)
            for name, row in zip(ids, rows, strict=True):
                if np.isfinite(row).all():
                    parts.add(name, row)
                else:
                    found[name] = "its embedding is not finite"
    finally:
        parts.flush()
        parts.note_faults(found)
    return found


def read_ahead(
    items: Iterable[tuple[Key, Item]],
    read: Callable[[Item], Read],
    workers: int = 4,
    ahead: int = 0,
) -> Generator[tuple[Key, Future[Read]], None, None]:
    """Every item in order with what is read of it, by threads that are some items ahead.

    Parameters
    ----------
    items : iterable of (key, item)
    read : callable
        Of an item; what it raises, the future's ``result()`` raises.
    workers : int
        Threads; 0 is one, as people who know DataLoaders write it.
    ahead : int
        Items that are read or waiting at once; at least two a thread.

    Examples
    --------
    >>> [(key, future.result()) for key, future in read_ahead([("a", 1), ("b", 2)], str)]
    [('a', '1'), ('b', '2')]
    """
    workers = max(workers, 1)
    pool, rest = ThreadPoolExecutor(workers), iter(items)
    waiting: deque[tuple[Key, Future[Read]]] = deque()
    try:
        while True:
            for key, item in islice(rest, max(ahead, 2 * workers) - len(waiting)):
                waiting.append((key, pool.submit(read, item)))
            if not waiting:
                return
            yield waiting.popleft()
    finally:
        for _, future in waiting:  # those that were given out are still wanted
            future.cancel()
        pool.shutdown()


def content_key(name: str, content: Iterable[Any]) -> str:
    """An id with what its embedding is of: another file or other bytes under it are another.

    Parameters
    ----------
    name : str
    content : iterable
        What the item is. Of a file its path, its size and when it was written count.

    Examples
    --------
    >>> content_key("ann/1", [b"a file's content"]), content_key("ann/1", [b"another's"])
    ('ann/1 fc850c3f', 'ann/1 643b557b')
    """
    parts = []
    for value in content:
        parts.append(value if isinstance(value, bytes) else repr(value).encode())
        path = isinstance(value, Path) or (isinstance(value, str) and os.sep in value)
        if path and os.path.isfile(value):
            status = os.stat(value)
            parts.append(b"%d %d" % (status.st_size, status.st_mtime_ns))
    return f"{name} {zlib.crc32(b' '.join(parts)):08x}"


def collect(
    parts: EmbeddingParts, keys: Mapping[str, str], faults: Mapping[str, str]
) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """What became of everything that was to be embedded into a folder of parts.

    Parameters
    ----------
    parts : EmbeddingParts
    keys : mapping from id to what it is in the parts, see :func:`content_key`
    faults : mapping from key to str
        What could not be embedded, and why; other keys than those are passed over.

    Returns
    -------
    embeddings : mapping from id to float32 [D]
        In the order of `keys`, in a file of the folder of `parts`: it ends with that folder.
    faults : dict from id to str

    Raises
    ------
    OSError
        Some have neither an embedding nor a fault: a part was damaged or replaced meanwhile.

    Examples
    --------
    >>> parts = EmbeddingParts(getfixture("tmp_path") / "parts", "model 1")
    >>> parts.add("ann/1 fc850c3f", np.ones(1))
    >>> parts.flush()
    >>> keys = {"ann/1": "ann/1 fc850c3f", "bob/1": "bob/1 643b557b"}
    >>> found, faults = collect(parts, keys, {"bob/1 643b557b": "cut off"})
    >>> dict(found), faults
    ({'ann/1': array([1.], dtype=float32)}, {'bob/1': 'cut off'})
    >>> collect(parts, keys, {})
    Traceback (most recent call last):
    OSError: ...parts: 1 of 2 embeddings are not there any more, the first is bob/1; ...
    """
    found = parts.gathered(keys.values())
    lost = [name for name, key in keys.items() if key not in found and key not in faults]
    if lost:
        raise OSError(
            f"{parts.folder}: {len(lost)} of {len(keys)} embeddings are not there any more, the "
            f"first is {lost[0]}; end whatever else writes there, and start again: the others are "
            "kept"
        )
    if isinstance(found, Embeddings):
        found = Embeddings([name for name, key in keys.items() if key in found], found.matrix)
    return found, {name: faults[key] for name, key in keys.items() if key in faults}


def extract_items(
    folder: str | Path,
    model: str,
    inputs: Inputs,
    read: Callable[[Any], Read],
    embed: Callable[[list[Read]], Any],
    *,
    batch_size: int = 1,
    workers: int = 4,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Embed recordings or images; interrupted, it goes on.

    Parameters
    ----------
    folder : path
        Of :class:`EmbeddingParts`. What it has already is not embedded again, unless the item is
        another by now (:func:`content_key`).
    model : str
        What tells the model from others.
    inputs : Inputs
    read : callable
        Of a file or bytes, called by threads; OSError and ValueError mean that the item cannot be
        used, but where they say that the process lacks open files or memory.
    embed : callable
        From what was read of up to `batch_size` items to their embeddings [B, D].
    batch_size, workers : int
    progress : callable, optional
        Called with how many items were done since the last call.

    Returns
    -------
    embeddings : mapping from id to float32 [D]
        In the order of the items, in a file of the folder: it ends with that.
    faults : dict from id to str
        What could not be embedded, and why; those of `inputs` first.

    Raises
    ------
    ValueError
        The folder holds embeddings of another model.
    OSError
        Embeddings that were written are not there at the end.

    Examples
    --------
    >>> folder, inputs = getfixture("tmp_path") / "parts", Inputs({"a": "1", "b": "x"}, str)
    >>> found, faults = extract_items(folder, "model 1", inputs, int, lambda rows: [[1.0]])
    >>> found["a"].tolist(), faults
    ([1.0], {'b': "invalid literal for int() with base 10: 'x'"})
    """
    parts, items = EmbeddingParts(folder, model), inputs.items
    keys = {name: content_key(name, [item, inputs.state]) for name, item in items.items()}
    todo = {keys[name]: item for name, item in items.items() if keys[name] not in parts.done}
    progress = progress or (lambda count: None)
    progress(len(items) - len(todo))
    faults: dict[str, str] = {}

    def read_one(item: Any) -> Read:
        return read(inputs.content(item))

    def batches() -> Iterator[tuple[list[str], list[Read]]]:
        batch: list[str] = []
        rows: list[Read] = []
        for key, future in read_ahead(todo.items(), read_one, workers, 2 * batch_size):
            try:
                rows.append(future.result())
                batch.append(key)
            except (OSError, ValueError) as error:
                faults[key] = fault_of(error)
                progress(1)
            if len(batch) == batch_size:
                yield batch, rows
                progress(len(batch))
                batch, rows = [], []
        if batch:
            yield batch, rows
            progress(len(batch))

    extract_into(parts, batches(), embed, faults)
    found, wrong = collect(parts, keys, faults)
    return found, inputs.faults | wrong


def _model_of(about: Path) -> str:
    try:
        return json.loads(about.read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{about}: damaged ({error}); delete {about.parent}") from None


def _load(file: Path) -> Embeddings | None:
    """A part; None for one that is damaged, which is renamed and said."""
    try:
        return load_embeddings(file)
    except (ValueError, OSError, EOFError, KeyError, BadZipFile, NotImplementedError) as error:
        fault = fault_of(error)
        file.rename(file.with_suffix(".damaged"))
        logger.warning(f"{file}: damaged, what it held is embedded again ({fault})")
        return None
