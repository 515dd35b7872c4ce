"""Enrolments in one SQLite file: whole or not at all, of one encoder each, and erased for good.

A person has one embedding for each recording that was enrolled, with the digest of the encoder that
made it and what was measured on the recording. No recording, file name or other trace of its origin
is kept.

An enrolment is one transaction, on the disk before :meth:`People.enrol` returns
(``synchronous=EXTRA``, a rollback journal). What is deleted is overwritten (``secure_delete``), and
the file is built anew (``VACUUM``), so that nothing of a person is left in it; copies of the file,
backups and the blocks that a file system or a drive has freed are beyond this module.

SQLite does not notice flipped bits in what it keeps: each recording has a checksum (CRC-32) of
whose it is and of all that is held of it, which every reader of embeddings compares.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from speechbrain_qmargin.files import json_values
from speechbrain_qmargin.tables import composed_name

__all__ = [
    "NotEnrolled",
    "OtherEncoder",
    "People",
    "Person",
    "StorageFault",
    "checked_name",
    "is_enrolments",
]

_FORMAT = 0x516D6567  # "Qmeg": SQLite's application_id
_VERSION = 1
_SCHEMA = """
CREATE TABLE people (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    added TEXT NOT NULL
);
CREATE TABLE recordings (
    id INTEGER PRIMARY KEY,
    person INTEGER NOT NULL REFERENCES people(id) ON DELETE CASCADE,
    encoder TEXT NOT NULL,
    embedding BLOB NOT NULL,
    quality TEXT NOT NULL,
    added TEXT NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE INDEX recordings_of ON recordings(person);
"""
_STATEMENTS = [one.strip() for one in _SCHEMA.split(";") if one.strip()]
_HELD = "encoder, embedding, quality, added, checksum"
MAX_NAME = 200
_UNSEEN = re.compile(  # Unicode's Default_Ignorable_Code_Point, and the blank of Braille
    r"[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# some scripts are spelt with these: Persian and those of India with joiners, Mongolian and names in
# Chinese characters with selectors of a letter's shape
_JOINER = re.compile(r"[\u200c\u200d]")
_SELECTOR = re.compile(r"[\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")


class NotEnrolled(ValueError):
    """Nobody of that name.

    Examples
    --------
    >>> people = People(getfixture("tmp_path") / "people.sqlite")
    >>> people.delete("Bob")
    Traceback (most recent call last):
    speechbrain_qmargin.verify.people.NotEnrolled: nobody is enrolled as 'Bob'
    >>> people.close()
    """


class OtherEncoder(ValueError):
    """Templates of another encoder than the one that is loaded.

    Examples
    --------
    >>> people = People(getfixture("tmp_path") / "people.sqlite")
    >>> _ = people.enrol("Ann", np.ones((1, 2)), "encoder 1")
    >>> people.embeddings("Ann", "encoder 2")
    Traceback (most recent call last):
    speechbrain_qmargin.verify.people.OtherEncoder: Ann is enrolled with the encoder encoder 1, ...
    >>> people.close()
    """


class StorageFault(OSError):
    """The file of enrolments cannot be read or written: damaged, locked, or the disk is full.

    Examples
    --------
    >>> People(getfixture("tmp_path"))      # a folder
    Traceback (most recent call last):
    speechbrain_qmargin.verify.people.StorageFault: ...: unable to open database file
    """


@dataclass(frozen=True)
class Person:
    """Somebody who is enrolled.

    Attributes
    ----------
    name : str
    recordings : int
    encoder : str
        The digest of the encoder of all of them.
    added : str
        When the person was enrolled first, UTC.

    Examples
    --------
    >>> people = People(getfixture("tmp_path") / "people.sqlite")
    >>> _ = people.enrol("Ann", np.ones((2, 4)), "encoder 1")
    >>> (ann,) = people.list()
    >>> ann.name, ann.recordings, ann.encoder
    ('Ann', 2, 'encoder 1')
    >>> people.close()
    """

    name: str
    recordings: int
    encoder: str
    added: str


def checked_name(name: str) -> str:
    """A person's name in Unicode's normal form C, its words one plain space apart.

    Raises
    ------
    ValueError
        No text, longer than 200 characters, with control or invisible characters or some that were
        lost on the way, or none that the service's URLs could hold.

    Examples
    --------
    >>> checked_name(" Ann\\u00a0 Example ")
    'Ann Example'
    """
    if not isinstance(name, str):
        raise ValueError(f"a name is text, not {type(name).__name__}")
    name = _spaced(name)
    if not name or len(name) > MAX_NAME:
        raise ValueError(f"a name has 1 to {MAX_NAME} characters; this has {len(name)}")
    if "/" in name or name in (".", ".."):
        raise ValueError(f"the name {name!r} could not be part of a URL: no slash, not . or ..")
    bad = [letter for letter in name if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")]
    if bad:
        raise ValueError(f"the name {name!r} has control characters")
    if "\ufffd" in name:  # what is put for it, as by the service's URLs; for e9 as for e8
        raise ValueError(f"the name {name!a} was not written in UTF-8: a part of it is lost")
    if any(_hides(name, place) for place in range(len(name))):
        raise ValueError(f"the name {name!a} has invisible characters: it could look like another")
    return name


def _spaced(name: str) -> str:
    """A name with whatever space is between its words as one plain space."""
    words = "".join(
        " " if unicodedata.category(one) == "Zs" else one for one in composed_name(name)
    )
    return re.sub(" +", " ", words.strip())


def _hides(name: str, place: int) -> bool:
    """Whether a character is invisible, and not one that its script is spelt with."""
    one = name[place]
    if unicodedata.category(one) != "Cf" and not _UNSEEN.match(one):
        return False
    if not _JOINER.match(one) and not _SELECTOR.match(one):
        return True
    if _JOINER.match(one) and place and unicodedata.combining(name[place - 1]) == 9:
        return False  # after a virama, also at a word's end
    before = [unicodedata.category(other) for other in name[:place] if not _UNSEEN.match(other)]
    after = name[place + 1 : place + 2]
    while before and before[-1] in ("Mn", "Mc"):
        before.pop()
    spelt = before[-1:] in (["Lo"], ["So"])  # a letter without capitals, or a sign
    return not spelt or bool(_JOINER.match(one) and not after.strip())


def is_enrolments(path: str | Path) -> bool:
    """Whether a file is a database, or will be one: empty, or not there and named as one.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> is_enrolments(folder / "people.sqlite"), is_enrolments(folder / "people.txt")
    (True, False)
    >>> _ = (folder / "list.sqlite").write_text("ann.wav")
    >>> is_enrolments(folder / "list.sqlite")
    False
    """
    path = Path(path)
    if not path.is_file():
        return path.suffix == ".sqlite"
    with path.open("rb") as stream:
        return stream.read(16) in (b"", b"SQLite format 3\0")


class People:
    """Who is enrolled. Calls from several threads and processes are safe.

    Parameters
    ----------
    path : path
        Made if it is not there, readable by its owner alone. One that may only be read can be
        opened; enrolling and deleting are then a StorageFault.

    Raises
    ------
    ValueError
        Another file, or one of a newer version.
    StorageFault
        The file cannot be opened.

    Examples
    --------
    >>> people = People(getfixture("tmp_path") / "people.sqlite")
    >>> _ = people.enrol("Ann", np.eye(2, dtype=np.float32), "encoder 1")
    >>> people.list()[0].recordings
    2
    >>> people.delete("Ann"), people.list()
    (2, [])
    >>> people.close()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self.path.touch(mode=0o600)
        try:
            self._db = sqlite3.connect(
                self.path, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._db.execute("SELECT count(*) FROM sqlite_master")
        except sqlite3.OperationalError as error:
            raise StorageFault(f"{self.path}: {error}") from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # in a message of SQLite's
            raise ValueError(f"{self.path}: no file of enrolments ({error})") from None
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        run = self._db.execute
        run("PRAGMA secure_delete=ON")
        run("PRAGMA synchronous=EXTRA")
        run("PRAGMA foreign_keys=ON")
        run("PRAGMA temp_store=MEMORY")
        run("PRAGMA trusted_schema=OFF")
        with self._transaction("DEFERRED"):  # a file that may only be read is opened too
            empty = self._is_empty()
        if not empty:
            return
        with self._transaction("IMMEDIATE"):
            if self._is_empty():  # still
                for statement in _STATEMENTS:
                    run(statement)
                run(f"PRAGMA application_id={_FORMAT}")
                run(f"PRAGMA user_version={_VERSION}")

    def _is_empty(self) -> bool:
        """Whether nobody has written to the file yet; what is not of enrolments is refused."""
        run = self._db.execute
        (kind,), (version,) = (
            run(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        schema = run("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        if not schema and not kind:
            return True
        if kind != _FORMAT:
            raise ValueError(f"{self.path}: a database of something else, not of enrolments")
        if version != _VERSION:
            raise ValueError(
                f"{self.path}: of version {version}, written by a newer release; this reads "
                f"{_VERSION}"
            )
        if sorted(sql for (sql,) in schema) != sorted(_STATEMENTS):
            raise ValueError(  # a trigger may put one person's embedding in another's place
                f"{self.path}: not as this package writes it; it has other tables, or triggers "
                "that would act on enrolments"
            )
        return False

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The database in the hands of one thread; what it cannot do is a StorageFault."""
        with self._lock:
            try:
                yield self._db
            except (sqlite3.Error, UnicodeDecodeError) as error:
                raise StorageFault(f"{self.path}: {error}") from None

    @contextmanager
    def _transaction(self, lock: str) -> Iterator[sqlite3.Connection]:
        """One transaction, committed at the end or undone; IMMEDIATE: to write."""
        with self._reading() as db:
            db.execute(f"BEGIN {lock}")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # some faults have undone it
                    db.execute("ROLLBACK")
                raise

    def _empty_log(self) -> None:
        """Bring into the file what a write-ahead log holds, if other tools have given it one.

        Until then the log, or the file behind it, has what is deleted.
        """
        (busy, *_) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise sqlite3.OperationalError("another program holds on to its write-ahead log")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    # ---------------------------------------------------------------- in

    def enrol(
        self,
        name: str,
        embeddings: np.ndarray,
        encoder: str,
        qualities: Sequence[Any] | None = None,
        replace: bool = False,
        refuse: Callable[[np.ndarray], None] | None = None,
    ) -> int:
        """Add recordings to a person, who is made if not there: all of them or none.

        Parameters
        ----------
        name : str
        embeddings : float array [n, D]
            Of the encoder, not of unit length.
        encoder : str
            Its digest.
        qualities : sequence of dataclass, optional
            What was measured on each recording.
        replace : bool
            Take the place of what was enrolled, whatever encoder that was of.
        refuse : callable, optional
            Called with the person's embeddings that are there, float32 [n, D], while nobody else
            can add any; what it raises undoes everything.

        Returns
        -------
        int
            How many recordings of the person there are now.

        Raises
        ------
        ValueError
            Values that are not finite, no recording, templates of another encoder or size, a name
            that is none.
        """
        name = checked_name(name)
        rows = np.ascontiguousarray(embeddings, dtype="<f4")
        if rows.ndim != 2 or not len(rows):
            raise ValueError(f"embeddings {rows.shape}; [recordings, D] is wanted, one at least")
        if not _usable(rows):
            raise ValueError("an embedding is zero or not finite, or its length is")
        said = [json.dumps(json_values(one)) for one in qualities or []] or ["{}"] * len(rows)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self._transaction("IMMEDIATE") as db:
            try:
                person, name = self._person(name)
            except NotEnrolled:
                run = db.execute("INSERT INTO people(name, added) VALUES (?, ?)", (name, now))
                person = run.lastrowid
            if replace:
                db.execute("DELETE FROM recordings WHERE person = ?", (person,))
            self._refuse_other(person, name, encoder, rows.shape[1])
            if refuse is not None:
                held = self._held(person)
                refuse(self._matrix(name, held) if held else rows[:0])
            db.executemany(
                f"INSERT INTO recordings(person, {_HELD}) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (person, *held, _checksum(name, *held))
                    for row, quality in zip(rows, said, strict=True)
                    for held in [(encoder, row.tobytes(), quality, now)]
                ],
            )
            count = self._count(person)
        if replace:
            with self._reading(), suppress(sqlite3.OperationalError):  # or at the next deletion
                self._empty_log()
        return count

    def _count(self, person: int | None) -> int:
        """How many recordings of a person there are."""
        return self._db.execute(
            "SELECT count(*) FROM recordings WHERE person = ?", (person,)
        ).fetchone()[0]

    def _refuse_other(self, person: int | None, name: str, encoder: str, size: int) -> None:
        held = self._db.execute(
            "SELECT encoder, length(embedding) / 4 FROM recordings WHERE person = ? LIMIT 1",
            (person,),
        ).fetchone()
        if held and held[0] != encoder:
            raise OtherEncoder(_other_encoder(name, held[0], encoder))
        if held and held[1] != size:
            raise ValueError(f"{name}: embeddings of {held[1]} values are there, these have {size}")

    def delete(self, name: str) -> int:
        """Erase a person; nothing of them is left in the file.

        Returns
        -------
        int
            How many recordings there were.

        Raises
        ------
        NotEnrolled
            Nobody of that name.
        StorageFault
            The person is deleted, but the file could not be built anew.
        """
        with self._reading():
            with self._transaction("IMMEDIATE") as db:
                person, name = self._person(name)
                count = self._count(person)
                db.execute("DELETE FROM people WHERE id = ?", (person,))
            try:
                self._db.execute("VACUUM")
                self._empty_log()
            except sqlite3.Error as error:
                raise StorageFault(
                    f"{self.path}: {name} is deleted, but the file could not be built anew, and "
                    f"what was there may be left in it: {error}"
                ) from None
            return count

    # ---------------------------------------------------------------- out

    def _person(self, name: str) -> tuple[int, str]:
        """A person's number and name as they are in the file, whatever names are refused now."""
        spellings = (composed_name(name), _spaced(name))
        try:
            found = self._db.execute(
                "SELECT id, name FROM people WHERE name IN (?, ?) ORDER BY name = ? DESC",
                (*spellings, spellings[0]),
            ).fetchone()
        except UnicodeEncodeError:  # of half a character, as names of files may have
            found = None
        if found is None:
            raise NotEnrolled(f"nobody is enrolled as {name!r}")
        return found

    def _held(self, person: int | None) -> list[tuple[Any, ...]]:
        """A person's rows of `_HELD`."""
        return self._db.execute(
            f"SELECT {_HELD} FROM recordings WHERE person = ? ORDER BY id", (person,)
        ).fetchall()

    def version(self) -> tuple[int, int]:
        """What changes with every change of the file, by this connection or by another."""
        with self._reading():
            (others,) = self._db.execute("PRAGMA data_version").fetchone()
            return others, self._db.total_changes

    def __len__(self) -> int:
        with self._reading():
            return self._db.execute("SELECT count(*) FROM people").fetchone()[0]

    def list(self) -> list[Person]:
        """Everybody, by name."""
        with self._reading():
            rows = self._db.execute(
                "SELECT name, count(recordings.id), coalesce(max(encoder), ''), people.added "
                "FROM people LEFT JOIN recordings ON person = people.id "
                "GROUP BY people.id ORDER BY name"
            ).fetchall()
        return [Person(*row) for row in rows]

    def embeddings(self, name: str, encoder: str) -> np.ndarray:
        """A person's embeddings, float32 [recordings, D].

        Raises
        ------
        NotEnrolled
            Nobody of that name.
        OtherEncoder
            They are of another encoder.
        StorageFault
            They are damaged.
        """
        with self._reading():
            person, name = self._person(name)
            rows = self._held(person)
        matrix = self._matrix(name, rows)
        other = [held for held, *_ in rows if held != encoder]
        if other:
            raise OtherEncoder(_other_encoder(name, other[0], encoder))
        return matrix

    def _matrix(self, name: str, rows: Sequence[Sequence[Any]]) -> np.ndarray:
        """The embeddings in a person's rows of `_HELD`, as far as they are what was written."""
        blobs = [row[1] for row in rows]
        sizes = {len(blob) if isinstance(blob, bytes) else 0 for blob in blobs}
        written = all(_checksum(name, *held) == checksum for *held, checksum in rows)
        if written and len(sizes) == 1 and (size := sizes.pop()) and size % 4 == 0:
            matrix = np.frombuffer(b"".join(blobs), dtype="<f4").reshape(len(blobs), -1)
            if _usable(matrix):
                return matrix
        raise StorageFault(
            f"{self.path}: the embeddings of {name} are damaged; enrol them anew (--replace)"
        )

    def everybody(self, encoder: str) -> dict[str, np.ndarray]:
        """The embeddings of all who are enrolled with an encoder, by name, float32 [n, D] each.

        Raises
        ------
        StorageFault
            Somebody's are damaged.
        """
        with self._reading():
            held = _HELD.replace("added", "recordings.added")
            rows = self._db.execute(
                f"SELECT name, {held} FROM recordings JOIN people ON person = people.id "
                "WHERE encoder = ? ORDER BY name, recordings.id",
                (encoder,),
            ).fetchall()
        found: dict[str, list[Any]] = {}
        for name, *row in rows:
            found.setdefault(name, []).append(row)
        everybody = {name: self._matrix(name, theirs) for name, theirs in found.items()}
        sizes = {matrix.shape[1] for matrix in everybody.values()}
        if len(sizes) > 1:
            raise StorageFault(f"{self.path}: damaged, embeddings of {len(sizes)} lengths in it")
        return everybody

    def export(self, name: str) -> dict[str, Any]:
        """All that is held of a person, as plain values for JSON.

        Raises
        ------
        NotEnrolled
            Nobody of that name.
        StorageFault
            What is held is damaged.
        """
        with self._reading():
            person, name = self._person(name)
            (added,) = self._db.execute(
                "SELECT added FROM people WHERE id = ?", (person,)
            ).fetchone()
            rows = self._held(person)
        matrix = self._matrix(name, rows)
        try:
            recordings = [
                {
                    "encoder": encoder,
                    "embedding": embedding,
                    "quality": json.loads(quality),
                    "added": when,
                }
                for (encoder, _, quality, when, _), embedding in zip(
                    rows, matrix.tolist(), strict=True
                )
            ]
        except (ValueError, TypeError, RecursionError):
            raise StorageFault(f"{self.path}: what was measured on {name} is damaged") from None
        return {"name": name, "added": added, "recordings": recordings}


def _checksum(name: Any, encoder: Any, embedding: Any, quality: Any, added: Any) -> int:
    """CRC-32 of a recording's row; of what was not written here too, which it then contradicts."""
    parts = (name, encoder, embedding, quality, added)
    return zlib.crc32(
        b"\0".join(
            one if isinstance(one, bytes) else str(one).encode("utf-8", "replace") for one in parts
        )
    )


def _usable(rows: np.ndarray) -> bool:
    """Whether rows can be brought to unit length in float32."""
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    return bool(((norms > 1e-19) & (norms < 1e19)).all())


def _other_encoder(name: str, held: str, encoder: str) -> str:
    return (
        f"{name} is enrolled with the encoder {held[:16]}, and this is {encoder[:16]}: their "
        "embeddings cannot be compared. Enrol them anew with this one (--replace), or load that one"
    )
