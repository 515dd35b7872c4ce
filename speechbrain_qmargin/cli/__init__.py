"""The command ``qmargin``: one front door, a module for each group of subcommands.

A module of this package that has subcommands defines ``configure(add)``, which calls
``add(name, run, about)`` once for each and adds the arguments to the parser that it returns;
`about` is what its ``--help`` says beyond the one line: an example, and what to know beforehand.
``run(args)`` does the work; what it returns, if anything, is the exit status. :data:`GROUPS` names
the modules; only the one that has the subcommand is imported, so that ``--help`` costs nothing.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["GOES_ON", "GROUPS", "HelpFormatter", "main", "status_of"]

GOES_ON = "the same command goes on where it was"  # said of what may be interrupted

# as `qmargin --help` lists them: heading, module, its subcommands with one line of help each
_LISTED: dict[str, dict[str, dict[str, str]]] = {
    "prepare data": {
        "trials": {"trials": "make trial lists from your own recordings or images"},
        "faces": {"align": "align photographs of faces by five landmarks"},
    },
    "use an encoder": {
        "encoder": {
            "extract": "embed recordings or face images with a trained encoder",
            "export": "write an encoder for SpeechBrain, ONNX and other toolkits",
            "pairs": "face pair sets, such as LFW: accuracy over ten folds, TAR@FAR",
        }
    },
    "decide about people": {
        "people": {
            "threshold": "choose and measure an encoder's threshold on your own people",
            "enrol": "enrol a person from recordings or face images",
            "verify": "accept or reject a claim to be an enrolled person",
            "identify": "search the enrolled people for the person in a recording or image",
            "people": "list, export or erase enrolments",
            "serve": "enrol and verify over HTTP, with a demonstration page",
        }
    },
    "score trials and report": {
        "score": {
            "cosine": "cosine scores of a trial list",
            "normalize": "cosine scores normalised against a cohort (AS-norm and others)",
            "calibrate": "fit a calibration to log-likelihood ratios on development scores",
            "apply": "apply a calibration to other scores",
            "score": "cosine, AS-norm and calibrated scores of several lists, with tables",
            "report": "compare systems: HTML page, plots, JSON and operating point",
        }
    },
    "evaluate further": {
        "evaluate": {
            "breakdown": "error rates by groups: gender, language, duration, session",
            "fuse": "fuse several systems' scores into one log-likelihood ratio",
            "watchlist": "1:N search: rank curve, and FPIR and FNIR of watch lists",
            "bayes": "normalised Bayes error of log-likelihood ratios over priors",
            "quality": "a quality measure for calibration: the mean cohort score",
            "plda": "PLDA scores of a trial list",
        }
    },
}
# module: its subcommands
GROUPS = {module: texts for modules in _LISTED.values() for module, texts in modules.items()}


def _listing() -> str:
    lines = ["`qmargin COMMAND --help` explains a command, with an example."]
    for heading, modules in _LISTED.items():
        lines += ["", f"{heading}:"]
        for texts in modules.values():
            lines += [f"  {name:<10} {text}" for name, text in texts.items()]
    return "\n".join(lines)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written; behind each option its default, where there is one.

    Examples
    --------
    >>> parser = argparse.ArgumentParser("extract", formatter_class=HelpFormatter)
    >>> _ = parser.add_argument("--batch_size", type=int, default=64, help="images in a batch")
    >>> "images in a batch (default: 64)" in parser.format_help()
    True
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if not text or "%(default)" in text or default is None or default is False:
            return text
        if default in ([], argparse.SUPPRESS):
            return text
        if isinstance(default, (list, tuple)):  # as they are typed
            default = " ".join(map(str, default))
        return f"{text} (default: {default})"


def _say(others, message, category, *place) -> None:
    """What we warn users of as a line, without its place in the code; others as they were."""
    if category is UserWarning and "speechbrain_qmargin" in str(place[0]):
        print(f"warning: {message}", file=sys.stderr)
    else:
        others(message, category, *place)


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. An error of the user's input ends with one line, not with a traceback.

    With ``QMARGIN_TRACEBACK=1`` in the environment the traceback is shown.

    Returns
    -------
    int
        Exit status: 0; 1 for an error of the input; argparse ends with 2 by itself; 3 of
        subcommands that decide, where somebody is rejected; 130 where it was interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="qmargin",
        description="Speaker and face verification: embed, score, report, enrol and decide.",
        epilog=_listing(),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bars; goes before COMMAND"
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="one of those below"
    )
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for group, texts in GROUPS.items():
        if wanted in texts:

            def add(name: str, run, about: str = "", texts=texts) -> argparse.ArgumentParser:
                sub = commands.add_parser(
                    name,
                    description=f"{texts[name]}\n{about}",
                    formatter_class=HelpFormatter,
                    allow_abbrev=False,
                )
                sub.set_defaults(run=run)
                return sub

            importlib.import_module(f"{__name__}.{group}").configure(add)
        else:
            for name in texts:
                commands.add_parser(name)
    args = parser.parse_args(argv)
    said: list[int | None] = []
    work, again = lambda: said.append(args.run(args)), getattr(args, "again", "")
    status = status_of(f"qmargin {args.command}", work, again)
    return status or next(filter(None, said), 0)


def status_of(program: str, work: Callable[[], Any], again: str = "") -> int:
    """Do a program's work; an error of the user's input is one line, not a traceback.

    With ``QMARGIN_TRACEBACK=1`` in the environment the traceback is shown.

    Parameters
    ----------
    program : str
        What the line begins with.
    work : callable
    again : str
        What is said of a second start where the first was interrupted (Ctrl-C).

    Returns
    -------
    int
        Exit status: 0; 1 for such an error; 130 where it was interrupted.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_say, warnings.showwarning)
            work()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        if os.environ.get("QMARGIN_TRACEBACK"):
            raise
        print(f"\n{program}: interrupted{again and '; '}{again}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("QMARGIN_TRACEBACK"):
            raise
        logging.getLogger(__name__).debug(program, exc_info=True)  # a run's log.txt has it
        message = str(error).strip() or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            message = f"{error.filename}: {error.strerror}"  # without Python's [Errno 2]
        if "Original Traceback" in message:  # of a DataLoader's worker
            message = message.splitlines()[-1]
        print(f"{program}: {message}", file=sys.stderr)
        return 1
    return 0
