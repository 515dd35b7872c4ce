"""Trials and scores, in and out.

A trial list is text, ``label enrolment test`` per line (VoxCeleb), label 1 for a target. A score
file is text with a header, tab-separated ``enrolment test score label``, in full precision.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = [
    "Trials",
    "cosine_scores",
    "load_embeddings",
    "read_scores",
    "read_trials",
    "save_embeddings",
    "write_scores",
]

_HEADER = "enrolment\ttest\tscore\tlabel"


@dataclass(frozen=True)
class Trials:
    """Pairs of recordings, by index into their distinct ids.

    Attributes
    ----------
    ids : list of str
        Every recording once.
    enrolment, test : int64 arrays [N]
        Indices into `ids`.
    is_target : bool array [N]
    """

    ids: list[str]
    enrolment: np.ndarray
    test: np.ndarray
    is_target: np.ndarray

    def __len__(self) -> int:
        return len(self.is_target)

    def speakers(self) -> np.ndarray:
        """Speaker of every id: the part of its path before the first slash."""
        names = [name.split("/", 1)[0] for name in self.ids]
        return np.unique(names, return_inverse=True)[1]


def _index(pairs: list[tuple[str, str]], labels: list[bool]) -> Trials:
    ids: dict[str, int] = {}
    flat = [ids.setdefault(name, len(ids)) for pair in pairs for name in pair]
    sides = np.asarray(flat, dtype=np.int64).reshape(-1, 2)
    return Trials(list(ids), sides[:, 0].copy(), sides[:, 1].copy(), np.asarray(labels, dtype=bool))


def read_trials(path: str | Path) -> Trials:
    """Read a VoxCeleb trial list.

    Raises
    ------
    ValueError
        A line that is not ``label enrolment test``, a label other than 0 or 1, a trial listed
        twice, no trials: with file and line.
    """
    pairs, labels, first = [], [], {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise ValueError(
                f"{path}:{number}: expected 'label enrolment test' with label 0 or 1, got {line!r}"
            )
        pair = (fields[1], fields[2])
        if first.setdefault(pair, number) != number:
            raise ValueError(f"{path}:{number}: the trial of line {first[pair]} again: {line!r}")
        pairs.append(pair)
        labels.append(fields[0] == "1")
    if not pairs:
        raise ValueError(f"{path}: no trials in it")
    return _index(pairs, labels)


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
    missing = [name for name in trials.ids if name not in embeddings]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(trials.ids)} recordings in the trials have no embedding: "
            f"{', '.join(missing[:5])}"
        )
    matrix = np.stack([np.asarray(embeddings[name], dtype=np.float32) for name in trials.ids])
    if mean is not None:
        matrix -= np.asarray(mean, dtype=np.float32)
    norms = np.linalg.norm(matrix, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise ValueError(
            f"{len(bad)} embeddings are zero or not finite: "
            f"{', '.join(trials.ids[i] for i in bad[:5])}"
        )
    matrix /= norms[:, None]
    scores = np.empty(len(trials), dtype=np.float32)
    for start in range(0, len(trials), 65536):
        block = slice(start, start + 65536)
        left, right = matrix[trials.enrolment[block]], matrix[trials.test[block]]
        scores[block] = np.einsum("nd,nd->n", left, right)
    return scores


def _replace(path: Path, write) -> None:
    """Write a file whole or not at all; `write` gets the binary stream."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as stream:
        write(stream)
    os.replace(partial, path)


def write_scores(path: str | Path, trials: Trials, scores: np.ndarray) -> None:
    """Write scores with their trials, unrounded (the shortest text that reads back exactly)."""
    lines = [_HEADER]
    for enrolment, test, score, target in zip(
        trials.enrolment.tolist(),
        trials.test.tolist(),
        scores.tolist() if scores.dtype == np.float64 else scores,
        trials.is_target.tolist(),
        strict=True,
    ):
        lines.append(f"{trials.ids[enrolment]}\t{trials.ids[test]}\t{score!s}\t{int(target)}")
    text = "\n".join(lines) + "\n"
    _replace(Path(path), lambda stream: stream.write(text.encode()))


def read_scores(path: str | Path) -> tuple[Trials, np.ndarray]:
    """Read a file of :func:`write_scores`: the trials, and float64 scores [N].

    Raises
    ------
    ValueError
        A missing header (four bare columns are ambiguous), a malformed line, a score that is not
        a finite number: with file and line.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if not lines or lines[0] != _HEADER:
        raise ValueError(f"{path}:1: expected the header {_HEADER!r}")
    pairs, labels, scores = [], [], []
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        try:
            enrolment, test, score, label = fields
            scores.append(float(score))
            labels.append({"0": False, "1": True}[label])
        except (ValueError, KeyError):
            raise ValueError(f"{path}:{number}: malformed line {line!r}") from None
        if not np.isfinite(scores[-1]):
            raise ValueError(f"{path}:{number}: the score {score} is not finite")
        pairs.append((enrolment, test))
    return _index(pairs, labels), np.asarray(scores)


def save_embeddings(path: str | Path, embeddings: Mapping[str, np.ndarray]) -> None:
    """Write ``ids`` [N] and ``embeddings`` float32 [N, D] as npz."""
    ids = np.asarray(list(embeddings), dtype=np.str_)
    matrix = np.stack(list(embeddings.values())).astype(np.float32)
    _replace(Path(path), lambda stream: np.savez(stream, ids=ids, embeddings=matrix))


def load_embeddings(path: str | Path) -> dict[str, np.ndarray]:
    """Read a file of :func:`save_embeddings`; never executes code.

    Raises
    ------
    ValueError
        Not such a file; named.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(zip(file["ids"].tolist(), file["embeddings"], strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not ids [N] and embeddings [N, D] as npz: {error}") from error
