"""WeSpeaker: a folder with ``config.yaml`` and ``avg_model.pt``, or ``avg_model.pt`` alone.

Source: wenet-e2e/wespeaker, ``wespeaker/cli/speaker.py``: 80 Kaldi filterbanks of 16-bit samples,
Hamming window, no dither in a test, mean removed. ``config.yaml`` has ``model``, ``model_args`` and
``dataset_args``; the training's head is saved with the network, below ``projection.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from speechbrain_qmargin.published import speaker_networks as networks
from speechbrain_qmargin.published.kaldi_input import kaldi_input
from speechbrain_qmargin.published.model import Published
from speechbrain_qmargin.published.source import Source, first_keys
from speechbrain_qmargin.published.speaker_networks import Known, network_of

NAME = "WeSpeaker"
KEYS = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.shortcut.0.weight",
        "seg_1.weight")  # fmt: skip
FILES = ("avg_model.pt", "models/avg_model.pt")
HEAD = "projection."

NETWORKS = {
    "ResNet": Known(
        networks.load_resnet, ("layer4.0.conv1.weight", "seg_1.weight"), ("convs.", "fuse")
    ),
    "CAMPPlus": Known(
        partial(networks.load_campplus, least_variance=1e-7),
        ("head.conv1.weight", "xvector.tdnn.linear.weight", "xvector.dense.linear.weight",
         "xvector.block1.tdnnd1.cam_layer.linear_local.weight"),
    ),
    "ECAPA_TDNN": Known(
        networks.load_wespeaker_ecapa,
        ("layer1.conv.weight", "layer2.se_res2block.0.conv.weight", "pool.linear1.weight",
         "conv.weight", "linear.weight"),
    ),
    "ERes2Net": Known(
        partial(networks.load_eres2net, second=False),
        ("layer3.0.conv2_1.weight", "fuse_mode1234.local_att.0.weight", "seg_1.weight",
         "layer1.0.conv3.weight", "layer1.0.convs.0.weight", "layer4.0.convs.0.weight"),
    ),
}  # fmt: skip
_OF_ALIBABA = ("CAMPPlus", "ERes2Net34")


def recognise(source: Source) -> bool:
    """A folder with WeSpeaker's ``config.yaml``; a file beside one, or with its names.

    Examples
    --------
    >>> import torch
    >>> path = getfixture("tmp_path") / "avg_model.pt"
    >>> torch.save({name: torch.zeros(1) for name in NETWORKS["ResNet"].has}, path)
    >>> recognise(Source(path))
    True
    """
    path = source.weights(*FILES)
    if path is None:
        return False
    if _config(source):
        return True
    if not source.path.is_file() or path.name in networks.THREE_D_SPEAKER_FILES:
        return False
    return network_of(source.state_of(path), NETWORKS) is not None


def load(source: Source) -> Published:
    """The network; the training's head is left out.

    Raises
    ------
    ValueError
        A network, a pooling or features that are not here, with the name in ``config.yaml``.

    Examples
    --------
    >>> import torch
    >>> from speechbrain_qmargin.models.resnet import ResNet
    >>> path = getfixture("tmp_path") / "avg_model.pt"
    >>> torch.save(ResNet(16, channels=4, lin_neurons=8, depth=18).state_dict(), path)
    >>> published = load(Source(path))
    >>> published.network, published.embedding_dim, published.notes
    ('ResNet18', 8, ("no config.yaml beside it: 16 kHz is assumed, as for all of WeSpeaker's",))
    """
    path = source.weights(*FILES)
    if path is None:
        raise ValueError(f"{source.path}: none of {', '.join(FILES)} in it")
    config = _config(source)
    state = source.state_of(path)
    head = [key for key in state if key.startswith(HEAD)]
    state = {key: value for key, value in state.items() if key not in head}
    network = network_of(state, NETWORKS)
    if network is None:
        named = f"{config['model']}, " if config else ""
        raise ValueError(
            f"{path}: {named}a network that is not here, or not with this pooling; of WeSpeaker's "
            f"there are {', '.join(NETWORKS)}. Its entries begin with {first_keys(state)}"
        )
    model, name, bands, settings = NETWORKS[network].load(state, path)
    if config:
        _check(config, name, path)
    data = config.get("dataset_args", {})
    frontend = data.get("frontend", "fbank")
    if frontend != "fbank":
        raise ValueError(f"{path}: the features are {frontend}, which are not here; fbank is")
    fbank = data.get("fbank_args", {})
    if (fbank.get("frame_length", 25), fbank.get("frame_shift", 10)) != (25, 10):
        raise ValueError(f"{path}: frames of {fbank}; 25 ms every 10 ms are here")
    speech, features = kaldi_input(
        bands, data.get("resample_rate", 16000), dither=float(fbank.get("dither", 1.0))
    )
    notes = [f"the head of the training is left out ({head[0]})"] if head else []
    if not config:
        notes.append("no config.yaml beside it: 16 kHz is assumed, as for all of WeSpeaker's")
    if name in _OF_ALIBABA:
        notes.append(
            "if it is WeSpeaker's campplus or eres2net of 200,000 Chinese speakers, its features "
            f"are 3D-Speaker's, as `wespeaker --campplus` sets them: three_d_speaker:{path}"
        )
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
    found = source.yaml("config.yaml")
    if found is None and source.path.is_file():  # an experiment's exp/.../models/avg_model.pt
        found = source.yaml("../config.yaml")
    return found[1] if found and {"model", "model_args"} <= set(found[1]) else {}


def _check(config: Mapping[str, Any], name: str, path: Path) -> None:
    named = str(config["model"])
    if named != name and not (name == "ERes2Net34" and named.startswith(name)):
        raise ValueError(f"{path}: config.yaml says {named}, the weights are of {name}")
