"""Embeddings by id, in and out; the cosine of every trial."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from speechbrain_qmargin.files import load_arrays, replacing
from speechbrain_qmargin.tables import file_source, read_lines, some
from speechbrain_qmargin.trials import Trials, match_ids

__all__ = [
    "ENROLMENT_RULES",
    "Embeddings",
    "cosine_scores",
    "id_texts",
    "load_embeddings",
    "load_mean",
    "pair_products",
    "save_embeddings",
]

ENROLMENT_RULES = ("embedding", "score")
_BLOCK = 16384
_LONGEST_ID = 4096
_SHORT, _LONG = 1e-15, 1e15


class OfEncoder(Protocol):
    """What comes from the embeddings of one encoder, and says of which."""

    @property
    def encoder(self) -> str:
        """The encoder's digest; empty where it is not known."""
        ...


class Embeddings(Mapping):
    """Embeddings by id, in one matrix.

    Parameters
    ----------
    ids : sequence of str
    matrix : float array [N, D]
    source : str
        The file they are from, by name and SHA-256.
    encoder : str
        The digest of the encoder that made them; empty if not known.

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

    def __init__(self, ids: Iterable[str], matrix: np.ndarray, source: str = "", encoder: str = ""):
        self.source, self.encoder = source, encoder
        self.ids = [str(name) for name in ids]
        self.matrix = np.asarray(matrix)
        if self.matrix.ndim != 2 or len(self.matrix) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids and a matrix {self.matrix.shape}; want [N, D]")
        self._row = {name: row for row, name in enumerate(self.ids)}
        if len(self._row) < len(self.ids):
            twice = [name for row, name in enumerate(self.ids) if self._row[name] != row]
            raise ValueError(f"{len(twice)} ids are listed twice: {some(twice)}")

    @classmethod
    def of(cls, embeddings: Mapping[str, np.ndarray]) -> Embeddings:
        """Any mapping from id to vector, as one matrix.

        Raises
        ------
        ValueError
            No embeddings, or some of other lengths; named.
        """
        if isinstance(embeddings, cls):
            return embeddings
        if not embeddings:
            raise ValueError("there are no embeddings")
        rows = {name: np.asarray(row) for name, row in embeddings.items()}
        first, shape = next((name, row.shape) for name, row in rows.items())
        other = next((name for name, row in rows.items() if row.shape != shape), None)
        if other is not None:
            raise ValueError(
                f"the embedding of {other} is {list(rows[other].shape)}, that of {first} "
                f"{list(shape)}: want one length for all"
            )
        return cls(rows, np.stack(list(rows.values())))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.matrix[self._row[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Sequence[str], what: str = "recordings in the trials") -> np.ndarray:
        """Row of each id, by the rules of :func:`~speechbrain_qmargin.trials.match_ids`.

        Raises
        ------
        ValueError
            Ids without an embedding; named, beside one that is there.
        """
        rows, how = match_ids(ids, self.ids)
        if len(rows) and rows.min() < 0:
            missing = [name for name, row in zip(ids, rows, strict=True) if row < 0]
            raise ValueError(
                f"{len(missing)} of {len(ids)} {what} have no embedding: {some(missing)} (there is "
                f"{self.ids[0]})"
            )
        if how:
            warnings.warn(f"{what} and embeddings are the same {how}", stacklevel=3)
        return rows

    def refuse_other(self, others: OfEncoder, what: str) -> None:
        """Refuse what is of another encoder's embeddings: no score between the two says anything.

        Where either does not say which encoder it is of, nothing is compared.

        Raises
        ------
        ValueError
            Both say, and differ; with `what` the others are called.

        Examples
        --------
        >>> own, others = (Embeddings(["a"], np.eye(1), encoder=each) for each in ("5e11", "ac1d"))
        >>> own.refuse_other(others, "the cohort")
        Traceback (most recent call last):
        ValueError: the cohort is of the encoder ac1d, the trials' embeddings are of 5e11: ...
        """
        if self.encoder and others.encoder and self.encoder != others.encoder:
            raise ValueError(
                f"{what} is of the encoder {others.encoder[:16]}, the trials' embeddings are of "
                f"{self.encoder[:16]}: extract both with one encoder"
            )

    def missing(self, ids: Sequence[str]) -> list[str]:
        """Those of `ids` that have no embedding."""
        places, _ = match_ids(ids, self.ids)
        return [name for name, place in zip(ids, places, strict=True) if place < 0]

    def mean(self) -> np.ndarray:
        """Mean of all rows: float64 [D]; a sum of a million in float32 would be 1 % off.

        Examples
        --------
        >>> Embeddings(["a", "b"], np.array([[1.0, 0], [2, 0]])).mean()
        array([1.5, 0. ])
        """
        return self.matrix.mean(axis=0, dtype=np.float64)

    def unit(self, ids: Sequence[str], mean: np.ndarray | None = None) -> np.ndarray:
        """Embeddings of `ids` minus `mean`, of unit length: float32 [len(ids), D].

        Raises
        ------
        ValueError
            An id without an embedding, or an embedding that is zero or not finite; named.
        """
        rows = self.matrix[self.rows(ids)].astype(np.float32, copy=False)
        if mean is not None:
            mean = np.asarray(mean, dtype=np.float32)
            if mean.shape != rows.shape[1:]:
                raise ValueError(
                    f"embeddings have {rows.shape[1]} dimensions, the mean {mean.shape}"
                )
            rows -= mean
        return _unit(rows, ids, "embeddings")

    def enrolled(
        self, trials: Trials, mean: np.ndarray | None = None, rule: str = "embedding"
    ) -> np.ndarray:
        """What stands for every id of trials: float32 [len(trials.ids), D].

        A recording's unit embedding; a model's mean of its recordings' unit embeddings.

        Parameters
        ----------
        trials : Trials
        mean : array [D], optional
            Subtracted from every embedding first.
        rule : {"embedding", "score"}
            ``embedding``: a model's mean is brought to unit length, so that inner products are
            cosines. ``score``: it is left as it is, so that they are the mean of the cosines with
            the model's recordings.

        Raises
        ------
        ValueError
            As :meth:`unit`; a model whose embeddings cancel out; another rule.
        """
        if rule not in ENROLMENT_RULES:
            raise ValueError(f"enrolment must be one of {', '.join(ENROLMENT_RULES)}, got {rule!r}")
        if not trials.models:
            return self.unit(trials.ids, mean)
        unit = self.unit(trials.recordings, mean)
        place = {name: row for row, name in enumerate(trials.recordings)}
        made = np.empty((len(trials.ids), unit.shape[1]), dtype=np.float32)
        for row, name in enumerate(trials.ids):
            recordings = trials.models.get(name, (name,))
            made[row] = unit[[place[one] for one in recordings]].mean(axis=0)
        return _unit(made, trials.ids, "models") if rule == "embedding" else made


def _unit(rows: np.ndarray, ids: Sequence[str], what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    far = ~((norms > _SHORT) & (norms < _LONG))  # whose squares are too small or large for float32
    if far.any():
        largest = np.abs(rows[far]).max(1, keepdims=True, initial=0)
        rows[far] /= np.where((largest > 0) & np.isfinite(largest), largest, 1)
        norms[far] = np.sqrt(np.einsum("nd,nd->n", rows[far], rows[far]))
    fine = np.isfinite(norms) & (norms > 0)
    if not fine.all():
        bad = [name for name, good in zip(ids, fine, strict=True) if not good]
        raise ValueError(f"{len(bad)} {what} are zero or not finite: {some(bad)}")
    rows /= norms[:, None]
    return rows


def cosine_scores(
    embeddings: Mapping[str, np.ndarray],
    trials: Trials,
    mean: np.ndarray | None = None,
    enrolment: str = "embedding",
) -> np.ndarray:
    """Cosine of the two embeddings of every trial.

    Each embedding is normalised once; trials are gathered in blocks, so memory is bounded.

    Parameters
    ----------
    embeddings : mapping from id to array [D]
    trials : Trials
    mean : array [D], optional
        Subtracted from every embedding first.
    enrolment : {"embedding", "score"}
        How the recordings of a model are put together, see :meth:`Embeddings.enrolled`.

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
    unit = Embeddings.of(embeddings).enrolled(trials, mean, enrolment)
    return pair_products(unit, trials.enrolment, trials.test)


