"""3D-Speaker: ModelScope's folders and their files of weights.

Source: modelscope/3D-Speaker, ``speakerlab/bin/infer_sv.py``: 80 Kaldi filterbanks of samples in
[-1, 1], Kaldi's own (Povey) window, no dither, mean removed; 16 kHz. ECAPA-TDNN has SpeechBrain's
names, CAM++ WeSpeaker's.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from speechbrain_qmargin.published import speaker_networks as networks
from speechbrain_qmargin.published.kaldi_input import kaldi_input
from speechbrain_qmargin.published.model import Published
from speechbrain_qmargin.published.source import Source, first_keys
from speechbrain_qmargin.published.speaker_networks import Known, network_of

NAME = "3D-Speaker"
KEYS = ("layer3_ds.weight", "fuse34.local_att.0.weight", "layer1.0.convs.0.weight",
        "layer4.0.fuse_models.0.local_att.0.weight", "seg_1.weight")  # fmt: skip
FILES = (*networks.THREE_D_SPEAKER_FILES, "avg_model.pt")

NETWORKS = {
    "CAM++": Known(
        partial(networks.load_campplus, least_variance=0.0),
        ("head.conv1.weight", "xvector.tdnn.linear.weight", "xvector.dense.linear.weight",
         "xvector.block1.tdnnd1.cam_layer.linear_local.weight"),
    ),
    "ERes2NetV2": Known(
        partial(networks.load_eres2net, second=True),
        ("layer3_ds.weight", "fuse34.local_att.0.weight", "seg_1.weight", "layer1.0.conv3.weight",
         "layer1.0.convs.0.weight", "layer4.0.convs.0.weight"),
    ),
    "ECAPA-TDNN": Known(
        networks.load_speechbrain_ecapa,
        ("blocks.0.conv.conv.weight", "mfa.conv.conv.weight", "asp.tdnn.conv.conv.weight",
         "fc.conv.weight"),
    ),
}  # fmt: skip


def recognise(source: Source) -> bool:
    """A file with the names of its networks; a folder of ModelScope's with one.

    Examples
    --------
    >>> import torch
    >>> path = getfixture("tmp_path") / "campplus_cn_common.bin"
    >>> torch.save({name: torch.zeros(1) for name in NETWORKS["CAM++"].has}, path)
    >>> recognise(Source(path))
    True
    """
    path = _weights(source)
    if path is None or source.file("hyperparams.yaml", "config.yaml"):
        return False
    state = source.state_of(path)
    if path.name == "avg_model.pt" or any(key.startswith("projection.") for key in state):
        return False  # WeSpeaker's
    return network_of(state, NETWORKS) is not None


def load(source: Source) -> Published:
    """The network.

    Raises
    ------
    ValueError
        No such file in the folder; not the weights of a network that is here.

    Examples
    --------
    >>> import torch
    >>> from speechbrain_qmargin.models.campplus import CAMPPlus
    >>> path = getfixture("tmp_path") / "campplus_cn_common.bin"
    >>> torch.save(CAMPPlus(16, 8, growth=4, channels=8, layers=(1, 1, 1)).state_dict(), path)
    >>> published = load(Source(path))
    >>> published.network, published.embedding_dim, published.settings["fbank_window"]
    ('CAMPPlus', 8, 'povey')
    """
    path = _weights(source)
    if path is None:
        raise ValueError(f"{source.path}: none of {', '.join(FILES)} in it")
    state = {
        key: value
        for key, value in source.state_of(path).items()
        if not key.startswith("projection.")
    }
    network = network_of(state, NETWORKS)
    if network is None:
        raise ValueError(
            f"{path}: not a network that is here; of 3D-Speaker's there are {', '.join(NETWORKS)}. "
            f"Its entries begin with {first_keys(state)}"
        )
    model, name, bands, settings = NETWORKS[network].load(state, path)
    speech, features = kaldi_input(bands, window="povey", full_scale=1.0, dither=0.0)
    return Published(
        model, speech, settings["embedding_dim"], NAME, name, path, {**settings, **features}
    )


def _weights(source: Source) -> Path | None:
    if source.path.is_file():
        return source.path
    named = source.file("configuration.json")
    if named is not None:
        try:
            file = json.loads(named.read_text(encoding="utf-8"))["model"]["pretrained_model"]
        except (ValueError, KeyError, TypeError, RecursionError):
            file = None
        if isinstance(file, str) and (found := source.file(Path(file).name)):
            return found
    return source.file(*FILES)
