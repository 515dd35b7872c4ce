"""Files that appear whole or not at all, and where those lie that can be made again."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CACHE_VARIABLE",
    "cache_folder",
    "fault_of",
    "is_lack",
    "json_digest",
    "json_values",
    "load_arrays",
    "load_record",
    "make_folder",
    "named_file",
    "refuse_overwriting",
    "refuse_yaml_bomb",
    "replacing",
    "replacing_folder",
    "save_record",
    "tag_of",
    "to_disk",
    "write_new",
    "write_text",
    "zip_damage",
]

CACHE_VARIABLE = "SPEECHBRAIN_QMARGIN_CACHE"

_LARGE, _DENSEST = 2**26, 100  # bytes; ids in UTF-32 are packed by 10 to 40, floats hardly
_LACKS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_DEEPEST, _LARGEST_YAML = 100, 1_000_000  # levels, characters; a recipe has 5 and 9,000


def cache_folder() -> Path:
    """Where runs share what can be made again: generated corpora, durations.

    It is the environment variable ``SPEECHBRAIN_QMARGIN_CACHE`` if that is set, else
    ``~/.cache/speechbrain_qmargin``.

    Examples
    --------
    >>> getfixture("monkeypatch").setenv(CACHE_VARIABLE, "scratch/qmargin")
    >>> cache_folder().as_posix()
    'scratch/qmargin'
    """
    base = os.environ.get(CACHE_VARIABLE)
    return (Path(base) if base else Path.home() / ".cache" / "speechbrain_qmargin").expanduser()


def is_lack(error: BaseException) -> bool:
    """Whether an error says what the process lacks, open files or memory, and not what a file is.

    What is read in spite of faulty files must not take the one for the other: the images that
    could not be opened for a moment would pass for broken.

    Examples
    --------
    >>> is_lack(OSError(errno.EMFILE, "Too many open files")), is_lack(FileNotFoundError(2, "a"))
    (True, False)
    """
    return isinstance(error, OSError) and error.errno in _LACKS


def fault_of(error: BaseException) -> str:
    """What an error says is wrong with a file; raises it where it is a lack (:func:`is_lack`).

    Whoever goes on without a faulty file asks this of what reading it raised.

    Examples
    --------
    >>> fault_of(ValueError("a.wav: cut off"))
    'a.wav: cut off'
    >>> fault_of(OSError(errno.EMFILE, "Too many open files"))
    Traceback (most recent call last):
    OSError: [Errno ...] Too many open files
    """
    if is_lack(error):
        raise error
    return str(error)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` if the block ends well.

    It is on the disk before it does: after a power cut there is the old file or the new one. Nobody
    can read it who could not read the old one. The suffix is that of `path`, and the name is this
    writer's own: processes of several machines, in containers, have the same numbers.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> with replacing(folder / "table.txt") as partial:
    ...     _ = partial.write_text("done")
    >>> [file.name for file in folder.iterdir()]
    ['table.txt']
    """
    path = Path(path)
    make_folder(path.parent)
    partial = path.with_name(f".{path.stem}.{_new_name()}.partial{path.suffix}")
    try:
        yield partial
        to_disk(partial)
        if path.is_file():
            new, old = (stat.S_IMODE(one.stat().st_mode) for one in (partial, path))
            if new & old != new:
                partial.chmod(new & old)
        os.replace(partial, path)
    except OSError as error:  # a full disk names no file, others the hidden one
        if error.errno is not None and error.filename in (None, os.fspath(partial)):
            error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write into; it takes its place if the block ends well.

    Its files are on the disk before it does, and if it cannot take the place `folder` stays.

    Examples
    --------
    >>> parent = getfixture("tmp_path")
    >>> with replacing_folder(parent / "model") as partial:
    ...     _ = (partial / "weights").write_text("1")
    >>> [path.relative_to(parent).as_posix() for path in parent.rglob("*")]
    ['model', 'model/weights']
    """
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.{_new_name()}.partial")
    make_folder(folder.parent)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                to_disk(file)
        old, there = partial.with_suffix(".old"), os.path.lexists(folder)
        if there:
            folder.rename(old)
        try:
            partial.rename(folder)
        except BaseException:
            if there:
                old.rename(folder)
            raise
        if old.is_symlink():  # to a folder, which stays
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _new_name() -> str:
    return uuid4().hex[:12]


def make_folder(folder: str | Path) -> None:
    """Make a folder, and those above it, where it is not there.

    Raises
    ------
    NotADirectoryError
        A file is in its place, or in that of one above it; named.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "dev.txt"
    >>> file.touch()
    >>> make_folder(file / "lists")
    Traceback (most recent call last):
    NotADirectoryError: ...dev.txt is a file; a folder is wanted there
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        _refuse_file(folder)
        raise


