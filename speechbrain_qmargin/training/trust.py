"""What the YAML of a run's folder may name: nothing that runs code of its author's choosing.

HyperPyYAML executes: ``!apply:subprocess.getoutput [...]`` runs a command while a file is loaded.
A YAML that a user writes or passes on the command line is the user's program. The YAML inside the
folder of a run may come from somebody else, with the weights; it is checked before anything is
loaded, and refused unless every object in it is one that networks, features, losses, optimisers and
loggers are made of.

What is looked at is the tree that the loader itself composes, its references resolved, so that
directives, aliases and implicit tags mean here what they mean there.
"""

from __future__ import annotations

import functools
import inspect
import os
import pydoc
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML, Loader
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from speechbrain_qmargin.files import refuse_yaml_bomb, tag_of

__all__ = ["load_checked", "object_names", "refuse_code", "refuse_outside"]

# Modules whose networks and optimisers may be built, those below them included.
ROOTS = (
    "speechbrain_qmargin",
    "torch.nn",
    "torch.optim",
    "speechbrain.nnet",
    "speechbrain.processing.features",
    "speechbrain.lobes.features",
    "speechbrain.lobes.models.CRDNN",
    "speechbrain.lobes.models.ECAPA_TDNN",
    "speechbrain.lobes.models.ResNet",
    "speechbrain.lobes.models.Xvector",
)
# What else the recipes' YAMLs are made of. None of it opens, writes or fetches what a YAML names,
# but for the log, the checkpoints and the noise of a training.
NAMES = frozenset(
    {
        "speechbrain.augment.augmenter.Augmenter",
        "speechbrain.augment.time_domain.DropChunk",
        "speechbrain.augment.time_domain.DropFreq",
        "speechbrain.augment.time_domain.SpeedPerturb",
        "speechbrain.dataio.encoder.CategoricalEncoder",
        "speechbrain.dataio.preprocess.AudioNormalizer",
        "speechbrain.utils.epoch_loop.EpochCounter",
        "speechbrain.utils.parameter_transfer.Pretrainer",
        "speechbrain.utils.seed_everything",
        "speechbrain.utils.train_logger.FileTrainLogger",
        "speechbrain.utils.train_logger.TensorboardLogger",
        "speechbrain_qmargin.data.augment.DropChunk",
        "speechbrain_qmargin.data.augment.room_and_noise",
        "speechbrain_qmargin.make_loss",
        "speechbrain_qmargin.training.checkpoints.AtomicCheckpointer",
        "speechbrain_qmargin.training.schedules.loss_schedule",
        "speechbrain_qmargin.training.schedules.polynomial_decay",
        "speechbrain_qmargin.training.schedules.warmup_exponential",
    }
)
# Those that write or delete files, and the settings that say where
WRITERS = ("AtomicCheckpointer", "FileTrainLogger", "TensorboardLogger")
PLACES = ("save_folder", "collect_in")
# Settings that name a module of the user's own, which is imported
IMPORTED, MAKE_LOSS = ("loss", "reader"), "speechbrain_qmargin.make_loss"
_OBJECT = re.compile(r"!(?:new|name|apply):(.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z]\w*(?:\.[A-Za-z]\w*)+")
_CORE = "tag:yaml.org,2002:"
_PLAIN = {f"{_CORE}{name}" for name in ("str", "int", "float", "bool", "null")}
_PLAIN |= {f"{_CORE}{name}" for name in ("map", "seq", "timestamp")}
_REFERENCE = re.compile(r"<([^>]*)>")
_LARGEST, _LONGEST, _DEEPEST = 1_000_000, 10_000, 100  # characters, of a text; references in turn
_REFERENCE_TO_ATTRIBUTE = re.compile(r"<[^<>]*\.[^<>]*>")


