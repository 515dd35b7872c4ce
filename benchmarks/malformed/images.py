"""Images."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from malformed.kinds import Kind, content, error, value
from speechbrain_qmargin.data.images import check_images, read_pixels

GREY = np.kron(np.random.default_rng(0).integers(10, 240, (6, 5)), np.ones((8, 8))).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    return stream.getvalue()


def images(folder: Path) -> Iterator[Kind]:
    grey = Image.fromarray(GREY)
    wide, rgb = GREY.astype(np.uint16), np.stack([GREY] * 3, 2)
    head = b"P5 %d %d " % (GREY.shape[1], GREY.shape[0])
    clear = grey.convert("RGBA")
    clear.putalpha(255)
    right = {
        "16 bits, PNG": encoded(Image.fromarray(wide * 257)),
        "16 bits, PGM": head + b"65535\n" + (wide * 257).astype(">u2").tobytes(),
        "12 bits, PGM": head + b"4095\n" + np.rint(GREY / 255 * 4095).astype(">u2").tobytes(),
        "a palette": encoded(grey.convert("P")),
        "grey with transparency": encoded(clear.convert("LA")),
        "colour with transparency": encoded(clear),
        "CMYK": encoded(grey.convert("RGB").convert("CMYK"), "TIFF"),
        "WebP without loss": encoded(grey.convert("RGB"), "WEBP", lossless=True),
    }
    for name, data in right.items():
        yield value(name, lambda data=data: read_pixels(data), rgb, 1.0)
    turns = (None, None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE",
             "ROTATE_90", "TRANSVERSE", "ROTATE_270")  # fmt: skip
    for number, turn in enumerate(turns[1:], 1):
        exif = Image.Exif()
        exif[0x0112] = number
        turned = grey.transpose(Image.Transpose[turn]) if turn else grey
        data = encoded(turned, exif=exif)
        yield value(f"EXIF orientation {number}", lambda data=data: read_pixels(data), rgb)
    png, jpeg = encoded(grey), bytearray(encoded(grey, "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    wrong = {
        "floating_point.tiff": encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        "32_bits.tiff": encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
        "half.png": png[: len(png) // 2],
        "half.jpg": encoded(grey, "JPEG")[:300],
        "3.6_gigapixels.jpg": bytes(jpeg),
        "empty.png": b"",
        "text.png": b"no image",
        "flipped.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
    }
    for name, data in wrong.items():
        path = content(folder / name, data)
        yield error(name.replace("_", " "), lambda path=path: read_pixels(path), name)
    one = content(folder / "one_colour.png", encoded(Image.new("L", (40, 48), 255)))
    yield error("one colour", lambda: check_images({"pair 1": one}), "one_colour.png", "equal")
