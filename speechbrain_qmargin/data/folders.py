"""Audio files and images below a folder."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from speechbrain_qmargin.data.audio import AUDIO_SUFFIXES, UNREAD_AUDIO

__all__ = ["FoundFile", "audio_files", "files_below", "found_file", "say_unread"]

logger = logging.getLogger(__name__)


class FoundFile(NamedTuple):
    """A file below a folder.

    Attributes
    ----------
    name : str
        Its path below the folder, with ``/``.
    path : str
    fault : str
        Why it cannot be used by its name; usually empty. `name` is then escaped.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "ann").mkdir()
    >>> (folder / "ann/1.wav").touch()
    >>> (found,) = audio_files(folder)
    >>> found.name, found.fault
    ('ann/1.wav', '')
    """

    name: str
    path: str
    fault: str = ""


def audio_files(folder: str | Path) -> Iterator[FoundFile]:
    """Every audio file below a folder, see :func:`files_below`.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> for name in ("1.wav", "2.FLAC", "notes.txt", ".3.wav"):
    ...     (folder / name).touch()
    >>> sorted(found.name for found in audio_files(folder))
    ['1.wav', '2.FLAC']
    """
    return files_below(folder, AUDIO_SUFFIXES, UNREAD_AUDIO)


def files_below(
    folder: str | Path, suffixes: tuple[str, ...], unread: tuple[str, ...] = ()
) -> Iterator[FoundFile]:
    """Every file of some suffixes below a folder, in no order; hidden ones are left out.

    Links to files and to folders are followed, but not those that lead back to a folder that they
    lie in. At the end a warning says how many there are of the suffixes `unread`, which somebody
    might expect to be read.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "ann").mkdir()
    >>> (folder / "ann/1.wav").touch()
    >>> (folder / "ann/again").symlink_to(folder)
    >>> [file.name for file in files_below(folder, (".wav",))]
    ['ann/1.wav']
    """
    left_out: Counter[str] = Counter()
    stack = [(os.fspath(folder), "")]
    while stack:
        parent, prefix = stack.pop()
        with os.scandir(parent) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if not (entry.is_symlink() and _leads_back(entry.path, parent)):
                        stack.append((entry.path, f"{prefix}{entry.name}/"))
                elif (name := entry.name.lower()).endswith(suffixes):
                    yield found_file(prefix + entry.name, entry.path)
                elif name.endswith(unread):
                    left_out[os.path.splitext(name)[1]] += 1
    say_unread(folder, left_out, suffixes)


def say_unread(folder: str | Path, left_out: Mapping[str, int], suffixes: tuple[str, ...]) -> None:
    """Warn of files below a folder that are of no suffix that is read, by suffix.

    Examples
    --------
    >>> say_unread("corpus", {".sph": 7}, (".wav", ".flac"))
    """
    if left_out:
        counts = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(left_out.items()))
        logger.warning(
            f"{folder}: files are left out that are not read ({counts}): convert them to "
            f"one of {', '.join(suffixes)}"
        )


def _leads_back(link: str, parent: str) -> bool:
    target, here = os.path.realpath(link), os.path.realpath(parent)
    return here == target or here.startswith(target.rstrip(os.sep) + os.sep)


def found_file(name: str, path: str) -> FoundFile:
    """A file with what is wrong with its name: not UTF-8, or parted by what parts lines of tables.

    Examples
    --------
    >>> found_file("ann/1\\t2.jpg", "faces/ann/1\\t2.jpg").fault
    'its name has a tab or a line break: rename it'
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
        return FoundFile(name, path, "its name is not UTF-8: rename it")
    if any(character in name for character in "\t\n\r"):
        return FoundFile(repr(name)[1:-1], path, "its name has a tab or a line break: rename it")
    return FoundFile(name, path)