def _refuse_file(folder: Path) -> None:
    """A file in the place of a folder, or in that of one above it."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; a folder is wanted there")


def named_file(setting: str, path: str | Path) -> Path:
    """The file that a setting names.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, ValueError
        Nothing there, a folder, or no path; with the setting.

    Examples
    --------
    >>> named_file("valid_file", "gone.txt")
    Traceback (most recent call last):
    FileNotFoundError: valid_file: gone.txt does not exist
    >>> named_file("valid_file", ["a.txt"])
    Traceback (most recent call last):
    ValueError: valid_file: ['a.txt'] is no path of one file
    """
    if not isinstance(path, (str, Path)):  # of a YAML: a list, a number
        raise ValueError(f"{setting}: {path} is no path of one file")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{setting}: {path} is a folder; give the file")
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: {path} does not exist")
    return path


def refuse_overwriting(
    outputs: Iterable[str | Path | None],
    inputs: Iterable[str | Path | None],
    overwrite: bool = False,
) -> None:
    """Refuse to write over what is read, twice, and, unless that is wanted, over what is there.

    For before the work. A command asks it for whatever files it is told to write; what it keeps
    in a place of its own, a run's folder or an encoder's, it replaces unasked.

    Parameters
    ----------
    outputs, inputs : iterable of path; None is passed over
    overwrite : bool
        Whether what is there may be replaced; never what is read.

    Raises
    ------
    ValueError
        An output that is an input or another output, by whatever path; one that is a device or a
        pipe, which a file would replace; named.
    FileExistsError
        An output that is there already; named.
    IsADirectoryError, NotADirectoryError
        A folder in the place of an output, or a file in that of its folder; named.

    Examples
    --------
    >>> refuse_overwriting(["a.tsv"], ["b.tsv", None])
    >>> refuse_overwriting(["a.tsv"], ["./a.tsv"])
    Traceback (most recent call last):
    ValueError: a.tsv: the output is an input too (./a.tsv)
    """
    outputs = [path for path in outputs if path]
    read = {os.path.realpath(path): path for path in inputs if path}
    written: set[str] = set()
    for path in outputs:
        place = os.path.realpath(path)
        if place in read:
            raise ValueError(f"{path}: the output is an input too ({read[place]})")
        if place in written:
            raise ValueError(f"{path}: two outputs would be written there; give one another name")
        if os.path.isdir(place):
            raise IsADirectoryError(f"{path} is a folder; give the file to write")
        _refuse_file(Path(path).parent)
        if os.path.exists(place) and not os.path.isfile(place):
            raise ValueError(f"{path}: a device or a pipe, which a file would replace")
        written.add(place)
    there = [] if overwrite else [path for path in outputs if os.path.lexists(path)]
    if there:
        raise FileExistsError(
            f"{there[0]} is there already; give another name, or say --overwrite to replace it"
        )


def to_disk(path: str | Path) -> None:
    """Wait until what was written to a file is on the disk, as before it takes another's place.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "table.txt"
    >>> _ = file.write_text("done")
    >>> to_disk(file)
    """
    with open(path, "r+b") as stream:
        os.fsync(stream.fileno())


def write_new(texts: Mapping[Path, str], overwrite: bool = False) -> None:
    """Write UTF-8 text files, but none of them where one is there with another text.

    What is there with the same text is left as it is.

    Raises
    ------
    FileExistsError
        A file with another text, unless `overwrite`; named, and nothing is written.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "list.txt"
    >>> write_new({file: "one"})
    >>> write_new({file: "one"})
    >>> write_new({file: "two"})
    Traceback (most recent call last):
    FileExistsError: ...list.txt is there already, with another content; give another folder, or ...
    """
    other = {
        path: text
        for path, text in texts.items()
        if not (path.is_file() and path.read_bytes() == text.encode())
    }
    for path in other:
        if os.path.lexists(path) and not overwrite:
            raise FileExistsError(
                f"{path} is there already, with another content; give another folder, or say "
                "--overwrite to replace it"
            )
    for path, text in other.items():
        write_text(path, text)


def write_text(path: str | Path, text: str, private: bool = False) -> None:
    """Write a UTF-8 text file whole or not at all; `private`: one that its owner alone can read.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "results" / "table.txt"
    >>> write_text(file, "done")
    >>> [file.name for file in file.parent.iterdir()]
    ['table.txt']
    """
    with replacing(path) as partial:
        if private:
            partial.touch(mode=0o600)
        partial.write_text(text, encoding="utf-8")


def json_values(value: Any) -> Any:
    """A value as JSON has it: mappings and lists, no dataclass; null for what is not finite.

    Examples
    --------
    >>> json_values({"scores": (0.5, float("inf"))})
    {'scores': [0.5, None]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: json_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_arrays(
    path: str | Path, what: str = "arrays", names: Collection[str] | None = None
) -> np.ndarray | dict[str, np.ndarray]:
    """The array of a npy, or those of a npz; never executes code.

    A npz has a checksum for each array, which is compared; a npy has none.

    Parameters
    ----------
    path : path
    what : str
        What the file should hold, for the message.
    names : collection of str, optional
        Of the arrays to read of a npz; others are left.

    Raises
    ------
    ValueError
        A damaged file, one with objects in it, or a few bytes that unpack to gigabytes; with the
        file.
    FileNotFoundError
        No such file.
    OSError
        The process lacks open files or memory.

    Examples
    --------
    >>> path = getfixture("tmp_path") / "x.npy"
    >>> _ = path.write_bytes(b"1, 2")
    >>> load_arrays(path, "embeddings")
    Traceback (most recent call last):
    ValueError: ...x.npy: damaged, or not embeddings (...)
    """
    import numpy as np

    try:
        with open(path, "rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            with loaded:
                wanted = [name for name in loaded.files if names is None or name in names]
                for member in loaded.zip.infolist():  # the directory has no checksum:
                    loaded.zip.open(member).close()  # each name is compared with the other one
                for name in wanted:
                    _refuse_bomb(loaded.zip, name)
                arrays = {name: loaded[name] for name in wanted}
            for name, array in arrays.items():
                if not isinstance(array, np.ndarray):  # numpy gives what is no array as bytes
                    raise ValueError(f"{name} is no array")
            return arrays
    except FileNotFoundError:
        raise
    # numpy's, zip's and Python's own words for damage and pickles
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError,
            RuntimeError, MemoryError, OverflowError, SyntaxError,
            AttributeError, TypeError) as error:  # fmt: skip
        raise ValueError(f"{path}: damaged, or not {what} ({fault_of(error)})") from None


def _refuse_bomb(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse a member that is packed as no embeddings and no ids are."""
    for member in archive.infolist():
        if member.filename in (name, f"{name}.npy"):
            packed, size = member.compress_size, member.file_size
            if size > _LARGE and size > _DENSEST * packed:
                raise ValueError(f"{name}: {packed:,} bytes unpack to {size:,}")


def zip_damage(path: str | Path) -> str | None:
    """What is wrong with a file that may be a zip archive, as torch's are; None if nothing is.

    Each entry has a checksum, which torch does not compare: flipped bits would be other weights.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "weights.pt"
    >>> with zipfile.ZipFile(file, "w") as archive:
    ...     archive.writestr("data/0", "1234")
    >>> zip_damage(file)
    >>> _ = file.write_bytes(file.read_bytes().replace(b"1234", b"1239"))
    >>> zip_damage(file)
    'data/0 is not what was written'
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(2)
        if not start:
            return "empty"
        if start == b"PK":
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            return f"{bad} is not what was written" if bad else None
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return " ".join(fault_of(error).split())[:200]
    return None


def tag_of(node: Any) -> str:
    """The tag that a node of a parsed YAML was written with; empty without one.

    Examples
    --------
    >>> from ruamel.yaml import YAML
    >>> tree = YAML().load("{network: !new:torch.nn.ReLU {inplace: true}, dropout: 0.1}")
    >>> tag_of(tree["network"]), tag_of(tree["dropout"])
    ('!new:torch.nn.ReLU', '')
    """
    return str(getattr(getattr(node, "tag", None), "value", None) or "")


def refuse_yaml_bomb(text: str) -> None:
    """Refuse a YAML that costs a reader minutes, its stack or its memory.

    Nested by the hundred, or lists of aliases of lists of aliases, which grow when they are
    written out. It is parsed for that, an event at a time; nothing is built.

    Raises
    ------
    ValueError, ruamel.yaml.error.YAMLError
        More than 100 levels, more than a million characters with its aliases written out; no YAML
        up to there.

    Examples
    --------
    >>> refuse_yaml_bomb("a: [1, {b: 2}]")
    >>> refuse_yaml_bomb("a: " + "[" * 101)
    Traceback (most recent call last):
    ValueError: nested deeper than 100 levels
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.events import (
        AliasEvent,
        CollectionEndEvent,
        CollectionStartEvent,
        ScalarEvent,
    )

    known: dict[str, int] = {}  # anchors and the characters below them
    within: list[tuple[str | None, int]] = [(None, 0)]  # of each open collection, what was before
    total = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionStartEvent):
            within.append((event.anchor, total))
            if len(within) > _DEEPEST + 1:
                raise ValueError(f"nested deeper than {_DEEPEST} levels")
        elif isinstance(event, CollectionEndEvent):
            anchor, before = within.pop()
            if anchor:
                known[anchor] = total - before
        elif isinstance(event, ScalarEvent):
            total += len(event.value) + 1
            if event.anchor:
                known[event.anchor] = len(event.value) + 1
        elif isinstance(event, AliasEvent):
            total += known.get(event.anchor, 0) + 1
        if total > _LARGEST_YAML:
            raise ValueError(f"its aliases grow beyond {_LARGEST_YAML:,} characters")


def json_digest(content: Any) -> str:
    """SHA-256 of numbers and names, in hexadecimal digits.

    Examples
    --------
    >>> json_digest([["a"], [1.5]])[:16]
    'e71c07767cad9659'
    """
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def save_record(path: str | Path, kind: str, content: dict) -> None:
    """Write a JSON file that says what kind of record it is, for :func:`load_record`.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "point.json"
    >>> save_record(file, "point", {"x": 1})
    >>> print(file.read_text())
    {
      "format": "speechbrain_qmargin point 1",
      "x": 1
    }
    """
    record = {"format": f"speechbrain_qmargin {kind} 1", **content}
    write_text(path, json.dumps(record, indent=2) + "\n")


def load_record(path: str | Path, kind: str, make: Callable[..., Any]) -> Any:
    """``make(**content)`` of a file of :func:`save_record`.

    Raises
    ------
    ValueError
        Another file, or fields that `make` does not take; with the file.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "point.json"
    >>> save_record(file, "point", {"x": 1})
    >>> load_record(file, "point", dict)
    {'x': 1}
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not the fields of a record")
        if content.pop("format", None) != f"speechbrain_qmargin {kind} 1":
            raise ValueError(f"its format is not 'speechbrain_qmargin {kind} 1'")
        return make(**content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        article = "an" if kind[0] in "aeiou" else "a"
        raise ValueError(f"{path}: not {article} {kind} file ({error})") from None
