"""Malformed inputs of every kind: what the command of docs/robustness.md feeds and expects."""

import re

import pytest
from malformed import kinds
from scripts import ROOT, load

from speechbrain_qmargin.data import audio

attacks = load("benchmarks/attacks.py")
PAGE = (ROOT / "docs/robustness.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \[.+\| (\d+) \| (\d*) ?\| (\d*) ?\| (\d*) ?\|$", PAGE, re.MULTILINE)
ENDS = ("an error with its name", "the right value", "listed, the rest goes on")


@pytest.mark.parametrize("group", attacks.GROUPS)
def test_every_malformed_input_ends_as_it_should(group, tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "_scaled", set())  # what other tests have had said
    results = attacks.attack(tmp_path, [group])
    assert len(results) > 10
    assert [one for one in results if not one["ok"]] == []
    (row,) = (row for row, name in zip(ROWS, attacks.GROUPS, strict=True) if name == group)
    ends = [one["expected"] for one in results]
    assert [int(n or 0) for n in row] == [len(ends), *(ends.count(end) for end in ENDS)]


def test_the_page_says_how_many_kinds_there_are():
    (kinds_said,) = re.findall(r"tested with (\d+) kinds", PAGE)
    assert int(kinds_said) == sum(int(row[0]) for row in ROWS)


def test_what_is_not_right_is_said(tmp_path, monkeypatch):
    def made(folder):
        yield kinds.error("accepted", lambda: 7, "word")
        yield kinds.error("no name", lambda: int("x"), "x.wav")
        yield kinds.error("a traceback", lambda: [][0], "")
        yield kinds.value("another value", lambda: 7, 8)
        yield kinds.listed("silence", lambda: "", "x.wav")

    monkeypatch.setitem(attacks.GROUPS, "none", made)
    results = attacks.attack(tmp_path, ["none"])
    assert [one["ok"] for one in results] == [False] * 5
    assert attacks.table(results).count("**NOT OK**") == 5
