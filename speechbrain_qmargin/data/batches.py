"""Items become batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from speechbrain.dataio.batch import PaddedBatch

__all__ = ["readable_batch"]


def readable_batch(items: Iterable[Mapping[str, Any] | None]) -> PaddedBatch | None:
    """SpeechBrain's batch of the items that could be read; None where there is none.

    Datasets give None for a recording that is skipped.
    """
    readable = [item for item in items if item is not None]
    return PaddedBatch(readable) if readable else None