def refuse_code(text: str, source: str | Path, trust: bool | Collection[str] = False) -> None:
    """Refuse a HyperPyYAML document that would build or call what it should not.

    Parameters
    ----------
    text : str
        The document; nothing of it is built.
    source : path
        Its file, for the message.
    trust : bool or collection of str
        True allows everything; names allow those beside the list's: what the user's own YAML
        names already.

    Raises
    ------
    ValueError
        A tag outside the list, no YAML, one that is nested too deeply, or one whose aliases and
        references grow without bound; with the file and what to do.

    Examples
    --------
    >>> refuse_code("layer: !new:torch.nn.Linear [2, 1]", "run/hyperparams.yaml")
    >>> refuse_code("x: !apply:os.getcwd []", "run/hyperparams.yaml")
    Traceback (most recent call last):
    ValueError: run/hyperparams.yaml: !apply:os.getcwd would run code that came with the folder; ...
    """
    if trust is True:
        return
    allowed = NAMES if trust is False else NAMES | set(trust)
    try:
        found = _refused(text, frozenset(allowed))
    except (YAMLError, RecursionError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{source}: not a YAML file ({_first_line(error)})") from None
    if found is not None:
        _refuse(source, found)


@functools.lru_cache(maxsize=64)  # a run's YAML is checked at several points
def _refused(text: str, allowed: frozenset[str]) -> str | None:
    """What in a document would build or call what it should not; None where nothing would."""
    refuse_yaml_bomb(text)
    tree = YAML().load(text)
    _refuse_growth(tree)
    # before references are resolved: some tags act then already
    for tag, value in [*_composed(text), *_written(tree)]:
        if not (tag in ("!ref", "!copy", "!PLACEHOLDER") or _permitted(tag, value, allowed)):
            return tag
        if tag in ("!ref", "!copy") and value and _REFERENCE_TO_ATTRIBUTE.search(value):
            return f"{tag} {value}, an attribute of an object,"
    resolved = resolve_references(text).read()
    for tag, value in _composed(resolved):
        if not _permitted(tag, value, allowed):
            return tag
    for key, value in _imports(YAML().load(resolved)):
        if value not in allowed:
            return f"{key}: {value}, a name of somebody's module,"
    return None


def _refuse_growth(tree: Any) -> None:
    """Refuse a document that a loader would write out to gigabytes, or compute for ever.

    Lists of aliases of lists of aliases, texts of references to texts of references, 9 ** 9 ** 9.
    """
    sizes: dict[int, int | None] = {}  # None while a node is being measured

    def size(node: Any) -> int:
        """Its characters, aliases and references written out."""
        tag = tag_of(node)
        if not isinstance(node, (dict, list, tuple, set)) and tag not in ("!ref", "!copy"):
            return len(str(getattr(node, "value", node))) + 1
        if id(node) not in sizes:
            sizes[id(node)] = None
            if isinstance(node, dict):
                total = 1 + sum(size(key) + size(value) for key, value in node.items())
            elif isinstance(node, (list, tuple, set)):
                total = 1 + sum(map(size, node))
            else:
                total = referred(str(getattr(node, "value", node)))
            if total > _LARGEST:
                raise YAMLError(f"its aliases and references grow beyond {_LARGEST:,} characters")
            sizes[id(node)] = total
        found = sizes[id(node)]
        if found is None:
            raise YAMLError("a part of it is made of itself")
        return found

    def referred(text: str) -> int:
        whole = re.fullmatch(r"<([^<>]*)>", text)
        if whole:
            return size(target(whole[1]))
        for _ in range(_DEEPEST):
            if not _REFERENCE.search(text):
                break
            text = _REFERENCE.sub(lambda found: shown(target(found[1])), text)
            if len(text) > _LONGEST:
                raise YAMLError(f"a text of references grows beyond {_LONGEST:,} characters")
        else:
            raise YAMLError("a reference leads to itself")
        if "**" in text or ("*" in text and re.search("['\"]", text)):
            raise YAMLError(f"{text[:60]!r}: a power, or a text times a number, of any size")
        return len(text)

    def shown(node: Any) -> str:
        if size(node) > _LONGEST:
            raise YAMLError(f"a text of references grows beyond {_LONGEST:,} characters")
        return str(getattr(node, "value", node))

    def target(name: str) -> Any:
        node = tree
        for part in name.split(".")[0].split("["):
            node = node.get(part.strip("]"), "") if isinstance(node, dict) else ""
        return node  # what is not there the loader names

    size(tree)


def refuse_outside(text: str, source: str | Path) -> None:
    """Refuse a document that writes elsewhere than in its ``output_folder``.

    Checkpoints are deleted when newer ones are there, and a log is appended to: a YAML that came
    with a folder must not choose where.

    Parameters
    ----------
    text : str
        The whole experiment; nothing of it is built.
    source : path
        The file that came with the folder, for the message.

    Raises
    ------
    ValueError
        A checkpointer, a log or ``save_folder`` outside ``output_folder``.

    Examples
    --------
    >>> refuse_outside("output_folder: a\\nsave_folder: !ref <output_folder>/save", "run.yaml")
    >>> refuse_outside("output_folder: a\\nsave_folder: a/../b", "run.yaml")
    Traceback (most recent call last):
    ValueError: run.yaml: a/../b is outside the output folder a...
    """
    tree = YAML().load(resolve_references(text).read())
    folder = tree.get("output_folder")
    for place in _places(tree):
        inside = isinstance(folder, str) and os.path.realpath(place).startswith(
            os.path.join(os.path.realpath(folder), "")
        )
        if not inside:
            raise ValueError(
                f"{source}: {place} is outside the output folder {folder}, and the run would write "
                "there; nothing was loaded. If you know where the folder is from and mean it, say "
                "--trust"
            )


def _places(node: Any, writes: bool = False) -> Iterator[str]:
    """Where the objects of a resolved tree write."""
    tag = tag_of(node)
    if tag:  # an object's own arguments, not those of the objects among them
        writes = tag.endswith(WRITERS)
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _places(value, writes or key in PLACES)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _places(value, writes)
    elif writes and isinstance(node, str):
        yield node


def load_checked(text: str, source: str | Path, trust: bool | Collection[str] = False) -> dict:
    """The objects of a HyperPyYAML document, once :func:`refuse_code` has let it pass.

    Examples
    --------
    >>> load_checked("network: !new:torch.nn.ReLU", "run/hyperparams.yaml")
    {'network': ReLU()}
    >>> load_checked("network: !apply:os.system [ls]", "run/hyperparams.yaml")
    Traceback (most recent call last):
    ValueError: run/hyperparams.yaml: !apply:os.system would run code that came with the folder; ...
    """
    refuse_code(text, source, trust)
    return load_hyperpyyaml(text)


def object_names(text: str) -> frozenset[str]:
    """The dotted names that a document builds, calls or imports.

    Examples
    --------
    >>> sorted(object_names("a: !new:my.Net {size: 3}\\nb: [!name:my.rate , 2]"))
    ['my.Net', 'my.rate']
    """
    refuse_yaml_bomb(text)
    tree = YAML().load(text)
    matches = (_OBJECT.fullmatch(tag) for tag, _ in _written(tree))
    names = {match[1] for match in matches if match}
    return frozenset(names | {value for _, value in _imports(tree)})


def _refuse(source: str | Path, what: str) -> None:
    raise ValueError(
        f"{source}: {what} would run code that came with the folder; nothing was loaded. If you "
        "know where the folder is from and mean it, say --trust (trust=True)"
    )


def _permitted(tag: str, value: str | None, allowed: Collection[str]) -> bool:
    if tag in _PLAIN or tag in ("", "!tuple"):
        # HyperPyYAML reads "(...)" as a tuple, with a loader that executes tags
        return not (value is not None and value.lstrip().startswith("(") and "!" in value)
    match = _OBJECT.fullmatch(tag)
    return match is not None and (match[1] in allowed or _is_network(match[1]))


def _is_network(name: str) -> bool:
    """Whether a name is a network's or an optimiser's class, defined below one of `ROOTS`."""
    if not _NAME.fullmatch(name) or not _below(name):
        return False
    import torch

    try:
        found = pydoc.locate(name)  # imports modules below the roots, which run nothing of the YAML
    except pydoc.ErrorDuringImport:
        return False
    return (
        inspect.isclass(found)
        and issubclass(found, (torch.nn.Module, torch.optim.Optimizer))
        and _below(found.__module__)
    )


def _below(name: str) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in ROOTS)


