"""Embeddings of a protocol's images: extraction that resumes, files, the cache."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from speechbrain_qmargin.embeddings import id_texts
from speechbrain_qmargin.extraction import PART_SECONDS, extract_into, read_ahead
from speechbrain_qmargin.faces.ijb.protocol import IJB
from speechbrain_qmargin.faces.pair_sets import flip_fusion
from speechbrain_qmargin.files import fault_of, load_arrays, replacing, write_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImageEmbeddings", "extract_ijb", "load_image_embeddings", "save_image_embeddings"]

_SIZES = "sizes.npy"


@dataclass(frozen=True)
class ImageEmbeddings:
    """Embeddings of a protocol's images, and of their mirror images.

    Attributes
    ----------
    plain, mirrored : float arrays [N, D]
        As the network gives them, not normalised; `mirrored` may be None.
    rows : int array [M] or None
        The row of every image of the protocol; None where they are in its order.

    Examples
    --------
    >>> images = ImageEmbeddings(np.array([[1.0, 0.0]]), mirrored=np.array([[0.0, 2.0]]))
    >>> images.fused(slice(0, 1), "sum"), images.fused(slice(0, 1), "none")
    (array([[1., 2.]], dtype=float32), array([[1., 0.]], dtype=float32))
    """

    plain: np.ndarray
    mirrored: np.ndarray | None = None
    rows: np.ndarray | None = None

    def fused(self, block: slice, flip: str) -> np.ndarray:
        """Float32 embeddings of some images of the protocol.

        Parameters
        ----------
        block : slice
            Of the protocol's images.
        flip : str
            As :func:`~speechbrain_qmargin.faces.pair_sets.flip_fusion`, and so are the errors.
        """
        rows = block if self.rows is None else self.rows[block]
        plain = np.asarray(self.plain[rows], dtype=np.float32)
        if flip == "none" or self.mirrored is None:
            return flip_fusion(plain, None, flip)
        return flip_fusion(plain, np.asarray(self.mirrored[rows], dtype=np.float32), flip)


def save_image_embeddings(
    path: str | Path, names: Sequence[str], plain: np.ndarray, mirrored: np.ndarray | None = None
) -> None:
    """Write ``ids`` [N], ``embeddings`` and perhaps ``mirrored`` float32 [N, D] as npz.

    Parameters
    ----------
    path : path
    names : sequence of str [N]
        As the protocol names its images.
    plain, mirrored : float arrays [N, D]
        Of the images and of their mirror images, as the network gives them.

    Examples
    --------
    >>> file = getfixture("tmp_path") / "images.npz"
    >>> save_image_embeddings(file, ["1.jpg", "2.jpg"], np.eye(2), mirrored=np.eye(2))
    >>> with np.load(file) as arrays:
    ...     print({name: array.shape for name, array in arrays.items()})
    {'ids': (2,), 'embeddings': (2, 2), 'mirrored': (2, 2)}
    """
    arrays = {"ids": np.asarray(names, dtype=np.str_), "embeddings": np.asarray(plain, np.float32)}
    if mirrored is not None:
        arrays["mirrored"] = np.asarray(mirrored, np.float32)
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)


def load_image_embeddings(path: str | Path, ijb: IJB) -> ImageEmbeddings:
    """Read embeddings of a protocol's images; never executes code.

    Parameters
    ----------
    path : path
        The cache folder of :func:`extract_ijb` (mapped into memory, not read), or npz of
        :func:`save_image_embeddings`: names in any order, others than the protocol's are left.
    ijb : IJB

    Raises
    ------
    ValueError
        An unfinished cache or one of other images; arrays missing or of shapes that disagree, a
        name twice, images without an embedding: with the file.
    FileNotFoundError
        No such file.

    Examples
    --------
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> pair = LabelledTrials(["4", "9"], np.array([0]), np.array([1]), np.array([True]))
    >>> each = np.arange(2)  # every template is of one image
    >>> ijb = IJB("IJBC", ["1.jpg", "2.jpg"], np.zeros((2, 5, 2)), np.ones(2), each, each, each,
    ...           pair)
    >>> file = getfixture("tmp_path") / "images.npz"
    >>> save_image_embeddings(file, ["2.jpg", "1.jpg"], np.array([[0.0, 2.0], [1.0, 0.0]]))
    >>> load_image_embeddings(file, ijb).fused(slice(0, 2), "none")  # in the protocol's order
    array([[1., 0.],
           [0., 2.]], dtype=float32)
    """
    path = Path(path)
    if path.is_dir():
        state = _cache_state(path, ijb)
        if state is None or state["done"] < len(ijb.names):
            done = 0 if state is None else state["done"]
            raise ValueError(
                f"{path}: {done:,} of {len(ijb.names):,} images are extracted; go on with the "
                "extraction first"
            )
        both = _mapped(path / "embeddings.npy", "r", len(ijb.names))
        return ImageEmbeddings(both[:, 0], both[:, 1])
    loaded = load_arrays(path, "embeddings", ("ids", "embeddings", "mirrored"))
    if not isinstance(loaded, dict) or not {"ids", "embeddings"} <= loaded.keys():
        raise ValueError(f"{path}: not an npz of embeddings; wanted arrays 'ids' and 'embeddings'")
    names, plain = id_texts(loaded["ids"], path), loaded["embeddings"]
    mirrored = loaded.get("mirrored")
    if plain.ndim != 2 or len(names) != len(plain):
        raise ValueError(f"{path}: {len(names)} ids and embeddings {plain.shape}; want [N, D]")
    if mirrored is not None and mirrored.shape != plain.shape:
        raise ValueError(f"{path}: embeddings {plain.shape}, those mirrored {mirrored.shape}")
    if names == ijb.names:
        return ImageEmbeddings(plain, mirrored)
    row = {name: index for index, name in enumerate(names)}
    if len(row) < len(names):
        twice = next(name for index, name in enumerate(names) if row[name] != index)
        raise ValueError(f"{path}: {twice} is listed twice")
    rows = np.fromiter((row.get(name, -1) for name in ijb.names), np.int64, len(ijb.names))
    if rows.min() < 0:
        raise ValueError(
            f"{path}: {np.count_nonzero(rows < 0):,} of {len(rows):,} images have no embedding, "
            f"the first is {ijb.names[int(np.argmin(rows))]}"
        )
    return ImageEmbeddings(plain, mirrored, rows)


def _mapped(path: Path, mode: Literal["r", "r+"], images: int) -> np.memmap:
    """The cache's array, not read."""
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path}: damaged ({fault_of(error)}); delete the cache to extract anew"
        ) from None
    if array.ndim != 3 or array.shape[:2] != (images, 2):
        raise ValueError(f"{path}: damaged ({array.shape}); delete the cache to extract anew")
    assert isinstance(array, np.memmap)
    return array


