"""One experiment from several YAMLs: what a recipe's file extends, its overlays, the options.

A recipe's YAML holds the full-size experiment and names the files that complete it, a model, a
head, a size. :func:`load_experiment` makes one plain HyperPyYAML document of them, with the
comments at their keys; SpeechBrain's loader takes it as it is.

Three keys of such a YAML are the composer's and not settings:

``extends``
    The YAML that this one completes or changes.
``overlays``
    YAMLs over it, such as ``models/<model>.yaml``, with ``<key>`` for a setting's value. The later
    one wins and whole entries are replaced; then comes the command line, which also chooses among
    the overlays. Written as ``known: sizes/<size>.yaml`` an overlay changes only settings that
    exist and is ignored for others: a size may name settings of every model.
``auto``
    For a setting its values, each with settings: ``auto`` means the first whose settings hold.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

from hyperpyyaml import load_hyperpyyaml, resolve_references
from hyperpyyaml.core import recursive_update
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from speechbrain_qmargin.files import tag_of
from speechbrain_qmargin.training.trust import object_names, refuse_code, refuse_outside

__all__ = [
    "CommandLine",
    "Experiment",
    "compose",
    "composed",
    "load_experiment",
    "plain_settings",
    "resolved",
    "settings_of",
    "settings_text",
    "with_values",
]


# ---------------------------------------------------------------- the experiment


@dataclass
class Experiment:
    """A parsed command line.

    Attributes
    ----------
    hparams_file : str
        The YAML.
    run_opts : speechbrain RunOptions
    text : str
        The whole experiment as one HyperPyYAML document: the YAML with what it extends, its
        overlays and the command line.
    settings : dict
        The plain values (numbers, strings, lists) of `text`, resolved. One that is not there is a
        ValueError that names the YAML.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "mine.yaml"
    >>> _ = file.write_text(
    ...     "output_folder: results/mine\\nlr: 0.1\\nclasses: 2\\n"
    ...     "network: !new:torch.nn.Linear {in_features: 4, out_features: !ref <classes>}\\n"
    ... )
    >>> experiment = load_experiment([str(file), "--lr", "0.2"])
    >>> experiment.settings["lr"], experiment.output_folder.name
    (0.2, 'mine')
    >>> experiment.load(classes=3)["network"]
    Linear(in_features=4, out_features=3, bias=True)
    """

    hparams_file: str
    run_opts: Any
    text: str
    settings: dict

    @property
    def output_folder(self) -> Path:
        return Path(self.settings["output_folder"])

    @property
    def objects(self) -> frozenset[str]:
        """The names that the experiment builds, names or calls: the user's own, hence trusted."""
        return object_names(self.text)

    def load(self, **known_now: Any) -> dict:
        """The hyperparameters as objects; `known_now` are values that the data decide.

        Raises
        ------
        ValueError
            An argument that an object does not take.
        ModuleNotFoundError
            An object's package is not installed.
        """
        self.settings.update(known_now)  # the results say them too
        self.text = with_values(self.text, self.hparams_file, known_now)
        try:
            return load_hyperpyyaml(self.text)
        except TypeError as error:  # an argument of the wrong kind
            what = ": ".join(str(one) for one in error.args)
            raise ValueError(f"{self.hparams_file} with these settings: {what}") from error
        except ModuleNotFoundError as error:  # of an object that a setting chose
            raise ModuleNotFoundError(
                f"{self.hparams_file} with these settings: {error}; pip install {error.name}, or "
                "put its folder on PYTHONPATH",
                name=error.name,
            ) from error


class _Settings(dict):
    """Settings of a YAML; a recipe that is given another recipe's misses some."""

    source = ""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.source} has no setting {key}: is it the YAML of another recipe?")


