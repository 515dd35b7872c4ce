"""Every command that installs an extra can be followed as it stands."""

import re
from configparser import ConfigParser

import pytest
from scripts import ROOT

from speechbrain_qmargin.extras import require

PLACES = ("speechbrain_qmargin", "recipes", "benchmarks", "hparams", "docs", "tests")
FILES = [
    *(file for place in PLACES for file in sorted((ROOT / place).rglob("*.*"))),
    *ROOT.glob("*.md"),
]
TEXTS = {f: f.read_text(encoding="utf-8") for f in FILES if f.suffix in (".py", ".md", ".yaml")}


def extras():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return set(config["options.extras_require"])


def test_extras_that_are_named_exist():
    named = {
        extra
        for text in TEXTS.values()
        for extras in re.findall(r"""extra="(\w+)"|'\.\[([\w,]+)\]'""", text)
        for extra in "".join(extras).split(",")
    }
    assert {"report", "voxceleb", "demo"} <= named <= extras()


def test_the_package_is_not_said_to_be_on_an_index():
    said = re.compile(r"pip install [^\n]*speechbrain_qmargin" + re.escape("["))
    assert [str(file) for file, text in TEXTS.items() if said.search(text)] == []


def test_the_message_says_what_is_missing_and_how_it_is_had():
    wanted = r"^plots: .*'no_such'; .* pip install -e '\.\[report\]'$"
    with pytest.raises(ImportError, match=wanted) as raised:
        require("math", "no_such", why="plots", extra="report")
    assert raised.value.name == "no_such"
