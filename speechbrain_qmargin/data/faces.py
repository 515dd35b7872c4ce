"""Folders of face images become manifests: who is trained on, who is validated and tested on.

A folder holds ``<identity>/<image>.{jpg,png,...}``, itself or below ``images/``. An image's id is
its path below that, as pair lists write it. Identities that a pair list names are never trained on.
Images that cannot be decoded are found before training where they are tested on; of those that are
trained on, another takes the place, and they are listed (:class:`SkippedImages`).
"""

from __future__ import annotations

import io
import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speechbrain_qmargin.data.classes import all_pairs, held_out_for_validation, training_classes
from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import write_text
from speechbrain_qmargin.trials import read_trials, speaker_in

__all__ = [
    "FaceCorpus",
    "SkippedImages",
    "check_images",
    "face_dataset",
    "prepare_faces",
    "read_image",
    "read_pixels",
]

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
    verification_file: str | Path | None = None,
    valid_file: str | Path | None = None,
    num_valid_identities: int = 0,
    train_identities: str | Path | None = None,
    min_images: int = 2,
) -> FaceCorpus:
    """Divide a folder of images into training, validation and test.

    Parameters
    ----------
    data_folder : path
        Holds ``<identity>/<image>``, itself or below ``images/``; hidden files are left out.
    save_folder : path
        Where the validation pairs are written.
    verification_file, valid_file : path, optional
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
        A missing folder or list, images deeper than ``<identity>/<image>``, a pair whose image is
        missing, a training list that shares identities with the pairs or names unknown ones: each
        is named.
    """
    root = Path(data_folder)
    if not root.is_dir():
        raise FileNotFoundError(f"data_folder: {root} does not exist")
    root = root / "images" if (root / "images").is_dir() else root
    images = _images_below(root)
    lists, members = {}, {"test": set(), "valid": set()}
    if verification_file is not None:
        lists = {Path(verification_file).stem: Path(verification_file)}
        members["test"] = _images_of(Path(verification_file), images, root)
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


def _images_below(root: Path) -> dict[str, Path]:
    """Image id to path of every ``<identity>/<image>``, sorted."""

    def entries(folder: str | Path) -> list[os.DirEntry]:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]

    def is_image(name: str) -> bool:
        return name.lower().endswith(IMAGE_SUFFIXES)

    images = {}
    for identity in entries(root):
        for entry in entries(identity.path) if identity.is_dir() else ():
            if is_image(entry.name):
                images[f"{identity.name}/{entry.name}"] = Path(entry.path)
            elif entry.is_dir():
                for folder, _, names in os.walk(entry.path):
                    if deeper := sorted(filter(is_image, names)):
                        raise ValueError(
                            f"data_folder: {Path(folder, deeper[0])} is deeper than "
                            f"<identity>/<image> below {root}: give the folder that holds the "
                            f"folders of the identities, such as {Path(folder).parent}; several "
                            "of them have to become one first (links will do)"
                        )
    if not images:
        raise FileNotFoundError(
            f"data_folder: no <identity>/<image> with {', '.join(IMAGE_SUFFIXES)} below {root}"
        )
    return dict(sorted(images.items()))


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


