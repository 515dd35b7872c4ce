"""Folders of face images become manifests: who is trained on, who is validated and tested on.

A folder holds ``<identity>/<image>.{jpg,png,...}``, itself or below ``images/``. An image's id is
its path below that, as pair lists write it. Identities that a pair list names are never trained on.
"""

from __future__ import annotations

import io
import logging
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speechbrain_qmargin.data.classes import all_pairs, held_out_for_validation, training_classes
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.scoring.trials import read_trials, speaker_in

__all__ = ["FaceCorpus", "face_dataset", "prepare_faces", "read_image"]

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp")


@dataclass(frozen=True)
class FaceCorpus:
    """What :func:`prepare_faces` found.

    Attributes
    ----------
    root : Path
    train, valid, test : dict
        Image id to ``{"image": path, "identity": name}``.
    valid_trials : Path or None
    test_lists : dict from name to Path
        Pair lists, ids as in the manifests.
    """

    root: Path
    train: dict[str, dict]
    valid: dict[str, dict]
    test: dict[str, dict]
    valid_trials: Path | None
    test_lists: dict[str, Path]

    @property
    def identities(self) -> list[str]:
        """Training identities, sorted."""
        return sorted({item["identity"] for item in self.train.values()})


def prepare_faces(
    data_folder: str | Path,
    save_folder: str | Path,
    *,
    verification_file: str | Path,
    valid_file: str | Path | None = None,
    num_valid_identities: int = 0,
    train_identities: str | Path | None = None,
    min_images: int = 2,
) -> FaceCorpus:
    """Divide a folder of images into training, validation and test.

    Parameters
    ----------
    data_folder : path
        Holds ``<identity>/<image>``, itself or below ``images/``.
    save_folder : path
        Where the validation pairs are written.
    verification_file, valid_file : path
        Pairs, ``label image image`` per line.
    num_valid_identities : int
        Without a `valid_file`: how many training identities to hold out; all pairs of up to ten
        of their images become the validation pairs. 0 is no validation.
    train_identities : path, optional
        A file of identities to train on, one a line; otherwise all that no pair list names.
    min_images : int
        Identities with fewer are dropped, with a warning that names them.

    Raises
    ------
    FileNotFoundError, ValueError
        A missing folder or list, a pair whose image is missing, a training list that shares
        identities with the pairs or names unknown ones: each is named.
    """
    root = Path(data_folder)
    if not root.is_dir():
        raise FileNotFoundError(f"data_folder: {root} does not exist")
    root = root / "images" if (root / "images").is_dir() else root
    images = {
        path.relative_to(root).as_posix(): path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.parent != root
    }
    if not images:
        raise FileNotFoundError(
            f"data_folder: no <identity>/<image> with {', '.join(IMAGE_SUFFIXES)} below {root}"
        )
    lists = {Path(verification_file).stem: Path(verification_file)}
    members = {"test": _images_of(Path(verification_file), images, root), "valid": set()}
    valid_trials = None
    if valid_file is not None:
        valid_trials = Path(valid_file)
        members["valid"] = _images_of(valid_trials, images, root)
    held_out = {speaker_in(name) for part in members.values() for name in part}

    by_identity: dict[str, list[str]] = defaultdict(list)
    for name in images:
        by_identity[speaker_in(name)].append(name)
    candidates = training_classes(
        by_identity,
        held_out,
        listed=train_identities,
        minimum=min_images,
        names=("identities", "images"),
    )
    if valid_file is None and num_valid_identities > 0:
        candidates, members["valid"] = held_out_for_validation(
            by_identity, candidates, num_valid_identities
        )
        valid_trials = Path(save_folder) / "trials" / "valid.txt"
        write_text(valid_trials, all_pairs(members["valid"]))
    if len(candidates) < 2:
        raise ValueError(
            f"{root}: {len(candidates)} identities left to train on, at least 2 are needed (the "
            f"pair lists and validation hold out {len(held_out)})"
        )

    def manifest(names: Iterable[str]) -> dict[str, dict]:
        return {
            name: {"image": str(images[name]), "identity": speaker_in(name)}
            for name in sorted(names)
        }

    return FaceCorpus(
        root=root,
        train=manifest(name for identity in candidates for name in by_identity[identity]),
        valid=manifest(members["valid"]),
        test=manifest(members["test"]),
        valid_trials=valid_trials,
        test_lists=lists,
    )


def _images_of(pair_list: Path, images: dict[str, Path], root: Path) -> set[str]:
    """The images that a pair list names, all of which must be there."""
    if not pair_list.is_file():
        raise FileNotFoundError(f"{pair_list}: no such pair list")
    trials = read_trials(pair_list)
    missing = [name for name in trials.ids if name not in images]
    if missing:
        raise FileNotFoundError(
            f"{pair_list}: {len(missing)} of the images it names are not below {root}, the first: "
            f"{', '.join(missing[:5])}"
        )
    trials.speakers()  # a label that contradicts its identities stops the run before it trains
    return set(trials.ids)


def read_image(source: str | Path | bytes, size: int) -> Tensor:
    """A face as the networks take it, [3, size, size] float32 in [-1, 1].

    Parameters
    ----------
    source : path or bytes
        A file of any format Pillow reads, or its content. Grey images get three equal channels.
    size : int
        Other sizes are resized, antialiased; shapes that are not square are stretched.

    Raises
    ------
    OSError
        The file cannot be decoded; the message names it.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            pixels = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        name = "image" if isinstance(source, bytes) else source
        raise OSError(f"{name}: cannot be decoded ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float().sub_(127.5).div_(127.5)


def face_dataset(
    manifest: dict[str, dict],
    image_size: int = 112,
    *,
    flip: bool = False,
    label_encoder=None,
    seed: int = 0,
    epoch: Callable[[], int] = lambda: 0,
):
    """A SpeechBrain dynamic dataset over a manifest of :func:`prepare_faces`.

    Parameters
    ----------
    manifest : dict
    image_size : int
    flip : bool
        Mirror half of the images. Which ones is a function of (seed, epoch, image) alone, so
        neither the number of workers nor an interruption changes what is trained on.
    label_encoder : CategoricalEncoder, optional
        With it, items also carry ``identity_encoded``.
    epoch : callable
        Gives the current epoch.

    Returns
    -------
    DynamicItemDataset with keys ``id``, ``image`` [3, H, W] and, with an encoder,
    ``identity_encoded``.
    """
    from speechbrain.dataio.dataset import DynamicItemDataset
    from speechbrain.utils.data_pipeline import provides, takes

    @takes("id", "path")
    @provides("image")
    def load(name: str, path: str) -> Tensor:
        image = read_image(path, image_size)
        if flip:
            rng = np.random.default_rng([seed, epoch(), zlib.crc32(name.encode())])
            if rng.random() < 0.5:
                image = image.flip(2)
        return image

    @takes("identity")
    @provides("identity_encoded")
    def encode(identity: str) -> Tensor:
        return torch.tensor([label_encoder.encode_label(identity)])

    items = {
        name: {"path": item["image"], "identity": item["identity"]}
        for name, item in manifest.items()
    }
    pipelines, keys = [load], ["id", "image"]
    if label_encoder is not None:
        pipelines.append(encode)
        keys.append("identity_encoded")
    return DynamicItemDataset(items, pipelines, keys)
