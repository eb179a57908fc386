"""Pictures made to hurt: every mode, cut at every place, lying headers, polyglots, in one job that must come to an end."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.latents.rows import ROW_SCHEMA, read_table
from preprocessing.reasons import REASONS
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards
from tests.preprocessing.builders import Files, NumpyEncoder, encode_config, image_file, noise, write_input

MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "WEBP": ["RGB", "RGBA"],
}
CUTS = 40
FLIPS = 60


def in_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(noise(1, 40, 40)[..., 0].astype(np.uint16) * 200)
    return Image.fromarray(noise(1, 40, 40, 4)).convert(mode)


def every_mode() -> Iterator[tuple[str, bytes]]:
    for kind, modes in MODES.items():
        for mode in modes:
            yield f"mode-{kind}-{mode.replace(';', '')}", image_file(in_mode(mode), kind)
            yield (
                f"icc-{kind}-{mode.replace(';', '')}",
                image_file(in_mode(mode), kind, icc_profile=b"\0" * 128),
            )


def damaged() -> Iterator[tuple[str, bytes]]:
    generator = np.random.default_rng(0)
    for kind in MODES:
        whole = image_file(noise(2, 48, 48), kind)
        for cut in np.linspace(0, len(whole) - 1, CUTS).astype(int):
            yield f"cut-{kind}-{cut}", whole[:cut]
        for number in range(FLIPS):
            place = int(generator.integers(len(whole)))
            flipped = whole[:place] + bytes([whole[place] ^ (1 << number % 8)]) + whole[place + 1 :]
            yield f"flip-{kind}-{number}", flipped


def png(width: int, height: int, packed: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        parts += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return parts


def lying() -> Iterator[tuple[str, bytes]]:
    jpeg, webp = image_file(noise(3, 48, 48), "JPEG"), image_file(noise(3, 48, 48), "WEBP")
    yield "inflates-beyond", png(16, 16, zlib.compress(bytes(50_000_000), 9))
    yield "too-little-data", png(500, 500, zlib.compress(bytes(100)))
    yield "not-deflate", png(16, 16, b"\xff" * 500)
    yield "depth-3", png(16, 16, zlib.compress(bytes(1000)), depth=3)
    size = jpeg.index(b"\xff\xc0") + 5
    yield "jpeg-64000-high", jpeg[:size] + struct.pack(">HH", 64000, 48) + jpeg[size + 4 :]
    yield "jpeg-taller", jpeg[:size] + struct.pack(">HH", 480, 480) + jpeg[size + 4 :]
    yield "jpeg-no-height", jpeg[:size] + struct.pack(">HH", 0, 48) + jpeg[size + 4 :]
    yield "webp-length", webp[:4] + struct.pack("<I", 0xFFFFFFF0) + webp[8:]
    yield (
        "chunks",
        png(16, 16, b"")[:33] + (b"\0\0\0\0teXt" + struct.pack(">I", zlib.crc32(b"teXt"))) * 100_000,
    )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield "icc-zeroed", image_file(noise(4, 40, 40), icc_profile=profile[:128] + bytes(len(profile) - 128))


def polyglots() -> Iterator[tuple[str, bytes]]:
    jpeg = image_file(noise(5, 40, 40), "JPEG")
    yield "jpeg-then-zip", jpeg + b"PK\x03\x04" + bytes(200)
    yield "jpeg-with-script", jpeg[:2] + b"\xff\xfe\x00\x1b<script>alert(1)</script>" + jpeg[2:]
    yield "gif-with-jpeg-inside", b"GIF89a/*" + jpeg
    yield "pdf-then-png", b"%PDF-1.7\n" + image_file(noise(6, 40, 40))
    yield "html-before-png", b"<html>" + image_file(noise(6, 40, 40))
    yield "pickle", b"\x80\x04\x95cposix\nsystem\n."
    yield "postscript-in-jpeg-name", b"%!PS-Adobe-3.0 EPSF-3.0\n(ls) (r) file"


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, tuple[str, str | None]]]:
    """Run everything as one job; return how many went in, and (status, reason) by key."""
    root = tmp_path_factory.mktemp("torture")
    pictures = [*every_mode(), *damaged(), *lying(), *polyglots()]
    files: Files = [
        file for key, image in pictures for file in ((f"{key}.jpg", image), (f"{key}.txt", key.encode()))
    ]
    source = write_input(root / "in", {"00000": files})
    encode = encode_config(max_failed_fraction=1.0, max_pixels=1_000_000)
    counts = encode_shards(Work(list_shards(source), root / "out"), NumpyEncoder(), encode).counts
    assert counts.unaccounted == 0 and counts.read == len(pictures)
    rows = read_table(root / "out/00/00000.parquet", ROW_SCHEMA).to_pylist()
    return len(pictures), {row["key"]: (row["status"], row["reason"]) for row in rows}


def test_everything_ends_somewhere_under_a_known_name(
    torture: tuple[int, dict[str, tuple[str, str | None]]],
) -> None:
    count, outcomes = torture
    assert len(outcomes) == count > 300
    for key, (status, reason) in outcomes.items():
        assert status == "written" or (status == "rejected" and reason in REASONS), (key, status, reason)


def test_what_is_whole_is_written(torture: tuple[int, dict[str, tuple[str, str | None]]]) -> None:
    outcomes = torture[1]
    for key, outcome in outcomes.items():
        if key.startswith(("mode-", "icc-")):
            assert outcome == ("written", None), key
    assert outcomes["jpeg-then-zip"] == outcomes["jpeg-with-script"] == ("written", None)


def test_what_lies_is_rejected(torture: tuple[int, dict[str, tuple[str, str | None]]]) -> None:
    outcomes = torture[1]
    reasons = {key: reason for key, (status, reason) in outcomes.items() if status == "rejected"}
    assert reasons["jpeg-64000-high"] == "too_many_pixels"
    assert reasons["too-little-data"] in ("truncated", "corrupt") and reasons["not-deflate"] == "corrupt"
    assert reasons["pickle"] == reasons["html-before-png"] == "not_image"
    assert reasons["gif-with-jpeg-inside"] == reasons["pdf-then-png"] == "format"
    cut = [key for key in outcomes if key.startswith("cut-JPEG")]
    assert all(
        key in reasons for key in cut if not key.endswith(f"-{max(int(k.rpartition('-')[2]) for k in cut)}")
    )


def test_nothing_is_lost_between_bytes_and_rows(tmp_path: Path) -> None:
    """The counts add up also when a decoder breaks on every second picture."""
    files: Files = []
    for number in range(20):
        payload = image_file(noise(number)) if number % 2 else image_file(noise(number))[: 40 + number]
        files += [(f"{number}.png", payload), (f"{number}.txt", b"x")]
    source = write_input(tmp_path / "in", {"00000": files})
    counts = encode_shards(
        Work(list_shards(source), tmp_path / "out"), NumpyEncoder(), encode_config()
    ).counts
    assert (counts.read, counts.written, sum(counts.rejected.values()), counts.failed) == (20, 10, 10, {})
