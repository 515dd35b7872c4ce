"""AdaFace: Lightning's ``adaface_ir101_ms1mv2.ckpt`` and the like.

Source: mk-minchul/AdaFace, ``inference.py``: the entries below ``model.``; images in the order BGR,
``(value / 255 - 0.5) / 0.5``. Its validation adds the mirror image's embedding.
"""

from __future__ import annotations

from speechbrain_qmargin.published.backbones import NAMES, as_iresnet, exchange_channels
from speechbrain_qmargin.published.iresnets import iresnet_of
from speechbrain_qmargin.published.model import FaceInput, Published
from speechbrain_qmargin.published.source import Source, without_prefix

NAME, KEYS = "AdaFace", NAMES


def recognise(source: Source) -> bool:
    """Entries of the backbone below ``model.``, or without a prefix.

    Examples
    --------
    >>> import torch
    >>> path = getfixture("tmp_path") / "adaface.ckpt"
    >>> torch.save({f"model.{name}": torch.zeros(1) for name in KEYS}, path)
    >>> recognise(Source(path))
    True
    """
    if not source.path.is_file() or source.file("model.yaml"):
        return False
    return all(name in _backbone(source) for name in KEYS)


def load(source: Source) -> Published:
    """The backbone; the head of the training is left out.

    Raises
    ------
    ValueError
        A folder; not the weights of a network that is here.
    """
    if not source.path.is_file():
        raise ValueError(f"{source.path}: a folder; give AdaFace's checkpoint itself")
    state = exchange_channels(as_iresnet(_backbone(source), source.path))
    model, name, settings = iresnet_of(state, source.path, plain_shortcuts=True)
    return Published(
        model,
        FaceInput(settings["image_size"], channels="BGR"),
        settings["embedding_dim"],
        NAME,
        name,
        source.path,
        settings,
    )


def _backbone(source: Source):
    return without_prefix(source.state, "model.") or source.state