def load_experiment(argv: list[str]) -> Experiment:
    """Parse ``hparams.yaml [--key value ...]`` and compose the experiment.

    SpeechBrain's options and the settings of the YAML are told apart by their full names;
    abbreviations are refused. ``--trust`` lets the YAML of a run's folder build any object.

    Raises
    ------
    FileNotFoundError, ValueError
        A missing YAML, an unknown choice, an override that names no key of the experiment.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "mine.yaml"
    >>> _ = file.write_text("output_folder: results/mine\\nlr: 0.1\\nfinal_lr: !ref <lr> / 10\\n")
    >>> load_experiment([str(file), "--lr=0.5", "--device=cpu"]).settings
    {'output_folder': 'results/mine', 'lr': 0.5, 'final_lr': 0.05}
    >>> load_experiment([str(file), "--learning_rate", "0.5"])
    Traceback (most recent call last):
    ValueError: --learning_rate is neither a setting of ...mine.yaml nor an option of SpeechBrain...
    """
    given = CommandLine.of(argv)
    text = composed(given)
    settings = _Settings(plain_settings(resolved(text)))
    settings.source = given.hparams_file
    return Experiment(given.hparams_file, given.run_opts(), text, settings)


def composed(given: CommandLine) -> str:
    """The document of a command line: :func:`compose`, and what a published model asks for.

    Where ``pretrained`` is a published model, its network and its features are the experiment's,
    as if the command line had named them.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "mine.yaml"
    >>> _ = file.write_text("lr: 0.1  # of the encoder\\n")
    >>> print(composed(CommandLine(str(file), {"lr": "0.2"})))
    lr: 0.2 # of the encoder
    """
    from speechbrain_qmargin.training.published_settings import published_overrides

    text = compose(given.hparams_file, given.overrides, trust=given.trust)
    settings = plain_settings(resolved(text))
    if settings.get("pretrained") is None:
        return text
    asked = published_overrides(settings, given.overrides)
    if not asked:
        return text
    return compose(given.hparams_file, {**given.overrides, **asked}, trust=given.trust)


def compose(hparams_file: str | Path, overrides: dict[str, str], trust: bool = False) -> str:
    """One plain HyperPyYAML document of a YAML, the files that complete it, and the command line.

    Parameters
    ----------
    hparams_file : path
    overrides : dict from str to str
        YAML of the values.
    trust : bool
        Whether the file of a folder that a setting names (``extends: <pretrained>/...``) may name
        any object; see :mod:`~speechbrain_qmargin.training.trust`.

    Raises
    ------
    FileNotFoundError, ValueError
        A missing YAML, an unknown choice, an override that names no key of the experiment.

    Examples
    --------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "base.yaml").write_text("epochs: 10  # of training\\nlr: 0.1\\n")
    >>> _ = (folder / "mine.yaml").write_text("extends: base.yaml\\nlr: 0.2\\n")
    >>> print(compose(folder / "mine.yaml", {"epochs": "3"}))
    epochs: 3 # of training
    lr: 0.2
    """
    path, given = Path(hparams_file), _parsed(overrides)
    document = _compose(path, given, trust)
    for key, text in overrides.items():
        if key not in document.entries:
            raise ValueError(
                f"--{key} is neither a setting of {path} nor an option of SpeechBrain; "
                + _near(key, document.entries, path)
            )
        if key not in document.chosen:
            value, text = _of_its_kind(key, document.entries[key].value, given[key], text)
            document.change(key, value, text)
    text = document.text()
    if document.borrowed is not None and not trust:
        refuse_outside(text, document.borrowed)
    return text


def resolved(text: str) -> Any:
    """The tree of a HyperPyYAML document, references resolved; tags are kept, nothing is run.

    Examples
    --------
    >>> resolved("lr: 0.1\\nfinal_lr: !ref <lr> / 2")["final_lr"]
    0.05
    """
    return copy.deepcopy(_resolved(text))


@functools.lru_cache(maxsize=16)  # a start asks for the same tree several times
def _resolved(text: str) -> Any:
    return _round_trip(resolve_references(text).read())