def _cache_state(folder: Path, ijb: IJB, model: str | None = None) -> dict | None:
    """What a cache holds; None if it holds nothing yet."""
    path = folder / "cache.json"
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it to extract anew") from None
    if state.get("images") != ijb.fingerprint:
        raise ValueError(
            f"{path}: of other images or landmarks; give another cache folder (--output)"
        )
    if model is not None and state.get("model") != model:
        raise ValueError(
            f"{path}: of the model {state.get('model')!r}, not {model!r}; give another cache "
            "folder (--output), or delete this one"
        )
    return state


def extract_ijb(
    embed: Callable[[Tensor], Tensor],
    images_folder: str | Path,
    ijb: IJB,
    cache: str | Path,
    batch_size: int = 128,
    *,
    model: str = "",
    image_size: int = 112,
    workers: int = 4,
) -> ImageEmbeddings:
    """Embed every image of a protocol and its mirror image; interrupted, it goes on.

    The images are aligned by their five landmarks, RGB in [-1, 1].

    Parameters
    ----------
    embed : callable
        From float32 [2 B, 3, image_size, image_size] on the CPU, images and then their mirror
        images, to [2 B, D]. In evaluation mode: no statistics of a batch.
    images_folder : path
        ``loose_crop``.
    ijb : IJB
    cache : path
        A folder: ``embeddings.npy`` float32 [M, 2, D], ``sizes.npy`` int64 [M], the bytes of the
        images, by which a cache of others is known, and ``cache.json`` with how many are done.
        Progress is on disk at least every minute. A cache of all images serves without them.
    batch_size : int
        Images at once.
    model : str
        What tells the model from others, such as its checkpoint's SHA-256: a cache of another is
        refused.
    image_size : int
        What the model takes; ArcFace's template is scaled to it.
    workers : int
        Threads that decode and align.

    Returns
    -------
    ImageEmbeddings
        Mapped into memory.

    Raises
    ------
    FileNotFoundError
        Images that are missing, before anything is computed; counted, the first named.
    OSError
        An image that cannot be decoded: with the file. What was computed is kept.
    ValueError
        A cache of other images, by name or by size, or of another model, an embedding that is not
        finite: with the file. Embeddings of another shape. What was computed is kept.

    Examples
    --------
    >>> from PIL import Image
    >>> from speechbrain_qmargin.trials import LabelledTrials
    >>> folder = getfixture("tmp_path")
    >>> Image.linear_gradient("L").resize((112, 112)).save(folder / "1.png")
    >>> points = np.array([[[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]]], dtype=np.float32)
    >>> one = np.array([0])
    >>> pair = LabelledTrials(["4"], one, one, np.array([True]))
    >>> ijb = IJB("IJBC", ["1.png"], points, np.ones(1), one, one, one, pair)
    >>> found = extract_ijb(lambda images: images.mean((2, 3)), folder, ijb, folder / "cache")
    >>> found.plain.shape, np.allclose(found.plain, found.mirrored)  # mirror images have one mean
    ((1, 3), True)
    """
    import torch
    from tqdm import tqdm

    from speechbrain_qmargin.data.align import align_face
    from speechbrain_qmargin.data.images import read_pixels

    cache, images_folder = Path(cache), Path(images_folder)
    state = _cache_state(cache, ijb, model) or {
        "images": ijb.fingerprint, "model": model, "done": 0
    }  # fmt: skip
    total, done = len(ijb.names), state["done"]
    sizes = _sizes_of(images_folder, ijb.names)
    _refuse_changed(cache, images_folder, ijb.names, sizes, done)
    if done == total:
        return load_image_embeddings(cache, ijb)
    _refuse_missing(images_folder, ijb.names[done:], sizes[done:])
    kept = _Cache(cache, state, sizes)

    def batches() -> Generator[tuple[Sequence[str], Tensor], None, None]:
        """Images from the first that is not done on, decoded and aligned ahead by threads."""
        rows = ((row, row) for row in range(done, total))
        faces = read_ahead(rows, aligned, workers, 2 * batch_size)
        with contextlib.closing(faces):
            while batch := list(islice(faces, batch_size)):
                pixels = np.stack([face.result() for _, face in batch])
                images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
                yield [ijb.names[row] for row, _ in batch], images.sub_(127.5).div_(127.5)
                progress.update(len(batch))

    def aligned(row: int) -> np.ndarray:
        place = images_folder / ijb.names[row]
        return np.asarray(align_face(read_pixels(place), ijb.landmarks[row], image_size))

    def both(images: Tensor) -> np.ndarray:
        """Embeddings of images and of their mirror images, side by side: [B, 2 D]."""
        found = embed(torch.cat([images, images.flip(3)])).float().cpu().numpy()
        count, dim = len(images), found.shape[-1] if kept.dim is None else kept.dim
        if found.shape != (2 * count, dim):
            raise ValueError(f"embed gave {found.shape} where {(2 * count, dim)} was wanted")
        rows = np.concatenate([found[:count], found[count:]], axis=1)
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(bad):
            name = ijb.names[kept.done + int(bad[0])]
            raise ValueError(f"{images_folder / name}: its embedding is not finite")
        return rows

    with (
        torch.inference_mode(),
        tqdm(total=total, initial=done, desc=f"{ijb.target} images", unit="image") as progress,
        contextlib.closing(batches()) as coming,
    ):
        extract_into(kept, coming, both)
    return load_image_embeddings(cache, ijb)


