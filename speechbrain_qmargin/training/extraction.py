"""Embeddings of a dataset, shared out over the processes of a run, so that it can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from torch import Tensor

from speechbrain_qmargin.extraction import (
    EmbeddingParts,
    collect,
    content_key,
    extract_into,
    folder_of_model,
)
from speechbrain_qmargin.files import fault_of

__all__ = ["ReadableBatch", "Unreadable", "extract_dataset"]


class Unreadable(NamedTuple):
    """An item that could not be read: its id, and why."""

    name: str
    why: str


class _Readable(torch.utils.data.Dataset):
    """Some items of a dataset with `ids`; one that cannot be read is an `Unreadable`."""

    def __init__(self, dataset: Any, rows: list[int]) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        try:
            return self.dataset[row]
        except OSError as error:
            return Unreadable(self.dataset.ids[row], fault_of(error))


class ReadableBatch:
    """A `collate_fn`: the batch of what could be read (None where nothing could), and the rest.

    Examples
    --------
    >>> items = [{"id": "ann/1", "x": torch.ones(2)}, Unreadable("bob/1", "bob/1.wav: damaged")]
    >>> batch, unreadable = ReadableBatch()(items)
    >>> batch.id, [one.name for one in unreadable]
    (['ann/1'], ['bob/1'])
    """

    def __call__(self, items: list) -> tuple[Any, list[Unreadable]]:
        unreadable = [item for item in items if isinstance(item, Unreadable)]
        readable = [item for item in items if not isinstance(item, Unreadable)]
        return PaddedBatch(readable) if readable else None, unreadable


def extract_dataset(
    dataset: Any,
    folder: str | Path,
    model: str,
    load: Callable[[Any], Iterable[tuple[Any, list[Unreadable]]]],
    embed: Callable[[Any], Tensor],
    faults: dict[str, str] | None = None,
) -> Mapping[str, np.ndarray]:
    """Embeddings of a dataset, id to float32 [D]; what is in the folder already is not made again.

    Every process embeds its share; the main process returns the whole, the others nothing.

    Parameters
    ----------
    dataset : dataset with `ids` and `describe`
    folder : path
        A model's embeddings are in a folder of their own in it; those of other models go.
    model : str
        What tells the model from others.
    load : callable
        From a dataset to its batches, collated by :class:`ReadableBatch`.
    embed : callable
        From a batch of B items to embeddings [B, D].
    faults : dict, optional
        Filled with the items that have no embedding, id to what is wrong.

    Raises
    ------
    OSError
        Without `faults`: those items, named once all others are embedded and kept. Embeddings that
        were written are not there at the end.

    Examples
    --------
    >>> class Vectors:
    ...     ids = ["ann/1", "bob/1"]
    ...
    ...     def describe(self, row):
    ...         return {}
    ...
    ...     def __getitem__(self, row):
    ...         if row:
    ...             raise OSError("bob/1.wav: damaged")
    ...         return {"id": self.ids[row], "x": torch.tensor([3.0, 4.0])}
    >>> def load(dataset):
    ...     return torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=ReadableBatch())
    >>> folder, faults = getfixture("tmp_path"), {}
    >>> embed = lambda batch: batch.x.data
    >>> dict(extract_dataset(Vectors(), folder, "model 1", load, embed, faults))
    {'ann/1': array([3., 4.], dtype=float32)}
    >>> faults
    {'bob/1': 'bob/1.wav: damaged'}
    """
    together = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if together else 0
    world = torch.distributed.get_world_size() if together else 1
    own = folder_of_model(folder, model, alone=if_main_process())
    if if_main_process():
        EmbeddingParts(own, model)
    ddp_barrier()  # the main process has made the folder
    parts = EmbeddingParts(own, model, rank)
    ddp_barrier()  # all have seen the same ones
    keys = {
        name: content_key(name, dataset.describe(row).values())
        for row, name in enumerate(dataset.ids)
    }
    left = [row for row, key in enumerate(keys.values()) if key not in parts.done]
    share = left[rank::world]
    if share:
        seen: dict[str, str] = {}

        def batches() -> Iterator[tuple[list[str], Any]]:
            for batch, unreadable in load(_Readable(dataset, share)):
                seen.update({keys[one.name]: one.why for one in unreadable})
                if batch is not None:
                    yield [keys[name] for name in batch.id], batch

        extract_into(parts, batches(), embed, seen)
    ddp_barrier()
    if not if_main_process():
        return {}
    found, wrong = collect(parts, keys, parts.faults())
    if faults is not None:
        faults.update(wrong)
    elif wrong:
        name, why = next(iter(wrong.items()))
        raise OSError(
            f"{len(wrong)} of {len(keys)} test items have no embedding, the first is {name}: "
            f"{why}. The others are kept; mend it and start again"
        )
    return found
