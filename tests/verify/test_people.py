"""The file of enrolments: atomic, of one encoder a person, and forgetful."""

import json
import re
import sqlite3
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import numpy as np
import pytest

from speechbrain_qmargin.verify.people import (
    NotEnrolled,
    People,
    StorageFault,
    checked_name,
    is_enrolments,
)
from speechbrain_qmargin.verify.speech_quality import SpeechQuality

QUALITY = SpeechQuality(2.0, 1.5, -float("inf"), 0.0, 20.0, 0.8, 8.0)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "people.sqlite"


def rows(seed, count=3, size=192):
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


def test_what_is_enrolled_comes_back_exactly_also_in_another_process(file):
    people = People(file)
    people.enrol("Ann", rows(0), "e1", [QUALITY] * 3)
    people.enrol("Ann", rows(1, 1), "e1")
    people.enrol("Bob", rows(2), "e2")
    assert file.stat().st_mode & 0o077 == 0  # readable by its owner alone
    other = People(file)
    np.testing.assert_array_equal(
        other.embeddings("Ann", "e1"), np.concatenate([rows(0), rows(1, 1)])
    )
    assert [(one.name, one.recordings, one.encoder) for one in other.list()] == [
        ("Ann", 4, "e1"),
        ("Bob", 3, "e2"),
    ]
    assert list(other.everybody("e2")) == ["Bob"]
    held = json.loads(json.dumps(other.export("Ann"), allow_nan=False))
    assert held["recordings"][0]["quality"]["voiced"] == 0.8
    assert held["recordings"][0]["quality"]["level"] is None
    np.testing.assert_array_equal(np.float32(held["recordings"][3]["embedding"]), rows(1, 1)[0])


def test_templates_of_another_encoder_are_refused_with_what_to_do(file):
    people = People(file)
    people.enrol("Ann", rows(0), "e1")
    for use in (lambda: people.embeddings("Ann", "e2"), lambda: people.enrol("Ann", rows(1), "e2")):
        with pytest.raises(ValueError, match=r"enrolled with the encoder e1, and this is e2.*anew"):
            use()
    with pytest.raises(ValueError, match="embeddings of 192 values are there, these have 8"):
        people.enrol("Ann", rows(1, 2, 8), "e1")
    assert len(people.embeddings("Ann", "e1")) == 3
    people.enrol("Ann", rows(1), "e2", replace=True)
    np.testing.assert_array_equal(people.embeddings("Ann", "e2"), rows(1))


def test_an_enrolment_is_whole_or_not_at_all(file):
    people = People(file)
    people.enrol("Ann", rows(0), "e1")
    bad = rows(1)
    bad[2, 5] = np.nan
    for embeddings in (bad, np.zeros((1, 192)), rows(0)[:0], rows(0)[0]):
        with pytest.raises(ValueError, match="embedding"):
            people.enrol("Bob", embeddings, "e1")
    with pytest.raises(ValueError, match="zip"):  # a quality for every recording
        people.enrol("Bob", rows(1), "e1", [QUALITY], replace=True)
    assert [one.name for one in people.list()] == ["Ann"]


def test_flipped_bits_of_an_enrolment_are_noticed(file):
    """SQLite gives them as they are: a value of another size, a name that is somebody else's."""
    people = People(file)
    people.enrol("Ann", rows(0), "e1", [QUALITY] * 3)
    people.enrol("Bob", rows(1), "e1", [QUALITY] * 3)
    people.close()
    value = rows(0)[1].copy()
    value.view(np.uint32)[7] ^= 1 << 21
    for statement, given, name in (
        ("UPDATE recordings SET embedding = ? WHERE id = 2", value.tobytes(), "Ann"),
        ("UPDATE recordings SET person = 2 WHERE id = ?", 1, "Bob"),
        ("UPDATE people SET name = ? WHERE id = 1", "Amn", "Amn"),
        ("UPDATE recordings SET quality = ? WHERE id = 5", "{}", "Bob"),
    ):
        whole = file.read_bytes()
        with sqlite3.connect(file) as db:
            db.execute(statement, (given,))
        db.close()
        people = People(file)
        said = f"{file}: the embeddings of {name} are damaged; enrol them anew"
        for ask in (lambda p, n=name: p.embeddings(n, "e1"), lambda p: p.everybody("e1"),
                    lambda p, n=name: p.export(n)):  # fmt: skip
            with pytest.raises(StorageFault, match=re.escape(said)):
                ask(people)
        people.close()
        file.write_bytes(whole)


