"""Colours mean what they meant in the file: alpha, palettes, 16 bits, inks and profiles become sRGB on a background."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from preprocessing.filters import Rules
from preprocessing.images import (
    Picture,
    prepare_image,
)
from preprocessing.sources import list_shards
from tests.preprocessing.builders import SIDE, encode_config, image_file, noise, solid, square


def alpha_picture() -> tuple[np.ndarray, np.ndarray]:
    """Return RGBA with every alpha over black hidden colours, and the same over white by hand."""
    rgba = np.zeros((SIDE, SIDE, 4), np.uint8)
    rgba[..., 3] = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    rgba[: SIDE // 2, :, 0] = 200
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba, rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_laid_on_white(kind: str) -> None:
    rgba, expected = alpha_picture()
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.abs(square(image_file(rgba, kind, **options)).pixels - expected).max() <= 1


def test_alpha_on_another_background() -> None:
    clear = np.zeros((SIDE, SIDE, 4), np.uint8)
    assert np.array_equal(
        square(image_file(clear), background=[10, 20, 30]).pixels, solid((10, 20, 30), SIDE)
    )


def test_transparent_edges_do_not_bleed_when_shrunk() -> None:
    """White over transparent black must stay white: the background is laid below before resizing."""
    rgba = np.zeros((96, 96, 4), np.uint8)
    rgba[20:70, 30:80] = 255
    assert (square(image_file(rgba)).pixels == 255).all()


def test_real_emoji_have_white_corners() -> None:
    shard = list_shards(Path(__file__).parents[2] / "examples/emoji")[1]
    rules = Rules.from_config(encode_config(image_size=64))
    corners, dropped = [], []
    for raw, _ in zip(shard.samples(), range(40), strict=False):
        with Image.open(io.BytesIO(raw.image)) as image:
            if image.getpixel((0, 0))[3]:  # type: ignore[index]
                continue
            dropped.append(image.convert("RGB").getpixel((0, 0)))
        found = prepare_image(raw.image, rules)
        assert isinstance(found, Picture)
        corners.append(tuple(found.pixels[0, 0]))
    assert len(corners) > 10 and set(corners) == {(255, 255, 255)}
    assert (0, 0, 0) in dropped  # what a reader that only drops alpha would have trained on


def test_palette_with_and_without_transparency() -> None:
    indices = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 3
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    assert np.array_equal(square(image_file(image)).pixels, colours[indices])
    colours[1] = 255
    assert np.array_equal(square(image_file(image, transparency=1)).pixels, colours[indices])
    half = bytes([255, 0, 255])
    assert np.array_equal(square(image_file(image, transparency=half)).pixels, colours[indices])


def test_grey_one_bit_and_grey_alpha() -> None:
    grey = noise(3, SIDE, SIDE)[..., 0]
    assert np.array_equal(square(image_file(grey)).pixels, np.stack([grey] * 3, axis=-1))
    bits = grey > 127
    assert np.array_equal(square(image_file(Image.fromarray(bits))).pixels[..., 1], bits * np.uint8(255))
    clear = Image.merge("LA", [Image.fromarray(grey), Image.new("L", (SIDE, SIDE), 0)])
    assert (square(image_file(clear)).pixels == 255).all()
    with_transparent_grey = square(image_file(Image.fromarray(grey), transparency=int(grey[0, 0])))
    assert tuple(with_transparent_grey.pixels[0, 0]) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)
    found = square(image_file(Image.fromarray(values))).pixels[..., 0]
    assert np.abs(found - values / 257).max() <= 0.5
    with Image.open(io.BytesIO(image_file(Image.fromarray(values)))) as image:
        clipped = np.asarray(image.convert("L"))
    assert clipped.mean() > 250 > found.mean() > 120


def sixteen_bit_png(values_HWC: np.ndarray) -> bytes:
    """Return a PNG of 16 bits a channel, written by hand from the format's own words: no library writes them in colour."""
    height, width, channels = values_HWC.shape
    colour = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colours_and_alpha_are_scaled_to_within_a_level(channels: int) -> None:
    values = np.random.default_rng(channels).integers(0, 65536, (SIDE, SIDE, channels)).astype(np.uint16)
    found = square(sixteen_bit_png(values)).pixels.astype(float)
    real = values / 65535
    colours = real[..., :1].repeat(3, axis=2) if channels == 2 else real[..., :3]
    alpha = real[..., -1:] if channels in (2, 4) else 1.0
    assert np.abs(found - 255 * (colours * alpha + 1 - alpha)).max() <= 2


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    values = np.full((SIDE, SIDE), 1000, np.uint16)
    values[0, 0] = 2000
    found = square(image_file(Image.fromarray(values), transparency=2000)).pixels
    assert tuple(found[0, 0]) == (255, 255, 255) and tuple(found[5, 5]) == (4, 4, 4)


def test_cmyk() -> None:
    cmyk = Image.fromarray(
        np.broadcast_to(np.array([0, 255, 255, 0], np.uint8), (SIDE, SIDE, 4)).copy(), "CMYK"
    )
    payload = image_file(cmyk, "JPEG", quality=100)
    assert b"Adobe" in payload[:200], "the kind that stores its inks inverted"
    red = square(payload).pixels.astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 4


def wide_profile() -> bytes:
    """Return a matrix profile whose red and green primaries are swapped: no eye is needed to see it applied."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[132 + 12 * k : 136 + 12 * k]): 132 + 12 * k for k in range(profile[131])}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_profiles_become_srgb(kind: str) -> None:
    options: dict[str, Any] = {
        "PNG": {},
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
    }[kind]
    payload = image_file(solid((200, 40, 90), SIDE), kind, icc_profile=wide_profile(), **options)
    found = square(payload)
    assert found.remarks == ("icc_converted",)
    assert np.abs(found.pixels[0, 0].astype(int) - [40, 200, 90]).max() <= 4


def test_srgb_itself_and_broken_profiles_change_nothing() -> None:
    pixels = noise(1, SIDE, SIDE)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tagged = square(image_file(pixels, icc_profile=srgb))
    assert np.array_equal(tagged.pixels, pixels) and tagged.remarks == ()
    for broken in (b"no profile", srgb[:200], srgb[:16] + b"CMYK" + srgb[20:]):
        found = square(image_file(pixels, icc_profile=broken))
        assert np.array_equal(found.pixels, pixels) and found.remarks == ("icc_unusable",)


def test_a_grey_picture_with_a_colour_profile_and_alpha_under_a_profile() -> None:
    grey = np.full((SIDE, SIDE), 77, np.uint8)
    found = square(image_file(grey, icc_profile=wide_profile()))
    assert found.remarks == ("icc_converted",) and np.abs(found.pixels.astype(int) - 77).max() <= 2
    rgba = np.zeros((SIDE, SIDE, 4), np.uint8)
    rgba[:, :8] = (200, 40, 90, 255)
    mixed = square(image_file(rgba, icc_profile=wide_profile()))
    assert np.abs(mixed.pixels[0, 0].astype(int) - [40, 200, 90]).max() <= 4
    assert tuple(mixed.pixels[0, 15]) == (255, 255, 255)
