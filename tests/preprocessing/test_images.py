"""Pixels mean what they meant in the file: each conversion is held against its definition."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from preprocessing.filters import Failure, Rejection, Rules
from preprocessing.images import (
    ORIENTATION_TAG,
    Picture,
    PreparedSample,
    png_bytes,
    prepare_image,
    prepare_sample,
)
from preprocessing.sources import RawSample
from tests.preprocessing.builders import SIDE, encode_config, image_file, noise, solid, square


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    pixels = noise(1, SIDE, SIDE)
    found = square(image_file(pixels))
    assert np.array_equal(found.pixels, pixels)
    assert (found.original_height, found.original_width, found.crop) == (SIDE, SIDE, (0, 0, SIDE, SIDE))
    assert found.remarks == ()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_formats_are_told_by_content(kind: str) -> None:
    smooth = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8)[:, None, None], (1, SIDE, 3))
    found = square(image_file(smooth, kind, **({} if kind == "PNG" else {"quality": 100})))
    assert np.abs(found.pixels.astype(int) - smooth).max() <= 6


def test_centre_square_of_the_short_side_is_scaled() -> None:
    """The same as scaling the whole picture by an even factor and cutting out the middle."""
    pixels = noise(2, 2 * SIDE, 6 * SIDE)
    found = square(image_file(pixels))
    assert found.crop == (0, 2 * SIDE, 2 * SIDE, 2 * SIDE)
    assert (found.original_height, found.original_width) == (2 * SIDE, 6 * SIDE)
    whole = Image.fromarray(pixels).resize((3 * SIDE, SIDE), Image.Resampling.BICUBIC)
    assert np.array_equal(found.pixels, np.asarray(whole)[:, SIDE : 2 * SIDE])
    upright = square(image_file(np.ascontiguousarray(pixels.transpose(1, 0, 2))))
    assert upright.crop == (2 * SIDE, 0, 2 * SIDE, 2 * SIDE)


def test_shrinking_is_antialiased() -> None:
    """A fine checkerboard has the mean of its colours; picking single pixels would show black and white."""
    board = (np.indices((160, 160)).sum(axis=0) % 2 * 255).astype(np.uint8)
    found = square(image_file(np.stack([board] * 3, axis=-1)))
    assert np.abs(found.pixels.astype(int) - 127).max() <= 2


def test_small_pictures_grow_and_are_counted() -> None:
    assert square(image_file(solid((9, 8, 7), 4))).remarks == ("upscaled",)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    """EXIF 2.32, tag 0112: which side of the picture row 0 and column 0 of the stored pixels are."""
    shown = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    shown[: SIDE // 2, :SIDE] = (255, 0, 0)
    shown[SIDE // 2 :, :SIDE] = (0, 255, 0)
    shown[: SIDE // 2, SIDE:] = (0, 0, 255)
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: shown.transpose(1, 0, 2)[::-1],
        7: shown.transpose(1, 0, 2)[::-1, ::-1],
        8: shown.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    options = (
        {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    )
    found = square(image_file(np.ascontiguousarray(stored), kind, exif=exif, **options))
    assert (found.original_height, found.original_width) == (SIDE, 2 * SIDE)
    assert found.crop == (0, SIDE // 2, SIDE, SIDE)
    assert np.abs(found.pixels.astype(int) - shown[:, SIDE // 2 : SIDE // 2 + SIDE]).max() <= 12


def test_broken_exif_is_ignored() -> None:
    found = square(image_file(solid((1, 2, 3), SIDE), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))
    assert tuple(found.pixels[0, 0]) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken_and_counted(kind: str) -> None:
    frames = [Image.fromarray(solid((k * 80, 0, 0), SIDE)) for k in range(3)]
    payload = image_file(
        frames[1],
        kind,
        save_all=True,
        append_images=[frames[2], frames[0]],
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    found = square(payload)
    assert found.remarks == ("animated",) and tuple(found.pixels[0, 0]) == (80, 0, 0)


def test_nothing_is_decoded_before_its_size_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = image_file(Image.new("1", (8000, 8000)))
    assert len(bomb) < 10_000

    def load(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    rules = Rules.from_config(encode_config(max_pixels=1_000_000))
    assert prepare_image(bomb, rules) == Rejection("too_many_pixels")
    assert prepare_image(
        image_file(solid((0, 0, 0), 1)), rules.__class__(**{**vars(rules), "min_side": 2})
    ) == Rejection("too_small")


def test_a_decoders_bug_costs_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", broken)
    raw = RawSample("k", "k", "s", image=image_file(noise(0)), text=b"x")
    assert prepare_sample(raw, Rules.from_config(encode_config())) == Failure("ZeroDivisionError")


def test_lack_of_memory_is_not_the_samples_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    raw = RawSample("k", "k", "s", image=image_file(noise(0)), text=b"x")
    with pytest.raises(MemoryError):
        prepare_sample(raw, Rules.from_config(encode_config()))


def test_a_prepared_sample_remembers_where_it_came_from() -> None:
    raw = RawSample("k-1", "k 1", "00000.tar", image=image_file(noise(0)), text=b"x", ignored_members=2)
    found = prepare_sample(raw, Rules.from_config(encode_config()))
    assert isinstance(found, PreparedSample)
    assert found.remarks == ("renamed_key", "ignored_members", "ignored_members")
    assert len(found.source_sha256) == 64 and found.captions == ("x",)


@pytest.mark.parametrize(
    ("suffix", "kind", "noted"),
    [
        ("png", "PNG", False),
        ("jpg", "JPEG", False),
        ("jpeg", "JPEG", False),
        ("png", "JPEG", True),
        ("webp", "PNG", True),
    ],
)
def test_a_name_that_lies_is_used_by_its_content_and_noted(suffix: str, kind: str, noted: bool) -> None:
    raw = RawSample("k", "k", "s", image=image_file(noise(0), kind), text=b"x", suffix=suffix)
    found = prepare_sample(raw, Rules.from_config(encode_config()))
    assert isinstance(found, PreparedSample) and ("other_suffix" in found.remarks) == noted


@pytest.mark.parametrize(
    ("sizes", "noted"),
    [
        ((256, 256, 400, 300), True),
        ((256, 256, 300, 300), False),
        ((341, 256, 400, 300), False),
        ((None,) * 4, False),
    ],
)
def test_squares_that_were_none_are_noted(sizes: tuple[int | None, ...], noted: bool) -> None:
    """img2dataset's json: (width, height) after its resize, which pads with white by default, and the original's."""
    names = ("width", "height", "original_width", "original_height")
    document = json.dumps(dict(zip(names, sizes, strict=True))).encode()
    raw = RawSample("k", "k", "s", image=image_file(noise(0)), text=b"x", json=document)
    found = prepare_sample(raw, Rules.from_config(encode_config()))
    assert isinstance(found, PreparedSample) and ("squared" in found.remarks) == noted


def test_png_round_trip() -> None:
    pixels = noise(4, 8, 12)
    with Image.open(io.BytesIO(png_bytes(pixels))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return smooth random pixels with an edge, uint8 [height, width, 3]: what JPEG is made for."""
    coarse = noise(seed, height // 16 + 1, width // 16 + 1)
    pixels = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 3 : height // 2, width // 4 : width // 3] = (250, 20, 20)
    return pixels


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = np.mean((first.astype(float) - second.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize(
    ("height", "width", "scaling"),
    [(16, 16, 1), (31, 40, 1), (32, 32, 2), (63, 200, 2), (64, 64, 4), (130, 129, 8), (1001, 777, 8)],
)
def test_jpeg_is_decoded_at_the_smallest_scale_that_covers_the_target(
    height: int, width: int, scaling: int
) -> None:
    pixels = photo(height, width)
    payload = image_file(pixels, "JPEG", quality=95, subsampling=0)
    found = square(payload, max_aspect=10)
    assert found.scaling == scaling and (found.original_height, found.original_width) == (height, width)
    full = square(payload, max_aspect=10, draft=False)
    assert full.scaling == 1 and full.crop == found.crop
    assert psnr(found.pixels, full.pixels) > 30


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_reproduced_from_the_original(orientation: int) -> None:
    """By what the row says alone: turn the original, cut the crop, resize."""
    stored = photo(200, 333, seed=orientation)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    payload = image_file(stored, "PNG", exif=exif)
    rules = Rules.from_config(encode_config(buckets=[[16, 32], [32, 16], [24, 24]], bucket_tolerance=0.5))
    found = prepare_image(payload, rules)
    assert isinstance(found, Picture) and found.scaling == 1
    with Image.open(io.BytesIO(payload)) as image:
        shown = ImageOps.exif_transpose(image)
    top, left, height, width = found.crop
    box = (left, top, left + width, top + height)
    again = shown.resize((found.bucket[1], found.bucket[0]), Image.Resampling.BICUBIC, box=box)
    if orientation == 1:
        assert np.array_equal(np.asarray(again), found.pixels)
    # Turned pictures are resized before they are turned: the two passes round in the other order.
    assert psnr(np.asarray(again), found.pixels) > 44


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_crop_is_reproduced_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    payload = image_file(photo(205, 333), "JPEG", quality=95, exif=exif)
    found = prepare_image(payload, Rules.from_config(encode_config(buckets=[[16, 32], [32, 16]])))
    assert isinstance(found, Picture) and found.scaling == 8
    with Image.open(io.BytesIO(payload)) as image:
        shown = ImageOps.exif_transpose(image)
    top, left, height, width = found.crop
    again = shown.crop((left, top, left + width, top + height)).resize(
        (found.bucket[1], found.bucket[0]), Image.Resampling.BICUBIC
    )
    assert psnr(np.asarray(again), found.pixels) > 28


def test_a_picture_goes_to_the_bucket_where_it_loses_least() -> None:
    encode = encode_config(buckets=[[16, 16], [8, 32], [32, 8]], bucket_tolerance=0.3)
    rules = Rules.from_config(encode)

    def outcome(height: int, width: int, **changes: Any) -> object:
        rules = Rules.from_config(encode.model_copy(update=changes))
        found = prepare_image(image_file(photo(height, width)), rules)
        return (found.bucket, found.crop, found.remarks) if isinstance(found, Picture) else found

    assert outcome(40, 160) == ((8, 32), (0, 0, 40, 160), ())
    assert outcome(160, 44) == ((32, 8), (0, 2, 160, 40), ())
    assert outcome(50, 40) == ((16, 16), (5, 0, 40, 40), ())
    assert outcome(40, 80) == Rejection("bucket")  # loses half either way
    assert outcome(40, 80, bucket_overflow="crop")[2] == ("bucket_overflow",)  # type: ignore[index]
    assert len(rules.shapes()) == 3


def test_a_phone_s_double_picture_is_one_jpeg() -> None:
    first, second = (Image.fromarray(photo(64, 64, seed)) for seed in (0, 1))
    payload = image_file(first, "MPO", save_all=True, append_images=[second], quality=95)
    found = square(payload)
    assert found.scaling == 4 and found.remarks == ()
    assert psnr(found.pixels, square(image_file(first, "JPEG", quality=95)).pixels) > 40


def progressive_bomb(scans: int) -> bytes:
    """Return a progressive JPEG whose last scan stands there many times over."""
    payload = image_file(photo(64, 64), "JPEG", progressive=True)
    last = payload.rindex(b"\xff\xda")
    return payload[:last] + payload[last:-2] * scans + payload[-2:]


def test_cost_is_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(prepare_image(progressive_bomb(50), Rules.from_config(encode_config())), Picture)
    padded = image_file(solid((0, 0, 0), 16), "JPEG")
    padded += bytes(9 << 20)

    def load(*arguments: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    rules = Rules.from_config(encode_config())
    assert prepare_image(progressive_bomb(200), rules) == Rejection("too_many_scans")
    assert prepare_image(padded, rules) == Rejection("too_many_bytes")
