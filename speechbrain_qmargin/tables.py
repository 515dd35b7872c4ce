"""Text tables as people publish them: lists of trials, of scores, of ids and values.

Columns stand between tabs (then cells may hold spaces), commas or blanks; a byte order mark, blank
lines and a header are allowed. Text is UTF-8, or UTF-16 with its mark, which Excel calls Unicode
text.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TextIO

import numpy as np

__all__ = [
    "LABELS",
    "Table",
    "composed_name",
    "could_be_header",
    "file_source",
    "numbered_lines",
    "read_columns",
    "read_lines",
    "read_map",
    "read_models",
    "read_table",
    "some",
]

LABELS = {
    **dict.fromkeys(("1", "target", "tgt", "true", "genuine"), True),
    **dict.fromkeys(("0", "nontarget", "non-target", "imp", "impostor", "false"), False),
}
"""What is written for a target trial (True) and for an impostor trial (False), in lower case."""

_NAMES = {
    "enrolment": "enrolment enrol enroll enrollment enrolmentid enrollmentid enrollid enrolid "
    "modelid model utt1 file1 id1 wav1 path1",
    "test": "test testid segmentid segment testutt utt2 file2 id2 wav2 path2",
    "score": "score scores llr",
    "label": "label labels target targettype istarget key trialtype",
}
_SIDES = ("side", "channel")
_COLUMN = {alias: name for name, aliases in _NAMES.items() for alias in aliases.split()}


def some(names: Sequence[str]) -> str:
    """The first few of many names.

    Examples
    --------
    >>> some("abcdefg")
    'a, b, c, d, e, ...'
    """
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def composed_name(name: str) -> str:
    """A person's name in Unicode's normal form C, in which names are counted and compared.

    File systems and editors write an accent as a part of its letter or as a character of its own;
    both are one name. Ids and paths stay as they are.

    Examples
    --------
    >>> len("Jose\\u0301"), len(composed_name("Jose\\u0301"))
    (5, 4)
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def file_source(path: str | Path) -> str:
    """A file's name with its SHA-256: "name sha256:" and 64 hexadecimal digits.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "greeting.txt"
    >>> _ = file.write_bytes(b"hello")
    >>> file_source(file)
    'greeting.txt sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824'
    """
    with Path(path).open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    return f"{Path(path).name} sha256:{digest.hexdigest()}"


def read_lines(path: str | Path) -> tuple[list[str], str]:
    """The lines of a text file, and its name with its SHA-256.

    Raises
    ------
    ValueError
        Another encoding; with the file.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "ids.txt"
    >>> _ = file.write_text("anna/1\\nanna/2\\n")
    >>> lines, source = read_lines(file)
    >>> lines, source == file_source(file)
    (['anna/1', 'anna/2'], True)
    """
    content = Path(path).read_bytes()
    with _text(path, io.BufferedReader(io.BytesIO(content))) as stream:
        # not splitlines, which also parts at characters that a name may hold
        lines = stream.read().split("\n")
    if not lines[-1]:
        lines.pop()
    return lines, f"{Path(path).name} sha256:{hashlib.sha256(content).hexdigest()}"