def with_values(text: str, source: str | Path, values: dict[str, Any]) -> str:
    """A document whose entries have other plain values.

    Examples
    --------
    >>> print(with_values("classes: 2  # of the data\\nlr: 0.1", "mine.yaml", {"classes": 3}))
    classes: 3 # of the data
    lr: 0.1
    """
    document = _Document.of(text, source)
    for key, value in values.items():
        document.give(key, value)
    return document.text()


def settings_of(text: str, entries: Iterable[str]) -> dict[str, Any]:
    """The plain settings that entries of a document refer to, by others or not; nothing is built.

    Examples
    --------
    >>> text = "lr: 0.1\\nsize: 2\\nwidth: !ref <size> * 2\\nnet: !new:my.Net {width: !ref <width>}"
    >>> settings_of(text, ["net"])
    {'width': 4, 'size': 2}
    """
    document, values = _Document.of(text, "settings"), plain_settings(resolved(text))
    found: dict[str, Any] = {}
    waiting = [key for key in entries if key in document.entries]
    for key in waiting:
        for name in re.findall(r"<(\w+)", document.entries[key].lines):
            if name in values and name not in found:
                found[name] = values[name]
                waiting.append(name)
    return found


def settings_text(text: str) -> str:
    """The part of a document that consists of plain settings, with their comments.

    Examples
    --------
    >>> print(settings_text("lr: 0.1  # of all\\nnetwork: !new:torch.nn.ReLU\\n"))
    lr: 0.1 # of all
    """
    document = _Document.of(text, "settings")
    document.heading = ""
    document.entries = {
        key: entry
        for key, entry in document.entries.items()
        if tag_of(entry.value) in ("", "!ref")
        and not (isinstance(entry.value, dict) and entry.value)
    }
    return document.text()


def plain_settings(tree: Any) -> dict:
    """The untagged scalars and lists of a parsed YAML.

    Examples
    --------
    >>> plain_settings(resolved("lr: 0.1\\nfinal_lr: !ref <lr> / 2\\nnet: !new:torch.nn.Identity"))
    {'lr': 0.1, 'final_lr': 0.05}
    """
    return {
        key: value
        for key, value in tree.items()
        if value is None or (isinstance(value, (bool, int, float, str, list)) and not tag_of(value))
    }


# ---------------------------------------------------------------- the command line


@dataclass
class CommandLine:
    """``hparams.yaml [--key value ...]``, taken apart.

    Attributes
    ----------
    hparams_file : str
    overrides : dict from str to str
        Settings of the YAML, as YAML.
    options : list of str
        SpeechBrain's own, as it parses them.
    trust : bool
    """

    hparams_file: str
    overrides: dict[str, str] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    trust: bool = False

    @classmethod
    def of(cls, argv: list[str]) -> CommandLine:
        """Take arguments apart.

        Raises
        ------
        ValueError
            No YAML, a setting without a value or given twice, an abbreviation of an option.

        Examples
        --------
        >>> CommandLine.of(["hparams/qmargin.yaml", "--loss", "cosface", "--precision=fp16"])
        CommandLine(hparams_file='hparams/qmargin.yaml', overrides={'loss': 'cosface'},
        options=['--precision=fp16'], trust=False)
        """
        from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

        defaults = RunOptions().as_dict()
        known = {name for name in HELP_TEXTS if name in defaults}
        known |= {"jit_module_keys", "compile_module_keys"}
        flags = {name for name in known if defaults[name] is False}
        found, waiting = cls(""), list(argv)
        while waiting:
            word = waiting.pop(0)
            if not word.startswith("--"):
                if found.hparams_file:
                    raise ValueError(f"{word!r}: settings are given as --key value")
                found.hparams_file = word
                continue
            name, given, value = word[2:].partition("=")
            if name == "trust" and not given:
                found.trust = True
            elif name in known:
                found.options.append(word)
                while name not in flags and waiting and not waiting[0].startswith("--"):
                    found.options.append(waiting.pop(0))
                    if not name.endswith("_module_keys"):
                        break
            elif near := sorted(one for one in known if one.startswith(name)):
                raise ValueError(
                    f"--{name} is not an option; SpeechBrain would take it for --{near[0]}: "
                    "options are written in full"
                )
            elif name in found.overrides:
                raise ValueError(f"--{name} is given twice on the command line")
            else:
                words = [value] if given else []
                while not given and waiting and not waiting[0].startswith("--"):
                    words.append(waiting.pop(0))
                if not " ".join(words).strip():
                    raise ValueError(f"--{name} needs a value; null stands for none")
                found.overrides[name] = " ".join(words)
        if not found.hparams_file:
            raise ValueError("give the experiment's YAML first, such as hparams/qmargin.yaml")
        return found

    def run_opts(self) -> Any:
        """SpeechBrain's RunOptions."""
        import speechbrain as sb

        return sb.parse_arguments([self.hparams_file, *self.options])[1]