def pair_products(matrix: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Inner products of rows ``left[n]`` and ``right[n]``: float32 [N], in blocks.

    Parameters
    ----------
    matrix : float array [R, D]
    left, right : int arrays [N]

    Examples
    --------
    >>> unit = np.array([[1.0, 0.0], [0.6, 0.8]], dtype=np.float32)
    >>> pair_products(unit, np.array([0, 1]), np.array([1, 1]))
    array([0.6, 1. ], dtype=float32)
    """
    scores = np.empty(len(left), dtype=np.float32)
    for start in range(0, len(left), _BLOCK):
        block = slice(start, start + _BLOCK)
        one, two = matrix[left[block]], matrix[right[block]]
        np.einsum("nd,nd->n", one, two, out=scores[block], casting="same_kind")
    return scores


def save_embeddings(
    path: str | Path, embeddings: Mapping[str, np.ndarray], encoder: str = ""
) -> None:
    """Write ``ids`` [N] and ``embeddings`` float32 [N, D] as npz.

    With it goes the digest of the encoder, if known: a threshold for scores is bound to that.

    Parameters
    ----------
    path : path
    embeddings : mapping from id to array [D]
    encoder : str
        The digest; that of `embeddings` by default, if it is an :class:`Embeddings`.

    Raises
    ------
    ValueError
        No embeddings.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "test.npz"
    >>> rows = {"a/1": np.array([1.0, 0]), "a/2": np.array([0, 1.0])}
    >>> save_embeddings(file, rows, encoder="5e11")
    >>> loaded = load_embeddings(file)
    >>> loaded["a/2"], loaded.encoder
    (array([0., 1.], dtype=float32), '5e11')
    """
    embeddings = Embeddings.of(embeddings)
    encoder = encoder or embeddings.encoder
    arrays: dict[str, Any] = {
        "ids": np.asarray(embeddings.ids, dtype=np.str_),
        "embeddings": embeddings.matrix.astype(np.float32, copy=False),
    }
    if encoder:
        arrays["encoder"] = np.asarray(encoder, dtype=np.str_)
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)


def load_embeddings(path: str | Path, ids: str | Path | None = None) -> Embeddings:
    """Read embeddings; never executes code.

    Parameters
    ----------
    path : path
        ``.npz`` of :func:`save_embeddings`, ``.npy`` [N, D] with its ids in a text file, or Kaldi
        ``.ark`` or ``.scp``.
    ids : path, optional
        One id a line, for ``.npy``; by default the file of the same name with ``.txt``.

    Returns
    -------
    Embeddings
        float32 [N, D], or float64 where the file has that.

    Raises
    ------
    ValueError
        Another format, missing arrays, objects inside, an scp line that is a command, a vector of
        another length, an id twice: with the file.
    FileNotFoundError
        No such file.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "xvector.ark"  # Kaldi's, as text
    >>> _ = file.write_text("a/1 [ 1 0 ]\\na/2 [ 0.6 0.8 ]\\n")
    >>> embeddings = load_embeddings(file)
    >>> embeddings.ids, embeddings["a/2"]
    (['a/1', 'a/2'], array([0.6, 0.8], dtype=float32))
    """
    path = Path(path)
    if path.suffix in (".ark", ".scp"):
        return _load_kaldi(path)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"{path}: embeddings are read from .npz, .npy, .ark or .scp")
    loaded, encoder = load_arrays(path, "embeddings", ("ids", "embeddings", "encoder")), ""
    if isinstance(loaded, dict):
        missing = [name for name in ("ids", "embeddings") if name not in loaded]
        if missing:
            raise ValueError(
                f"{path}: no array {missing[0]!r} in it; wanted arrays 'ids' and 'embeddings'"
            )
        names, matrix = id_texts(loaded["ids"], path), loaded["embeddings"]
        encoder = "".join(id_texts(loaded["encoder"], path)) if "encoder" in loaded else ""
    else:
        listed = Path(ids) if ids else path.with_suffix(".txt")
        if not listed.is_file():
            raise ValueError(f"{path}: its ids are wanted in {listed}, one a line")
        names, matrix = read_lines(listed)[0], loaded
    if not len(matrix):
        raise ValueError(f"{path}: no embeddings in it")
    try:
        return Embeddings(names, _floats(matrix), file_source(path), encoder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_mean(path: str | Path, of: Embeddings | None = None) -> np.ndarray:
    """A mean embedding, float32 [D]: of a ``.npy`` vector (WeSpeaker's ``mean_vec.npy``), or that
    of embeddings (:func:`load_embeddings`).

    The mean of speakers' means is not that of their utterances: give the file whose mean the
    system subtracts.

    Parameters
    ----------
    path : path
    of : Embeddings, optional
        Those that it will be subtracted from.

    Raises
    ------
    ValueError
        As :func:`load_embeddings`; a value that is not finite; embeddings of another encoder than
        `of`, or a vector of another length.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "mean_vec.npy"
    >>> np.save(file, np.array([0.5, -0.25]))
    >>> load_mean(file)
    array([ 0.5 , -0.25], dtype=float32)
    """
    path = Path(path)
    mean = _mean_in(path, of)
    if not np.isfinite(mean).all():
        raise ValueError(f"{path}: the mean is not finite")
    if of is not None and len(mean) != of.matrix.shape[1]:
        raise ValueError(
            f"{path}: a mean of {len(mean)} dimensions, for embeddings of {of.matrix.shape[1]}"
        )
    return mean


def _mean_in(path: Path, of: Embeddings | None) -> np.ndarray:
    if path.suffix == ".npy":
        vector = load_arrays(path, "embeddings", ("ids", "embeddings"))
        if isinstance(vector, np.ndarray) and (vector.ndim == 1 or vector.shape[:-1] == (1,)):
            return _floats(vector.reshape(-1)).astype(np.float32)
    embeddings = load_embeddings(path)
    if of is not None:
        of.refuse_other(embeddings, f"{path}")
    if not any("/" in name for name in embeddings.ids):
        warnings.warn(
            f"{path}: its ids, such as {embeddings.ids[0]}, are perhaps speakers; the mean of "
            "speakers' means is not that of their utterances: give that (mean_vec.npy)",
            stacklevel=3,
        )
    return embeddings.mean().astype(np.float32)


def id_texts(ids: np.ndarray, path: Path) -> list[str]:
    """Ids as text; some toolkits keep them as bytes.

    Raises
    ------
    ValueError
        Bytes that are not UTF-8; with the file.

    Examples
    --------
    >>> id_texts(np.array([b"anna/1", b"anna/2"]), Path("test.npz"))
    ['anna/1', 'anna/2']
    """
    if ids.dtype.kind == "S":
        try:
            return [name.decode() for name in ids.reshape(-1).tolist()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: its ids are not UTF-8 ({error})") from None
    return [str(name) for name in ids.reshape(-1).tolist()]


def _floats(matrix: np.ndarray) -> np.ndarray:
    """float16 overflows at 65,504, the sum of squares of a vector of norm 256."""
    if matrix.dtype.kind not in "fiu":
        raise ValueError(f"the embeddings are of type {matrix.dtype}, not numbers")
    return matrix if matrix.dtype in (np.float32, np.float64) else matrix.astype(np.float32)


def _load_kaldi(path: Path) -> Embeddings:
    """Vectors of an ark, or of the arks that an scp points into.

    kaldiio reads them too, but it also unpickles what an ark calls a pickle and runs what an scp
    calls a pipe.
    """
    names, rows = [], []
    if path.suffix == ".ark":
        with path.open("rb") as stream:
            while name := _token(stream, path):
                names.append(name)
                rows.append(_kaldi_vector(stream, f"{path}: {name}"))
    else:
        with ExitStack() as files:
            opened: dict[str, BinaryIO] = {}
            for number, line in enumerate(read_lines(path)[0], 1):
                name, place = [*line.split(maxsplit=1), "", ""][:2]
                ark, _, offset = place.strip().rpartition(":")
                if not ark or not offset.isdigit() or len(offset) > 18:
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
        return Embeddings(names, np.stack(rows), file_source(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _token(stream: BinaryIO, path: Path) -> str:
    """The text up to the next space, which is read too."""
    token = bytearray()
    while (byte := stream.read(1)) not in (b"", b" "):
        token += byte
        if len(token) > _LONGEST_ID:
            raise ValueError(f"{path}: not a Kaldi ark: an id of more than {_LONGEST_ID} bytes")
    try:
        return token.decode().strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: an id that is not UTF-8: {bytes(token)!r:.60}") from None


def _kaldi_vector(stream: BinaryIO, where: str) -> np.ndarray:
    """The vector that starts here: binary (FV, DV, or a matrix FM, DM of one row), or text."""
    start = stream.read(2)
    if start == b"\0B":
        kind = stream.read(3)
        dtype = {b"F": np.dtype("<f4"), b"D": np.dtype("<f8")}.get(kind[:1])
        if dtype is None or kind[1:] not in (b"V ", b"M "):
            raise ValueError(f"{where} is {kind!r}, not a Kaldi vector (FV or DV)")
        size = int.from_bytes(stream.read(5)[1:], "little")
        if kind[1:] == b"M ":
            if size != 1:
                raise ValueError(f"{where} is a matrix of {size} rows; an embedding has one")
            size = int.from_bytes(stream.read(5)[1:], "little")
        place = stream.tell()  # what the header claims is not asked for before it is there
        left = stream.seek(0, os.SEEK_END) - place
        stream.seek(place)
        data = stream.read(min(size * dtype.itemsize, left))
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
