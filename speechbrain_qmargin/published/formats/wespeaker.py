"""WeSpeaker: a folder with ``config.yaml`` and ``avg_model.pt``, or ``avg_model.pt`` alone.

Source: wenet-e2e/wespeaker, ``wespeaker/cli/speaker.py``: 80 Kaldi filterbanks of 16-bit samples,
Hamming window, no dither in a test, mean removed. ``config.yaml`` has ``model``, ``model_args`` and
``dataset_args``; the training's head is saved with the network, below ``projection.``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from speechbrain_qmargin.models.resnet import BLOCKS, ResNet
from speechbrain_qmargin.published.kaldi_input import kaldi_input
from speechbrain_qmargin.published.model import Published
from speechbrain_qmargin.published.source import Source, fit

NAME = "WeSpeaker"
KEYS = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.shortcut.0.weight",
        "seg_1.weight")  # fmt: skip
FILES = ("avg_model.pt", "models/avg_model.pt")
HEAD = "projection."

Found = tuple[nn.Module, str, dict[str, Any]]


def recognise(source: Source) -> bool:
    """A folder with WeSpeaker's ``config.yaml``; a file beside one, or with its names."""
    path = source.weights(*FILES)
    if path is None:
        return False
    if _config(source):
        return True
    return source.path.is_file() and _network_of(source.state_of(path)) is not None


def load(source: Source) -> Published:
    """The network; the training's head is left out.

    Raises
    ------
    ValueError
        A network, a pooling or features that are not here, with the name in ``config.yaml``.
    """
    path = source.weights(*FILES)
    if path is None:
        raise ValueError(f"{source.path}: none of {', '.join(FILES)} in it")
    config = _config(source)
    state = source.state_of(path)
    head = [key for key in state if key.startswith(HEAD)]
    state = {key: value for key, value in state.items() if key not in head}
    network = _network_of(state)
    if network is None:
        named = f"{config['model']}, " if config else ""
        raise ValueError(
            f"{path}: {named}a network that is not here, or not with this pooling; of WeSpeaker's "
            f"there are {', '.join(NETWORKS)}. Its entries begin with {', '.join([*state][:3])}"
        )
    model, name, settings = NETWORKS[network](state, path)
    if config:
        _check(config, name, path)
    data = config.get("dataset_args", {})
    frontend = data.get("frontend", "fbank")
    if frontend != "fbank":
        raise ValueError(f"{path}: the features are {frontend}, which are not here; fbank is")
    fbank = data.get("fbank_args", {})
    if (fbank.get("frame_length", 25), fbank.get("frame_shift", 10)) != (25, 10):
        raise ValueError(f"{path}: frames of {fbank}; 25 ms every 10 ms are here")
    bands = _bands(model)
    speech, features = kaldi_input(
        bands, data.get("resample_rate", 16000), dither=float(fbank.get("dither", 1.0))
    )
    notes = [f"the head of the training is left out ({head[0]})"] if head else []
    if not config:
        notes.append("no config.yaml beside it: 16 kHz is assumed, as of all of WeSpeaker's")
    return Published(
        model,
        speech,
        settings["embedding_dim"],
        NAME,
        name,
        path,
        {**settings, **features},
        tuple(notes),
    )


def _config(source: Source) -> dict:
    found = source.yaml("config.yaml") or source.yaml("../config.yaml")
    return found[1] if found and {"model", "model_args"} <= set(found[1]) else {}


def _check(config: Mapping[str, Any], name: str, path: Path) -> None:
    if str(config["model"]).replace("_", "") != name.replace("_", ""):
        raise ValueError(f"{path}: config.yaml says {config['model']}, the weights are of {name}")


def _bands(model: Any) -> int:
    return model.input_size


# ---------------------------------------------------------------- networks


def _resnet(state: Mapping[str, Tensor], path: Path) -> Found:
    counts = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    bottlenecks = "layer1.0.conv3.weight" in state
    depths = [d for d, blocks in BLOCKS.items() if blocks == counts and (d >= 50) == bottlenecks]
    if not depths:
        raise ValueError(f"{path}: a ResNet with {counts} blocks; known are {BLOCKS}")
    if "seg_2.weight" in state:
        raise ValueError(f"{path}: two embedding layers (two_emb_layer), which are not here")
    channels = len(state["conv1.weight"])
    dim, inputs = state["seg_1.weight"].shape
    bands = 8 * inputs // (2 * 8 * channels * (4 if bottlenecks else 1))
    model = ResNet(bands, channels, dim, depths[0])
    fit(model, state, path, f"ResNet{depths[0]} with {bands} bands")
    settings = {"model": "resnet34" if depths[0] < 152 else f"resnet{depths[0]}", "width": channels,
                "embedding_dim": dim}  # fmt: skip
    if depths[0] < 152 and depths[0] != 34:
        settings["depth"] = depths[0]
    return model, f"ResNet{depths[0]}", settings


# A name of a parameter that only this network of WeSpeaker's has
NETWORKS: dict[str, Callable[[Mapping[str, Tensor], Path], Found]] = {"ResNet": _resnet}
MARKS = {"ResNet": ("layer4.0.conv1.weight", "seg_1.weight")}
NOT_OF = ("convs.", "fuse")  # Res2Net, ERes2Net


def _network_of(state: Mapping[str, Tensor]) -> str | None:
    if any(part in key for key in state for part in NOT_OF):
        return None
    return next((name for name, keys in MARKS.items() if all(key in state for key in keys)), None)
