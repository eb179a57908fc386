"""A latent data set on disk without encoders: seeded moments and text states in real tars, tables and manifest."""

import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.record import json_length, npy_bytes, padded_json, stride_bytes
from pipeline.latents.rows import ROW_SCHEMA, SHARD_SCHEMA, write_table
from pipeline.latents.segments import segments_array
from pipeline.latents.shard import Counts, Segment, shard_path
from pipeline.latents.spec import LatentSpec, Member
from pipeline.models.text_encoder import FrozenTextEncoder
from pipeline.publish import file_digest

SPEC = LatentSpec(
    latent="moments",
    channels=4,
    downsampling=2,
    scaling_factor=0.7,
    shift_factor=0.1,
    text="embeddings",
    text_tokens=6,
    text_width=32,
    pooled_width=None,
    max_captions=1,
)
BUCKET = (16, 16)


def build_dataset(
    folder: Path,
    samples: int,
    seed: int = 0,
    spec: LatentSpec = SPEC,
    encoder: FrozenTextEncoder | None = None,
) -> Path:
    """Write a data set of `samples` training samples, 8x8 latents of 4 channels, and return its folder.

    The latents depend on the seed alone. Text states and tokens are random too, or what `encoder` makes of the captions.
    """
    records = [{"key": f"k{number:06d}", "captions": [f"caption {number}"]} for number in range(samples)]
    json_bytes = json_length(records)
    tar = shard_path(folder, "00000", ".tar")
    tar.parent.mkdir(parents=True)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as stream:
        for number, record in enumerate(records):
            draw = np.random.default_rng((seed, number))
            arrays = {member.name: _array(draw, member) for member in spec.members(BUCKET)}
            if encoder is not None:
                arrays |= _text_arrays(encoder, str(record["captions"][0]), spec)
            for member in spec.members(BUCKET):
                _add(stream, f"{record['key']}.{member.name}.npy", npy_bytes(arrays[member.name]))
            _add(stream, f"{record['key']}.json", padded_json(record, json_bytes))
    stride = stride_bytes(spec.members(BUCKET), json_bytes)
    content = tar.read_bytes()
    rows: list[dict[str, Any]] = [
        dict.fromkeys(ROW_SCHEMA.names)
        | {"key": record["key"], "status": "written", "split": "train", "offset": number * stride}
        | {"crc32": zlib.crc32(content[number * stride : (number + 1) * stride])}
        for number, record in enumerate(records)
    ]
    write_table(tar.with_suffix(".parquet"), rows, ROW_SCHEMA)
    segment = Segment(0, "train", *BUCKET, json_bytes, 0, samples, stride, 0)
    np.save(folder / SEGMENTS_NAME, segments_array([segment]), allow_pickle=False)
    row = {"name": "00000", "samples": samples, "bytes": tar.stat().st_size, "digest": file_digest(tar)}
    write_table(folder / SHARDS_NAME, [row], SHARD_SCHEMA)
    null = {}
    draw = np.random.default_rng((seed, samples))
    null_arrays = _text_arrays(encoder, "", spec) if encoder is not None else {}
    for member in spec.text_members(1):
        path = folder / "null" / f"{member.name}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, null_arrays.get(member.name, _array(draw, member)), allow_pickle=False)
        null[member.name] = file_digest(path)
    Manifest(
        spec=spec,
        counts=Counts(samples, samples),
        splits={"train": samples, "validation": 0},
        buckets=[{"height": BUCKET[0], "width": BUCKET[1], "train": samples, "validation": 0}],
        encoder={
            "autoencoder": f"seed {seed}",
            "text_encoder": encoder.digest if encoder else "none",
            "tokenizer": encoder.tokenizer_digest if encoder else "none",
            "precision": "fp32",
        },
        preprocessing={},
        statistics={},
        tables={name: file_digest(folder / name) for name in (SHARDS_NAME, SEGMENTS_NAME)},
        null=null,
    ).save(folder)
    return folder


def _text_arrays(encoder: FrozenTextEncoder, caption: str, spec: LatentSpec) -> dict[str, np.ndarray]:
    """Return the text members of one caption."""
    tokens_1L, _ = encoder.tokenize([caption])
    text_1LD = encoder.encode(tokens_1L).numpy().astype(np.float16)
    made = {"tokens": tokens_1L.numpy().astype(np.uint16), "text": text_1LD}
    return {member.name: made[member.name] for member in spec.text_members(1)}


def _array(draw: np.random.Generator, member: Member) -> np.ndarray:
    if member.dtype == "<u2":
        return draw.integers(0, 100, member.shape).astype(np.uint16)
    values = draw.standard_normal(member.shape)
    if member.name == "latent":
        values[SPEC.channels :] -= 3.0  # Log-variances of a posterior that knows something.
    return values.astype(np.float16)


def _add(stream: tarfile.TarFile, name: str, payload: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(payload)
    stream.addfile(entry, io.BytesIO(payload))