def test_killed_in_the_middle_of_an_enrolment_nothing_of_it_is_there(file):
    People(file).enrol("Ann", rows(0), "e1")
    script = """
        import os, sys, sqlite3
        db = sqlite3.connect(sys.argv[1], isolation_level=None)
        db.execute("PRAGMA cache_size=1")  # pages go to the file before the transaction ends
        db.execute("BEGIN IMMEDIATE")
        db.execute("INSERT INTO people(name, added) VALUES ('Bob', '')")
        db.executemany("INSERT INTO recordings(person, encoder, embedding, quality, added, "
                       "checksum) VALUES (2, 'e1', ?, '', '', 0)", [(os.urandom(4096),)] * 500)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(file)], check=False)
    assert done.returncode == -9
    assert file.with_name(f"{file.name}-journal").stat().st_size > 0  # it was under way
    people = People(file)
    assert [one.name for one in people.list()] == ["Ann"]
    np.testing.assert_array_equal(people.embeddings("Ann", "e1"), rows(0))


def test_an_erased_person_leaves_nothing_in_any_byte(file):
    people = People(file)
    secret, kept = rows(7, 40), rows(8, 40)
    for take in range(40):  # in turn, so that they share pages
        people.enrol("Zacharias Grepable", secret[take : take + 1], "e1", [QUALITY])
        people.enrol("Ann", kept[take : take + 1], "e1", [replace(QUALITY, seconds=4.0)])

    def bytes_of_all():
        return b"".join(one.read_bytes() for one in file.parent.iterdir())  # -wal, -journal too

    pieces = [b"Grepable", *(row[:16].tobytes() for row in secret)]
    assert all(piece in bytes_of_all() for piece in pieces)
    before = file.stat().st_size
    assert people.delete("Zacharias Grepable") == 40
    left = bytes_of_all()
    assert not any(piece in left for piece in pieces)
    assert file.stat().st_size < 0.7 * before
    np.testing.assert_array_equal(people.embeddings("Ann", "e1"), kept)
    with pytest.raises(NotEnrolled, match="nobody is enrolled as 'Zacharias"):
        people.delete("Zacharias Grepable")
    people.enrol("Ann", kept[:1], "e1", replace=True)  # replaced is overwritten
    assert kept[30, :16].tobytes() not in bytes_of_all()


def test_many_threads_and_connections_lose_nothing(file):
    shared = People(file)

    def enrol(number):
        own = shared if number % 2 else People(file)
        for take in range(5):
            own.enrol(f"person {number}", rows(10 * number + take, 1), "e1")

    threads = [threading.Thread(target=enrol, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = People(file).everybody("e1")
    for number in range(6):
        expected = np.concatenate([rows(10 * number + take, 1) for take in range(5)])
        np.testing.assert_array_equal(found[f"person {number}"], expected)


def test_a_change_by_another_connection_is_seen(file):
    one, other = People(file), People(file)
    before = one.version()
    assert one.version() == before
    other.enrol("Ann", rows(0), "e1")
    assert one.version() != before


def test_a_file_that_may_only_be_read_verifies(file, monkeypatch):
    people = People(file)
    people.enrol("Ann", np.ones((1, 4)), "encoder 1")
    people.close()
    connect = sqlite3.connect  # as SQLite opens what it may not write; root may write everything

    def to_read(path, **settings):
        return connect(f"{path.as_uri()}?mode=ro", uri=True, **settings)

    monkeypatch.setattr(sqlite3, "connect", to_read)
    people = People(file)
    np.testing.assert_array_equal(people.embeddings("Ann", "encoder 1"), np.ones((1, 4)))
    with pytest.raises(StorageFault, match="readonly"):
        people.enrol("Bob", np.ones((1, 4)), "encoder 1")
    with pytest.raises(StorageFault, match="readonly"):
        people.delete("Ann")
    assert [one.name for one in people.list()] == ["Ann"]
    people.close()


def test_another_file_is_refused(file):
    file.write_text("no database, but long enough to be looked at " * 40)
    with pytest.raises(ValueError, match="no file of enrolments"):
        People(file)
    file.unlink()
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE recipes(x)")
    with pytest.raises(ValueError, match="a database of something else"):
        People(file)
    file.unlink()
    People(file).close()
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version=7")
    with pytest.raises(ValueError, match="of version 7, written by a newer release"):
        People(file)


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 201, "a\x00", None, 3])
def test_a_name_is_a_line_of_text(name):
    with pytest.raises(ValueError, match="name"):
        checked_name(name)


@pytest.mark.parametrize("name", [
    "Ann\u200b", "\u202eAnn", "A\u00adnn", "\ufeffAnn", "\u2060Ann",
    "A\u200dnn", "An\u0302\u200cn", "Ann\u200d", "Ann\ufe0f", "Ann\U000e0100",  # of other scripts
    "Ann\u3164", "Ann\u115f", "Ann\uffa0", "A\u034fnn", "Ann\u2800", "Ann\u17b4", "Ann\ufff0",
    "\u0645\u06cc\u200c", "\u200c\u0645",  # that join nothing
])  # fmt: skip
def test_names_that_only_look_like_others_are_refused(name):
    with pytest.raises(ValueError, match=r"\\[uUx][0-9a-f]+.* has invisible characters"):
        checked_name(name)


@pytest.mark.parametrize("name", [
    "\u0645\u06cc\u200c\u062e",  # Persian
    "\u0d15\u0d41\u0d2e\u0d3e\u0d30\u0d4d\u200d",  # Malayalam: after a virama it shows
    "\u8fbb\U000e0100 \u592a\u90ce",  # Japanese: a letter's shape
    "Zo\u00eb d\u2019Arc-\u0141\u00f3d\u017a",
])  # fmt: skip
def test_scripts_are_spelt_with_joiners_and_selectors(name):
    assert checked_name(name) == name


def test_whatever_space_is_between_words_it_is_one_name(file):
    people = People(file)
    people.enrol("Ann\u00a0Example", rows(0), "e1")
    people.enrol("Ann  Example", rows(1), "e1")
    assert [(one.name, one.recordings) for one in people.list()] == [("Ann Example", 6)]
    assert people.export("\u3000Ann\u2009Example")["name"] == "Ann Example"


@pytest.mark.parametrize("name", ["Ann\u200b", "Ann\u00a0\u00a0Example", "a/b"])
def test_who_has_a_name_that_is_refused_now_can_be_erased(file, name):
    """What names may be changes with this package and with Python's Unicode."""
    people = People(file)
    people.enrol("Ann Example", rows(0), "e1")
    people.enrol("Eve", rows(1), "e1")
    with sqlite3.connect(file) as db:
        db.execute("UPDATE people SET name = ? WHERE name = 'Eve'", (name,))
    db.close()
    assert people.delete(name) == 3
    assert [one.name for one in people.list()] == ["Ann Example"]
    for unknown in (f"{name}x", "\udcff", "x" * 300):
        with pytest.raises(NotEnrolled, match="nobody is enrolled as"):
            people.embeddings(unknown, "e1")


