"""SpeechBrain: the folder of an encoder, ``hyperparams.yaml`` and ``embedding_model.ckpt``.

That is what ``spkrec-ecapa-voxceleb``, ``spkrec-resnet-voxceleb`` and ``spkrec-xvect-voxceleb``
hold, what Huggingface's cache and ``from_hparams(savedir=...)`` make of them, and the
``inference/`` of a run of this package. The YAML is read as data: what ``!new:`` names is looked up
among the names below, and nothing else of the file is built.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from torch import Tensor, nn

from speechbrain_qmargin.files import refuse_yaml_bomb, tag_of
from speechbrain_qmargin.published.model import Published, SpeechInput
from speechbrain_qmargin.published.source import Source, fit, read_tensors

NAME = "SpeechBrain"
KEYS = ("blocks.0.conv.conv.weight", "blocks.1.tdnn1.conv.conv.weight", "mfa.conv.conv.weight",
        "asp.tdnn.conv.conv.weight", "asp_bn.norm.weight", "fc.conv.weight")  # fmt: skip
YAML_FILE, WEIGHTS = "hyperparams.yaml", "embedding_model.ckpt"

OWN = "speechbrain_qmargin.models"
NORMALISED = {"embedding_norm": "embedding_norm"}  # False where a network is not given it
# Networks, the recipe's model that has them, and which of its settings their arguments are
NETWORKS: dict[str, tuple[str, dict[str, str]]] = {
    "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN": (
        "ecapa", {"attention_channels": "attention_channels"},
    ),
    "speechbrain.lobes.models.ResNet.ResNet": ("speechbrain_resnet", {}),
    "speechbrain.lobes.models.Xvector.Xvector": ("xvector", NORMALISED),
    f"{OWN}.xvector.Xvector": ("xvector", NORMALISED),
    f"{OWN}.resnet.ResNet": ("resnet34", {"channels": "width", "depth": "depth", **NORMALISED}),
    f"{OWN}.campplus.CAMPPlus": (
        "campplus",
        {"growth": "growth", "channels": "tdnn_channels", "layers": "layers",
         "least_variance": "least_variance"},
    ),
    f"{OWN}.ecapa.WeSpeakerEcapa": (
        "wespeaker_ecapa",
        {"channels": "channels", "context": "global_context", "pooled": "pooled_channels"},
    ),
    f"{OWN}.eres2net.ERes2Net": (
        "eres2net",
        {"channels": "width", "base": "base_width", "scale": "groups", "expansion": "expansion",
         **NORMALISED},
    ),
    f"{OWN}.eres2net.ERes2NetV2": (
        "eres2netv2",
        {"channels": "width", "base": "base_width", "scale": "groups", "expansion": "expansion",
         **NORMALISED},
    ),
}  # fmt: skip
BANDS, DIMENSIONS = ("input_size", "in_channels"), "lin_neurons"
FBANK = "speechbrain.lobes.features.Fbank"
KALDI = "speechbrain_qmargin.features.KaldiFbank"
NORM = "speechbrain.processing.features.InputNormalization"
KNOWN = {*NETWORKS, FBANK, KALDI, NORM} | {
    f"torch.nn.{name}" for name in ("LeakyReLU", "ReLU", "GELU", "SiLU", "Tanh")
}
_REFERENCE = re.compile(r"<(\w+)>")
_MOST_VALUES = 10_000  # of a document, each as often as it is referred to


def recognise(source: Source) -> bool:
    """``hyperparams.yaml`` with a network of its, beside ``embedding_model.ckpt``.

    Examples
    --------
    >>> import torch
    >>> folder = getfixture("tmp_path")
    >>> network = "!new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN"
    >>> _ = (folder / YAML_FILE).write_text(f"embedding_model: {network}")
    >>> recognise(Source(folder))           # without embedding_model.ckpt
    False
    >>> torch.save({"weight": torch.zeros(1)}, folder / WEIGHTS)
    >>> recognise(Source(folder))
    True
    """
    if source.path.is_file() and source.path.name != WEIGHTS:
        return False
    file = source.file(YAML_FILE)
    return (
        file is not None
        and source.file(WEIGHTS) is not None
        and any(name in file.read_text(encoding="utf-8", errors="replace") for name in NETWORKS)
    )


def load(source: Source) -> Published:
    """The network with its features and statistics; classifier and labels are left out.

    Raises
    ------
    ValueError
        A network or features that are not known, or a reference to nothing; with the key.
    """
    file, weights = source.file(YAML_FILE), source.file(WEIGHTS)
    if file is None or weights is None:
        raise ValueError(f"{source.path}: no {YAML_FILE if file is None else WEIGHTS} in it")
    document = _Document(file)
    name, arguments = document.definition("embedding_model", NETWORKS)
    network = document.built(name, arguments)
    network_name = name.rsplit(".", 1)[1]
    fit(network, source.state_of(weights), weights, f"the {network_name} of {YAML_FILE}")
    features_name, features_arguments = document.definition("compute_features", {FBANK, KALDI})
    features = document.built(features_name, features_arguments)
    norm_name, norm_arguments = document.definition("mean_var_norm", {NORM})
    norm = document.built(norm_name, norm_arguments)
    _statistics(norm, source.file("mean_var_norm.ckpt"))
    notes = []
    rate = document.plain("sample_rate")
    if rate is None:
        rate = features_arguments.get("sample_rate")
    if rate is None:
        rate = 16000
        notes.append(f"{YAML_FILE} has no sample_rate: 16 kHz, which SpeechBrain's features assume")
    mean = None
    if (statistics := source.file("mean_var_norm_emb.ckpt")) is not None:
        found = read_tensors(statistics).get("glob_mean")
        mean = found.float().flatten() if isinstance(found, Tensor) and found.numel() > 1 else None
        if mean is not None:
            notes.append(
                "mean_var_norm_emb is kept but not subtracted, as when SpeechBrain verifies"
            )
    settings: dict[str, Any] = {
        "model": NETWORKS[name][0],
        "embedding_dim": int((_defaults(name) | arguments)[DIMENSIONS]),
    }
    settings |= _architecture(name, arguments)
    settings |= _features(features_name, features_arguments, rate)
    if norm_arguments.get("norm_type", "global") != "sentence" or norm_arguments.get(
        "std_norm", True
    ):
        settings["mean_var_norm"] = dict(norm_arguments)
    mels = features_arguments.get("n_mels", 40 if features_name == FBANK else 80)
    kind = "SpeechBrain" if features_name == FBANK else "Kaldi"
    removed = "mean and deviation" if norm_arguments.get("std_norm", True) else "mean"
    of = "each recording" if norm_arguments.get("norm_type") == "sentence" else "training"
    about = f"{mels} {kind} filterbanks, {removed} of {of} removed"
    return Published(
        network,
        SpeechInput(features, norm, rate, about),
        settings["embedding_dim"],
        NAME,
        network_name,
        weights,
        settings,
        tuple(notes),
        mean,
    )


def _defaults(name: str) -> dict[str, Any]:
    """What the arguments of a network are where a YAML does not give them."""
    parameters = inspect.signature(_found(name)).parameters
    return {key: one.default for key, one in parameters.items() if one.default is not one.empty}


def _statistics(norm: Any, file: Path | None) -> None:
    if file is not None and norm.norm_type == "global":
        found = read_tensors(file)
        if not {"count", "glob_mean", "glob_std"} <= set(found):
            raise ValueError(f"{file}: no statistics (count, glob_mean, glob_std) in it")
        norm.count, norm.glob_mean, norm.glob_std = (
            found[key] for key in ("count", "glob_mean", "glob_std")
        )


def _architecture(name: str, arguments: dict) -> dict[str, Any]:
    """Settings of the recipe's YAML of a network; what it has none for is set inside it.

    What a YAML leaves to the network's defaults is among them: a recipe, or its ``--size``, has
    others.
    """
    named, defaults = NETWORKS[name][1], _defaults(name)
    rest = {key: value for key, value in arguments.items() if key not in (*BANDS, DIMENSIONS)}
    settings: dict[str, Any] = {
        setting: rest.pop(key, defaults.get(key, False)) for key, setting in named.items()
    }
    if name.endswith(".ECAPA_TDNN"):
        channels = rest.get("channels", defaults["channels"])
        if len(channels) == 5 and channels == [channels[0]] * 4 + [3 * channels[0]]:
            settings["channels"] = channels[0]
            rest.pop("channels", None)
        usual = {"kernel_sizes": [5, 3, 3, 3, 1], "dilations": [1, 2, 3, 4, 1], "groups": [1] * 5}
        rest = {key: value for key, value in rest.items() if usual.get(key) != value}
    rest = {key: value for key, value in rest.items() if not isinstance(value, type)}
    return settings | ({"embedding_model": rest} if rest else {})


def _features(name: str, arguments: dict, rate: int) -> dict[str, Any]:
    rest = {key: value for key, value in arguments.items() if key not in ("n_mels", "sample_rate")}
    settings = {"n_mels": arguments.get("n_mels", 40 if name == FBANK else 80), "sample_rate": rate}
    if name == FBANK:
        plain = {"left_frames": 0, "right_frames": 0, "deltas": False}
        rest = {key: value for key, value in rest.items() if plain.get(key) != value}
        settings["features"] = "speechbrain"
    else:
        settings["features"] = "kaldi"
        for key in ("window", "full_scale", "dither"):
            if key in rest:
                settings[f"fbank_{key}"] = rest.pop(key)
    return settings | ({"compute_features": rest} if rest else {})


class _Document:
    """A ``hyperparams.yaml`` as data: plain values, references to them, names of classes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            text = file.read_text(encoding="utf-8")
            refuse_yaml_bomb(text)
            tree = YAML().load(text)
        except (YAMLError, ValueError) as error:
            raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())[:160]})") from None
        if not isinstance(tree, dict):
            raise ValueError(f"{file}: not a YAML of settings, `key: value`")
        self.tree, self.left = tree, _MOST_VALUES

    def plain(self, key: str) -> Any:
        """The value of a key; None where there is none."""
        return self._value(self.tree[key]) if self.tree.get(key) is not None else None

    def definition(self, key: str, known: Any) -> tuple[str, dict[str, Any]]:
        """The class that a key names, of those that are known, and its arguments."""
        modules = self.tree.get("modules")
        node = self.tree.get(key, modules.get(key) if isinstance(modules, dict) else None)
        if node is None:
            raise ValueError(f"{self.file}: no {key} in it")
        tag = tag_of(node)
        if not tag.startswith("!new:") or tag[5:] not in known:
            raise ValueError(
                f"{self.file}: {key} is {tag or 'no object'}; known are {', '.join(known)}"
            )
        if not isinstance(node, dict):
            if getattr(node, "value", None) in (None, ""):
                return tag[5:], {}
            raise ValueError(f"{self.file}: {key} has arguments without names")
        return tag[5:], {str(name): self._value(value) for name, value in node.items()}

    def built(self, name: str, arguments: dict[str, Any]) -> nn.Module:
        """The object itself."""
        try:
            return _found(name)(**arguments).eval()
        except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
            raise ValueError(f"{self.file}: {name} cannot be built ({error})") from None

    def _value(self, node: Any, depth: int = 0) -> Any:
        tag = tag_of(node)
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"{self.file}: its references grow beyond {_MOST_VALUES:,} values")
        if depth > 20:
            raise ValueError(f"{self.file}: references go round in a circle")
        if tag.startswith("!name:") and tag[6:] in KNOWN:
            return _found(tag[6:])
        if tag == "!ref":
            text = str(node.value)
            if (whole := _REFERENCE.fullmatch(text)) and whole[1] in self.tree:
                return self._value(self.tree[whole[1]], depth + 1)
            raise ValueError(f"{self.file}: !ref {text} does not refer to a value in it")
        if tag:
            raise ValueError(f"{self.file}: {tag} among the arguments is not read")
        if isinstance(node, list):
            return [self._value(one, depth + 1) for one in node]
        if isinstance(node, dict):
            raise ValueError(f"{self.file}: a mapping among the arguments is not read")
        return node.item() if hasattr(node, "item") else node


def _found(name: str) -> Any:
    if name not in KNOWN:
        raise ValueError(f"{name} is not known")
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)
