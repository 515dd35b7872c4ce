"""Images of every kind: what they show is what is trained on."""

import contextlib
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from speechbrain_qmargin.data.face_dataset import FaceDataset, ImageDataset, StoredDataset
from speechbrain_qmargin.data.images import check_images, image_size, read_image, read_pixels
from speechbrain_qmargin.data.manifest import Item, Manifest
from speechbrain_qmargin.data.pickled import read_bin
from speechbrain_qmargin.data.recordio import write_records
from speechbrain_qmargin.data.records import FaceRecords
from speechbrain_qmargin.export.images import find_images

GREY = np.kron(np.random.default_rng(0).integers(10, 240, (4, 5)), np.ones((7, 7))).astype(np.uint8)
RGB = np.stack((GREY, 255 - GREY, GREY // 2), 2)


def encoded(image, **kwargs):
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **kwargs})
    return stream.getvalue()


def pgm(values, maximum):
    head = b"P5 %d %d %d\n" % (values.shape[1], values.shape[0], maximum)
    return head + values.astype(">u2").tobytes()


def tiff(values, bits, zero_is_white=False):
    """A grey TIFF of 12 or 16 bits a value, which Pillow reads and does not write."""
    height, width = values.shape
    data = values.astype("<u2").tobytes()
    if bits == 12:
        first, second = values.reshape(height, width // 2, 2).astype(int).transpose(2, 0, 1)
        packed = (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
        data = np.stack(packed, -1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not zero_is_white), 273: 8}
    tags |= {277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    place = struct.pack("<I", 8 + len(data))
    return b"II*\0" + place + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        tiff(np.rint(GREY[:, :34] / 255 * 4095), 12),
        tiff(65535 - GREY[:, :34].astype(int) * 257, 16, zero_is_white=True),
    ],
)
def test_tiffs_that_pillow_gives_unscaled_or_inverted(content):
    assert np.abs(read_pixels(content).astype(int) - GREY[:, :34, None]).max() <= 1


@pytest.mark.parametrize("values", [GREY.astype(np.uint16) * 16, GREY.astype(np.uint16)])
def test_sixteen_bits_of_which_few_are_used_are_refused(values):
    with pytest.raises(
        OSError, match=r"mode I;16: 16 bits, of which the brightest pixel, \d+, use"
    ):
        read_pixels(encoded(Image.fromarray(values)))
    with pytest.raises(OSError, match="shows nothing"):
        read_image(encoded(Image.fromarray(0 * values)), 9)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(GREY.astype(np.uint16) * 257)),
        pgm(GREY.astype(int) * 257, 65535),
        pgm(np.rint(GREY / 255 * 4095), 4095),
        pgm(np.rint(GREY / 255 * 1023), 1023),
        encoded(Image.fromarray(GREY.astype(np.uint16) * 257), format="TIFF"),
    ],
)
def test_grey_of_more_than_eight_bits_is_scaled(content):
    found = read_pixels(content).astype(int)
    assert found.shape == (*GREY.shape, 3)
    assert np.abs(found - GREY[..., None]).max() <= 1


