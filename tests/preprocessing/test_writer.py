"""Tar, rows and segments agree with each other, and the split is a function of the keys."""

import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.latents.record import LatentSample, parse_sample, stride_bytes
from pipeline.latents.rows import ROW_SCHEMA, read_table
from pipeline.latents.shard import shard_path
from preprocessing.claims import claimed_temporary, publish_same, remove_dead_temporaries
from preprocessing.strict_tar import walk_tar
from preprocessing.writer import Spool, arrange, validation_keys, write_shard
from tests.preprocessing.builders import NumpyEncoder

ENCODER = NumpyEncoder(8)
BUCKETS = [(32, 16), (16, 32), (16, 16), (16, 16), (32, 16), (16, 32)]


def sample(number: int) -> LatentSample:
    key = f"k{number}"
    members = ENCODER.spec.members(BUCKETS[number])
    draw = np.random.default_rng(number)
    arrays = {member.name: draw.normal(size=member.shape).astype(member.dtype) for member in members}
    record = {"key": key, "captions": ["x" * 300 * number]}
    return LatentSample(key, arrays, record)


def spooled(folder: Path) -> Spool:
    spool = Spool(folder / "spool", ENCODER.spec)
    for number, bucket in enumerate(BUCKETS):
        row = {"key": f"k{number}", "status": "written", "height": bucket[0], "width": bucket[1]}
        spool.add(sample(number), bucket, row)
    return spool


def test_validation_is_the_smallest_hashes() -> None:
    keys = [f"{k:05d}" for k in range(50)]
    chosen = validation_keys(keys, 7)
    hashes = {key: hashlib.sha256(key.encode()).hexdigest() for key in keys}
    assert len(chosen) == 7
    assert max(hashes[key] for key in chosen) < min(hashes[key] for key in set(keys) - chosen)
    assert validation_keys(keys[::-1], 7) == chosen
    assert validation_keys(keys[:3], 7) == set(keys[:3])


def test_order_is_split_then_bucket_then_arrival(tmp_path: Path) -> None:
    with spooled(tmp_path) as spool:
        stretches = arrange(spool.samples, 2)
    found = [(s.split, s.bucket, [sample.key for sample in s.samples]) for s in stretches]
    validation = validation_keys([f"k{k}" for k in range(6)], 2)
    expected = []
    for split, keys in (("train", {f"k{k}" for k in range(6)} - validation), ("validation", validation)):
        for bucket in sorted(set(BUCKETS)):
            members = [f"k{k}" for k in range(6) if BUCKETS[k] == bucket and f"k{k}" in keys]
            expected += [(split, bucket, members)] if members else []
    assert found == expected


def test_segments_lead_to_every_sample(tmp_path: Path) -> None:
    with spooled(tmp_path) as spool:
        stretches = arrange(spool.samples, 2)
        written = write_shard(
            tmp_path, "00007", spool, stretches, [{"key": "bad", "status": "rejected", "reason": "x"}]
        )
    content = shard_path(tmp_path, "00007", ".tar").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (written.tar_bytes, written.tar_digest)
    row_number = 0
    for segment, stretch in zip(written.segments, stretches, strict=True):
        members = ENCODER.spec.members((segment.height, segment.width))
        assert segment.stride == stride_bytes(members, segment.json_bytes) and segment.first_row == row_number
        for place, expected in enumerate(stretch.samples):
            offset = segment.first_offset + place * segment.stride
            block = content[offset : offset + segment.stride]
            found = parse_sample(block, members, segment.json_bytes, "here")
            original = sample(int(expected.key[1:]))
            assert found.record == original.record
            for name, array in original.arrays.items():
                assert np.array_equal(found.arrays[name], array)
            row = written.rows[row_number]
            assert (row["key"], row["offset"], row["crc32"]) == (expected.key, offset, zlib.crc32(block))
            assert row["split"] == segment.split
            row_number += 1
    assert written.rows[row_number:] == [{"key": "bad", "status": "rejected", "reason": "x"}]
    stored = read_table(shard_path(tmp_path, "00007", ".parquet"), ROW_SCHEMA).to_pylist()
    assert [row["key"] for row in stored] == [row["key"] for row in written.rows]
    names = [member.name for member in walk_tar(shard_path(tmp_path, "00007", ".tar"))]
    assert names[:4] == [
        f"{stretches[0].samples[0].key}.{end}" for end in ("latent.npy", "text.npy", "tokens.npy", "json")
    ]


def test_a_shard_without_samples_is_a_whole_tar(tmp_path: Path) -> None:
    with Spool(tmp_path, ENCODER.spec) as spool:
        written = write_shard(tmp_path, "00000", spool, arrange([], 2), [])
    assert written.segments == [] and walk_tar(shard_path(tmp_path, "00000", ".tar")) == []


def test_first_wins_and_equal_bytes_are_no_conflict(tmp_path: Path) -> None:
    target = tmp_path / "file"
    for content in (b"same", b"same"):
        with claimed_temporary(target) as beside:
            beside.write_bytes(content)
            publish_same(beside, target, hashlib.sha256(beside.read_bytes()).hexdigest())
    with claimed_temporary(target) as beside, pytest.raises(DataError, match=r"there already with sha256"):
        beside.write_bytes(b"other")
        publish_same(beside, target, hashlib.sha256(beside.read_bytes()).hexdigest())
    assert target.read_bytes() == b"same" and list(tmp_path.iterdir()) == [target]
    assert not target.stat().st_mode & 0o111


def test_only_the_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "00" / ".00000.tar.tmp-1-abc"
    left.parent.mkdir()
    left.write_bytes(b"half")
    with claimed_temporary(tmp_path / "00" / "00001.tar") as alive:
        assert remove_dead_temporaries(tmp_path) == 1
        assert alive.exists() and not left.exists()
    assert not alive.exists()
