"""What ``--help`` of the command and its subcommands says."""

import argparse
import importlib

import pytest

from speechbrain_qmargin.cli import GROUPS, main

COMMANDS = [name for group in GROUPS.values() for name in group]


def helped(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("group", GROUPS)
def test_every_argument_is_explained(group):
    parsers = {}

    def add(name, run, about=""):
        parsers[name] = argparse.ArgumentParser(name)
        return parsers[name]

    importlib.import_module(f"speechbrain_qmargin.cli.{group}").configure(add)
    assert parsers.keys() == GROUPS[group].keys()
    bare = [
        f"{name} {action.dest}"
        for name, parser in parsers.items()
        for action in parser._actions
        if not action.help
    ]
    assert bare == []


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