def test_an_enrolment_says_how_many_recordings_there_are_now(file):
    people = People(file)
    counts = [people.enrol("Ann", rows(number, 2), "e1") for number in (0, 1)]
    assert [*counts, people.enrol("Bob", rows(2), "e1")] == [2, 4, 3]
    assert people.enrol("Ann", rows(3), "e2", replace=True) == 3
    assert people.delete("Ann") == 3


def test_what_is_there_is_looked_at_in_the_same_transaction(file):
    """Or two who enrol one recording at once would both find it new."""
    people, other = People(file), People(file)
    people.enrol("Ann", rows(0), "e1")
    other._db.execute("PRAGMA busy_timeout=1")

    def refuse(held):
        np.testing.assert_array_equal(held, rows(0))
        with pytest.raises(StorageFault, match="locked"):
            other.enrol("Ann", rows(2), "e1")
        raise ValueError("it is enrolled already")

    with pytest.raises(ValueError, match="enrolled already"):
        people.enrol("Ann", rows(1), "e1", refuse=refuse)
    np.testing.assert_array_equal(people.embeddings("Ann", "e1"), rows(0))
    for name, instead in (("Bob", False), ("Ann", True)):
        held = []
        people.enrol(name, rows(1), "e1", replace=instead, refuse=held.append)
        assert [one.shape for one in held] == [(0, 192)]


def test_no_write_ahead_log_keeps_what_is_deleted(file):
    """Tools that copy a database while it is used switch it to one, and hold on to it."""
    People(file).close()
    db = sqlite3.connect(file, isolation_level=None)
    assert db.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
    people = People(file)
    people.enrol("Zacharias Grepable", rows(7), "e1")
    people.enrol("Ann", rows(8), "e1")

    def held():
        kept = b"".join(one.read_bytes() for one in file.parent.iterdir())
        return [
            piece in kept for piece in (b"Grepable", *(rows(n)[0, :16].tobytes() for n in (7, 8)))
        ]

    people.enrol("Ann", rows(9), "e1", replace=True)
    assert held() == [True, True, False]
    people.delete("Zacharias Grepable")
    assert held() == [False, False, False]
    np.testing.assert_array_equal(people.embeddings("Ann", "e1"), rows(9))
    people.enrol("Bob", rows(7), "e1")
    people._db.execute("PRAGMA busy_timeout=1")
    db.execute("BEGIN")
    db.execute("SELECT count(*) FROM people").fetchone()  # reads on, as of now
    with pytest.raises(StorageFault, match=r"Bob is deleted, .*: another program holds on to"):
        people.delete("Bob")
    db.close()


