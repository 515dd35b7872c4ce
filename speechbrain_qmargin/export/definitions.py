"""What a run's ``hyperparams.yaml`` says of its modules, whatever the model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hyperpyyaml import load_hyperpyyaml, resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

__all__ = ["build", "definitions", "hyperparams_tree"]


def hyperparams_tree(path: str | Path, wanted: tuple[str, ...] = ("modules", "sample_rate")) -> Any:
    """A ``hyperparams.yaml`` with its tags, references resolved."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run's output folder holds one")
    tree = YAML().load(resolve_references(path.read_text(encoding="utf-8")).read())
    missing = [key for key in wanted if key not in (tree or {})]
    if missing:
        raise ValueError(f"{path}: no {' and no '.join(missing)} in it")
    return tree


def definitions(tree: Any, names) -> str:
    """The YAML of some modules and of what they are made of; each a key of its own."""

    def without_comments(node):
        if isinstance(node, (CommentedMap, CommentedSeq)):
            if hasattr(node, "_yaml_comment"):
                del node._yaml_comment
            for value in node.values() if isinstance(node, CommentedMap) else node:
                without_comments(value)

    chosen = CommentedMap(
        (name, tree["modules"][name]) for name in names if name in tree["modules"]
    )
    without_comments(chosen)
    stream = io.StringIO()
    YAML().dump(chosen, stream)
    return stream.getvalue()


def build(tree: Any, names) -> dict[str, Any]:
    return load_hyperpyyaml(definitions(tree, names))
