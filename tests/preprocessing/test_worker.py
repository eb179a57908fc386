"""One shard through the real worker: everything read ends somewhere, and the rows say where."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.latents.rows import ROW_SCHEMA, read_table
from pipeline.latents.shard import ShardRecord, shard_path
from preprocessing.ahead import Decoders
from preprocessing.encoded import EncodedBatch
from preprocessing.filters import Rules
from preprocessing.hashes import hash_distance
from preprocessing.sources import InputShard, list_shards
from preprocessing.worker import EncoderTurn, ShardJob, encode_shard
from tests.preprocessing.builders import (
    POISON,
    Files,
    NumpyEncoder,
    encode_config,
    image_file,
    noise,
    pair,
    pairs,
    solid,
    write_input,
)


def encode(shard: InputShard, out: Path, encoder: NumpyEncoder | None = None, **changes: Any) -> ShardRecord:
    encoder = encoder or NumpyEncoder()
    rules = Rules.from_config(encode_config(max_captions=encoder.spec.max_captions, **changes))
    job = ShardJob(shard, 2, {"input": {"name": "test"}})
    with Decoders(2, ahead=8) as decoders:
        return encode_shard(job, EncoderTurn(encoder), decoders, rules, out, lambda count: None)


def rows_of(out: Path, stem: str = "00000") -> list[dict[str, Any]]:
    return list(read_table(shard_path(out, stem, ".parquet"), ROW_SCHEMA).to_pylist())


NASTY: Files = [
    *pair("good-0", 0),
    *pair("dup", 1),
    ("empty.png", b""),
    ("empty.txt", b"x"),
    *pair("good 1", 2, "a caption that is long"),
    ("html.jpg", b"<html>not found</html>"),
    ("html.txt", b"x"),
    ("nan.png", image_file(solid(POISON))),
    ("nan.txt", b"poison"),
    *pair("dup", 3),
    ("half.png", image_file(noise(4))[:200]),
    ("half.txt", b"x"),
    ("silent.png", image_file(noise(5))),
    ("silent.txt", b"  "),
    ("alone.txt", b"x"),
    ("wide.png", image_file(noise(6, 10, 90))),
    ("wide.txt", b"x"),
    *pair("good-2", 7),
    *pair("good-3", 8),
    *pair("good-4", 9),
]


def test_conservation_over_a_nasty_shard(tmp_path: Path) -> None:
    shard = list_shards(write_input(tmp_path / "in", {"00000": NASTY}))[0]
    record = encode(shard, tmp_path / "out")
    expected = {
        "aspect": 1,
        "duplicate_key": 1,
        "empty": 1,
        "empty_caption": 1,
        "nonfinite_latent": 1,
        "not_image": 1,
        "orphan": 1,
        "truncated": 1,
    }
    assert record.counts.rejected == expected
    assert (record.counts.read, record.counts.written, record.counts.unaccounted) == (14, 6, 0)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 14 and [row["status"] for row in rows[:6]] == ["written"] * 6
    assert Counter(row["reason"] for row in rows[6:]) == Counter(expected)
    assert {row["key"]: row["reason"] for row in rows[6:]}["nan"] == "nonfinite_latent"
    assert sum(segment.rows for segment in record.segments) == 6
    assert {s.split: s.rows for s in record.segments} == {"train": 4, "validation": 2}
    assert record.extra["remarks"] == {"renamed_key": 1, "truncated_caption": 6}


def test_failures_are_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(payload: bytes, rules: Rules) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("preprocessing.images.prepare_image", broken)
    shard = list_shards(write_input(tmp_path / "in", {"00000": pairs(["a", "b"])}))[0]
    record = encode(shard, tmp_path / "out")
    assert record.counts.failed == {"ZeroDivisionError": 2} and record.counts.unaccounted == 0
    assert [(row["status"], row["reason"]) for row in rows_of(tmp_path / "out")] == [
        ("failed", "ZeroDivisionError")
    ] * 2


def test_rows_tell_where_everything_came_from(tmp_path: Path) -> None:
    files = [
        ("a.png", image_file(noise(1, 30, 50))),
        ("a.json", json.dumps({"caption": ["x", "y", "z"]}).encode()),
    ]
    shard = list_shards(write_input(tmp_path / "in", {"00000": files}))[0]
    encode(shard, tmp_path / "out", NumpyEncoder(max_captions=2))
    (row,) = rows_of(tmp_path / "out")
    assert row["captions"] == ["x", "y"] and row["source"] == "00000.tar"
    assert (row["original_height"], row["original_width"], row["crop"]) == (30, 50, [0, 10, 30, 30])
    assert (row["height"], row["width"], row["split"]) == (16, 16, "validation")
    assert row["source_sha256"] == hashlib.sha256(files[0][1]).hexdigest()
    assert (row["scaling"], row["remarks"]) == (1, ["surplus_captions"])


def test_rows_tell_how_a_picture_was_decoded_and_what_it_looks_like(tmp_path: Path) -> None:
    """Two copies of one picture, the large one decoded at a fourth: other bytes, nearly the same appearance."""
    coarse = Image.fromarray(noise(1, 5, 5))
    large, small = (
        image_file(coarse.resize((side, side), Image.Resampling.BICUBIC), "JPEG", quality=95)
        for side in (64, 16)
    )
    files = [
        ("large.jpg", large),
        ("large.txt", b"x"),
        ("small.jpg", small),
        ("small.txt", b"x"),
        *pair("other", 7),
    ]
    shard = list_shards(write_input(tmp_path / "in", {"00000": files}))[0]
    encode(shard, tmp_path / "out")
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    assert (rows["large"]["scaling"], rows["small"]["scaling"]) == (4, 1)
    assert rows["large"]["source_sha256"] != rows["small"]["source_sha256"]
    near, far = (
        hash_distance(rows["large"]["perceptual_hash"], rows[key]["perceptual_hash"])
        for key in ("small", "other")
    )
    assert near <= 8 < far


class Retrying(NumpyEncoder):
    """Says of every second sample of a batch that it came from the second attempt in fp32."""

    def encode(self, images_BHWC: np.ndarray, captions: Any) -> EncodedBatch:
        found = super().encode(images_BHWC, captions)
        return replace(found, retried=np.arange(len(images_BHWC)) % 2 == 1)


def test_a_retry_in_fp32_is_told_in_the_row_and_counted_in_the_marker(tmp_path: Path) -> None:
    shard = list_shards(write_input(tmp_path / "in", {"00000": pairs(["a", "b", "c", "d", "e"])}))[0]
    record = encode(shard, tmp_path / "out", Retrying())
    again = {row["key"] for row in rows_of(tmp_path / "out") if "fp32_retry" in row["remarks"]}
    assert again == {"b", "d"} and record.extra["remarks"]["fp32_retry"] == 2


def test_statistics_are_those_of_the_stored_values(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    shard = list_shards(write_input(tmp_path / "in", {"00000": pairs(["a", "b", "c", "d", "e"])}))[0]
    record = encode(shard, tmp_path / "out", encoder)
    with (tmp_path / "out/00/00000.tar").open("rb") as stream:
        content = stream.read()
    latents = []
    for row in rows_of(tmp_path / "out"):
        start = row["offset"] + 512 + 128
        latents.append(np.frombuffer(content, "<f2", 96, start).reshape(6, 4, 4).astype(np.float64))
    stored = np.stack(latents)
    assert record.statistics.positions == 5 * 16
    assert np.allclose(record.statistics.total, stored[:, :3].sum(axis=(0, 2, 3)))
    assert np.allclose(record.statistics.total_of_squares, (stored[:, :3] ** 2).sum(axis=(0, 2, 3)))
    assert np.allclose(record.statistics.variance_total, np.exp(stored[:, 3:]).sum(axis=(0, 2, 3)))
    assert encoder.batches == [4, 1]


def test_batches_never_cross_shards_and_rejects_leave_no_gap(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    write_input(tmp_path / "in", {"00000": NASTY, "00001": pairs(["a"])})
    for shard in list_shards(tmp_path / "in"):
        encode(shard, tmp_path / "out", encoder)
    assert encoder.batches == [4, 3, 1]


def test_another_workers_marker_must_agree(tmp_path: Path) -> None:
    shard = list_shards(write_input(tmp_path / "in", {"00000": pairs(["a", "b"])}))[0]
    first = encode(shard, tmp_path / "out")
    assert encode(shard, tmp_path / "out").tar_digest == first.tar_digest
    path = shard_path(tmp_path / "out", "00000", ".json")
    path.write_text(path.read_text().replace('"name": "test"', '"name": "else"'))
    with pytest.raises(DataError, match="another worker committed this shard"):
        encode(shard, tmp_path / "out")


def test_a_damaged_shard_publishes_nothing(tmp_path: Path) -> None:
    write_input(tmp_path / "in", {"00000": pairs(["a", "b"])}, successes={"00000": 3})
    with pytest.raises(DataError, match="3 samples expected, 2 found, 1 lost"):
        encode(list_shards(tmp_path / "in")[0], tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