def test_one_name_however_it_was_typed(file):
    people = People(file)
    people.enrol("Zoe\u0308", rows(0), "e1")
    assert len(people.embeddings("Zo\u00eb ", "e1")) == 3


@pytest.mark.parametrize("name", ["a/b", ".", ".."])
def test_names_are_those_that_a_url_can_hold(name):
    with pytest.raises(ValueError, match="part of a URL"):
        checked_name(name)


def test_a_database_is_told_from_weights(file, tmp_path):
    assert is_enrolments(file)  # to be
    assert not is_enrolments(tmp_path / "encoder")
    People(file).close()
    assert is_enrolments(file)
    weights = tmp_path / "backbone.pth"
    weights.write_bytes(b"PK\x03\x04 weights")
    assert not is_enrolments(weights)


TRIGGER = (
    "CREATE TRIGGER evil AFTER INSERT ON recordings BEGIN UPDATE recordings SET embedding = "
    "(SELECT embedding FROM recordings WHERE person = 1) WHERE id = NEW.id; END"
)


@pytest.mark.parametrize("statement", [TRIGGER, "CREATE VIEW v AS SELECT 1", "CREATE TABLE t (x)",
                                       "CREATE INDEX i ON people(added)"])  # fmt: skip
def test_a_file_with_more_in_it_is_refused(file, statement):
    """The trigger gives everybody who is enrolled the voice of the first."""
    People(file).enrol("Eve", rows(0), "e1")
    with sqlite3.connect(file) as db:
        db.execute(statement)
    db.close()
    with pytest.raises(ValueError, match="not as this package writes it; it has other tables, or"):
        People(file)


def test_a_damaged_file_is_named_whatever_is_asked_of_it(file, tmp_path):
    people = People(file)
    for n in range(4):
        people.enrol(f"a{n}", rows(n), "e1", [QUALITY] * 3)
    people.close()
    whole, random, seen = file.read_bytes(), np.random.default_rng(0), {}
    broken = tmp_path / "broken.sqlite"
    asks = {
        "list": People.list,
        "embeddings": lambda people: people.embeddings("a1", "e1"),
        "everybody": lambda people: people.everybody("e1"),
        "export": lambda people: people.export("a1"),
        "enrol": lambda people: people.enrol("new", rows(9), "e1"),
        "delete": lambda people: people.delete("a2"),
    }
    for _ in range(60):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(100, len(data), 300)] = random.integers(0, 256, 300)
        broken.write_bytes(data.tobytes())
        tmp_path.joinpath("broken.sqlite-journal").unlink(missing_ok=True)
        try:
            people = People(broken)
        except (ValueError, StorageFault) as error:
            seen[f"open {len(seen)}"] = str(error)
            continue
        for name, ask in asks.items():
            try:
                ask(people)
            except StorageFault as error:
                seen[f"{name} {len(seen)}"] = str(error)
            except ValueError:  # a name, an encoder that is another now
                pass
        people.close()
    assert all(str(broken) in said for said in seen.values())
    assert {what.split()[0] for what in seen} >= {"open", "list", "embeddings", "everybody"}


def test_an_embedding_that_is_not_what_was_written_is_named(file):
    for value in (b"", b"123", np.full(192, np.nan, "<f4").tobytes(), "text",
                  np.full(192, 1e38, "<f4").tobytes(), np.zeros(192, "<f4").tobytes()):  # fmt: skip
        file.unlink(missing_ok=True)
        people = People(file)
        people.enrol("Ann", rows(0), "e1")
        with sqlite3.connect(file) as db:
            db.execute("UPDATE recordings SET embedding = ? WHERE id = 2", (value,))
        db.close()
        for ask in (lambda p: p.embeddings("Ann", "e1"), lambda p: p.everybody("e1")):
            with pytest.raises(StorageFault, match="the embeddings of Ann are damaged"):
                ask(people)
        people.enrol("Ann", rows(1), "e1", replace=True)
        np.testing.assert_array_equal(people.embeddings("Ann", "e1"), rows(1))
        people.close()
