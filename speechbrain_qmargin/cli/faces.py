"""The subcommand of photographs: align."""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.cli import GOES_ON
from speechbrain_qmargin.data.align import align_face
from speechbrain_qmargin.data.images import read_pixels
from speechbrain_qmargin.data.skipped import write_listing
from speechbrain_qmargin.extraction import content_key
from speechbrain_qmargin.files import fault_of, replacing, write_text
from speechbrain_qmargin.tables import read_lines

__all__ = ["configure", "read_landmarks"]

ALIGN = """
    qmargin align originals landmarks.txt photographs

LANDMARKS is a text file with a line for each face, `image x1 y1 ... x5 y5`: the image's path below
IMAGES, then x and y in pixels of the left and right eye, the nose, and the left and right corner of
the mouth, left and right as seen in the picture. They become the positions of ArcFace's training
crops. OUTPUT gets <image>.png in the same folders; if these are named after the identities, it is a
--data_folder for recipes/face/train.py. An interrupted run resumes when the same command is started
again, and aligns those anew whose landmarks or photograph have changed (OUTPUT/aligned.txt says
what was used); images that cannot be aligned are listed in OUTPUT/skipped_images.txt.
"""


def read_landmarks(path: str | Path) -> dict[str, np.ndarray]:
    """Image to landmarks [5, 2]; a line that does not fit raises ValueError with its number."""
    landmarks, outputs = {}, {}
    for number, line in enumerate(read_lines(path)[0], 1):
        name, *values = line.rsplit(maxsplit=10) or [""]
        try:
            points = np.array(values, dtype=float).reshape(5, 2)
            if not np.isfinite(points).all():
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{path}:{number}: expected 'image x1 y1 ... x5 y5', got {line!r}"
            ) from None
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{path}:{number}: {name} must be a path below IMAGES")
        before = outputs.setdefault(_aligned_name(name), number)
        if before != number:
            raise ValueError(f"{path}:{number}: {name} would overwrite the image of line {before}")
        landmarks[name] = points
    return landmarks


def _align(args: argparse.Namespace) -> None:
    from PIL import Image

    images, out = Path(args.images), Path(args.output)
    if images.resolve() == out.resolve():
        raise ValueError(f"{out}: aligned images would overwrite the photographs; another OUTPUT")
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder of photographs")
    if args.image_size < 1:
        raise ValueError(f"--image_size {args.image_size}; height and width in pixels are wanted")
    landmarks = read_landmarks(args.landmarks)

    def align(name: str) -> str:
        """What is wrong with an image; nothing if it is in place."""
        file = out / _aligned_name(name)
        if file.is_file():
            return ""
        try:
            aligned = align_face(read_pixels(images / name), landmarks[name], args.image_size)
        except (OSError, ValueError) as error:
            return fault_of(error)
        with replacing(file) as partial:
            Image.fromarray(aligned).save(partial)
        return ""

    sizes = out / "size.txt"
    if sizes.is_file() and sizes.read_text() != f"{args.image_size}\n":
        raise ValueError(f"{out} holds images of size {sizes.read_text().strip()}; another OUTPUT")
    write_text(sizes, f"{args.image_size}\n")
    _forget_changed(images.resolve(), landmarks, out)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(
            pool.map(align, landmarks),
            "aligning",
            len(landmarks),
            unit="face",
            disable=args.quiet,
        )
        faults = {name: fault for name, fault in zip(landmarks, found, strict=True) if fault}
    listing = out / "skipped_images.txt"
    write_listing(listing, faults)
    print(f"{len(landmarks) - len(faults):,} aligned images in {out}")
    if faults:
        print(f"{len(faults):,} could not be aligned, listed in {listing}")


def _aligned_name(name: str) -> str:
    return PurePath(name).with_suffix(".png").as_posix()


def _forget_changed(images: Path, landmarks: dict[str, np.ndarray], out: Path) -> None:
    """Delete the aligned images that other landmarks or another photograph are to replace.

    Of what they were made, ``aligned.txt`` says; a file that it does not list is somebody else's.
    """
    record = out / "aligned.txt"
    lines = read_lines(record)[0] if record.is_file() else []
    made = {line.rpartition(" ")[0]: line for line in lines}
    wanted = {
        name: content_key(name, [images / photograph, points.tobytes()])
        for photograph, points in landmarks.items()
        for name in [_aligned_name(photograph)]
    }
    for name, key in wanted.items():
        if made.get(name) == key or not (out / name).is_file():
            continue
        if name not in made:
            raise FileExistsError(f"{out / name} is not of this command; give another OUTPUT")
        (out / name).unlink()
    write_text(record, "".join(f"{key}\n" for key in (made | wanted).values()))


def configure(add) -> None:
    """The subcommand that aligns photographs; see :mod:`speechbrain_qmargin.cli`."""
    sub = add("align", _align, ALIGN)
    sub.set_defaults(again=GOES_ON)
    sub.add_argument("images", metavar="IMAGES", help="folder of photographs")
    sub.add_argument("landmarks", metavar="LANDMARKS", help="text file: image x1 y1 ... x5 y5")
    sub.add_argument("output", metavar="OUTPUT", help="folder to write the aligned images to")
    sub.add_argument("--image_size", default=112, type=int, help="height and width of the aligned "
                     "images, in pixels")  # fmt: skip
