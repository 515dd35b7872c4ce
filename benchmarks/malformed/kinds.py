"""What is fed and what is right: the kinds of input, what is heard meanwhile, harmed files."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

ERROR, VALUE, LISTED = "an error with its name", "the right value", "listed, the rest goes on"


class Kind(NamedTuple):
    """A kind of input; `feed` returns what happened, and raises where that is not right."""

    name: str
    expected: str
    feed: Callable[[], str]


class NotRight(Exception):
    """What happened is not what is right."""


def error(name: str, call: Callable, *words: str, unless: Path | None = None) -> Kind:
    """An error that has all the words; the file `unless` must not appear."""

    def feed() -> str:
        try:
            found = call()
        except (ValueError, OSError) as refusal:
            said = str(refusal)
        else:
            raise NotRight(f"accepted: {found!r:.80}")
        if unless is not None and unless.exists():
            unless.unlink()
            raise NotRight(f"code ran, then: {said}")
        if missing := [word for word in words if word not in said]:
            raise NotRight(f"an error without {missing}: {said}")
        return said

    return Kind(name, ERROR, feed)


def value(name: str, call: Callable, wanted, close: float = 0.0, says: str = "") -> Kind:
    """The call's result, to within `close`; `says` must be in the log or the warnings."""

    def feed() -> str:
        with heard() as lines:
            found = np.asarray(call())
        right = np.asarray(wanted)
        same = found.shape == right.shape and (
            np.abs(found.astype(float) - right.astype(float)).max(initial=0) <= close
            if close
            else bool((found == right).all())
        )
        if not same:
            raise NotRight(f"another value: {found!r:.60}, wanted {right!r:.60}")
        return heard_of(lines, says) or "right"

    return Kind(name, VALUE, feed)


def listed(name: str, call: Callable, *words: str) -> Kind:
    """The call ends well, and what it returns, logs or warns has all the words."""

    def feed() -> str:
        with heard() as lines:
            lines += str(call()).splitlines()
        said = [heard_of(lines, word) for word in words]
        return said[0]

    return Kind(name, LISTED, feed)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What is logged, warned and printed meanwhile."""
    lines: list[str] = []
    handler, printed = logging.Handler(), io.StringIO()
    handler.emit = lambda record: lines.append(record.getMessage())
    # SpeechBrain keeps its loggers from the root
    loggers = [logging.getLogger(name) for name in (None, "speechbrain_qmargin")]
    for one in loggers:
        one.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            yield lines
    finally:
        for one in loggers:
            one.removeHandler(handler)
        lines += [str(one.message) for one in caught] + printed.getvalue().splitlines()


def heard_of(lines: list[str], word: str) -> str:
    if not word:
        return ""
    for line in lines:
        if word in line:
            return line
    raise NotRight(f"not said: {word!r}; but {lines!r:.200}")


def content(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def cut(path: Path, share: float) -> Path:
    return content(path, path.read_bytes()[: round(share * path.stat().st_size)])


def flip(path: Path, at: float = 0.5) -> Path:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0xFF
    return content(path, bytes(data))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)
