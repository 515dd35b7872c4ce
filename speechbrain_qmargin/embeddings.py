"""Embeddings by id, in and out; the cosine of every trial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from speechbrain_qmargin.files import replacing
from speechbrain_qmargin.trials import Trials, _lines, _some

__all__ = [
    "Embeddings",
    "cosine_scores",
    "load_embeddings",
    "pair_products",
    "save_embeddings",
]

_BLOCK = 16384


class Embeddings(Mapping):
    """Embeddings by id, in one matrix.

    Parameters
    ----------
    ids : sequence of str
    matrix : float array [N, D]

    Raises
    ------
    ValueError
        Shapes that disagree, an id twice.

    Examples
    --------
    >>> embeddings = Embeddings(["a", "b"], np.eye(2))
    >>> embeddings["b"], len(embeddings)
    (array([0., 1.]), 2)
    """

    def __init__(self, ids: Iterable[str], matrix: np.ndarray):
        self.ids = [str(name) for name in ids]
        self.matrix = np.asarray(matrix)
        if self.matrix.ndim != 2 or len(self.matrix) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids and a matrix {self.matrix.shape}; want [N, D]")
        self._row = {name: row for row, name in enumerate(self.ids)}
        if len(self._row) < len(self.ids):
            twice = [name for row, name in enumerate(self.ids) if self._row[name] != row]
            raise ValueError(f"{len(twice)} ids are listed twice: {_some(twice)}")

    @classmethod
    def of(cls, embeddings: Mapping[str, np.ndarray]) -> Embeddings:
        """Any mapping from id to vector, as one matrix."""
        if isinstance(embeddings, cls):
            return embeddings
        if not embeddings:
            raise ValueError("there are no embeddings")
        return cls(embeddings, np.stack([np.asarray(row) for row in embeddings.values()]))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.matrix[self._row[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Sequence[str], what: str = "recordings in the trials") -> np.ndarray:
        """Row of each id.

        Raises
        ------
        ValueError
            Ids without an embedding; named.
        """
        rows = np.fromiter((self._row.get(name, -1) for name in ids), np.int64, len(ids))
        if len(rows) and rows.min() < 0:
            missing = [ids[i] for i in np.flatnonzero(rows < 0)]
            raise ValueError(
                f"{len(missing)} of {len(ids)} {what} have no embedding: {_some(missing)}"
            )
        return rows

    def unit(self, ids: Sequence[str], mean: np.ndarray | None = None) -> np.ndarray:
        """Embeddings of `ids` minus `mean`, of unit length: float32 [len(ids), D].

        Raises
        ------
        ValueError
            An id without an embedding, or an embedding that is zero or not finite; named.
        """
        rows = self.matrix[self.rows(ids)].astype(np.float32, copy=False)
        if mean is not None:
            rows = rows - np.asarray(mean, dtype=np.float32)
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
        if len(bad):
            raise ValueError(
                f"{len(bad)} embeddings are zero or not finite: {_some([ids[i] for i in bad])}"
            )
        rows /= norms[:, None]
        return rows


def cosine_scores(
    embeddings: Mapping[str, np.ndarray], trials: Trials, mean: np.ndarray | None = None
) -> np.ndarray:
    """Cosine of the two embeddings of every trial.

    Each embedding is normalised once; trials are gathered in blocks, so memory is bounded.

    Parameters
    ----------
    embeddings : mapping from id to array [D]
    trials : Trials
    mean : array [D], optional
        Subtracted from every embedding first.

    Returns
    -------
    float32 array [N]

    Raises
    ------
    ValueError
        An id without an embedding, or an embedding that is not finite or zero; named.

    Examples
    --------
    >>> trials = Trials(["a", "b"], np.array([0]), np.array([1]), np.array([True]))
    >>> cosine_scores({"a": np.array([1.0, 0.0]), "b": np.array([1.0, 1.0])}, trials)
    array([0.70710677], dtype=float32)
    """
    unit = Embeddings.of(embeddings).unit(trials.ids, mean)
    return pair_products(unit, trials.enrolment, trials.test)


def pair_products(matrix: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Inner products of rows ``left[n]`` and ``right[n]``: float32 [N], in blocks."""
    scores = np.empty(len(left), dtype=np.float32)
    for start in range(0, len(left), _BLOCK):
        block = slice(start, start + _BLOCK)
        np.einsum("nd,nd->n", matrix[left[block]], matrix[right[block]], out=scores[block])
    return scores


