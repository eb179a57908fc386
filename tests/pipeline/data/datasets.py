"""Latent data sets of any shape without encoders: shards, buckets, splits, captions, tables and manifest on disk."""

import io
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.record import json_length, npy_bytes, padded_json, stride_bytes
from pipeline.latents.rows import ROW_SCHEMA, SHARD_SCHEMA, write_table
from pipeline.latents.segments import segments_array
from pipeline.latents.shard import Counts, Segment, shard_path
from pipeline.latents.spec import Bucket, LatentSpec, Member
from pipeline.publish import file_digest

SPEC = LatentSpec("moments", 2, 2, 0.7, 0.1, "embeddings", 3, 4, None, 1)
SQUARE: Bucket = (8, 8)


@dataclass(frozen=True)
class Stretch:
    """`rows` samples of one split and bucket in a shard."""

    rows: int
    bucket: Bucket = SQUARE
    split: str = "train"


def square_shards(*rows: int) -> list[list[Stretch]]:
    """Return shards with so many training samples of one bucket each."""
    return [[Stretch(count)] for count in rows]


def write_dataset(
    folder: Path,
    shards: Sequence[Sequence[Stretch]],
    spec: LatentSpec = SPEC,
    seed: int = 0,
    captions: int = 1,
) -> Path:
    """Write the data set and return its folder; sample n of all has the key kNNNNNN and latents of (seed, n)."""
    segments: list[Segment] = []
    rows: list[dict[str, Any]] = []
    first = 0
    for number, stretches in enumerate(shards):
        stem = f"{number:05d}"
        tar = shard_path(folder, stem, ".tar")
        tar.parent.mkdir(parents=True, exist_ok=True)
        found, table, content = _shard(number, stretches, first, spec, seed, captions)
        tar.write_bytes(content)
        write_table(tar.with_suffix(".parquet"), table, ROW_SCHEMA)
        segments += found
        first += len(table)
        rows.append({"name": stem, "samples": len(table), "bytes": len(content), "digest": file_digest(tar)})
    np.save(folder / SEGMENTS_NAME, segments_array(segments), allow_pickle=False)
    write_table(folder / SHARDS_NAME, rows, SHARD_SCHEMA)
    _manifest(folder, segments, spec, seed).save(folder)
    return folder


def _shard(
    number: int, stretches: Sequence[Stretch], first: int, spec: LatentSpec, seed: int, captions: int
) -> tuple[list[Segment], list[dict[str, Any]], bytes]:
    stream, segments, table, row = io.BytesIO(), [], [], 0
    for stretch in stretches:
        records = [_record(first + row + place, stretch, captions) for place in range(stretch.rows)]
        json_bytes = json_length(records)
        members, start = spec.members(stretch.bucket), stream.tell()
        stride = stride_bytes(members, json_bytes)
        for place, record in enumerate(records):
            block = sample_bytes(record, members, json_bytes, (seed, first + row + place))
            assert len(block) == stride
            stream.write(block)
            plain: dict[str, Any] = dict.fromkeys(ROW_SCHEMA.names)
            table.append(
                plain
                | {"key": record["key"], "status": "written", "split": stretch.split}
                | {"offset": start + place * stride, "crc32": zlib.crc32(block)}
            )
        segments.append(
            Segment(number, stretch.split, *stretch.bucket, json_bytes, row, stretch.rows, stride, start)
        )
        row += stretch.rows
    stream.write(bytes(1024))
    return segments, table, stream.getvalue()


def _record(number: int, stretch: Stretch, captions: int) -> dict[str, Any]:
    return {
        "key": f"k{number:06d}",
        "captions": [f"caption {number}.{place}" for place in range(captions)],
        "original_height": 40,
        "original_width": 60,
        "crop": [4, 10, 20, 40],
    }


def sample_bytes(
    record: dict[str, Any], members: Sequence[Member], json_bytes: int, seed: tuple[int, int]
) -> bytes:
    """Return the tar bytes of one sample."""
    draw, stream = np.random.default_rng(seed), io.BytesIO()
    files = [(f"{record['key']}.{m.name}.npy", npy_bytes(_array(draw, m))) for m in members]
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in [*files, (f"{record['key']}.json", padded_json(record, json_bytes))]:
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            tar.addfile(entry, io.BytesIO(payload))
    return stream.getvalue()[: stride_bytes(members, json_bytes)]


def _array(draw: np.random.Generator, member: Member) -> np.ndarray:
    if member.dtype == "<u2":
        return draw.integers(0, 100, member.shape).astype(np.uint16)
    return draw.standard_normal(member.shape).astype(np.float16)


def _manifest(folder: Path, segments: Sequence[Segment], spec: LatentSpec, seed: int) -> Manifest:
    null, draw = {}, np.random.default_rng((seed, 10**6))
    for member in spec.text_members(1):
        path = folder / "null" / f"{member.name}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, _array(draw, member), allow_pickle=False)
        null[member.name] = file_digest(path)
    counts = {split: sum(s.rows for s in segments if s.split == split) for split in ("train", "validation")}
    buckets = [
        {"height": height, "width": width}
        | {
            n: sum(s.rows for s in segments if (s.split, s.height, s.width) == (n, height, width))
            for n in counts
        }
        for height, width in sorted({(s.height, s.width) for s in segments})
    ]
    total = sum(counts.values())
    return Manifest(
        spec=spec,
        counts=Counts(total, total),
        splits=counts,
        buckets=buckets,
        encoder={"autoencoder": "a", "text_encoder": "none", "tokenizer": "none", "precision": "fp32"},
        preprocessing={},
        statistics={},
        tables={name: file_digest(folder / name) for name in (SHARDS_NAME, SEGMENTS_NAME)},
        null=null,
    )


def with_captions(count: int, pooled_width: int | None = None) -> LatentSpec:
    """Return a spec with so many captions a sample."""
    return replace(SPEC, max_captions=count, pooled_width=pooled_width)
