"""3D-Speaker: ModelScope's folders and their files of weights.

Source: modelscope/3D-Speaker, ``speakerlab/bin/infer_sv.py``: 80 Kaldi filterbanks of samples in
[-1, 1], Kaldi's own (Povey) window, no dither, mean removed; 16 kHz. ECAPA-TDNN has SpeechBrain's
names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from torch import Tensor, nn

from speechbrain_qmargin.published.kaldi_input import kaldi_input
from speechbrain_qmargin.published.model import Published
from speechbrain_qmargin.published.source import Source, fit

NAME = "3D-Speaker"
KEYS = ("blocks.0.conv.conv.weight", "mfa.conv.conv.weight", "asp.tdnn.conv.conv.weight",
        "fc.conv.weight")  # fmt: skip
FILES = ("ecapa-tdnn.ckpt", "ecapa_tdnn.bin")

Found = tuple[nn.Module, str, dict[str, Any], int]


def recognise(source: Source) -> bool:
    """A file with the names of its networks; a folder of ModelScope's with one."""
    path = _weights(source)
    if path is None or source.file("hyperparams.yaml", "config.yaml"):
        return False
    if path.name == "avg_model.pt":  # WeSpeaker's
        return False
    return _network_of(source.state_of(path)) is not None


def load(source: Source) -> Published:
    """The network."""
    path = _weights(source)
    if path is None:
        raise ValueError(f"{source.path}: none of {', '.join(FILES)} in it")
    state = source.state_of(path)
    network = _network_of(state)
    if network is None:
        raise ValueError(
            f"{path}: not a network that is here; of 3D-Speaker's there are {', '.join(NETWORKS)}. "
            f"Its entries begin with {', '.join([*state][:3])}"
        )
    model, name, settings, bands = NETWORKS[network](state, path)
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
            return source.file(str(file))
        except (ValueError, KeyError, TypeError):
            pass
    return source.file(*FILES)


# ---------------------------------------------------------------- networks


def _ecapa(state: Mapping[str, Tensor], path: Path) -> Found:
    channels, bands = state["blocks.0.conv.conv.weight"].shape[:2]
    attention = len(state["asp.tdnn.conv.conv.weight"])
    dim = len(state["fc.conv.weight"])
    widths = [channels] * 4 + [3 * channels]
    model = ECAPA_TDNN(bands, lin_neurons=dim, channels=widths, attention_channels=attention)
    fit(model, state, path, f"ECAPA-TDNN with {channels} channels")
    settings = {"model": "ecapa", "channels": channels, "attention_channels": attention,
                "embedding_dim": dim}  # fmt: skip
    return model, f"ECAPA-TDNN {channels}", settings, bands


NETWORKS: dict[str, Callable[[Mapping[str, Tensor], Path], Found]] = {"ECAPA-TDNN": _ecapa}
MARKS = {"ECAPA-TDNN": KEYS}


def _network_of(state: Mapping[str, Tensor]) -> str | None:
    return next((name for name, keys in MARKS.items() if all(key in state for key in keys)), None)
