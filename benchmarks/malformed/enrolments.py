"""Files of people who are enrolled."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from malformed.kinds import Kind, content, cut, error, value
from speechbrain_qmargin.verify.people import People

TRIGGER = (
    "CREATE TRIGGER evil AFTER INSERT ON recordings BEGIN UPDATE recordings SET embedding = "
    "(SELECT embedding FROM recordings WHERE person = 1) WHERE id = NEW.id; END"
)


def enrolments(folder: Path) -> Iterator[Kind]:
    rows = np.random.default_rng(5).normal(size=(2, 16)).astype(np.float32)

    def made(name: str, statement: str = "", *given: object) -> Path:
        path = folder / name
        path.unlink(missing_ok=True)
        with closing(People(path)) as people:
            people.enrol("Ann", rows, "e")
            people.enrol("Bob", rows + 1, "e")
        if statement:
            with closing(sqlite3.connect(path)) as db, db:
                db.execute(statement, given)
        return path

    def asked(path: Path) -> np.ndarray:
        with closing(People(path)) as people:
            return people.embeddings("Ann", "e")

    yield value("as written", lambda: asked(made("whole.sqlite")), rows)
    flipped = rows[0].copy()
    flipped.view(np.uint32)[3] ^= 1 << 20
    update = "UPDATE recordings SET {} = ? WHERE id = 1"
    for name, column, put in (
        ("a flipped bit", "embedding", flipped.tobytes()),
        ("half an embedding", "embedding", rows[0].tobytes()[:30]),
        ("text for an embedding", "embedding", "text"),
        ("another time than it was written", "added", "2020-01-01T00:00:00+00:00"),
    ):
        path = made(f"{name.replace(' ', '_')}.sqlite", update.format(column), put)
        yield error(name, lambda path=path: asked(path), path.name, "Ann")
    for name, statement in (
        ("a trigger", TRIGGER),
        ("a view", "CREATE VIEW v AS SELECT 1"),
        ("another table", "CREATE TABLE t (x)"),
        ("a newer version", "PRAGMA user_version=2"),
        ("another application's number", "PRAGMA application_id=7"),
    ):
        path = made(f"{name.replace(' ', '_')}.sqlite", statement)
        yield error(name, lambda path=path: asked(path), path.name)
    path = content(folder / "text.sqlite", "ann,0.5\n" * 100)
    yield error("text", lambda: asked(path), "text.sqlite")
    half = cut(made("half.sqlite"), 0.4)
    yield error("half of the file", lambda: asked(half), "half.sqlite")
