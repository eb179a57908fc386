"""The data that every reader gets: one set of tars in our format, of 8 KB or 126 KB a sample."""

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
from pipeline.latents.spec import Bucket, LatentSpec
from pipeline.publish import file_digest

BUCKET: Bucket = (256, 256)
BUCKETS: dict[str, Bucket] = {"demo": (64, 64)}
"""Sizes whose pictures are not of BUCKET."""
SHARD_SAMPLES = 256
SPECS = {
    # Token ids stand for the text: 8,192 + 154 bytes.
    "8KB": LatentSpec("mean", 4, 8, 0.18215, 0.0, "tokens", 77, 768, None, 1),
    # CLIP-L states beside the latent: 8,192 + 118,272 + 154 bytes.
    "126KB": LatentSpec("mean", 4, 8, 0.18215, 0.0, "embeddings", 77, 768, None, 1),
    # For a small U-Net whose text is 64 wide; the posterior is sampled anew.
    "step": LatentSpec("moments", 4, 8, 0.18215, 0.0, "embeddings", 77, 64, None, 1),
    # What `ldm demo` trains on.
    "demo": LatentSpec("moments", 8, 8, 0.57, 0.0, "embeddings", 24, 128, None, 1),
}


def build(folder: Path, size: str, samples: int) -> Path:
    """Write `samples` samples of `size`, a name of SPECS, below `folder` and return the data set's folder."""
    spec, dataset, bucket = SPECS[size], folder / f"{size}-{samples}", BUCKETS.get(size, BUCKET)
    if (dataset / "manifest.json").exists():
        return dataset
    assert samples % SHARD_SAMPLES == 0, samples
    draw = np.random.default_rng(0)
    template = {
        member.name: (
            draw.standard_normal(member.shape)
            if member.dtype == "<f2"
            else draw.integers(0, 49408, member.shape)
        ).astype(member.dtype)
        for member in spec.members(bucket)
    }
    records = [{"key": f"{n:09d}", "captions": [f"a caption {n}"], "num_captions": 1} for n in range(samples)]
    json_bytes = json_length(records)
    stride = stride_bytes(spec.members(bucket), json_bytes)
    segments, rows = [], []
    for shard, first in enumerate(range(0, samples, SHARD_SAMPLES)):
        path = shard_path(dataset, f"{shard:05d}", ".tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        table = _write_shard(path, records[first : first + SHARD_SAMPLES], template, json_bytes, stride)
        write_table(path.with_suffix(".parquet"), table, ROW_SCHEMA)
        segments.append(Segment(shard, "train", *bucket, json_bytes, 0, SHARD_SAMPLES, stride, 0))
        size_bytes = path.stat().st_size
        rows.append(
            {"name": path.stem, "samples": SHARD_SAMPLES, "bytes": size_bytes, "digest": file_digest(path)}
        )
    np.save(dataset / SEGMENTS_NAME, segments_array(segments), allow_pickle=False)
    write_table(dataset / SHARDS_NAME, rows, SHARD_SCHEMA)
    save_manifest(dataset, spec, samples, bucket)
    return dataset


def save_manifest(dataset: Path, spec: LatentSpec, samples: int, bucket: Bucket = BUCKET) -> None:
    """Write the manifest that makes the folder a data set."""
    Manifest(
        spec=spec,
        counts=Counts(samples, samples),
        splits={"train": samples, "validation": 0},
        buckets=[{"height": bucket[0], "width": bucket[1], "train": samples, "validation": 0}],
        encoder={"autoencoder": "none", "text_encoder": "none", "tokenizer": "none", "precision": "fp32"},
        preprocessing={},
        statistics={},
        tables={name: file_digest(dataset / name) for name in (SHARDS_NAME, SEGMENTS_NAME)},
        null={},
    ).save(dataset)


def _write_shard(
    path: Path, records: list[dict[str, Any]], template: dict[str, np.ndarray], json_bytes: int, stride: int
) -> list[dict[str, Any]]:
    table, plain = [], dict.fromkeys(ROW_SCHEMA.names)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            files = [(f"{name}.npy", npy_bytes(array)) for name, array in template.items()]
            for name, payload in [*files, ("json", padded_json(record, json_bytes))]:
                entry = tarfile.TarInfo(f"{record['key']}.{name}")
                entry.size = len(payload)
                tar.addfile(entry, io.BytesIO(payload))
    content = path.read_bytes()
    for row, record in enumerate(records):
        block = content[row * stride : (row + 1) * stride]
        table.append(
            {
                **plain,
                "key": record["key"],
                "status": "written",
                "split": "train",
                "offset": row * stride,
                "crc32": zlib.crc32(block),
            }
        )
    return table
