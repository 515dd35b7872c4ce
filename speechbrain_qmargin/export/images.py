"""Embeddings of any face images with a trained encoder: whatever holds them in, one file out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechbrain_qmargin.data.folders import files_below
from speechbrain_qmargin.data.images import IMAGE_SUFFIXES, UNREAD_IMAGES, read_image
from speechbrain_qmargin.data.pickled import read_bin
from speechbrain_qmargin.data.shards import stored_faces
from speechbrain_qmargin.data.stored import StoredFaces
from speechbrain_qmargin.export.face_encoder import FaceEncoder
from speechbrain_qmargin.export.sources import read_list
from speechbrain_qmargin.extraction import Inputs, extract_items
from speechbrain_qmargin.faces.pair_sets import pair_ids
from speechbrain_qmargin.trials import match_ids

__all__ = ["extract_images", "find_images", "select_images"]


def find_images(source: str | Path, *, progress: bool = True) -> Inputs:
    """What a path holds, with ids as trial lists write them.

    Parameters
    ----------
    source : path
        A folder of images, at any depth: an id is the path below it, or below its ``images/``. A
        text file: a path a line, or an id and a path. A ``.rec`` or the folder of one, or of
        webdataset shards: ``<identity>/<key of the record>``. A ``.bin`` set: ``<set>/000000`` and
        ``<set>/000001`` are its first pair.
    progress : bool
        Show a bar where the labels of records or shards have to be read.

    Raises
    ------
    FileNotFoundError, ValueError
        Nothing there, no images in it, a list that does not fit; named.

    Examples
    --------
    >>> from PIL import Image
    >>> folder = getfixture("tmp_path")
    >>> (folder / "images" / "ann").mkdir(parents=True)
    >>> Image.new("RGB", (112, 112)).save(folder / "images" / "ann" / "1.png")
    >>> images = find_images(folder)
    >>> list(images.items)
    ['ann/1.png']
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder or file of images")
    if source.suffix == ".bin":
        contents, same = read_bin(source)
        items = dict(zip(pair_ids(source.stem, len(same)), contents, strict=True))
        return Inputs(items, bytes, named="<set>/<number of the image>")
    if source.is_dir() or source.suffix == ".rec":
        stored = stored_faces(source, progress=progress)
        if stored is not None:
            return _stored(stored)
    if source.is_dir():
        return _below(source / "images" if (source / "images").is_dir() else source)
    if source.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"{source}: an image; give its folder, or a list of images")
    return Inputs(read_list(source, "images"), Path, named="as the list names them")


def select_images(images: Inputs, ids: Sequence[str], what: str | Path) -> Inputs:
    """Those images alone, in the order of some ids; suffixes aside where they differ.

    Raises
    ------
    FileNotFoundError
        Some are not there; named, beside one that is.

    Examples
    --------
    >>> images = Inputs({"ann/1.png": b"a file's content", "bob/1.png": b"another's"}, bytes)
    >>> list(select_images(images, ["bob/1", "ann/1"], "trials.txt").items)
    ['bob/1', 'ann/1']
    >>> select_images(images, ["eve/1"], "trials.txt")
    Traceback (most recent call last):
    FileNotFoundError: trials.txt: 1 of the images it names are not there, the first: eve/1 ...
    """
    held = list(images.items)
    places = match_ids(ids, held)[0].tolist()
    missing = [name for name, place in zip(ids, places, strict=True) if place < 0]
    if missing:
        raise FileNotFoundError(
            f"{what}: {len(missing)} of the images it names are not there, the first: "
            f"{', '.join(missing[:5])} (there is {held[0]})"
        )
    items = {name: images.items[held[at]] for name, at in zip(ids, places, strict=True)}
    return replace(images, items=items, faults={})


def _below(root: Path) -> Inputs:
    found = sorted(files_below(root, IMAGE_SUFFIXES, UNREAD_IMAGES))
    if not found:
        raise FileNotFoundError(f"{root}: no {', '.join(IMAGE_SUFFIXES)} file in it")
    items = {one.name: Path(one.path) for one in found if not one.fault}
    faults = {one.name: one.fault for one in found if one.fault}
    return Inputs(items, Path, faults, f"by their path below {root}")


def _stored(stored: StoredFaces) -> Inputs:
    labels, lock = stored.identities(), threading.Lock()

    def content(row: int) -> bytes:
        with lock:  # one position in the file for all
            return stored.image(row)[0]

    items = {f"{label}/{stored.key(row)}": row for row, label in enumerate(labels) if label >= 0}
    faults = {stored.name(int(row)): "its label is broken" for row in np.flatnonzero(labels < 0)}
    faults |= stored.broken
    return Inputs(items, content, faults, "<identity>/<key>", stored.state())


def extract_images(
    encoder: FaceEncoder,
    images: Inputs,
    folder: str | Path,
    about: str = "",
    *,
    batch_size: int = 64,
    workers: int = 4,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Embed images; interrupted, it goes on.

    Parameters
    ----------
    encoder : FaceEncoder
    images : Inputs
    folder : path
        Where embeddings are kept on their way, and where those that are returned lie.
    about : str
        What tells the images from others of the same ids.
    batch_size, workers : int
        Images at once; threads that decode.
    progress : callable, optional
        Called with how many images were done since the last call.

    Returns
    -------
    embeddings : mapping from id to float32 [D]
        In the order of the images.
    faults : dict from id to str
        What could not be embedded, and why.

    Examples
    --------
    >>> from PIL import Image
    >>> folder = getfixture("tmp_path")
    >>> Image.linear_gradient("L").save(folder / "1.png")
    >>> _ = (folder / "2.png").write_text("no image")
    >>> network = torch.nn.Conv2d(3, 8, kernel_size=32)     # as large as the image
    >>> encoder = FaceEncoder(network, image_size=32)
    >>> found, faults = extract_images(encoder, find_images(folder), folder / "parts")
    >>> found["1.png"].shape, list(faults)
    ((8,), ['2.png'])
    """

    def read(content: Any) -> Tensor:
        return read_image(content, encoder.image_size)

    def embed(batch: list[Tensor]) -> Tensor:
        return encoder(torch.stack(batch).to(encoder.device))

    with torch.inference_mode():
        return extract_items(
            folder,
            f"{encoder.digest()} on {about}",
            images,
            read,
            embed,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