class SkippedImages:
    """The images that cannot be used, each once, in a file that workers, ranks and runs share.

    Lines are ``name<TAB>reason``, each appended by one write.

    Attributes
    ----------
    file : Path or None
        None: they are known to this object alone; see :meth:`keep_in`.

    Examples
    --------
    >>> skipped = SkippedImages(getfixture("tmp_path") / "skipped.txt")
    >>> skipped.add("lfw/7.jpg", "cut off"), skipped.add("lfw/7.jpg", "cut off")
    (True, False)
    >>> skipped.file.read_text()
    'lfw/7.jpg\\tcut off\\n'
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self.file: Path | None = None
        self._reasons: dict[str, str] = {}
        self._read = 0  # bytes of the file
        if file is not None:
            self.keep_in(file)

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, name: str) -> bool:
        return name in self._reasons

    def add(self, name: str, reason: object) -> bool:
        """List an image; False if it is listed already, by whomever."""
        if name not in self._reasons:
            self._catch_up()
        if name in self._reasons:
            return False
        self._reasons[name] = " ".join(str(reason).split())
        self._append([name])
        return True

    def keep_in(self, file: str | Path) -> None:
        """Go on in a file: its images are known from now on, those known so far are added."""
        own, self.file = list(self._reasons), Path(file)
        self._read = 0
        listed = self._catch_up()
        self._append([name for name in own if name not in listed])

    def warning(self) -> str:
        """What to say of them; empty if there are none."""
        if not self._reasons:
            return ""
        name, reason = next(iter(self._reasons.items()))
        where = f"all listed in {self.file}" if self.file else "the first"
        return (
            f"{len(self):,} images cannot be used and others take their places, {where}: "
            f"{name}: {reason}"
        )

    def _catch_up(self) -> set[str]:
        """Take over what the file has gained; the names in that."""
        if self.file is None or not self.file.is_file():
            return set()
        with self.file.open("rb") as stream:
            stream.seek(self._read)
            gained = stream.read()
        gained = gained[: gained.rfind(b"\n") + 1]
        self._read += len(gained)
        lines = gained.decode("utf-8", errors="replace").splitlines()
        pairs = [line.partition("\t")[::2] for line in lines]
        self._reasons |= dict(pairs)
        return {name for name, _ in pairs}

    def _append(self, names: list[str]) -> None:
        if self.file is None or not names:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        place = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            for name in names:
                os.write(place, f"{name}\t{self._reasons[name]}\n".encode())
        finally:
            os.close(place)


def check_images(images: Mapping[str, str | Path | bytes]) -> None:
    """Decode every image once.

    Parameters
    ----------
    images : mapping from what an image is called to its file or content

    Raises
    ------
    OSError
        Some cannot be decoded: their number, and the first three of them.

    Examples
    --------
    >>> check_images({"lfw.bin, pair 17, image 2": b"no image"})
    Traceback (most recent call last):
    OSError: 1 of 1 images to test on cannot be decoded, repair them or take their pairs out:
    lfw.bin, pair 17, image 2: cannot be decoded (of no format that Pillow knows)
    """

    def fault(item: tuple[str, str | Path | bytes]) -> str:
        try:
            read_pixels(item[1])
        except OSError as error:
            return f"{item[0]}: {error}"
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = list(filter(None, pool.map(fault, images.items())))
    if faults:
        raise OSError(
            f"{len(faults)} of {len(images)} images to test on cannot be decoded, repair them or "
            f"take their pairs out: {'; '.join(faults[:3])}"
        )


def read_pixels(source: str | Path | bytes, size: int | None = None) -> np.ndarray:
    """An image as uint8 [H, W, 3], RGB; grey ones get three equal channels.

    Parameters
    ----------
    source : path or bytes
        A file of any format Pillow reads, or its content.
    size : int, optional
        Others are resized to [size, size], antialiased; shapes that are not square are stretched.

    Raises
    ------
    OSError
        The image cannot be decoded; the message names its file.
    ImportError
        Pillow is not installed.

    Examples
    --------
    >>> read_pixels(b"P5 2 1 255 " + bytes([7, 9])).tolist()  # a PGM image
    [[[7, 7, 7], [9, 9, 9]]]
    """
    require("PIL", why="images are read with pillow", extra="face")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image = image.convert("RGB")
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            return np.array(image)
    except Exception as error:  # Pillow's decoders raise anything: DecompressionBombError, ...
        name = "" if isinstance(source, bytes) else f"{source}: "
        fault = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):
            fault = "of no format that Pillow knows"
        raise OSError(f"{name}cannot be decoded ({fault})") from error


def read_image(source: str | Path | bytes, size: int) -> Tensor:
    """A face as the networks take it, [3, size, size] float32 in [-1, 1].

    Parameters
    ----------
    source, size
        As :func:`read_pixels`, and so are the errors.
    """
    pixels = torch.from_numpy(read_pixels(source, size))
    return pixels.permute(2, 0, 1).float().sub_(127.5).div_(127.5)


def face_dataset(
    manifest: dict[str, dict],
    image_size: int = 112,
    *,
    flip: bool = False,
    label_encoder=None,
    seed: int = 0,
    epoch: Callable[[], int] = lambda: 0,
    skipped: SkippedImages | None = None,
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
    skipped : SkippedImages, optional
        With it, an image that cannot be decoded is listed there and the identity's next one, in
        the order of the manifest, takes its place. Without it, it raises OSError.

    Returns
    -------
    DynamicItemDataset with keys ``id``, ``image`` [3, H, W] and, with an encoder,
    ``identity_encoded``.

    Raises
    ------
    OSError
        When an item is read: the image, or every image of its identity, cannot be decoded.
    """
    from speechbrain.dataio.dataset import DynamicItemDataset
    from speechbrain.utils.data_pipeline import provides, takes

    family: dict[str, list[str]] = defaultdict(list)
    if skipped is not None:
        for name, item in manifest.items():
            family[item["identity"]].append(name)

    def decoded(name: str, path: str | bytes) -> Tensor:
        if skipped is None:
            return read_image(path, image_size)
        names = family[manifest[name]["identity"]]
        start = names.index(name)
        for other in names[start:] + names[:start]:
            try:
                return read_image(manifest[other]["image"], image_size)
            except OSError as error:
                if skipped.add(other, error):
                    logger.warning(f"{other} is skipped, its identity's next takes its place")
        raise OSError(
            f"no image of the identity {manifest[name]['identity']} can be decoded: take it out"
        )

    @takes("id", "path")
    @provides("image")
    def load(name: str, path: str | bytes) -> Tensor:
        image = decoded(name, path)
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
