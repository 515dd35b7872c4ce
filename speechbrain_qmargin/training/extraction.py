"""Embeddings of a long extraction on their way to one file: kept as they come, so it can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from speechbrain_qmargin.embeddings import load_embeddings, save_embeddings
from speechbrain_qmargin.files import write_text

__all__ = ["EmbeddingParts"]

PART_SECONDS, PART_SIZE = 60, 5000  # what an interruption may cost; what is held in memory


class EmbeddingParts:
    """A folder of embeddings of one model, written whole file by whole file.

    Several processes may write into one folder, each under its own `writer`.

    Parameters
    ----------
    folder : path
    model : str
        What tells the model from others, such as a digest of its weights, and the data, where ids
        alone do not.
    writer : int

    Attributes
    ----------
    done : set of str
        The ids that were there when the folder was opened.

    Raises
    ------
    ValueError
        The folder holds embeddings of another model or of other data.

    Examples
    --------
    >>> parts = EmbeddingParts(getfixture("tmp_path") / "parts", "model 1")
    >>> parts.add("id10001/a/1", np.ones(4, dtype=np.float32))
    >>> parts.flush()
    >>> EmbeddingParts(parts.folder, "model 1").done
    {'id10001/a/1'}
    """

    def __init__(self, folder: str | Path, model: str, writer: int = 0) -> None:
        self.folder, self.writer = Path(folder), writer
        self.waiting: dict[str, np.ndarray] = {}
        about = self.folder / "model.json"
        if not about.is_file():
            write_text(about, json.dumps({"model": model}))
        elif json.loads(about.read_text())["model"] != model:
            raise ValueError(
                f"{self.folder} holds embeddings of another model or of other data; delete it, or "
                "write elsewhere"
            )
        self.done = {name for file in self._files() for name in load_embeddings(file).ids}
        self._written = time.monotonic()

    def _files(self, writer: str = "*") -> list[Path]:
        return sorted(self.folder.glob(f"part_{writer}_*.npz"))

    def add(self, name: str, embedding: np.ndarray) -> None:
        """Keep an embedding [D]; on the disk after a minute or some thousands at the latest."""
        self.waiting[name] = embedding
        if len(self.waiting) >= PART_SIZE or time.monotonic() - self._written > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self.waiting:
            number = len(self._files(str(self.writer)))
            file = self.folder / f"part_{self.writer}_{number:06d}.npz"
            save_embeddings(file, self.waiting)
            self.waiting, self._written = {}, time.monotonic()

    def merged(self, order: Iterable[str]) -> dict[str, np.ndarray]:
        """All that are there, of every writer, in an order of ids; ids without one are left out."""
        everything = {}
        for file in self._files():
            loaded = load_embeddings(file)
            everything.update(zip(loaded.ids, loaded.matrix, strict=True))
        return {name: everything[name] for name in order if name in everything}
