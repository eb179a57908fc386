"""Rebuild the golden data set of format 1: what today's code writes, to be read by every later version.

    python -m tests.golden.build            # writes tests/golden/format1 anew; only for a new format

Two shards of 5 and 3 samples with two captions each, all members, both splits, a rejected row. `expected.json` lists
what a reader must find; it is computed here from the source, not read from the data set.
"""

import hashlib
import json
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.captions import Captions, captions_of, described
from preprocessing.filters import Rules
from preprocessing.images import Picture, prepare_image
from preprocessing.sources import RawSample, list_shards
from tests.preprocessing.builders import Files, NumpyEncoder, noise, write_input
from tests.preprocessing.conftest import Prepared

FOLDER = Path(__file__).parent / "format1"
CAPTIONS = ["a café", "two words", "猫", "&lt;b&gt;", "a long caption that is cut"]


def stored_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H,W,3] as a PNG without compression: compressed bytes differ between zlib builds."""
    height, width, _ = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": stored + struct.pack(">I", zlib.adler32(raw)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks.items()
    )


def source_files(first: int, count: int) -> Files:
    """Return pictures of growing size with two captions each."""
    files: Files = []
    for number in range(first, first + count):
        captions = [CAPTIONS[number % 5], f"number {number}"]
        described = json.dumps({"caption": captions}).encode()
        picture = stored_png(noise(number, 18 + number, 24))
        files += [(f"sample.{number}.png", picture), (f"sample.{number}.json", described)]
    return files


def expected_samples(prepared: Prepared) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, what must be read of it), straight from the source."""
    rules = Rules.from_config(prepared.config.encode)
    encoder = NumpyEncoder(max_captions=2)
    for shard in list_shards(prepared.source):
        for raw in shard.samples():
            if raw.problem is None and raw.text is not None:  # the bare one has no caption
                yield raw.key, expected_sample(raw, rules, encoder)


def expected_sample(raw: RawSample, rules: Rules, encoder: NumpyEncoder) -> dict[str, Any]:
    """Return digests of the arrays and the captions of one sample."""
    square, captions = prepare_image(raw.image, rules), captions_of(raw, rules, described(raw))
    assert isinstance(square, Picture) and isinstance(captions, Captions)
    tokens = np.stack([encoder.tokens(text) for text in captions.kept])
    arrays = {
        "latent": encoder.moments(square.pixels).astype(np.float16),
        "text": np.stack([encoder.text_states(row) for row in tokens]).astype(np.float16),
        "tokens": tokens.astype(np.uint16),
    }
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    return {"captions": list(captions.kept), "source_key": raw.source_key, "arrays": digests}


def build(folder: Path) -> None:
    """Write data set and `expected.json` to `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        prepared = Prepared(Path(temporary))
        encode = prepared.config.encode.model_copy(update={"max_captions": 2, "validation_samples": 3})
        prepared.config = prepared.config.model_copy(update={"encode": encode})
        bare: Files = [("bare.png", stored_png(noise(99)))]
        write_input(prepared.source, {"00000": source_files(0, 5) + bare, "00001": source_files(5, 3)})
        prepared.encode(NumpyEncoder(max_captions=2))
        digest = prepared.finalize()
        expected = {"digest": digest, "samples": dict(expected_samples(prepared))}
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared.out, folder)
    (folder / "expected.json").write_text(
        json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    )


if __name__ == "__main__":
    build(FOLDER)