def save_embeddings(path: str | Path, embeddings: Mapping[str, np.ndarray]) -> None:
    """Write ``ids`` [N] and ``embeddings`` float32 [N, D] as npz."""
    embeddings = Embeddings.of(embeddings)
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez(
            stream,
            ids=np.asarray(embeddings.ids, dtype=np.str_),
            embeddings=embeddings.matrix.astype(np.float32, copy=False),
        )


def load_embeddings(path: str | Path, ids: str | Path | None = None) -> Embeddings:
    """Read embeddings; never executes code.

    Parameters
    ----------
    path : path
        ``.npz`` of :func:`save_embeddings`, ``.npy`` [N, D] with its ids in a text file, or Kaldi
        ``.ark`` or ``.scp``.
    ids : path, optional
        One id a line, for ``.npy``; by default the file of the same name with ``.txt``.

    Raises
    ------
    ValueError
        Another format, missing arrays, objects inside, an scp line that is a command, a vector of
        another length, an id twice: with the file.
    """
    path = Path(path)
    if path.suffix in (".ark", ".scp"):
        return _load_kaldi(path)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"{path}: embeddings are read from .npz, .npy, .ark or .scp")
    try:
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with loaded:
                return Embeddings(loaded["ids"].tolist(), loaded["embeddings"])
        names = Path(ids) if ids else path.with_suffix(".txt")
        if not names.is_file():
            raise ValueError(f"its ids are wanted in {names}, one a line")
        return Embeddings(_lines(names)[0], loaded)
    except KeyError as error:
        raise ValueError(f"{path}: {error}; wanted arrays 'ids' and 'embeddings'") from None
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError) as error:  # numpy's own words for damage and pickles
        raise ValueError(f"{path}: {error}") from None


def _load_kaldi(path: Path) -> Embeddings:
    """Vectors of an ark, or of the arks that an scp points into.

    kaldiio reads them too, but it also unpickles what an ark calls a pickle and runs what an scp
    calls a pipe.
    """
    names, rows = [], []
    if path.suffix == ".ark":
        with path.open("rb") as stream:
            while name := _token(stream):
                names.append(name)
                rows.append(_kaldi_vector(stream, f"{path}: {name}"))
    else:
        with ExitStack() as files:
            opened: dict[str, BinaryIO] = {}
            for number, line in enumerate(_lines(path)[0], 1):
                name, _, place = line.strip().partition(" ")
                ark, _, offset = place.strip().rpartition(":")
                if not ark or not offset.isdigit():
                    raise ValueError(
                        f"{path}:{number}: expected 'id file.ark:offset', got {line!r}"
                    )
                if ark not in opened:
                    opened[ark] = files.enter_context(Path(ark).open("rb"))
                opened[ark].seek(int(offset))
                names.append(name)
                rows.append(_kaldi_vector(opened[ark], f"{path}:{number}: {ark}:{offset}"))
    if not rows:
        raise ValueError(f"{path}: no embeddings in it")
    for name, row in zip(names, rows, strict=True):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}: {name} has {len(row)} values, those before {len(rows[0])}")
    try:
        return Embeddings(names, np.stack(rows))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _token(stream: BinaryIO) -> str:
    """Bytes up to the next space, which is read too."""
    token = bytearray()
    while (byte := stream.read(1)) not in (b"", b" "):
        token += byte
    return token.decode().strip()


def _kaldi_vector(stream: BinaryIO, where: str) -> np.ndarray:
    """The vector that starts here, binary (FV, DV) or text."""
    start = stream.read(2)
    if start == b"\0B":
        kind = stream.read(3)
        dtype = {b"FV ": np.dtype("<f4"), b"DV ": np.dtype("<f8")}.get(kind)
        if dtype is None:
            raise ValueError(f"{where} is {kind!r}, not a Kaldi vector (FV or DV)")
        size = int.from_bytes(stream.read(5)[1:], "little")
        data = stream.read(size * dtype.itemsize)
        if len(data) != size * dtype.itemsize:
            raise ValueError(f"{where} ends after {len(data)} of {size * dtype.itemsize} bytes")
        return np.frombuffer(data, dtype)
    text = (start + stream.readline()).decode(errors="replace").strip()
    try:
        if text[0] != "[" or text[-1] != "]":
            raise ValueError
        return np.array(text[1:-1].split(), dtype=np.float32)
    except (ValueError, IndexError):
        raise ValueError(f"{where} is neither a binary vector nor '[ numbers ]'") from None
