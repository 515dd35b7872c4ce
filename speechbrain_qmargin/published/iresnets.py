"""IResNets by the names of arcface_torch: sizes are read off the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from speechbrain_qmargin.models.iresnet import BLOCKS, IResNet
from speechbrain_qmargin.published.source import fit, parts_below

__all__ = ["NAMES", "iresnet_of"]

NAMES = ("conv1.weight", "prelu.weight", "layer1.0.bn1.weight", "layer4.0.prelu.weight",
         "bn2.weight", "fc.weight", "features.running_mean")  # fmt: skip


def iresnet_of(
    state: Mapping[str, Tensor], path: Path, plain_shortcuts: bool = False
) -> tuple[IResNet, str, dict[str, Any]]:
    """The network that weights belong to, loaded; its name; a recipe's settings.

    Raises
    ------
    ValueError
        Weights of no IResNet, or of a depth that is not known.

    Examples
    --------
    >>> state = IResNet(18, embedding_dim=8, channels=4, image_size=32).state_dict()
    >>> model, name, settings = iresnet_of(state, Path("backbone.pth"))
    >>> name, settings["image_size"]
    ('IResNet-18, 4 channels', 32)
    >>> iresnet_of({}, Path("backbone.pth"))
    Traceback (most recent call last):
    ValueError: backbone.pth: not the weights of an IResNet: conv1.weight is missing
    """
    missing = [name for name in NAMES if name not in state]
    if missing:
        raise ValueError(f"{path}: not the weights of an IResNet: {missing[0]} is missing")
    counts = tuple(parts_below(state, f"layer{stage}.") for stage in (1, 2, 3, 4))
    depth = next((depth for depth, blocks in BLOCKS.items() if blocks == counts), None)
    if depth is None:
        raise ValueError(f"{path}: an IResNet with {counts} blocks; known are {BLOCKS}")
    channels, (dim, inputs) = len(state["conv1.weight"]), state["fc.weight"].shape
    side = math.isqrt(inputs // (8 * channels))
    size = 16 * side
    model = IResNet(depth, dim, channels=channels, image_size=size, plain_shortcuts=plain_shortcuts)
    name = f"IResNet-{depth}" + (f", {channels} channels" if channels != 64 else "")
    fit(model, state, path, name)
    settings = {"model": "iresnet", "depth": depth, "width": channels, "embedding_dim": dim,
                "image_size": size, "plain_shortcuts": plain_shortcuts}  # fmt: skip
    return model, name, settings
