"""Small inputs and an encoder without torch, for tests that run the real worker on them."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.config import EncodeConfig
from pipeline.latents.shard import ShardRecord
from pipeline.latents.spec import LatentSpec
from preprocessing.ahead import Decoders
from preprocessing.encoded import EncodedBatch, EncodedText, fill_captions, stored_arrays
from preprocessing.filters import Rules
from preprocessing.images import Picture, prepare_image
from preprocessing.samples import InputShard
from preprocessing.worker import EncoderTurn, ShardJob, encode_shard

POISON = (1, 2, 3)
"""A picture of only this colour makes the encoder return NaN."""
SIDE = 16
"""Pixels of the side of these tests' pictures."""
PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "eps")
Files = list[tuple[str, bytes]]


def encode_config(**changes: Any) -> EncodeConfig:
    """Return settings for 16 px pictures in batches of 4."""
    values = {
        "source": "source",
        "image_size": 16,
        "batch": 4,
        "validation_samples": 3,
        "max_pixels": 1_000_000,
    }
    return EncodeConfig.model_validate_json(json.dumps(values | changes))


def noise(seed: int, height: int = 20, width: int = 20, channels: int = 3) -> np.ndarray:
    """Return random pixels uint8 [height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def image_file(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the pixels as an image file."""
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, kind, **options)
    return stream.getvalue()


def solid(colour: Sequence[int], side: int = 20) -> np.ndarray:
    """Return a picture of one colour."""
    return np.full((side, side, len(colour)), colour, np.uint8)


def pair(key: str, seed: int, caption: str | None = None) -> Files:
    """Return the files of one sample: a PNG and its caption."""
    return [
        (f"{key}.png", image_file(noise(seed))),
        (f"{key}.txt", (caption or f"picture number {seed}").encode()),
    ]


def pairs(keys: Sequence[str], first_seed: int = 0) -> Files:
    """Return the files of several samples."""
    return [file for seed, key in enumerate(keys, first_seed) for file in pair(key, seed)]


def tar_bytes(files: Files, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar of the files in the order given, two of a name allowed."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def write_input(
    folder: Path, shards: Mapping[str, Files], successes: Mapping[str, int] | None = None
) -> Path:
    """Write tars with img2dataset's marker beside each; `successes` overrides what a marker promises."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, files in shards.items():
        (folder / f"{stem}.tar").write_bytes(tar_bytes(files))
        pictures = {name.rpartition(".")[0] for name, _ in files if name.lower().endswith(PICTURES)}
        found = len(pictures)
        promised = (successes or {}).get(stem, found)
        (folder / f"{stem}_stats.json").write_text(json.dumps({"count": promised, "successes": promised}))
    return folder


def three_shards(folder: Path) -> Path:
    """Write three shards of 7, 5 and 6 samples."""
    shards = {"00000": 7, "00001": 5, "00002": 6}
    return write_input(
        folder,
        {
            stem: pairs([f"{stem}{k:03d}" for k in range(n)], 100 * s)
            for s, (stem, n) in enumerate(shards.items())
        },
    )


class NumpyEncoder:
    """Pooled pixels as latents, hashes of captions as text: cheap, and each value can be computed by the test."""

    def __init__(
        self,
        batch: int = 4,
        *,
        max_captions: int = 1,
        latent: Literal["moments", "mean"] = "moments",
        text: Literal["embeddings", "tokens"] = "embeddings",
        weights: str = "a",
    ) -> None:
        self.batch, self.weights = batch, weights
        self.spec = LatentSpec(latent, 3, 4, 0.5, 0.0, text, 6, 8, None, max_captions)
        self.batches: list[int] = []

    def fingerprint(self) -> dict[str, Any]:
        names = ("autoencoder", "text_encoder", "tokenizer")
        digests = {name: hashlib.sha256(f"{name} {self.weights}".encode()).hexdigest() for name in names}
        return {"encoder": {**digests, "precision": "fp32", "device": "cpu"}, "versions": {"numpy": "2"}}

    def release_memory(self) -> None:
        """Nothing is cached."""

    def moments(self, image: np.ndarray) -> np.ndarray:
        """Return float32 [6, S/4, S/4]: the mean colour of each 4 x 4 square in [-1, 1], and its negative less 3."""
        height, width = image.shape[0] // 4, image.shape[1] // 4
        pooled = image.reshape(height, 4, width, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1) / 127.5 - 1
        return np.concatenate([pooled, -pooled - 3]).astype(np.float32)

    def tokens(self, caption: str) -> np.ndarray:
        """Return int64 [6]: begin, up to four characters, end as padding."""
        inside = [min(ord(character), 60000) for character in caption[:4]]
        return np.array([1, *inside, *[2] * (5 - len(inside))], np.int64)

    def text_states(self, tokens: np.ndarray) -> np.ndarray:
        """Return float32 [6, 8] of one caption's tokens."""
        return np.sin(tokens[:, None] * np.arange(1, 9) / 10).astype(np.float32)

    def encode(self, images_BHWC: np.ndarray, captions: Sequence[tuple[str, ...]]) -> EncodedBatch:
        self.batches.append(len(images_BHWC))
        assert 0 < len(images_BHWC) <= self.batch
        moments = np.stack([self.moments(image) for image in images_BHWC])
        moments[(images_BHWC == POISON).all(axis=(1, 2, 3))] = np.nan
        rows = [
            [self.tokens(text) for text in fill_captions(given, self.spec.max_captions)] for given in captions
        ]
        tokens = np.array(rows)
        text = None
        if self.spec.text == "embeddings":
            text = np.array([[self.text_states(row) for row in sample] for sample in rows])
        arrays, problems = stored_arrays(self.spec, moments, EncodedText(tokens, text))
        truncated = np.array([max(map(len, given)) > 4 for given in captions])
        return EncodedBatch(arrays, problems, truncated, np.zeros(len(images_BHWC), bool))


def encode_one(
    shard: InputShard, out: Path, encoder: NumpyEncoder | None = None, **changes: Any
) -> ShardRecord:
    """Encode one shard into `out` with the real worker, nothing kept for validation; return its marker."""
    encoder = encoder or NumpyEncoder()
    rules = Rules.from_config(encode_config(max_captions=encoder.spec.max_captions, **changes))
    with Decoders(1, ahead=8) as decoders:
        return encode_shard(
            ShardJob(shard, 0, {"input": {}}), EncoderTurn(encoder), decoders, rules, out, lambda count: None
        )


def square(payload: bytes, **changes: object) -> Picture:
    """Return what becomes of a picture's file at SIDE pixels."""
    found = prepare_image(payload, Rules.from_config(encode_config(image_size=SIDE, **changes)))
    assert isinstance(found, Picture), found
    assert found.pixels.dtype == np.uint8 and found.pixels.shape == (SIDE, SIDE, 3)
    return found
