"""Align photographs of faces by five landmarks, as the networks are trained.

    python recipes/face/align.py IMAGES LANDMARKS OUT [--size 112]

LANDMARKS is a text file with a line per face, `image x1 y1 ... x5 y5`: the image's path below
IMAGES, then x and y, in pixels, of the left and right eye, the nose, the left and right corner of
the mouth, as seen in the picture. OUT gets <image>.png with the same folders, which is a
`--data_folder` of recipes/face/train.py where they are the identities'. Interrupted, it goes on;
images that cannot be aligned are listed in OUT/skipped_images.txt.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import numpy as np
from tqdm import tqdm

from speechbrain_qmargin.data.align import align_face
from speechbrain_qmargin.data.images import read_pixels
from speechbrain_qmargin.data.skipped import Skipped
from speechbrain_qmargin.files import replacing, write_text


def read_landmarks(path):
    """Image to landmarks [5, 2]; a line that does not fit raises ValueError with its number."""
    landmarks, outputs = {}, {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        name, *values = line.rsplit(maxsplit=10) or [""]
        try:
            points = np.array(values, dtype=float).reshape(5, 2)
        except ValueError:
            raise ValueError(
                f"{path}:{number}: expected 'image x1 y1 ... x5 y5', got {line!r}"
            ) from None
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{path}:{number}: {name} must be a path below IMAGES")
        before = outputs.setdefault(PurePath(name).with_suffix(".png"), number)
        if before != number:
            raise ValueError(f"{path}:{number}: {name} would overwrite the image of line {before}")
        landmarks[name] = points
    return landmarks


def main(argv=None):
    from PIL import Image

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument("landmarks", help="text file: image x1 y1 ... x5 y5")
    parser.add_argument("out", type=Path, help="folder of aligned images")
    parser.add_argument("--size", default=112, type=int, help="height and width, in pixels")
    args = parser.parse_args(argv)
    if not args.images.is_dir():
        raise FileNotFoundError(f"{args.images}: no such folder of photographs")
    landmarks = read_landmarks(args.landmarks)

    def align(name):
        """What is wrong with an image; nothing if it is in place."""
        file = (args.out / name).with_suffix(".png")
        if file.is_file():
            return ""
        try:
            aligned = align_face(read_pixels(args.images / name), landmarks[name], args.size)
        except (OSError, ValueError) as error:
            return str(error)
        with replacing(file) as partial:
            Image.fromarray(aligned).save(partial)
        return ""

    sizes = args.out / "size.txt"
    if sizes.is_file() and sizes.read_text() != f"{args.size}\n":
        raise ValueError(
            f"{args.out} holds images of size {sizes.read_text().strip()}; another OUT"
        )
    write_text(sizes, f"{args.size}\n")
    listing = args.out / "skipped_images.txt"
    listing.unlink(missing_ok=True)  # they are tried again
    skipped = Skipped(listing)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = tqdm(pool.map(align, landmarks), "aligning", len(landmarks), unit="face")
        for name, fault in zip(landmarks, faults, strict=True):
            if fault:
                skipped.add(name, fault)
    print(f"{len(landmarks) - len(skipped):,} aligned images in {args.out}")
    if skipped:
        print(f"{len(skipped):,} could not be aligned, listed in {skipped.file}")


if __name__ == "__main__":
    main()