@contextmanager
def _text(
    path: str | Path, content: io.BufferedReader, newline: str | None = None
) -> Iterator[TextIO]:
    """A file's content as text, which is UTF-16 where it begins with that byte order mark."""
    start = content.peek(2)[:2]  # not read and sought: it may be a pipe
    marked = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        with io.TextIOWrapper(
            content, "utf-16" if marked else "utf-8-sig", newline=newline
        ) as text:
            yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error}); save it as UTF-8") from None


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of :func:`read_lines` that are not blank, from 1, one by one: a file may be large.

    Raises
    ------
    ValueError
        Another encoding; with the file.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "wav.scp"
    >>> _ = file.write_bytes(b"\\xef\\xbb\\xbfanna/1 a.wav\\r\\n\\r\\nanna/2 b.wav")
    >>> list(numbered_lines(file))
    [(1, 'anna/1 a.wav'), (3, 'anna/2 b.wav')]
    """
    with Path(path).open("rb") as content, _text(path, content) as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield number, line.removesuffix("\n")


def read_columns(path: str | Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """A table with a header: the columns' names, and the rows with the numbers of their last lines.

    Parameters
    ----------
    path : path
        Separated by tabs, commas or semicolons, whichever the header has most of; cells may be
        quoted.

    Returns
    -------
    list of str, and iterator of (int, list of str)
        Cells are stripped; rows without any are passed over. The file is read row by row.

    Raises
    ------
    ValueError
        Another encoding, a column twice, a row of another length, what is no table; with file and
        line, of a row once it is drawn.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "people.csv"
    >>> _ = file.write_text('file;person\\n"a;b.wav"; ann\\n\\nc.wav\\n')
    >>> header, rows = read_columns(file)
    >>> header, next(rows)
    (['file', 'person'], (2, ['a;b.wav', 'ann']))
    >>> next(rows)
    Traceback (most recent call last):
    ValueError: ...people.csv:4: 1 cells, the header has 2
    """
    rows = _rows(path)
    number, header = next(rows, (1, []))
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise ValueError(f"{path}:{number}: the column {twice[0]} is there twice")
    return header, rows


def _rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    with Path(path).open("rb") as content, _text(path, content, newline="") as stream:
        begun = [next(stream, "")]
        while begun[-1].isspace():
            begun.append(next(stream, ""))
        separator = max("\t,;", key=begun[-1].count)
        lines = chain(begun, stream)
        rows, width = csv.reader(lines, delimiter=separator, skipinitialspace=True), 0
        try:
            for row in rows:
                cells = [cell.strip() for cell in row]
                if not any(cells):
                    continue
                width = width or len(cells)
                if len(cells) != width:
                    raise ValueError(
                        f"{path}:{rows.line_num}: {len(cells)} cells, the header has {width}"
                    )
                yield rows.line_num, cells
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num}: not a table ({error})") from None


@dataclass(frozen=True)
class Table:
    """The rows of a file, by columns.

    Attributes
    ----------
    path : path
    source : str
        The file's name and SHA-256.
    columns : list of tuple of str
        Each [rows].
    numbers : list of int
        The line of every row, from 1.
    header : list of str or None
        What each column holds: "enrolment", "test", "score", "label", or its own name in lower
        case; None without a header.
    comment : str
        A first line that starts with "#", without it.
    separator : str or None
        What stands between the columns; None for blanks.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "trials.txt"
    >>> _ = file.write_text("anna/1 anna/2 target\\nanna/1 bert/1 nontarget\\n")
    >>> table = read_table(file)
    >>> table.columns[1], table.label_columns(), table.labels(2)
    (('anna/2', 'bert/1'), [2], array([ True, False]))
    >>> table.row(1)
    "...trials.txt:2: 'anna/1 bert/1 nontarget'"
    """

    path: str | Path
    source: str
    columns: list[tuple[str, ...]]
    numbers: list[int]
    header: list[str] | None
    comment: str = ""
    separator: str | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, index: int) -> str:
        """A row for a message: its file, line and cells."""
        cells = " ".join(column[index] for column in self.columns)
        return f"{self.path}:{self.numbers[index]}: {_cut(cells)!r}"

    def pairs(self, enrolment: int, test: int) -> tuple[Sequence[str], Sequence[str]]:
        """The ids of trials, from their two columns.

        Raises
        ------
        ValueError
            An empty id; one id for the two sides of a telephone call (NIST SRE's ``side``); with
            file and line.
        """
        for column in (enrolment, test):
            if "" in self.columns[column]:
                raise ValueError(f"{self.row(self.columns[column].index(''))}: an id is empty")
        self._refuse_sides(test)
        return self.columns[enrolment], self.columns[test]

    def _refuse_sides(self, test: int) -> None:
        for column, name in enumerate(self.header or []):
            if name not in _SIDES or column == test:
                continue
            first: dict[str, str] = {}
            for row, (one, side) in enumerate(
                zip(self.columns[test], self.columns[column], strict=True)
            ):
                if first.setdefault(one, side) != side:
                    raise ValueError(
                        f"{self.row(row)}: {one} is there with the {name}s {first[one]} and "
                        f"{side}, which are two recordings: write their ids apart in the test "
                        "column, and in the embeddings"
                    )

    def label_columns(self) -> list[int]:
        """The columns that hold nothing but labels."""
        return [n for n, column in enumerate(self.columns) if _all_labels(column)]

    def labels(self, column: int) -> np.ndarray:
        """A column as bool [rows].

        Raises
        ------
        ValueError
            A cell that is no label; with file and line.
        """
        found = [LABELS.get(cell.lower()) for cell in self.columns[column]]
        if None in found:
            at = found.index(None)
            raise ValueError(
                f"{self.row(at)}: the label {self.columns[column][at]!r} is none of "
                f"{', '.join(LABELS)}"
            )
        return np.array(found, dtype=bool)


def _cut(text: str) -> str:
    """A line for a message, which nobody reads a megabyte of."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _all_labels(cells: Sequence[str]) -> bool:
    return cells[0].lower() in LABELS and all(cell.lower() in LABELS for cell in set(cells))


def _separator(line: str) -> str | None:
    if "\t" in line.strip():
        return "\t"
    words = line.split()
    apart = len(words) < 3 or all(word.endswith(",") for word in words[:-1])  # a, b, target
    return "," if "," in line and apart else None


def _named(cell: str) -> str:
    plain = "".join(letter for letter in cell.lower() if letter.isalnum())
    return _COLUMN.get(plain, plain)


def could_be_header(cell: str) -> bool:
    """Whether an id could be taken for a label, a column's name or a comment.

    Examples
    --------
    >>> could_be_header("0"), could_be_header("test"), could_be_header("anna/1.wav")
    (True, True, False)
    """
    return cell.lower() in LABELS or _named(cell) in _NAMES or cell.startswith("#")


def read_table(path: str | Path, *, fewest: int = 2) -> Table:
    """Read a table; every row must have the first one's number of cells.

    A first line that names an enrolment and a test column is a header; so is one that alone keeps
    a column from holding labels.

    Raises
    ------
    ValueError
        No rows, or a row of another length or of fewer than `fewest` cells; with file and line.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "trials.csv"
    >>> _ = file.write_text("modelid,segmentid,targettype\\nanna,7.sph,target\\n")
    >>> table = read_table(file)
    >>> table.header, table.columns
    (['enrolment', 'test', 'label'], [('anna',), ('7.sph',), ('target',)])
    """
    lines, source = read_lines(path)
    comment = lines[0][1:].strip() if lines and lines[0].startswith("#") else ""
    start = 1 if comment else 0
    first = next((n for n in range(start, len(lines)) if lines[n].strip()), None)
    if first is None:
        raise ValueError(f"{path}: there is nothing in it")
    separator = _separator(lines[first])
    parse = _comma_cells if separator == "," else str.split
    head = parse(lines[first], separator)
    width = len(head)
    cells: list[str] = []  # one flat list: a list for every row costs twice the time
    numbers: list[int] = []
    for number in range(first, len(lines)):
        row = parse(lines[number], separator)
        if len(row) != width or width < fewest:
            if not lines[number].strip():
                continue
            semicolons = width < fewest and ";" in lines[number]
            raise ValueError(
                f"{path}:{number + 1}: expected {max(width, fewest)} columns as in the first line, "
                f"got {_cut(lines[number])!r}"
                + ", whose columns are between semicolons: save it with commas or tabs"
                * semicolons
            )
        cells += row
        numbers.append(number + 1)
    columns = [tuple(cells[n::width]) for n in range(width)]
    if separator:
        columns = [tuple(map(str.strip, column)) for column in columns]
    header = _header([column[0] for column in columns], columns)
    if header is not None:
        columns, numbers = [column[1:] for column in columns], numbers[1:]
        if not numbers:
            raise ValueError(f"{path}: a header and nothing below it")
    return Table(path, source, columns, numbers, header, comment, separator)


def _comma_cells(line: str, _) -> list[str]:
    try:
        return next(csv.reader([line], skipinitialspace=True), [])
    except csv.Error:  # a cell of more than 131,072 characters: no table
        return [line]


def _header(cells: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str] | None:
    """What the columns hold by the first line, None if that is no header."""
    names = [_named(cell) for cell in cells]
    if {"enrolment", "test"} <= set(names):
        return names
    # names of its own over the ids, and a known one over nothing but labels
    if names.count("label") == 1 and len(columns[0]) > 1:
        at = names.index("label")
        if cells[at].lower() not in LABELS and _all_labels(columns[at][1:]):
            return ["label" if n == at else "" for n in range(len(names))]
    return None


def read_map(path: str | Path, kind: type = str) -> dict:
    """Read ``id value`` lines, such as Kaldi's utt2spk (`kind` str) or utt2dur (`kind` float).

    Between tabs or commas ids may hold spaces.

    Parameters
    ----------
    path : path
    kind : type
        Of the values; called with their text. Those of kind str are names of people
        (:func:`composed_name`).

    Returns
    -------
    dict from id to value

    Raises
    ------
    ValueError
        A line without two fields, a value that is not finite, an id twice: with file and line.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "utt2dur"
    >>> _ = file.write_text("anna/1 4.5\\nanna/2 8\\n")
    >>> read_map(file, float)
    {'anna/1': 4.5, 'anna/2': 8.0}
    """
    values: dict = {}
    people: dict[str, str] = {}  # one string for all of a person's
    separator = None
    for number, line in numbered_lines(path):
        if not values:
            separator = _separator(line)
        fields = [field.strip() for field in line.split(separator)]
        value = None
        if len(fields) == 2:
            try:
                name = fields[1]
                value = people.setdefault(name, composed_name(name)) if kind is str else kind(name)
            except (TypeError, ValueError):
                value = None
        if value is None or (kind is float and not np.isfinite(value)):
            raise ValueError(f"{path}:{number}: expected an id and one {kind.__name__}: {line!r}")
        if fields[0] in values:
            raise ValueError(f"{path}:{number}: {fields[0]} is listed twice")
        values[fields[0]] = value
    return values


def read_models(path: str | Path) -> Mapping[str, tuple[str, ...]]:
    """Read which recordings a model is enrolled with.

    ``model recording`` lines, one for each recording (NIST SRE's, with a header or not), or
    ``model recording recording ...`` (Kaldi's spk2utt, CN-Celeb's enroll.map).

    Raises
    ------
    ValueError
        A line without a recording, a recording twice in one model, no models; with the file, and
        the line where there is one.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "enroll.map"
    >>> _ = file.write_text("anna anna/1 anna/2\\nbert bert/1\\n")
    >>> read_models(file)
    {'anna': ('anna/1', 'anna/2'), 'bert': ('bert/1',)}
    """
    lines, _ = read_lines(path)
    models: dict[str, list[str]] = {}
    separator = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not models:
            separator = _separator(line)
            names = [_named(field) for field in line.split(separator)]
            if {"enrolment", "test"} <= set(names):
                at = names.index("enrolment"), names.index("test")
                return _models_with_header(path, lines[number:], number, separator, at)
        name, *recordings = (field.strip() for field in line.split(separator))
        if not recordings:
            raise ValueError(f"{path}:{number}: expected a model and its recordings, got {line!r}")
        _enrol(models, name, recordings, f"{path}:{number}")
    if not models:
        raise ValueError(f"{path}: no models in it")
    return {name: tuple(recordings) for name, recordings in models.items()}


def _models_with_header(path, lines, offset, separator, at) -> Mapping[str, tuple[str, ...]]:
    models: dict[str, list[str]] = {}
    for number, line in enumerate(lines, offset + 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split(separator)]
        if len(fields) <= max(at):
            raise ValueError(f"{path}:{number}: expected a model and a recording, got {line!r}")
        _enrol(models, fields[at[0]], [fields[at[1]]], f"{path}:{number}")
    return {name: tuple(recordings) for name, recordings in models.items()}


def _enrol(models: dict[str, list[str]], name: str, recordings: list[str], where: str) -> None:
    held = models.setdefault(name, [])
    for recording in recordings:
        if recording in held:
            raise ValueError(f"{where}: {recording} is in the model {name} twice")
        held.append(recording)
