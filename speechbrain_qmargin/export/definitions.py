"""What a run's ``hyperparams.yaml`` says of its modules, whatever the model."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import Comment, CommentedMap, CommentedSeq

from speechbrain_qmargin.files import tag_of
from speechbrain_qmargin.training.config import resolved
from speechbrain_qmargin.training.trust import refuse_code

__all__ = ["build", "canonical", "definitions", "hyperparams_tree"]

# what recordings and images are brought to: memory goes by it
_SIZES = {"sample_rate": (1_000, 768_000), "image_size": (8, 4_096)}


def hyperparams_tree(
    path: str | Path,
    wanted: tuple[str, ...] = ("modules", "sample_rate"),
    trust: bool | Collection[str] = False,
) -> Any:
    """A ``hyperparams.yaml`` with its tags, references resolved.

    Raises
    ------
    FileNotFoundError, ValueError
        No such file; a key that is missing, a size that is none; a tag that would run code
        (:func:`~speechbrain_qmargin.training.trust.refuse_code`).

    Examples
    --------
    >>> path = getfixture("tmp_path") / "hyperparams.yaml"
    >>> _ = path.write_text("{sample_rate: 16000, bands: 80, modules: {n_mels: !ref <bands>}}")
    >>> hyperparams_tree(path)["modules"]["n_mels"]
    80
    >>> _ = path.write_text("{sample_rate: 16000, modules: {network: !apply:os.system [ls]}}")
    >>> hyperparams_tree(path)
    Traceback (most recent call last):
    ValueError: ...
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run's output folder holds one")
    text = path.read_text(encoding="utf-8", errors="replace")
    refuse_code(text, path, trust)
    tree = resolved(text)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: not a YAML of settings, `key: value`")
    missing = [key for key in wanted if key not in tree]
    if missing:
        raise ValueError(f"{path}: no {' and no '.join(missing)} in it")
    if "modules" in wanted and not isinstance(tree["modules"], dict):
        raise ValueError(f"{path}: its modules are not a mapping from names to objects")
    for key, (low, high) in _SIZES.items():
        value = tree.get(key, low)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{path}: {key} is {str(value)[:60]}; {low} to {high} are read")
    return tree


def definitions(tree: Any, names: Iterable[str]) -> str:
    """The YAML of some modules and of what they are made of; each a key of its own.

    Examples
    --------
    >>> linear = "!new:torch.nn.Linear {in_features: 2, out_features: 1}"
    >>> tree = resolved(f"modules: {{network: {linear}, classifier: 0}}")
    >>> print(definitions(tree, ["network"]).strip())
    network: !new:torch.nn.Linear {in_features: 2, out_features: 1}
    """

    def without_comments(node: Any) -> None:
        if isinstance(node, (CommentedMap, CommentedSeq)):
            if hasattr(node, Comment.attrib):
                delattr(node, Comment.attrib)
            for value in node.values() if isinstance(node, CommentedMap) else node:
                without_comments(value)

    chosen = CommentedMap(
        (name, tree["modules"][name]) for name in names if name in tree["modules"]
    )
    without_comments(chosen)
    stream = io.StringIO()
    YAML().dump(chosen, stream)
    return stream.getvalue()


def canonical(tree: Any, names: Iterable[str]) -> str:
    """What some modules are, as JSON that is the same however the YAML was laid out.

    Examples
    --------
    >>> tree = resolved("{sample_rate: 8000, modules: {net: !new:torch.nn.ReLU {inplace: True}}}")
    >>> canonical(tree, ["net"])
    '[{"net": {"!new:torch.nn.ReLU": {"inplace": true}}}, 8000]'
    """

    def plain(node: Any) -> Any:
        tag = tag_of(node)
        if isinstance(node, CommentedMap):
            content = {str(key): plain(value) for key, value in node.items()}
        elif isinstance(node, (CommentedSeq, list, tuple)):
            content = [plain(value) for value in node]
        elif node is None or isinstance(node, bool):
            return node
        elif isinstance(node, int):
            return int(node)
        elif isinstance(node, float):
            return float(node)
        else:
            content = str(getattr(node, "value", node))
        return {tag: content} if tag else content

    chosen = {name: plain(tree["modules"][name]) for name in names if name in tree["modules"]}
    return json.dumps([chosen, plain(tree.get("sample_rate"))], sort_keys=True)


def build(tree: Any, names: Iterable[str]) -> dict[str, Any]:
    """The modules themselves, with random weights; those that the YAML does not define are left.

    Examples
    --------
    >>> tree = resolved("modules: {net: !new:torch.nn.Linear {in_features: 2, out_features: 1}}")
    >>> build(tree, ["net", "classifier"])
    {'net': Linear(in_features=2, out_features=1, bias=True)}
    """
    return load_hyperpyyaml(definitions(tree, names))
