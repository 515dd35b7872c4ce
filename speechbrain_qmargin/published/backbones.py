"""The face backbone of AdaFace and CVLface (``Backbone``, mode ``ir``) as an IResNet.

Source: mk-minchul/AdaFace, ``net.py``. It is the same network with other names, but for two things:
where a block halves the image and keeps the channels its shortcut takes every other pixel, and the
last normalisation has neither weight nor bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from speechbrain_qmargin.models.iresnet import BLOCKS

__all__ = ["NAMES", "as_iresnet", "exchange_channels"]

NAMES = ("input_layer.0.weight", "input_layer.2.weight", "body.0.res_layer.1.weight",
         "body.0.res_layer.5.weight", "output_layer.3.weight",
         "output_layer.4.running_mean")  # fmt: skip
_TOP = {"input_layer.0": "conv1", "input_layer.1": "bn1", "input_layer.2": "prelu",
        "output_layer.0": "bn2", "output_layer.3": "fc", "output_layer.4": "features"}  # fmt: skip
_PARTS = {"res_layer.0": "bn1", "res_layer.1": "conv1", "res_layer.2": "bn2",
          "res_layer.3": "prelu", "res_layer.4": "conv2", "res_layer.5": "bn3",
          "shortcut_layer.0": "downsample.0", "shortcut_layer.1": "downsample.1"}  # fmt: skip
_BLOCK = re.compile(r"body\.(\d+)\.((?:res|shortcut)_layer\.\d)\.(.+)")


def as_iresnet(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights by the names of an IResNet.

    Raises
    ------
    ValueError
        A network with squeeze-and-excitation or with bottlenecks, or entries of another.

    Examples
    --------
    >>> state = {"body.7.res_layer.1.weight": torch.zeros(1)}       # of eight blocks the last
    >>> list(as_iresnet(state, Path("adaface.ckpt")))
    ['layer4.1.conv1.weight', 'features.weight', 'features.bias']
    """
    if any(".se_block." in key for key in state):
        raise ValueError(
            f"{path}: a backbone with squeeze-and-excitation (ir_se), which is not here"
        )
    if any(key.startswith("body.0.res_layer.7.") for key in state):
        raise ValueError(f"{path}: a backbone with bottlenecks (IR-152, IR-200), which is not here")
    blocks = 1 + max((int(m[1]) for m in map(_BLOCK.fullmatch, state) if m), default=-1)
    counts = next((counts for counts in BLOCKS.values() if sum(counts) == blocks), None)
    if counts is None:
        raise ValueError(f"{path}: a backbone of {blocks} blocks; known are {BLOCKS}")
    place = [(stage + 1, number) for stage, count in enumerate(counts) for number in range(count)]
    found = {}
    for key, value in state.items():
        block = _BLOCK.fullmatch(key)
        if block and block[2] in _PARTS:
            stage, number = place[int(block[1])]
            key = f"layer{stage}.{number}.{_PARTS[block[2]]}.{block[3]}"
        else:
            layer, _, name = key.rpartition(".")
            key = f"{_TOP[layer]}.{name}" if layer in _TOP else key
        found[key] = value
    dim = len(found["features.running_mean"]) if "features.running_mean" in found else 0
    return found | {"features.weight": torch.ones(dim), "features.bias": torch.zeros(dim)}


def exchange_channels(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network of BGR as one of RGB: the first convolution's input turned round.

    Examples
    --------
    >>> weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    >>> exchange_channels({"conv1.weight": weight})["conv1.weight"].flatten()
    tensor([3., 2., 1.])
    """
    return state | {"conv1.weight": state["conv1.weight"].flip(1)}
