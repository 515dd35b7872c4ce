"""The rooms of CONTRIBUTING: imports go down its list, and no private name leaves its module."""

import ast
import functools
import re
from graphlib import TopologicalSorter

from scripts import ROOT

PACKAGE = ROOT / "speechbrain_qmargin"


def rooms():
    """Room to its place in the list, 0 at the top."""
    (_, text) = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The rooms")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = [re.findall(r"`(\w+)(?:/|\.py)`", row) for row in rows]
    return {room: place for place, row in enumerate(named) for room in row}


@functools.cache
def imports(file):
    """Module and names of every import of ours, and its line."""
    return [
        (node.module, [alias.name for alias in node.names], node.lineno)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name)
    ]


def test_imports_go_down_the_list():
    place = rooms()
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert found - {"__init__", "__pycache__", "py"} <= set(place)
    up = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module, names, line in imports(file) if room in place else ():
            below = module.split(".")[1:2] or names
            up += [f"{file}:{line}" for one in below if place.get(one, 99) < place[room]]
    assert up == []


def test_no_circle_of_imports():
    modules = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = file
    needed = {name: set() for name in modules}
    for name, file in modules.items():
        for module, names, _ in imports(file):
            below = {f"{module}.{one}" for one in names} & set(modules)
            needed[name] |= below or {module}
    TopologicalSorter(needed).prepare()  # a CycleError names the circle


def test_loss_and_scoring_know_nothing_of_each_other():
    for room, other in (("loss", "scoring"), ("scoring", "loss"), ("scoring", "head")):
        for file in (PACKAGE / room).rglob("*.py"):
            assert not [
                m for m, *_ in imports(file) if f"{m}.".startswith(f"{PACKAGE.name}.{other}.")
            ]


def test_private_names_stay_in_their_module():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    private = [
        f"{file}:{line} {name}"
        for file in files
        for _, names, line in imports(file)
        for name in names
        if name.startswith("_") and not name.startswith("__")
    ]
    assert private == []