def _parsed(overrides: dict[str, str]) -> dict[str, Any]:
    values = {}
    for key, text in overrides.items():
        try:
            values[key] = _round_trip(f"{key}: {text}")[key]
        except (YAMLError, TypeError, KeyError):
            raise ValueError(f"--{key}: {text!r} is not a YAML value") from None
    return values


def _of_its_kind(key: str, before: Any, value: Any, text: str) -> tuple[Any, str]:
    """A value from the command line and its YAML, if it is of the kind of the one before.

    A scalar in the place of a list is a list of one. None takes any place, and any value that of
    None, of a string or of an object.
    """
    if value is None or tag_of(value) or tag_of(before):
        return value, text
    plain = not isinstance(value, (dict, list))
    if isinstance(before, bool):
        wanted = "" if isinstance(value, bool) or value in (0, 1) else "True or False"
    elif isinstance(before, (int, float)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wanted = "" if number else f"a number, such as {before}"
    elif isinstance(before, dict):
        wanted = "" if isinstance(value, dict) else "a mapping, such as '{key: value}'"
    elif isinstance(before, list) and plain:
        return [value], json.dumps([value], ensure_ascii=False)
    else:
        wanted = ""
    if wanted:
        raise ValueError(f"--{key}: {text!r} is not {wanted}")
    return value, text


def _near(key: str, known: Iterable[str], path: Path) -> str:
    """Which settings may be meant by a name that is none; all, where none is near."""
    names = sorted(known)
    words = set(key.split("_"))
    near = [name for name in names if words & set(name.split("_"))]
    near += [name for name in get_close_matches(key, names) if name not in near]
    if not near:
        return f"the settings are {', '.join(names)}"
    return f"is it {' or '.join(f'--{name}' for name in near)}? --help after {path} shows all"


# ---------------------------------------------------------------- documents


@dataclass(frozen=True)
class _Entry:
    """A top-level key of a document: its lines, and the comment lines before it."""

    before: str
    lines: str
    value: Any
    comment: str = ""  # at the end of a scalar's line
    column: int = 0  # where it begins

    @property
    def is_object(self) -> bool:
        return isinstance(self.value, (dict, list))

    def with_line(self, before: str, line: str, value: Any) -> _Entry:
        """Another value, with this one's comment at its end."""
        line = line.rstrip()
        if self.comment:
            line = f"{line:{self.column - 1}} {self.comment}"
        return _Entry(before, line + "\n", value, self.comment, self.column)


class _Document:
    """A YAML by its top-level entries, each with its own comments, as they are written."""

    def __init__(self, heading: str, entries: dict[str, _Entry]) -> None:
        self.heading, self.entries = heading, entries
        self.chosen: set[str] = set()  # settings that were `auto`
        self.borrowed: Path | None = None  # the file of a run's folder that it extends

    @classmethod
    def of(cls, text: str, source: str | Path) -> _Document:
        try:
            read = _read(text)
        except YAMLError as error:
            raise ValueError(
                f"{source}: not a YAML file ({' '.join(str(error).split())})"
            ) from None
        if read is None:
            raise ValueError(f"{source}: not a YAML of settings, `key: value`")
        heading, entries = read
        return cls(heading, dict(entries))

    def values(self) -> dict[str, Any]:
        return {key: entry.value for key, entry in self.entries.items()}

    def pop(self, key: str, default: Any) -> Any:
        entry = self.entries.pop(key, None)
        return default if entry is None else entry.value

    def update(self, entries: dict[str, _Entry]) -> None:
        """Replace whole entries; their comments stay where the new ones have none."""
        for key, new in entries.items():
            old = self.entries.get(key, new)
            before = new.before if new.before.strip() else old.before
            if new.comment or new.is_object or old.is_object:
                self.entries[key] = _Entry(before, new.lines, new.value, new.comment, new.column)
            else:
                self.entries[key] = old.with_line(before, new.lines, new.value)

    def change(self, key: str, value: Any, text: str) -> None:
        """Give a key a value from the command line; of a mapping, some of its values.

        An object, which has a tag, takes the place of another with all that it is given.
        """
        entry = self.entries[key]
        if isinstance(value, dict) and isinstance(entry.value, dict) and not tag_of(value):
            tree = _round_trip(entry.lines)
            recursive_update(tree, {key: value})
            self.entries[key] = _Entry(entry.before, _dump(tree), tree[key])
        else:
            self.entries[key] = entry.with_line(entry.before, f"{key}: {text}", value)

    def give(self, key: str, value: Any) -> None:
        """Give a key a plain value; a key that was not there comes first."""
        if isinstance(value, list):
            text = json.dumps(value, ensure_ascii=False)  # on one line; JSON is YAML
        else:
            text = _dump({key: value}).split(":", 1)[1].strip()
        if key in self.entries:
            self.change(key, value, text)
        else:
            self.entries = {key: _Entry("", f"{key}: {text}\n", value), **self.entries}

    def begin_with_heading(self) -> None:
        """The heading becomes the first key's comment."""
        for key, entry in list(self.entries.items())[:1]:
            before = self.heading.rstrip("\n") + "\n" * bool(self.heading) + entry.before
            self.entries[key] = replace(entry, before=before)
        self.heading = ""

    def text(self) -> str:
        # HyperPyYAML wants a value before what refers to it: scalars first, then objects
        entries = sorted(self.entries.values(), key=lambda entry: entry.is_object)
        body = "".join(entry.before + entry.lines for entry in entries)
        return self.heading + body.lstrip("\n")


@functools.lru_cache(maxsize=64)  # a YAML may be read for each of several starts in a process
def _read(text: str) -> tuple[str, dict[str, _Entry]] | None:
    """The heading and the entries of a YAML; None where it is not a mapping."""
    node = YAML().compose(text)
    tree = _round_trip(text) or {}
    if not isinstance(tree, dict):
        return None
    lines = text.splitlines(keepends=True)
    starts = [key.start_mark.line for key, _ in node.value] if node is not None else []
    heading, entries = [], {}
    begins, comments = 0, []
    nodes = [value for _, value in node.value] if node is not None else []
    for number, (start, key) in enumerate(zip(starts, tree, strict=True)):
        comments = lines[begins:start] if number == 0 else comments
        if number == 0:
            heading, comments = _split_heading(comments)
        stop = starts[number + 1] if number + 1 < len(starts) else len(lines)
        own = stop
        while own > start + 1 and _beside(lines[own - 1]):
            own -= 1
        end = nodes[number].end_mark
        after = lines[start][end.column :].strip() if end.line == start else ""
        after = after if after.startswith("#") else ""
        entries[key] = _Entry(
            "".join(comments),
            _ended("".join(lines[start:own])),
            tree[key],
            after,
            lines[start].index(after, end.column) if after else 0,
        )
        comments = lines[own:stop]
    return "".join(heading), entries


def _beside(line: str) -> bool:
    """Whether a line belongs to what follows it: a comment at the margin, or nothing."""
    return not line.strip() or line.startswith("#")


def _split_heading(lines: list[str]) -> tuple[list[str], list[str]]:
    """The comment that a file begins with, up to its last empty line; what is the first key's."""
    empty = [number for number, line in enumerate(lines) if not line.strip()]
    cut = empty[-1] + 1 if empty else len(lines)
    return lines[:cut], lines[cut:]


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _round_trip(text: str) -> Any:
    """A YAML text with its tags and comments."""
    return YAML().load(text)


def _dump(tree: Any) -> str:
    stream = StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.dump(tree, stream)
    return stream.getvalue()


# ---------------------------------------------------------------- composing


def _compose(path: Path, given: dict[str, Any], trust: bool, checked: bool = False) -> _Document:
    """A YAML with what it extends and its overlays; `given` chooses among them.

    What lies in a folder that a setting names is `checked`, with all that it extends.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such hyperparameter file (in {os.getcwd()})")
    text = path.read_text(encoding="utf-8")
    if checked:
        refuse_code(text, path, trust)
    document = _Document.of(text, path)
    auto = document.pop("auto", {})
    overlays = document.pop("overlays", [])
    parent = document.pop("extends", None)
    if parent is not None:
        choices = {**plain_settings(document.values()), **given}
        file = _named(parent, path, choices)
        from_folder = parent.startswith("<")
        below = _compose(file, choices, trust, checked or from_folder)
        if from_folder:
            below.borrowed = file
        below.heading = document.heading
        below.update(document.entries)
        document = below
    choices = {**plain_settings(document.values()), **given}
    for key, values in auto.items():
        if choices.get(key) == "auto":
            choices[key] = _first_that_holds(key, values, choices, path)
            document.give(key, choices[key])
            document.chosen.add(key)
            given = {**given, key: choices[key]}
    layers: list[tuple[bool, _Document]] = []
    for overlay in reversed(overlays):  # a later one may choose among those before it
        known_only = isinstance(overlay, dict)
        name = overlay["known"] if known_only else overlay
        layer = _compose(_named(name, path, choices, auto), {}, trust, checked)
        if not known_only:
            layer.begin_with_heading()
        layers.insert(0, (known_only, layer))
        choices = {**choices, **plain_settings(layer.values()), **given}
    for known_only, layer in layers:
        document.update(
            {
                key: entry
                for key, entry in layer.entries.items()
                if not known_only or key in document.entries
            }
        )
    return document


def _first_that_holds(key: str, values: dict, choices: dict, path: Path) -> str:
    for value, wanted in values.items():
        if all(choices.get(other) == want for other, want in (wanted or {}).items()):
            return value
    raise ValueError(f"{key}: auto is none of {', '.join(values)} here; see {path}")


def _named(name: str, path: Path, choices: dict, auto: Any = ()) -> Path:
    """The file that `name` means beside `path`; an unknown choice is named with the known ones."""
    keys = re.findall(r"<(\w+)>", name)
    if missing := [key for key in keys if choices.get(key) is None]:
        raise ValueError(f"--{missing[0]} must be given: {path} starts from it")
    file = Path(re.sub(r"<(\w+)>", lambda match: str(choices[match[1]]), name))
    if not name.startswith("<"):  # a folder that the user gave is where the user is
        file = path.parent / file
    if not file.is_file():
        if len(keys) == 1 and file.parent.is_dir() and Path(name).stem == f"<{keys[0]}>":
            known = sorted(one.stem for one in file.parent.glob("*.yaml"))
            known = ["auto"] * (keys[0] in auto) + known
            raise ValueError(
                f"{keys[0]}: {choices[keys[0]]!r} is unknown; choose {', '.join(known)}"
            )
        raise FileNotFoundError(f"{file}: {path} starts from it, but there is no such file")
    return file