class _Cache:
    """The cache folder of an extraction, filled image by image in the protocol's order."""

    def __init__(self, folder: Path, state: dict, sizes: np.ndarray) -> None:
        self.folder, self.state, self.sizes = folder, state, sizes
        self.path, self.done = folder / "embeddings.npy", int(state["done"])
        self.array = None
        if self.done:
            self.array = _mapped(self.path, "r+", len(sizes))
            # those that are gone since have the size that they had
            sizes[: self.done] = np.load(folder / _SIZES)[: self.done]
            self._write_sizes()
        self._written = time.monotonic()

    @property
    def dim(self) -> int | None:
        return None if self.array is None else self.array.shape[2]

    def add(self, name: str, embedding: np.ndarray) -> None:
        if self.array is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_sizes()
            shape = (len(self.sizes), 2, len(embedding) // 2)
            self.array = np.lib.format.open_memmap(self.path, "w+", np.float32, shape)
        self.array[self.done] = embedding.reshape(2, -1)
        self.done += 1
        if time.monotonic() - self._written > PART_SECONDS:
            self.flush()

    def _write_sizes(self) -> None:
        with replacing(self.folder / _SIZES) as partial:
            np.save(partial, self.sizes)

    def flush(self) -> None:
        if self.array is not None:
            self.array.flush()
            text = json.dumps(self.state | {"done": self.done}, indent=2) + "\n"
            write_text(self.folder / "cache.json", text)
        self._written = time.monotonic()

    def note_faults(self, faults: dict[str, str]) -> None:
        """Every image of a protocol is needed: what has no embedding ended the extraction."""


def _sizes_of(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Bytes of each image, int64 [M]; below 0 where there is no such file."""

    def size(name: str) -> int:
        try:
            found = os.stat(f"{folder}/{name}")
        except OSError:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    return np.fromiter(map(size, names), np.int64, len(names))


def _refuse_missing(folder: Path, names: Sequence[str], sizes: np.ndarray) -> None:
    missing = np.flatnonzero(sizes < 0)
    if len(missing):
        raise FileNotFoundError(
            f"{folder}: {len(missing):,} images of the protocol are missing, the first is "
            f"{names[missing[0]]}"
        )


def _refuse_changed(
    cache: Path, folder: Path, names: Sequence[str], sizes: np.ndarray, done: int
) -> None:
    """Images that are embedded already must be those that are there, as far as they still are."""
    if not done:
        return
    try:
        before = np.load(cache / _SIZES, allow_pickle=False)
        if before.shape != sizes.shape or before.dtype != np.int64:
            raise ValueError(f"{before.dtype} {before.shape}")
    except (ValueError, OSError, EOFError) as error:
        fault = f"{cache / _SIZES}: damaged ({fault_of(error)}); delete the cache to extract anew"
        raise ValueError(fault) from None
    others = np.flatnonzero((sizes[:done] >= 0) & (sizes[:done] != before[:done]))
    if len(others):
        raise ValueError(
            f"{cache}: {len(others):,} of its {done:,} images are others than in {folder}, the "
            f"first is {names[others[0]]}; give another cache folder (--output), or delete this one"
        )
