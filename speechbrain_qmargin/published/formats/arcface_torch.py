"""InsightFace's arcface_torch: ``backbone.pth``, ``model.pt``, ``checkpoint_gpu_0.pt``.

Source: deepinsight/insightface, recognition/arcface_torch: ``inference.py`` reads RGB and takes
``(value / 255 - 0.5) / 0.5``; ``eval/verification.py`` adds the mirror image's embedding.
"""

from __future__ import annotations

from speechbrain_qmargin.published.iresnets import NAMES, iresnet_of
from speechbrain_qmargin.published.model import FaceInput, Published
from speechbrain_qmargin.published.source import Source

NAME, KEYS = "arcface_torch", NAMES
FILES = ("backbone.pth", "model.pt", "checkpoint_gpu_0.pt")


def recognise(source: Source) -> bool:
    """Entries of an IResNet, or a training's folder that holds them."""
    path = source.weights(*FILES)
    if path is None or (source.path.is_dir() and source.file("config.yaml", "model.yaml")):
        return False
    return all(name in source.state_of(path) for name in KEYS)


def load(source: Source) -> Published:
    """The backbone; a checkpoint's head and optimiser are left out."""
    path = source.weights(*FILES)
    if path is None:
        raise ValueError(f"{source.path}: none of {', '.join(FILES)} in it")
    model, name, settings = iresnet_of(source.state_of(path), path)
    return Published(
        model,
        FaceInput(settings["image_size"]),
        settings["embedding_dim"],
        NAME,
        name,
        path,
        settings,
    )
