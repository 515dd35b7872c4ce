"""Your own people: whose recordings or images there are, and who is drawn into which part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, UNREAD_AUDIO
from speechbrain_qmargin.data.folders import files_below
from speechbrain_qmargin.data.images import IMAGE_SUFFIXES, UNREAD_IMAGES
from speechbrain_qmargin.tables import composed_name, read_columns
from speechbrain_qmargin.trials import speaker_in

__all__ = ["People", "draw_parts", "read_people"]

_FILE = ("file", "image", "wav", "path", "recording")
_PERSON = ("person", "identity", "speaker", "spk_id", "name", "label")


@dataclass(frozen=True)
class People:
    """Files of people.

    Attributes
    ----------
    ids : dict from person to list of id
        An id begins with its person and a slash; what stands before the file is the session.
    files : dict from id to path

    Examples
    --------
    >>> people = People({"ann": ["ann/1.jpg"]}, {"ann/1.jpg": Path("images/ann/1.jpg")})
    >>> print(people.listed(people.ids["ann"]))
    ann/1.jpg images/ann/1.jpg
    """

    ids: Mapping[str, Sequence[str]]
    files: Mapping[str, Path]

    def listed(self, ids: Iterable[str]) -> str:
        """Lines of an id and its file, as `qmargin extract` reads them."""
        return "".join(f"{name}\t{self.files[name]}\n" for name in ids)


def read_people(source: str | Path) -> People:
    """The people of a folder or of a table.

    Parameters
    ----------
    source : path
        A folder of ``<person>/<file>`` or ``<person>/<session>/<file>``, itself or below its
        ``wav/`` or ``images/``. Or a table as
        :func:`~speechbrain_qmargin.tables.read_columns` takes it: a column of files (file, image,
        wav, path or recording) and one of people (person, identity, speaker, spk_id, name or
        label), perhaps one of sessions (session); relative paths are relative to the table.

    Raises
    ------
    FileNotFoundError, ValueError
        Nothing there; a table without those columns, a malformed line, a file twice, names with a
        slash: with file and line.

    Examples
    --------
    >>> table = getfixture("tmp_path") / "people.csv"
    >>> _ = table.write_text("image,person\\na.jpg,ann\\nann/b.jpg,ann\\n")
    >>> read_people(table).ids
    {'ann': ['ann/a.jpg', 'ann/b.jpg']}
    """
    source = Path(source)
    if source.is_dir():
        return _below(source)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such folder or table of people")
    return _table(source)


def _below(folder: Path) -> People:
    root = next((folder / one for one in ("wav", "images") if (folder / one).is_dir()), folder)
    ids, files = defaultdict(list), {}
    read, unread = (*AUDIO_SUFFIXES, *IMAGE_SUFFIXES), (*UNREAD_AUDIO, *UNREAD_IMAGES)
    for one in sorted(files_below(root, read, unread)):
        if one.fault:
            raise ValueError(f"{root / one.name}: {one.fault}")
        if "/" not in one.name:
            raise ValueError(f"{root / one.name} is in no person's folder: {root}/<person>/...")
        ids[speaker_in(one.name)].append(one.name)
        files[one.name] = Path(one.path)
    if not files:
        raise FileNotFoundError(f"{root}: no recordings or images of people, <person>/<file>")
    return People(dict(ids), files)


def _table(path: Path) -> People:
    header, rows = read_columns(path)
    header, places = [name.lower() for name in header], []
    for wanted in (_FILE, _PERSON):
        found = [n for n, cell in enumerate(header) if cell in wanted]
        if len(found) != 1:
            raise ValueError(
                f"{path}:1: {len(found)} columns are called {', '.join(wanted)}; one is wanted"
            )
        places += found
    session_at = header.index("session") if "session" in header else None
    ids, files = defaultdict(list), {}
    for number, row in rows:
        where, (file, person) = f"{path}:{number}", (row[place] for place in places)
        session = "" if session_at is None else row[session_at]
        if not file or not person or "/" in person + session:
            raise ValueError(f"{where}: a file and a person without a slash are wanted, got {row}")
        name = _id(file, person, session)
        if name in files:
            raise ValueError(f"{where}: {name} is there twice")
        ids[composed_name(person)].append(name)
        files[name] = path.parent / file
    if not files:
        raise ValueError(f"{path}: nobody in it")
    return People(dict(ids), files)


def _id(file: str, person: str, session: str) -> str:
    parts = PurePosixPath(file.replace("\\", "/")).parts
    if session:
        return f"{person}/{session}/{parts[-1]}"
    if person in parts[:-1]:  # from the person on
        return "/".join(parts[parts.index(person) :])
    return "/".join((person, *(part for part in parts if part not in ("/", "..", "."))))


def draw_parts(
    ids: Mapping[str, Sequence[str]], counts: Mapping[str, int], seed: int = 0
) -> tuple[dict[str, list[str]], list[str]]:
    """Draw people into parts that share nobody.

    Parameters
    ----------
    ids : mapping from person to ids
        A person with a single one has no pair, and stays in the rest.
    counts : mapping from part to its number of people
    seed : int

    Returns
    -------
    dict from part to its people, sorted; and the people of the rest.

    Raises
    ------
    ValueError
        More people than have two, or a part of fewer than two.

    Examples
    --------
    >>> draw_parts({"a": "12", "b": "12", "c": "12", "d": "1"}, {"dev": 2})
    ({'dev': ['a', 'c']}, ['b', 'd'])
    """
    able = sorted(person for person, names in ids.items() if len(names) > 1)
    if min(counts.values()) < 2 or sum(counts.values()) > len(able):
        asked = " and ".join(f"{count} for {part}" for part, count in counts.items())
        raise ValueError(
            f"{asked}: give at least 2 people to each, and together no more than there are with "
            f"two files or more, {len(able)} of {len(ids)}"
        )
    drawn = [able[row] for row in np.random.default_rng(seed).permutation(len(able))]
    parts, start = {}, 0
    for part, count in counts.items():
        parts[part] = sorted(drawn[start : start + count])
        start += count
    taken = set(drawn[:start])
    return parts, [person for person in ids if person not in taken]
