"""InsightFace's arcface_torch: ``backbone.pth``, ``model.pt``, ``checkpoint_gpu_0.pt``.

Its IResNets and MobileFaceNets. Source: deepinsight/insightface, recognition/arcface_torch:
``inference.py`` reads RGB and takes ``(value / 255 - 0.5) / 0.5``; ``eval/verification.py`` adds
the mirror image's embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from speechbrain_qmargin.models.mbf import MBF
from speechbrain_qmargin.published.iresnets import NAMES, iresnet_of
from speechbrain_qmargin.published.model import FaceInput, Published
from speechbrain_qmargin.published.source import Source, fit, parts_below

NAME, KEYS = "arcface_torch", NAMES
MBF_KEYS = ("layers.0.layers.0.weight", "layers.7.layers.0.layers.0.layers.0.weight",
            "conv_sep.layers.0.weight", "features.layers.0.layers.0.weight",
            "features.layers.2.weight")  # fmt: skip
FILES = ("backbone.pth", "model.pt", "checkpoint_gpu_0.pt")


def recognise(source: Source) -> bool:
    """Entries of an IResNet, or a training's folder that holds them.

    Examples
    --------
    >>> import torch
    >>> folder = getfixture("tmp_path")
    >>> torch.save({name: torch.zeros(1) for name in KEYS}, folder / "backbone.pth")
    >>> recognise(Source(folder)), recognise(Source(folder / "backbone.pth"))
    (True, True)
    """
    path = source.weights(*FILES)
    if path is None or (source.path.is_dir() and source.file("config.yaml", "model.yaml")):
        return False
    state = source.state_of(path)
    return any(all(name in state for name in names) for names in (KEYS, MBF_KEYS))


def load(source: Source) -> Published:
    """The backbone; a checkpoint's head and optimiser are left out.

    Raises
    ------
    ValueError
        No such file in the folder; not the weights of a network that is here.
    """
    path = source.weights(*FILES)
    if path is None:
        raise ValueError(f"{source.path}: none of {', '.join(FILES)} in it")
    state = source.state_of(path)
    mobile = all(name in state for name in MBF_KEYS)
    model, name, settings = (_mbf_of if mobile else iresnet_of)(state, path)
    return Published(
        model,
        FaceInput(settings["image_size"]),
        settings["embedding_dim"],
        NAME,
        name,
        path,
        settings,
    )


def _mbf_of(state: Mapping[str, Tensor], path: Path) -> tuple[MBF, str, dict[str, Any]]:
    scale = len(state["layers.0.layers.0.weight"]) // 64
    blocks = [parts_below(state, f"layers.{layer}.layers.") for layer in (1, 3, 5, 7)]
    if "layers.1.layers.0.weight" in state:  # one block alone stands there itself
        blocks[0] = 1
    dim, size = len(state["features.layers.2.weight"]), 16 * state[MBF_KEYS[3]].shape[-1]
    model = MBF(dim, scale, blocks, size)
    fit(model, state, path, f"MobileFaceNet, scale {scale}, blocks {blocks}")
    settings = {"model": "mbf", "width_factor": scale, "blocks": blocks, "embedding_dim": dim,
                "image_size": size}  # fmt: skip
    return model, "MobileFaceNet (mbf)", settings
