"""Images of every kind: what they show is what is trained on."""

import io

import numpy as np
import pytest
from PIL import Image

from speechbrain_qmargin.data.images import check_images, read_image, read_pixels

GREY = np.kron(np.random.default_rng(0).integers(10, 240, (4, 5)), np.ones((7, 7))).astype(np.uint8)
RGB = np.stack((GREY, 255 - GREY, GREY // 2), 2)


def encoded(image, **kwargs):
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG", **kwargs})
    return stream.getvalue()


def pgm(values, maximum):
    head = b"P5 %d %d %d\n" % (values.shape[1], values.shape[0], maximum)
    return head + values.astype(">u2").tobytes()


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


def test_an_image_of_one_colour_is_named(tmp_path):
    path = tmp_path / "white.png"
    path.write_bytes(encoded(Image.new("L", (9, 9), 255)))
    with pytest.raises(OSError, match=r"white\.png: shows nothing: all its pixels are equal"):
        read_image(path, 9)
    with pytest.raises(OSError, match="1 of 1 images to test on cannot be used"):
        check_images({"a pair's first": path})
    assert read_pixels(path).min() == 255