@pytest.mark.parametrize("values", [GREY.astype(np.int32) * 70000, GREY.astype(np.float32)])
def test_values_of_no_known_range_are_refused_by_their_mode(tmp_path, values):
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(OSError, match=r"a\.tif: cannot be decoded \(ValueError: mode [IF]: "):
        read_pixels(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_turned_as_the_camera_noted(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(RGB).transpose(Image.Transpose.ROTATE_90)
    options = {} if kind == "PNG" else {"quality": 100}
    upright = read_pixels(encoded(Image.fromarray(RGB), format=kind, **options)).astype(int)
    found = read_pixels(encoded(turned, format=kind, exif=exif, **options)).astype(int)
    assert found.shape == RGB.shape
    assert np.abs(found - upright).mean() < 6  # compressed otherwise
    if kind == "PNG":
        assert (found == RGB).all()


def test_grey_palette_and_transparent_images():
    assert (read_pixels(encoded(Image.fromarray(GREY))) == GREY[..., None]).all()
    palette = Image.fromarray(RGB).quantize(256)
    assert (read_pixels(encoded(palette)) == np.asarray(palette.convert("RGB"))).all()
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:7] = 0
    hidden = RGB.copy()
    hidden[:7] = 0
    assert (read_pixels(encoded(Image.fromarray(np.dstack((RGB, alpha))))) == hidden).all()
    grey = read_pixels(encoded(Image.fromarray(np.dstack((GREY, alpha)))))
    assert (grey == np.where(alpha > 0, GREY, 0)[..., None]).all()
    clear = Image.fromarray(GREY).quantize(8)
    index = int(np.asarray(clear)[0, 0])
    found = read_pixels(encoded(clear, transparency=index))
    assert (found[np.asarray(clear) == index] == 0).all()
    assert found.any()


def test_cmyk_is_what_its_inverse_shows():
    ink = Image.fromarray(np.dstack((255 - RGB, np.zeros(GREY.shape, np.uint8))), mode="CMYK")
    found = read_pixels(encoded(ink, format="TIFF")).astype(int)
    assert np.abs(found - RGB).max() <= 1


def test_no_image_is_run_as_a_program(tmp_path, monkeypatch):
    """Pillow gives an EPS to Ghostscript, whatever its file is called, also within an IPTC."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/run\necho 10.02\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"

    def field(tag, content):
        return struct.pack(">BBBH", 0x1C, *tag, len(content)) + content

    head = {(3, 60): b"\1\0", (3, 65): b"\0", (3, 20): b"\0\x09", (3, 30): b"\0\x09",
            (3, 120): b"\5"}  # fmt: skip
    iptc = b"".join(field(*one) for one in head.items()) + field((8, 10), eps)
    for content in (eps, iptc):
        (tmp_path / "face.png").write_bytes(content)
        for source in (content, tmp_path / "face.png"):
            for read in (read_pixels, image_size):
                with pytest.raises(OSError, match=r"cannot be decoded \(of no format that is read"):
                    read(source)
    assert not (tmp_path / "run").exists()
    for content in (eps, iptc):  # what Pillow would do
        with Image.open(io.BytesIO(content)) as image, contextlib.suppress(OSError):
            image.load()
        (tmp_path / "run").unlink()


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM",
                                  "TIFF", "WEBP"])  # fmt: skip
def test_formats_of_images_are_read(kind):
    image = Image.fromarray(RGB)
    if kind not in Image.SAVE and not (Image.init() and kind in Image.SAVE):
        pytest.skip(f"this Pillow does not write {kind}")
    many = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}  # of telephones
    found = read_pixels(encoded(image, format=kind, **many))
    assert found.shape == RGB.shape
    assert np.abs(found.astype(int) - RGB).mean() < 25


def test_an_image_of_one_colour_is_named(tmp_path):
    path = tmp_path / "white.png"
    path.write_bytes(encoded(Image.new("L", (9, 9), 255)))
    with pytest.raises(OSError, match=r"white\.png: shows nothing: all its pixels are equal"):
        read_image(path, 9)
    with pytest.raises(OSError, match="1 of 1 images to test on cannot be used"):
        check_images({"a pair's first": path})
    assert read_pixels(path).min() == 255


def turned(values):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(values).transpose(Image.Transpose.ROTATE_90)
    return encoded(lying, exif=exif)


def with_alpha(values):
    return np.dstack((values, np.full(GREY.shape, 255, np.uint8)))


INK = np.dstack((255 - RGB, np.zeros(GREY.shape, np.uint8)))
COLOURS = Image.fromarray(RGB).quantize(256)
GREY_RGB = np.dstack([GREY] * 3)
KINDS = {  # content, and what it shows: an image, or a refusal
    "rgb": (encoded(Image.fromarray(RGB)), RGB),
    "grey": (encoded(Image.fromarray(GREY)), GREY_RGB),
    "16 bits": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY_RGB),
    "12 bits": (pgm(np.rint(GREY / 255 * 4095), 4095), GREY_RGB),
    "1 bit": (encoded(Image.fromarray(GREY > 120)), np.where(GREY_RGB > 120, 255, 0)),
    "palette": (encoded(COLOURS), np.asarray(COLOURS.convert("RGB"))),
    "alpha": (encoded(Image.fromarray(with_alpha(RGB))), RGB),
    "grey, alpha": (encoded(Image.fromarray(with_alpha(GREY))), GREY_RGB),
    "cmyk": (encoded(Image.fromarray(INK, mode="CMYK"), format="TIFF"), RGB),
    "exif": (turned(RGB), RGB),
    "float": (encoded(Image.fromarray(GREY / np.float32(255)), format="TIFF"), "mode F: floating"),
    "32 bits": (encoded(Image.fromarray(GREY.astype(np.int32)), format="TIFF"), "mode I: 32-bit"),
    "12 of 16 bits": (encoded(Image.fromarray(GREY.astype(np.uint16) * 16)), "mode I;16: 16 bits"),
    "one colour": (encoded(Image.new("RGB", (35, 28), "white")), "all its pixels are equal"),
    "damaged": (encoded(Image.fromarray(RGB))[:80], "cannot be decoded"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_shows_the_same_or_refuses_by_name(tmp_path, kind):
    content, shown = KINDS[kind]
    other = encoded(Image.fromarray(RGB[::-1]))
    file, whole = tmp_path / "images/ann/a.png", tmp_path / "images/ann/b.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    whole.write_bytes(other)
    manifest = Manifest.of(
        [Item("ann/a.png", str(file), "ann"), Item("ann/b.png", str(whole), "ann")]
    )
    write_records(tmp_path / "train.rec", [content, other], [0, 0])
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([content, other], [True])))
    found = find_images(tmp_path / "images")
    in_set = find_images(tmp_path / "lfw.bin")
    folder = FaceDataset(manifest, 28, {"ann": 0})
    records = StoredDataset(FaceRecords(tmp_path / "train.rec"), 28)
    readers = {
        "a folder": lambda: ImageDataset(["a"], [str(file)], 28)[0]["image"],
        "a set": lambda: ImageDataset(["a"], read_bin(tmp_path / "lfw.bin")[0], 28)[0]["image"],
        "extraction": lambda: read_image(found.content(found.items["ann/a.png"]), 28),
        "extraction of a set": lambda: read_image(in_set.content(in_set.items["lfw/000000"]), 28),
    }
    trained = {"a folder": folder[0], "records": records[0]}
    if isinstance(shown, str):  # another takes its place, and it is listed
        instead = read_image(other, 28)
        for item, skipped in zip(trained.values(), (folder.skipped, records.skipped), strict=True):
            assert torch.equal(item["image"], instead)
            assert shown in skipped.warning()
        assert "a.png" in folder.skipped.warning()
        for read in readers.values():
            with pytest.raises(OSError, match=shown):
                read()
        return
    upright = Image.fromarray(shown.astype(np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
    wanted = torch.from_numpy(np.array(upright)).permute(2, 0, 1).float().sub(127.5).div(127.5)
    for image in [
        *(item["image"] for item in trained.values()),
        *(read() for read in readers.values()),
    ]:
        assert (image - wanted).abs().max() <= 2.01 / 127.5
    assert not folder.skipped
    assert not records.skipped
