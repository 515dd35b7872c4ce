"""Speaker networks that more than one toolkit publishes: sizes are read off the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from torch import Tensor, nn

from speechbrain_qmargin.models.campplus import CAMPPlus
from speechbrain_qmargin.models.ecapa import WeSpeakerEcapa
from speechbrain_qmargin.models.eres2net import ERes2Net, ERes2NetV2
from speechbrain_qmargin.models.resnet import BLOCKS, ResNet
from speechbrain_qmargin.published.source import fit, parts_below

__all__ = ["THREE_D_SPEAKER_FILES", "Known", "Loaded", "network_of"]

State = Mapping[str, Tensor]

# Names under which ModelScope has 3D-Speaker's weights: some have WeSpeaker's entries too
THREE_D_SPEAKER_FILES = (
    "campplus_cn_common.bin", "campplus_voxceleb.bin", "campplus_cn_en_common.pt",
    "campplus_cn_3dspeaker.bin", "pretrained_eres2netv2.ckpt",
    "pretrained_eres2netv2w24s4ep4.ckpt", "ecapa-tdnn.ckpt", "ecapa_tdnn.bin",
)  # fmt: skip


class Loaded(NamedTuple):
    """A network with its weights; its toolkit's name for it; bands; a recipe's settings."""

    model: nn.Module
    name: str
    bands: int
    settings: dict[str, Any]


class Known(NamedTuple):
    """How a network is known and loaded: entries that it has, parts of names that it has not."""

    load: Callable[[State, Path], Loaded]
    has: tuple[str, ...]
    has_not: tuple[str, ...] = ()


def network_of(state: State, known: Mapping[str, Known]) -> str | None:
    """The name of the network that weights are of; None for none of them.

    Examples
    --------
    >>> import torch
    >>> known = {"ResNet": Known(load_resnet, has=("conv1.weight",), has_not=("fuse",))}
    >>> weight = torch.zeros(1)
    >>> network_of({"conv1.weight": weight}, known)
    'ResNet'
    >>> network_of({"conv1.weight": weight, "fuse1.weight": weight}, known) is None
    True
    """
    for name, one in known.items():
        alien = any(part in key for key in state for part in one.has_not)
        if not alien and all(key in state for key in one.has):
            return name
    return None


def load_resnet(state: State, path: Path) -> Loaded:
    """WeSpeaker's ResNet18 to ResNet293.

    Raises
    ------
    ValueError
        Blocks of no known depth, two embedding layers, or other entries.

    Examples
    --------
    >>> network = ResNet(input_size=16, channels=4, lin_neurons=8, depth=18)
    >>> loaded = load_resnet(network.state_dict(), Path("avg_model.pt"))
    >>> loaded.name, loaded.bands, loaded.settings["embedding_dim"]
    ('ResNet18', 16, 8)
    """
    counts = tuple(parts_below(state, f"layer{stage}.") for stage in (1, 2, 3, 4))
    bottlenecks = "layer1.0.conv3.weight" in state
    depths = [d for d, blocks in BLOCKS.items() if blocks == counts and (d >= 50) == bottlenecks]
    if not depths:
        raise ValueError(f"{path}: a ResNet with {counts} blocks; known are {BLOCKS}")
    if "seg_2.weight" in state:
        raise ValueError(f"{path}: two embedding layers (two_emb_layer), which are not here")
    depth, channels = depths[0], len(state["conv1.weight"])
    dim, inputs = state["seg_1.weight"].shape
    bands = 8 * inputs // (2 * 8 * channels * (4 if bottlenecks else 1))
    model = ResNet(bands, channels, dim, depth)
    fit(model, state, path, f"ResNet{depth} with {bands} bands")
    own = depth in (34, 152, 221, 293)
    settings = {"model": f"resnet{depth}" if own else "resnet34", "width": channels,
                "embedding_dim": dim, "embedding_norm": False}  # fmt: skip
    settings |= {} if own else {"depth": depth}
    return Loaded(model, f"ResNet{depth}", bands, settings)


def load_campplus(state: State, path: Path, least_variance: float) -> Loaded:
    """CAM++ of either toolkit.

    Raises
    ------
    ValueError
        Other entries than its network has.

    Examples
    --------
    >>> network = CAMPPlus(16, 8, growth=4, channels=8, layers=(1, 1, 1))
    >>> loaded = load_campplus(network.state_dict(), Path("avg_model.pt"), least_variance=1e-7)
    >>> loaded.bands, loaded.settings["layers"]
    (16, [1, 1, 1])
    """
    channels, inputs, _ = state["xvector.tdnn.linear.weight"].shape
    bands = 8 * inputs // len(state["head.conv1.weight"])
    dim = len(state["xvector.dense.linear.weight"])
    growth = len(state["xvector.block1.tdnnd1.cam_layer.linear_local.weight"])
    layers = tuple(parts_below(state, f"xvector.block{number}.") for number in (1, 2, 3))
    model = CAMPPlus(bands, dim, growth, channels, layers, least_variance)
    fit(model, state, path, f"CAM++ with {layers} layers")
    settings = {"model": "campplus", "embedding_dim": dim, "growth": growth,
                "tdnn_channels": channels, "layers": [*layers],
                "least_variance": least_variance}  # fmt: skip
    return Loaded(model, "CAMPPlus", bands, settings)


def load_wespeaker_ecapa(state: State, path: Path) -> Loaded:
    """WeSpeaker's ECAPA-TDNN, whose names and pooling are its own.

    Raises
    ------
    ValueError
        A normalisation of the embedding, or other entries.

    Examples
    --------
    >>> network = WeSpeakerEcapa(16, channels=8, lin_neurons=4, pooled=24)
    >>> loaded = load_wespeaker_ecapa(network.state_dict(), Path("avg_model.pt"))
    >>> loaded.name, loaded.bands, loaded.settings["embedding_dim"]
    ('ECAPA_TDNN_GLOB_c8', 16, 4)
    """
    if any(key.startswith("bn2.") for key in state):
        raise ValueError(f"{path}: a normalisation of the embedding (emb_bn), which is not here")
    channels, bands, _ = state["layer1.conv.weight"].shape
    pooled, dim = len(state["conv.weight"]), len(state["linear.weight"])
    context = state["pool.linear1.weight"].shape[1] == 3 * pooled
    model = WeSpeakerEcapa(bands, channels, dim, context, pooled)
    name = f"ECAPA_TDNN{'_GLOB' * context}_c{channels}"
    fit(model, state, path, name)
    settings = {"model": "wespeaker_ecapa", "channels": channels, "embedding_dim": dim,
                "global_context": context, "pooled_channels": pooled}  # fmt: skip
    return Loaded(model, name, bands, settings)


def load_eres2net(state: State, path: Path, second: bool) -> Loaded:
    """WeSpeaker's ERes2Net, or the second version, which is 3D-Speaker's.

    Raises
    ------
    ValueError
        Two embedding layers, or other entries.

    Examples
    --------
    >>> network = ERes2Net(16, channels=4, lin_neurons=8)
    >>> loaded = load_eres2net(network.state_dict(), Path("avg_model.pt"), second=False)
    >>> loaded.name, loaded.bands, loaded.settings["width"]
    ('ERes2Net34', 16, 4)
    """
    channels = len(state["conv1.weight"])
    expansion = len(state["layer1.0.conv3.weight"]) // channels
    scale = parts_below(state, "layer1.0.convs.")
    base = -(-len(state["layer4.0.convs.0.weight"]) * 8 // channels)
    dim, inputs = state["seg_1.weight"].shape
    bands = 8 * inputs // (2 * 8 * channels * expansion)
    network, name = (ERes2NetV2, "ERes2NetV2") if second else (ERes2Net, "ERes2Net34")
    if "seg_2.weight" in state:
        raise ValueError(f"{path}: two embedding layers (two_emb_layer), which are not here")
    model = network(bands, channels, dim, base, scale, expansion)
    fit(model, state, path, f"{name}, base {base}, scale {scale}, expansion {expansion}")
    settings = {"model": "eres2netv2" if second else "eres2net", "width": channels,
                "embedding_dim": dim, "base_width": base, "groups": scale,
                "expansion": expansion, "embedding_norm": False}  # fmt: skip
    return Loaded(model, name, bands, settings)


def load_speechbrain_ecapa(state: State, path: Path) -> Loaded:
    """ECAPA-TDNN by SpeechBrain's names, which 3D-Speaker's has as well.

    Raises
    ------
    ValueError
        Other entries than its network has.

    Examples
    --------
    >>> network = ECAPA_TDNN(20, lin_neurons=4, channels=[8] * 4 + [24], attention_channels=4)
    >>> loaded = load_speechbrain_ecapa(network.state_dict(), Path("ecapa-tdnn.ckpt"))
    >>> loaded.name, loaded.bands, loaded.settings["embedding_dim"]
    ('ECAPA-TDNN 8', 20, 4)
    """
    channels, bands = state["blocks.0.conv.conv.weight"].shape[:2]
    attention = len(state["asp.tdnn.conv.conv.weight"])
    dim = len(state["fc.conv.weight"])
    widths = [channels] * 4 + [3 * channels]
    model = ECAPA_TDNN(bands, lin_neurons=dim, channels=widths, attention_channels=attention)
    fit(model, state, path, f"ECAPA-TDNN with {channels} channels")
    settings = {"model": "ecapa", "channels": channels, "attention_channels": attention,
                "embedding_dim": dim}  # fmt: skip
    return Loaded(model, f"ECAPA-TDNN {channels}", bands, settings)
