"""What ``--help`` of the command and its subcommands says."""

import argparse
import importlib
import re
import shlex
from collections import defaultdict

import pytest
from scripts import load

from speechbrain_qmargin.cli import GROUPS, main

COMMANDS = [name for group in GROUPS.values() for name in group]
SCRIPTS = ["recipes/voxceleb/make_trials.py", "recipes/voxceleb/to_flac.py"]
SCRIPTS += ["recipes/face/evaluate_ijb.py"]


def helped(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    return " ".join(capsys.readouterr().out.split())


def parsers_of(group):
    """The subcommands of a group, each with its own parser; what is said of it is its usage."""
    parsers = {}

    def add(name, run, about=""):
        parsers[name] = argparse.ArgumentParser(name, usage=about)
        return parsers[name]

    importlib.import_module(f"speechbrain_qmargin.cli.{group}").configure(add)
    return parsers


def script_parser(script, monkeypatch):
    """The parser of a recipe's script, caught when it is used."""
    caught, main = [], load(script).main

    def parse_args(parser, *given):
        caught.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(SystemExit):
            main([])
    return caught[0]


@pytest.fixture
def arguments(monkeypatch):
    """Every argument of the command and of the recipes' scripts, with where it is."""
    parsers = {name: one for group in GROUPS for name, one in parsers_of(group).items()}
    parsers |= {script: script_parser(script, monkeypatch) for script in SCRIPTS}
    return [
        (place, action)
        for place, parser in parsers.items()
        for action in parser._actions
        if action.dest != "help"
    ]


def shown(action):
    """An argument's name as it is typed, or as its place is called."""
    return action.option_strings[0] if action.option_strings else action.dest


def in_two_ways(meanings):
    return {name: places for name, places in meanings.items() if len(places) > 1}


def test_a_name_has_one_meaning(arguments):
    """Of two subcommands with one option both take a value or neither, of one type and kind."""
    meanings = defaultdict(lambda: defaultdict(list))
    for place, action in arguments:
        kind = "switch" if action.nargs == 0 else getattr(action.type, "__name__", "text")
        of = "choice" if action.choices else action.metavar or action.dest.upper()
        meanings[shown(action)][kind, of].append(place)
    assert in_two_ways(meanings) == {}


def test_a_meaning_has_one_name(arguments):
    """What is explained in the same words is called the same."""
    names = defaultdict(lambda: defaultdict(list))
    for place, action in arguments:
        names[action.help][shown(action).lstrip("-")].append(place)
    assert in_two_ways(names) == {}


@pytest.mark.parametrize("group", GROUPS)
def test_every_argument_is_explained(group):
    parsers = parsers_of(group)
    assert parsers.keys() == GROUPS[group].keys()
    bare = [
        f"{name} {action.dest}"
        for name, parser in parsers.items()
        for action in parser._actions
        if not action.help
    ]
    assert bare == []


@pytest.mark.parametrize("group", GROUPS)
def test_every_subcommand_has_an_example_that_its_parser_takes(group):
    parsers = parsers_of(group)
    for name, parser in parsers.items():
        shown = re.findall(r"^    qmargin (.+)$", parser.usage, re.MULTILINE)
        words = [shlex.split(line) for line in shown]
        assert name in [first for first, *_ in words]
        for other, *arguments in words:
            parsers[other].parse_args(arguments)


def test_every_subcommand_is_listed_with_what_it_does(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for texts in GROUPS.values():
        for name, about in texts.items():
            assert f"  {name:<10} {about}\n" in text


def test_defaults_are_shown(capsys):
    text = helped(capsys, "trials")
    assert "seed of the division of the people (default: 0)" in text
    assert "replace existing output files (default" not in text  # a switch
    assert "(default: 0.1 0.01 0.001 0.0001 1e-05 1e-06)" in helped(capsys, "report")
    assert "None" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_to_print_json_is_where_json_is_printed(name, capsys):
    decides = {"threshold", "enrol", "verify", "identify", "people"}
    assert ("--json" in helped(capsys, name)) == (name in decides)