def _imports(tree: Any) -> Iterator[tuple[str, str]]:
    """Settings whose value is imported by name: a loss, a reader of one's own."""
    if not isinstance(tree, dict):
        return
    for key, node in tree.items():
        tag = tag_of(node)
        if key in IMPORTED or tag == f"!apply:{MAKE_LOSS}":
            for _, value in _written(node):
                if _dotted(value):
                    yield key, value


def _dotted(value: str | None) -> TypeGuard[str]:
    return value is not None and re.fullmatch(r"[^\W\d]\w*([.:][^\W\d]\w*)+", value) is not None


def _written(node: Any) -> Iterator[tuple[str, str | None]]:
    """Tag and scalar of every node of a tree that keeps its tags; no tag is the empty string."""
    tag = tag_of(node)
    if isinstance(node, dict):
        yield tag, None
        for key, value in node.items():
            yield from _written(key)
            yield from _written(value)
    elif isinstance(node, (list, tuple, set)):
        yield tag, None
        for value in node:
            yield from _written(value)
    else:
        yield tag, str(getattr(node, "value", node))


def _composed(text: str) -> Iterator[tuple[str, str | None]]:
    """Tag and scalar of every node, as the loader that executes tags would see them."""
    loader = Loader(text)
    root = loader.get_single_node()
    waiting, seen = [root] if root is not None else [], set()
    while waiting:
        node: Node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        tag = str(node.tag)
        if isinstance(node, MappingNode):
            yield tag, None
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            yield tag, None
            waiting += node.value
        elif isinstance(node, ScalarNode):
            yield tag, node.value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
