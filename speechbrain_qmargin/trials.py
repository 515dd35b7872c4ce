"""Trials and their scores, in and out.

Trial lists are text: ``label enrolment test`` (VoxCeleb) or ``enrolment test target|nontarget``
(Kaldi). A score file of ours is tab-separated with a header, ``enrolment test score label``, in
full precision; those of other systems are read with a trial list or a column order.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from speechbrain_qmargin.files import replacing

__all__ = [
    "Trials",
    "read_map",
    "read_scores",
    "read_trials",
    "speaker_in",
    "write_scores",
]

_HEADER = ("enrolment", "test", "score", "label")
_LABELS = {"1": True, "0": False, "target": True, "nontarget": False, "tgt": True, "imp": False}
_BLOCK = 16384


def speaker_in(name: str) -> str:
    """The speaker that a recording's id names: its part before the first slash.

    Examples
    --------
    >>> speaker_in("id10270/5r0dWxy17C8/00001.wav")
    'id10270'
    """
    return name.split("/", 1)[0]


@dataclass(frozen=True)
class Trials:
    """Pairs of recordings, by index into their distinct ids.

    Attributes
    ----------
    ids : list of str
        Every recording once.
    enrolment, test : int64 arrays [N]
        Indices into `ids`.
    is_target : bool array [N] or None
        None where nobody has said: such trials can be scored and calibrated, not evaluated.
    source : str
        The file's name and SHA-256, empty for trials made in memory.
    speaker_of : sequence of str, optional
        The speaker of every id, where the ids themselves do not tell.
    """

    ids: list[str]
    enrolment: np.ndarray
    test: np.ndarray
    is_target: np.ndarray | None
    source: str = ""
    speaker_of: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.enrolment)

    def with_speakers(self, speakers: Mapping[str, str]) -> Trials:
        """The same trials, with the speaker of every id (Kaldi's utt2spk; see :func:`read_map`).

        Raises
        ------
        ValueError
            An id without a speaker; named.
        """
        missing = [name for name in self.ids if name not in speakers]
        if missing:
            raise ValueError(f"{len(missing)} recordings have no speaker: {_some(missing)}")
        return replace(self, speaker_of=[speakers[name] for name in self.ids])

    def speaker_names(self) -> Sequence[str]:
        """Speaker of every id by name: `speaker_of`, else what the ids name."""
        return self.speaker_of or [speaker_in(name) for name in self.ids]

    def speakers(self) -> np.ndarray:
        """Speaker of every id as an int array [len(ids)].

        From `speaker_of`; else the part of an id before its first slash; else, where no id has
        one, recordings linked by target trials are one speaker.

        Raises
        ------
        ValueError
            A target trial of two speakers, or an impostor trial of one; named.
        """
        return self._speakers

    @cached_property
    def _speakers(self) -> np.ndarray:
        if self.speaker_of is not None:
            names = list(self.speaker_of)
        elif any("/" in name for name in self.ids):
            names = [speaker_in(name) for name in self.ids]
        else:
            return _linked(len(self.ids), self.enrolment[self.is_target], self.test[self.is_target])
        speakers = np.unique(names, return_inverse=True)[1]
        same = speakers[self.enrolment] == speakers[self.test]
        if (same != self.is_target).any():
            at = int(np.argmax(same != self.is_target))
            kind = ("an impostor trial of one speaker", "a target trial of two speakers")
            raise ValueError(
                f"{self.source or 'trials'}: {self.ids[self.enrolment[at]]} "
                f"{self.ids[self.test[at]]} is {kind[int(self.is_target[at])]} if the speaker is "
                "the id's part before its first slash. Correct the label, or give the speakers "
                "(utt2spk)"
            )
        return speakers

    @cached_property
    def impostor_pairs(self):
        """How many impostor trials each pair of speakers has: sparse float32 [S, S], upper half."""
        from scipy.sparse import coo_array, csr_array

        speakers = self.speakers().astype(np.int32)
        count = int(speakers.max()) + 1
        dense = count <= 4096
        total = np.zeros(count * count, np.float32) if dense else csr_array((count, count))
        for start in range(0, len(self), 2**21):
            block = slice(start, start + 2**21)
            kept = np.flatnonzero(~self.is_target[block])
            one, two = (speakers[side[block][kept]] for side in (self.enrolment, self.test))
            one, two = np.minimum(one, two), np.maximum(one, two)
            if dense:
                total += np.bincount(one * count + two, minlength=count * count)
            elif len(kept):
                ones = np.ones(len(kept), dtype=np.float32)
                total = total + coo_array((ones, (one, two)), (count, count)).tocsr()
        return csr_array(total.reshape(count, count)) if dense else total


def _linked(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(left)), (left, right)), shape=(count, count))
    return connected_components(links, directed=False)[1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _index(pairs: list[tuple[str, str]], labels: list[bool] | None, source: str) -> Trials:
    ids: dict[str, int] = {}
    flat = [ids.setdefault(name, len(ids)) for pair in pairs for name in pair]
    sides = np.asarray(flat, dtype=np.int64).reshape(-1, 2)
    labelled = None if labels is None else np.asarray(labels, dtype=bool)
    return Trials(list(ids), sides[:, 0].copy(), sides[:, 1].copy(), labelled, source)


def _lines(path: str | Path) -> tuple[list[str], str]:
    """The lines of a text file, and its name with its SHA-256."""
    content = Path(path).read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error})") from None
    return text.splitlines(), f"{Path(path).name} sha256:{hashlib.sha256(content).hexdigest()}"


class _Pairs:
    """Trials met so far, refusing one twice."""

    def __init__(self, path: str | Path):
        self.path, self.first = path, {}

    def add(self, number: int, enrolment: str, test: str) -> None:
        before = self.first.setdefault((enrolment, test), number)
        if before != number:
            raise ValueError(
                f"{self.path}:{number}: the trial of line {before} again: {enrolment} {test}"
            )


def read_trials(path: str | Path) -> Trials:
    """Read a VoxCeleb or a Kaldi trial list; every line must be of the first line's kind.

    Raises
    ------
    ValueError
        A line that is neither ``label enrolment test`` nor ``enrolment test target|nontarget``, a
        label other than 0 or 1, a trial listed twice, no trials: with file and line.
    """
    lines, source = _lines(path)
    pairs, labels = _Pairs(path), []
    kaldi = None
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        if kaldi is None and len(fields) == 3:
            kaldi = fields[0] not in ("0", "1") and fields[2] in ("target", "nontarget")
        label, enrolment, test = (
            ("", "", "") if len(fields) != 3 else (fields[2], *fields[:2]) if kaldi else fields
        )
        if label not in (("target", "nontarget") if kaldi else ("0", "1")):
            wanted = (
                "'enrolment test target|nontarget'"
                if kaldi
                else "'label enrolment test' with label 0 or 1"
            )
            raise ValueError(f"{path}:{number}: expected {wanted}, got {line!r}")
        pairs.add(number, enrolment, test)
        labels.append(_LABELS[label])
    if not labels:
        raise ValueError(f"{path}: no trials in it")
    return _index(list(pairs.first), labels, source)


def read_map(path: str | Path, kind: type = str) -> dict:
    """Read ``id value`` lines, such as Kaldi's utt2spk (`kind` str) or utt2dur (`kind` float).

    Raises
    ------
    ValueError
        A line without two fields, a value that is not finite, an id twice: with file and line.
    """
    values: dict = {}
    for number, line in enumerate(_lines(path)[0], 1):
        fields = line.split()
        if not fields:
            continue
        try:
            name, value = fields[0], kind(*fields[1:])
        except (TypeError, ValueError):
            value = None
        if len(fields) != 2 or value is None or (kind is float and not np.isfinite(value)):
            raise ValueError(f"{path}:{number}: expected an id and one {kind.__name__}: {line!r}")
        if name in values:
            raise ValueError(f"{path}:{number}: {name} is listed twice")
        values[name] = value
    return values


def write_scores(path: str | Path, trials: Trials, scores: np.ndarray) -> None:
    """Write scores with their trials, unrounded (the shortest text that reads back exactly).

    The label column is left out where the trials have no labels.
    """
    scores = np.asarray(scores)
    if scores.shape != (len(trials),):
        raise ValueError(f"{len(trials)} trials and scores {scores.shape}")
    ids, labels = trials.ids, trials.is_target
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write("\t".join(_HEADER if labels is not None else _HEADER[:3]) + "\n")
        for start in range(0, len(trials), _BLOCK):
            block = slice(start, start + _BLOCK)
            columns = [trials.enrolment[block].tolist(), trials.test[block].tolist(), scores[block]]
            if labels is not None:
                columns.append(labels[block].tolist())
            stream.writelines(
                f"{ids[enrolment]}\t{ids[test]}\t{score!s}"
                + "".join(f"\t{x:d}" for x in label)
                + "\n"
                for enrolment, test, score, *label in zip(*columns, strict=True)
            )


def read_scores(
    path: str | Path, trials: Trials | None = None, columns: str | None = None
) -> tuple[Trials, np.ndarray]:
    """Read a score file: its trials, and float64 scores [N].

    Parameters
    ----------
    path : path
        Of :func:`write_scores` (with a header), or lines of any system.
    trials : Trials, optional
        Where the labels come from if the file has none; the scores are returned in its order.
        Without it the trials of a file without labels have none (`is_target` is None).
        Scores of trials that it does not list are dropped with a warning that counts them.
    columns : str, optional
        The order of the columns of a file without a header, as "enrolment test label score"
        (SpeechBrain's scores.txt) or "enrolment test score label" (WeSpeaker). Three columns
        are "enrolment test score" by default; four are ambiguous and need it unless the last is
        "target" or "nontarget".

    Raises
    ------
    ValueError
        Ambiguous columns, a malformed line, a score
        that is not a finite number, a trial twice: with file and line. Trials without a score.
    """
    lines, source = _lines(path)
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: no scores in it")
    skip, separator = 0, None
    if columns is None and tuple(lines[0].split("\t")) in (_HEADER, _HEADER[:3]):
        columns, skip, separator = lines[0].replace("\t", " "), 1, "\t"
    if columns is None:
        width = len(lines[0].split())
        columns = "enrolment test score"
        if width == 4 and lines[0].split()[3] in ("target", "nontarget"):
            columns = "enrolment test score label"
        elif width != 3:
            raise ValueError(
                f"{path}:1: {width} columns without the header {' '.join(_HEADER)!r}. Say which is "
                "which: columns='enrolment test label score' (SpeechBrain), "
                "'enrolment test score label' (WeSpeaker), or another order"
            )
    order = columns.split()
    if not {"enrolment", "test", "score"} <= set(order) or len(set(order)) < len(order):
        raise ValueError(f"columns={columns!r} must name enrolment, test and score, each once")
    labelled = "label" in order
    enrol_at, test_at, score_at = (order.index(name) for name in ("enrolment", "test", "score"))
    label_at = order.index("label") if labelled else -1

    pairs, labels, scores = _Pairs(path), [], []
    for number, line in enumerate(lines[skip:], 1 + skip):
        fields = line.split(separator)
        if not line.strip():
            continue
        if len(fields) != len(order):
            raise ValueError(f"{path}:{number}: expected {columns!r}, malformed line {line!r}")
        try:
            score = float(fields[score_at])
        except ValueError:
            raise ValueError(
                f"{path}:{number}: malformed line {line!r}: the score {fields[score_at]!r} is not "
                "a number"
            ) from None
        if not np.isfinite(score):
            raise ValueError(f"{path}:{number}: the score {fields[score_at]} is not finite")
        if labelled and fields[label_at] not in _LABELS:
            raise ValueError(
                f"{path}:{number}: malformed line {line!r}: the label {fields[label_at]!r} is none "
                f"of {', '.join(_LABELS)}"
            )
        pairs.add(number, fields[enrol_at], fields[test_at])
        scores.append(score)
        labels.append(labelled and _LABELS[fields[label_at]])
    if not scores:
        raise ValueError(f"{path}: no scores in it")
    if trials is None:
        labels = labels if labelled else None
        return _index(list(pairs.first), labels, source), np.asarray(scores)
    return trials, _in_order_of(trials, path, pairs.first, scores, labels if labelled else None)


def _in_order_of(trials, path, pairs, scores, labels) -> np.ndarray:
    position = {pair: n for n, pair in enumerate(pairs)}
    ids = trials.ids
    wanted = [
        (ids[e], ids[t])
        for e, t in zip(trials.enrolment.tolist(), trials.test.tolist(), strict=True)
    ]
    order = np.fromiter((position.get(pair, -1) for pair in wanted), np.int64, len(wanted))
    if order.min() < 0:
        first = wanted[int(np.argmin(order))]
        raise ValueError(
            f"{path}: {np.count_nonzero(order < 0)} of {len(trials)} trials have no score, the "
            f"first is {first[0]} {first[1]}"
        )
    if labels is not None and (np.asarray(labels)[order] != trials.is_target).any():
        at = int(np.argmax(np.asarray(labels)[order] != trials.is_target))
        raise ValueError(
            f"{path}: the label of {wanted[at][0]} {wanted[at][1]} is not that of the trial list"
        )
    dropped = len(position) - len(set(wanted))
    if dropped:
        warnings.warn(
            f"{path}: {dropped} of {len(position)} scores dropped: not in the trial list",
            stacklevel=3,
        )
    return np.asarray(scores)[order]
