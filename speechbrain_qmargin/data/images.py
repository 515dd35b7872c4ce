"""Images: from every kind that is published to the values that networks take."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speechbrain_qmargin.extras import require
from speechbrain_qmargin.files import fault_of

__all__ = [
    "IMAGE_SUFFIXES",
    "UNREAD_IMAGES",
    "check_images",
    "image_size",
    "read_image",
    "read_pixels",
]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNREAD_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl")

# Pillow knows forty more: for EPS it runs Ghostscript, the image being a program, and others may
# hold one
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_BITS, _MEANS = 258, 262  # TIFF's tags of a value's bits and of what 0 means: 0 is white, 1 black


def check_images(images: Mapping[str, str | Path | bytes]) -> None:
    """Decode every image once.

    Parameters
    ----------
    images : mapping from what an image is called to its file or content

    Raises
    ------
    OSError
        Some cannot be decoded or show nothing: their number, and the first three of them.

    Examples
    --------
    >>> check_images({"lfw.bin, pair 17, image 2": b"no image"})
    Traceback (most recent call last):
    OSError: 1 of 1 images to test on cannot be used, repair them or take their pairs out:
    lfw.bin, pair 17, image 2: cannot be decoded (of no format that is read)
    """

    def fault(item: tuple[str, str | Path | bytes]) -> str:
        try:
            _check_content(read_pixels(item[1]), item[1])
        except OSError as error:
            return f"{item[0]}: {fault_of(error)}"
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = list(filter(None, pool.map(fault, images.items())))
    if faults:
        raise OSError(
            f"{len(faults)} of {len(images)} images to test on cannot be used, repair them or "
            f"take their pairs out: {'; '.join(faults[:3])}"
        )


def read_pixels(source: str | Path | bytes, size: int | None = None) -> np.ndarray:
    """An image as uint8 [H, W, 3], RGB, the right way up.

    Grey images get three equal channels. Those of 16 bits (12 in PGM and TIFF) are scaled, so that
    their white is white. Transparency is put on black. A camera's note of how it was held
    (EXIF orientation) is followed.

    Parameters
    ----------
    source : path or bytes
        A file in AVIF, BMP, GIF, JPEG, JPEG 2000, PNG, PPM, TIFF or WebP, as far as Pillow is built
        for it, whatever its name; or its content.
    size : int, optional
        Images of another size are resized to [size, size], antialiased; those that are not square
        are stretched.

    Raises
    ------
    OSError
        The image cannot be decoded, or its values have no known range (32-bit integers of a TIFF,
        floating point, 16 bits of which only the lowest 12 are used); the message names its file,
        and the mode.
    ImportError
        Pillow is not installed.

    Examples
    --------
    >>> read_pixels(b"P5 2 1 255 " + bytes([7, 9])).tolist()  # a PGM image
    [[[7, 7, 7], [9, 9, 9]]]
    """
    with _opened(source) as image:
        from PIL import Image, ImageOps

        tags = dict(getattr(image, "tag_v2", {}))
        image = _rgb(ImageOps.exif_transpose(image), image.format, tags)
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.array(image)


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Width and height as an image's header states them; nothing is decoded.

    Raises
    ------
    OSError, ImportError
        As :func:`read_pixels`.

    Examples
    --------
    >>> image_size(b"P5 2 1 255 " + bytes([7, 9]))
    (2, 1)
    """
    with _opened(source) as image:
        return image.size


@contextmanager
def _opened(source: str | Path | bytes):
    """Pillow's image; whatever is wrong with it is an OSError that names it."""
    require("PIL", why="images are read with pillow", extra="face")
    from PIL import Image, UnidentifiedImageError

    try:
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(stream, formats=_known_formats()) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise anything: DecompressionBombError, ...
        name = "" if isinstance(source, bytes) else f"{source}: "
        fault = f"{type(error).__name__}: {fault_of(error)}"
        if isinstance(error, UnidentifiedImageError):
            fault = "of no format that is read"
        raise OSError(f"{name}cannot be decoded ({fault})") from error


@lru_cache(maxsize=1)
def _known_formats() -> list[str]:
    """Those of `_FORMATS` that this Pillow reads."""
    from PIL import Image

    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _rgb(image, kind: str | None, tags: dict):
    """Pillow's image of any mode as RGB."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        if image.mode == "I" and kind not in ("PNG", "PPM"):  # these two have 16 bits in an I
            raise ValueError(f"mode {image.mode}: 32-bit integers, of which no range is known")
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its values are beyond 16 bits")
        if tags.get(_BITS) == (12,):  # Pillow gives them as they are
            values = (values * 65535 + 2047) // 4095
        elif values.min() < values.max() <= 4095:
            raise ValueError(
                f"mode {image.mode}: 16 bits, of which the brightest pixel, {values.max()}, uses "
                "12 or fewer; write it scaled to 65535"
            )
        if tags.get(_MEANS) == 0:
            values = 65535 - values
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("mode F: floating point, of which no range is known")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert(
            "RGB"
        )
    return image.convert("RGB")


def _check_content(pixels: np.ndarray, source: str | Path | bytes) -> None:
    if (pixels[0, 0] == pixels[-1, -1]).all() and (pixels == pixels[:1, :1]).all():
        name = "" if isinstance(source, bytes) else f"{source}: "
        raise OSError(f"{name}shows nothing: all its pixels are equal")


def read_image(source: str | Path | bytes, size: int) -> Tensor:
    """A face as the networks take it, [3, size, size] float32 in [-1, 1].

    Parameters
    ----------
    source, size
        As :func:`read_pixels`, and so are the errors. An image of one colour is refused too.

    Examples
    --------
    >>> read_image(b"P5 2 1 255 " + bytes([0, 255]), 2)[0, 0]
    tensor([-1.,  1.])
    """
    values = read_pixels(source, size)
    _check_content(values, source)
    return torch.from_numpy(values).permute(2, 0, 1).float().sub_(127.5).div_(127.5)
