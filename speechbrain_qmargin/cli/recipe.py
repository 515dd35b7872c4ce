"""The front door of the recipes' scripts: help, the plain experiment, one line for an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speechbrain_qmargin.cli import GOES_ON, status_of

__all__ = ["end_early", "run_recipe"]

HELP = """{about}

Every setting is an option, --key value or --key=value, its value in YAML. {settings}
Other options:
  --print_config   print the whole experiment as one plain HyperPyYAML file, and do nothing else
{training}An error is one line; QMARGIN_TRACEBACK=1 in the environment shows where it came from."""
TRAINING = """\
  --trust          allow the YAML of the run that --pretrained names to run any code
  SpeechBrain's    --device, --precision, --grad_accumulation_factor, --noprogressbar, --debug, ...
"""


def run_recipe(about: str | None, main: Callable[[list[str]], Any], argv: Sequence[str]) -> int:
    """Run a recipe as its command line says.

    Parameters
    ----------
    about : str
        What ``--help`` begins with: the script's docstring.
    main : callable
        From the arguments to whatever.
    argv : sequence of str
        ``hparams.yaml [--key value ...]``

    Returns
    -------
    int
        Exit status, see :func:`~speechbrain_qmargin.cli.status_of`. A training that a signal ended
        raises SystemExit instead, with 143 for SIGTERM.
    """
    status = _early(about, list(argv))
    if status is not None:
        return status
    return status_of(_program(), lambda: main(list(argv)), GOES_ON)


def end_early(about: str | None, argv: Sequence[str]) -> None:
    """End the program where the command line asks for help or the plain experiment.

    For the top of a script: neither wants what the script imports below.
    """
    status = _early(about, list(argv))
    if status is not None:
        sys.exit(status)


def _early(about: str | None, words: list[str]) -> int | None:
    if not words or {"-h", "--help"} & set(words):
        return status_of(_program(), lambda: _help(about or "", words))
    if "--print_config" in words:
        words.remove("--print_config")
        return status_of(_program(), lambda: _print_config(words))
    return None


def _program() -> str:
    return Path(sys.argv[0]).name


def _help(about: str, words: list[str]) -> None:
    from speechbrain_qmargin.training.config import CommandLine, compose, composed, settings_text

    words = [word for word in words if word not in ("-h", "--help", "--print_config")]
    settings, training = "Name the YAML before --help to see its own.\n", ""
    if words:
        # a YAML alone needs no SpeechBrain, whose import takes seconds
        alone = len(words) == 1 and not words[0].startswith("-")
        text = compose(words[0], {}) if alone else composed(CommandLine.of(words))
        settings = f"With {' '.join(words)}:\n\n{settings_text(text)}"
        training = TRAINING if "\npretrained:" in text else ""
    print(HELP.format(about=about.strip(), settings=settings, training=training))


def _print_config(words: list[str]) -> None:
    from speechbrain_qmargin.training.config import CommandLine, composed

    print(composed(CommandLine.of(words)), end="")
