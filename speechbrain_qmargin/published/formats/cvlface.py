"""CVLface: ``pretrained_model/model.pt`` with ``model.yaml``, which says the order of the channels.

Source: mk-minchul/CVLface, ``models/base``: the network stands below ``net.``, and input is flipped
to BGR where ``color_space`` says so. Its IResNets are AdaFace's (``iresnet``) or arcface_torch's
(``iresnet_insightface``).
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from speechbrain_qmargin.published import backbones, iresnets
from speechbrain_qmargin.published.model import FaceInput, Published
from speechbrain_qmargin.published.source import Source, without_prefix

NAME, KEYS = "CVLface", tuple(f"net.{name}" for name in backbones.NAMES)
FILES = ("model.pt", "pretrained_model/model.pt")
SETTINGS = ("model.yaml", "pretrained_model/model.yaml")


def recognise(source: Source) -> bool:
    """Entries below ``net.``; or a folder with ``model.pt`` and ``model.yaml``.

    Examples
    --------
    >>> import torch
    >>> folder = getfixture("tmp_path")
    >>> torch.save({name: torch.zeros(1) for name in KEYS}, folder / "model.pt")
    >>> recognise(Source(folder))           # without model.yaml
    False
    >>> _ = (folder / "model.yaml").write_text("color_space: BGR")
    >>> recognise(Source(folder))
    True
    """
    path = source.weights(*FILES)
    if path is None or (source.path.is_dir() and source.file(*SETTINGS) is None):
        return False
    state = _network(source, path)
    return any(all(name in state for name in one.NAMES) for one in (backbones, iresnets))


def load(source: Source) -> Published:
    """The network that ``model.yaml`` describes.

    Raises
    ------
    ValueError
        Without ``model.yaml``, which alone tells RGB from BGR; a transformer.
    """
    path = source.weights(*FILES)
    if path is None:
        raise ValueError(f"{source.path}: none of {', '.join(FILES)} in it")
    about = source.yaml(*SETTINGS)
    if about is None:
        raise ValueError(
            f"{path}: CVLface's model.yaml must lie beside it: it alone says whether the network "
            "takes RGB or BGR (color_space)"
        )
    channels = str(about[1].get("color_space", "")).upper()
    if channels not in ("RGB", "BGR"):
        raise ValueError(f"{about[0]}: color_space is {channels!r}; RGB or BGR is wanted")
    state = _network(source, path)
    plain = all(name in state for name in backbones.NAMES)
    if plain:
        state = backbones.as_iresnet(state, path)
    elif not all(name in state for name in iresnets.NAMES):
        raise ValueError(
            f"{path}: {about[1].get('name', 'this network')} is not here; of CVLface's networks "
            "the IResNets are"
        )
    if channels == "BGR":
        state = backbones.exchange_channels(state)
    model, name, settings = iresnets.iresnet_of(state, path, plain_shortcuts=plain)
    return Published(
        model,
        FaceInput(settings["image_size"], channels=channels),
        settings["embedding_dim"],
        NAME,
        name,
        path,
        settings,
    )


def _network(source: Source, path: Path) -> dict[str, Tensor]:
    state = source.state_of(path)
    return without_prefix(without_prefix(state, "model.") or state, "net.")
