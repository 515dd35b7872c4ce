"""What names an encoder: a hash of its weights and of what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["digest_of"]


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
