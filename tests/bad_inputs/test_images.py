"""Pictures from the web as they really come: each is used or rejected by name, and none takes the shard down."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.latents.rows import ROW_SCHEMA, read_table
from preprocessing.sources import list_shards
from tests.preprocessing.builders import (
    POISON,
    Files,
    encode_one,
    image_file,
    noise,
    solid,
    write_input,
)

PIXELS = noise(0, 64, 64)
PNG, JPEG, WEBP = (image_file(PIXELS, kind) for kind in ("PNG", "JPEG", "WEBP"))

SECOND = Image.fromarray(solid((1, 1, 1), 64))
TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def flipped(payload: bytes, place: int) -> bytes:
    return payload[:place] + bytes([payload[place] ^ 0xFF]) + payload[place + 1 :]


def zeroed(payload: bytes) -> bytes:
    return payload[:100] + bytes(500) + payload[600:]


def text_bomb() -> bytes:
    """Return a small PNG whose compressed text unpacks to 200 MB."""
    bomb = zlib.compressobj(9)
    packed = b"".join(bomb.compress(bytes(1 << 20)) for _ in range(200)) + bomb.flush()
    body = b"zTXtComment\0\0" + packed
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    png = image_file(solid((1, 2, 200), 64))
    return png[:33] + chunk + png[33:]


def declared(width: int, height: int) -> bytes:
    """Return a PNG whose header claims another size than its pixels have."""
    body = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + body + struct.pack(">I", zlib.crc32(body)) + PNG[33:]


def sixteen_bit_rgb() -> bytes:
    raw = b"".join(b"\0" + b"\x80\x00" * 3 * 64 for _ in range(64))
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png


def other_format(kind: str) -> bytes:
    return image_file(PIXELS, kind)


def float_tiff() -> bytes:
    return image_file(Image.fromarray(np.random.default_rng(0).random((64, 64)).astype(np.float32)), "TIFF")


CASES: list[tuple[str, bytes, str | None]] = [
    ("0-bytes", b"", "empty"),
    ("html", b"<!doctype html><html><body>404</body></html>", "not_image"),
    ("random", bytes(range(256)) * 9, "not_image"),
    ("jpeg-half", JPEG[: len(JPEG) // 2], "truncated"),
    ("jpeg-2-bytes", JPEG[:-2], "truncated"),
    ("jpeg-magic-only", JPEG[:3], "corrupt"),
    ("jpeg-flip", flipped(JPEG, len(JPEG) // 2), None),  # cannot be seen: JPEG has no checksum
    ("png-half", PNG[: len(PNG) // 2], "truncated"),
    ("png-crc", flipped(PNG, len(PNG) // 2), "corrupt"),
    ("png-zeroed-page", zeroed(PNG), "corrupt"),
    ("webp-half", WEBP[: len(WEBP) // 2], "corrupt"),
    ("png-magic-only", PNG[:8], "corrupt"),
    ("one-bit-8000", image_file(Image.new("1", (8000, 8000))), "too_many_pixels"),
    ("179-megapixels", image_file(Image.new("1", (20000, 9000))), "too_many_pixels"),
    ("claims-4-gigapixels", declared(65535, 65535), "too_many_pixels"),
    ("claims-nothing", declared(0, 64), "corrupt"),
    ("text-bomb", text_bomb(), "text_chunk_bomb"),
    ("1x1", image_file(solid((9, 9, 9), 1)), "too_small"),
    ("63-px", image_file(noise(1, 63, 63)), "too_small"),
    ("64-px", image_file(noise(1, 64, 64)), None),
    ("1x8000", image_file(np.zeros((8000, 1, 3), np.uint8)), "too_small"),
    ("8000x1", image_file(np.zeros((1, 8000, 3), np.uint8)), "too_small"),
    ("900x80", image_file(noise(1, 900, 80)), "aspect"),
    ("80x900", image_file(noise(1, 80, 900)), "aspect"),
    ("rgba", image_file(noise(1, 64, 64, 4)), None),
    ("palette-transparent", image_file(Image.fromarray(PIXELS).quantize(16), transparency=3), None),
    ("grey", image_file(PIXELS[..., 0]), None),
    ("grey-alpha", image_file(Image.fromarray(noise(1, 64, 64, 4)).convert("LA")), None),
    ("1-bit", image_file(Image.fromarray(PIXELS[..., 0] > 99)), None),
    ("16-bit-grey", image_file(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)), None),
    ("16-bit-rgb", sixteen_bit_rgb(), None),
    ("cmyk-jpeg", image_file(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"), None),
    ("exif", image_file(PIXELS, "JPEG", exif=TURNED), None),
    ("apng", image_file(Image.fromarray(PIXELS), save_all=True, append_images=[SECOND]), None),
    ("animated-webp", image_file(Image.fromarray(PIXELS), "WEBP", save_all=True, append_images=[SECOND]), None),
    ("float-tiff", float_tiff(), "format"),
    ("gif", other_format("GIF"), "format"),
    ("bmp", other_format("BMP"), "format"),
    ("tiff", other_format("TIFF"), "format"),
    ("eps", other_format("EPS"), "format"),
    ("pdf", other_format("PDF"), "format"),
    ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "format"),
    ("ps", b"%!PS-Adobe-3.0\n(ls) run", "format"),
    ("wmf", b"\xd7\xcd\xc6\x9a" + bytes(300), "format"),
    ("heic", b"\0\0\0 ftypheic\0\0\0\0mif1heic" + bytes(100), "format"),
    ("avif", b"\0\0\0 ftypavif\0\0\0\0avifmif1miaf" + bytes(100), "format"),
    ("png-as-jpeg-inside", JPEG, None),
    ("solid", image_file(solid((200, 10, 10), 64)), None),
    ("solid-nan", image_file(solid(POISON, 64)), "nonfinite_latent"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Run all cases as one shard through the real worker; return each key's reason, None where it was written."""
    root = tmp_path_factory.mktemp("images")
    files: Files = [
        file for key, image, _ in CASES for file in ((f"{key}.png", image), (f"{key}.txt", key.encode()))
    ]
    shard = list_shards(write_input(root / "in", {"00000": files}))[0]
    record = encode_one(shard, root / "out", min_side=64, max_pixels=16_000_000)
    assert record.counts.read == len(CASES) and record.counts.unaccounted == 0
    assert record.counts.failed == {}
    assert record.extra["remarks"]["animated"] == 2
    lying = {"jpeg-flip", "cmyk-jpeg", "exif", "animated-webp", "png-as-jpeg-inside"}
    assert record.extra["remarks"]["other_suffix"] == len(lying), "every file here is called .png"
    rows = read_table(root / "out/00/00000.parquet", ROW_SCHEMA).to_pylist()
    return {row["key"]: row["reason"] for row in rows}


@pytest.mark.parametrize(("key", "expected"), [(key, expected) for key, _, expected in CASES])
def test_picture(outcome: dict[str, str | None], key: str, expected: str | None) -> None:
    assert outcome[key] == expected


def test_bombs_are_small_files() -> None:
    sizes = {key: len(image) for key, image, _ in CASES}
    assert (
        sizes["one-bit-8000"] < 10_000
        and sizes["text-bomb"] < 300_000
        and sizes["claims-4-gigapixels"] < 20_000
    )


def test_encapsulated_postscript_never_reaches_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setattr("os.system", started)
    eps = other_format("EPS")
    files: Files = [
        ("a.png", eps),
        ("a.txt", b"x"),
        ("b.eps", eps),
        ("b.txt", b"x"),
    ]
    shard = list_shards(write_input(tmp_path / "in", {"00000": files}))[0]
    record = encode_one(shard, tmp_path / "out")
    assert record.counts.rejected == {"format": 2}
