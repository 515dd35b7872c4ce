"""What names an encoder: a hash of its weights and of what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["digest_of", "digest_of_modules"]


def digest_of(definition: str, state: Mapping[str, Any]) -> str:
    """SHA-256 of a definition in words and of every entry's name and bytes.

    Examples
    --------
    >>> digest_of("a network", {"weight": torch.zeros(2)})[:8]
    '0dab8af9'
    """
    digest = hashlib.sha256(definition.encode())
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_modules(definition: str, modules: Mapping[str, nn.Module]) -> str:
    """:func:`digest_of` the weights of some modules by name.

    With them goes what SpeechBrain's ``InputNormalization`` has learnt, which is in no
    ``state_dict``.

    Examples
    --------
    >>> network = nn.Linear(2, 1)
    >>> before = digest_of_modules("one layer", {"embedding_model": network})
    >>> len(before), before == digest_of_modules("one layer", {"embedding_model": network})
    (64, True)
    >>> _ = nn.init.zeros_(network.weight)
    >>> before == digest_of_modules("one layer", {"embedding_model": network})
    False
    """
    state: dict[str, Any] = {}
    for name, module in modules.items():
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        if hasattr(module, "glob_mean"):
            state |= {key: getattr(module, key) for key in ("glob_mean", "glob_std")}
    return digest_of(definition, state)
