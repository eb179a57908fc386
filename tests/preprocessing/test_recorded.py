"""Output of the real img2dataset, as it is: pax headers, unsorted keys, gaps, empty captions, failed downloads."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import DataError
from pipeline.latents.rows import ROW_SCHEMA, read_table
from pipeline.latents.shard import shard_path
from preprocessing.sources import InputShard, SourceOptions, list_shards
from tests.preprocessing.builders import encode_config, encode_one

RECORDED = Path(__file__).parent / "recorded"


def successes(stats: Path) -> int:
    return int(json.loads(stats.read_text())["successes"])


def test_the_recording_is_as_awkward_as_the_real_thing() -> None:
    """What the other tests rest on: if a new recording lacks it, they prove nothing."""
    with tarfile.open(RECORDED / "jpg/00000.tar") as tar:
        members = tar.getmembers()
    keys = list(dict.fromkeys(member.name.partition(".")[0] for member in members))
    assert keys != sorted(keys) and "000003" not in keys
    assert all("mtime" in member.pax_headers for member in members)
    assert any(member.size == 0 and member.name.endswith(".txt") for member in members)
    assert not (RECORDED / "jpg/00001.tar").exists() and (RECORDED / "jpg/00002.tar").exists()
    assert pq.read_table(RECORDED / "jpg/00000.parquet").num_rows == 10


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_every_sample_of_a_tar_is_read(kind: str) -> None:
    for shard in list_shards(RECORDED / kind):
        raws = list(shard.samples())
        assert len(raws) == shard.expected == successes(RECORDED / kind / f"{shard.stem}_stats.json")
        assert all(raw.problem is None and raw.image and raw.text is not None for raw in raws)
        assert all(json.loads(raw.json or b"")["key"] == raw.key for raw in raws)


def test_a_gap_in_shard_numbers_is_no_gap_in_the_output() -> None:
    assert [shard.stem for shard in list_shards(RECORDED / "jpg")] == ["00000", "00002"]


def rows(shard: InputShard, out: Path, **changes: object) -> dict[str, dict[str, object]]:
    encode_one(shard, out, **changes)
    found = read_table(shard_path(out, shard.stem, ".parquet"), ROW_SCHEMA).to_pylist()
    return {row["key"]: row for row in found}


def test_captions_and_reasons(tmp_path: Path) -> None:
    shard = list_shards(RECORDED / "jpg")[0]
    found = rows(shard, tmp_path)
    assert found["000008"]["captions"] == ["cats & dogs"]
    empty = {key: row["reason"] for key, row in found.items() if row["status"] == "rejected"}
    assert empty == {"000005": "empty_caption", "000006": "empty_caption"}
    assert found["000001"]["captions"] == ["a caption number 1"]


def test_filters_on_the_columns_that_img2dataset_saved(tmp_path: Path) -> None:
    """From the json in the tar, and from the parquet beside it where the json lacks them."""
    filters = [
        {"column": "similarity", "reason": "low_similarity", "min": 0.15},
        {"column": "NSFW", "reason": "nsfw", "equals": "UNLIKELY"},
    ]
    options = SourceOptions.from_config(encode_config(filters=filters))
    (shard, _) = list_shards(RECORDED / "jpg", options)
    found = rows(shard, tmp_path / "out", filters=filters)
    reasons = {key: row["reason"] for key, row in found.items()}
    assert reasons["000000"] == reasons["000001"] == "low_similarity"  # 0.10 and 0.13
    assert reasons["000009"] == "nsfw" and reasons["000002"] is None
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("00000.parquet", "00000_stats.json"):
        shutil.copy(RECORDED / "jpg" / name, bare)
    with tarfile.open(RECORDED / "jpg/00000.tar") as tar, tarfile.open(bare / "00000.tar", "w") as copy:
        for member in tar.getmembers():
            if not member.name.endswith(".json"):
                copy.addfile(member, tar.extractfile(member))
    (again,) = list_shards(bare, options)
    assert {
        key: row["reason"] for key, row in rows(again, tmp_path / "again", filters=filters).items()
    } == reasons
    version = again.version()
    os.utime(bare / "00000.parquet")
    assert again.version() != version


def test_a_parquet_shard_counts_what_was_not_downloaded(tmp_path: Path) -> None:
    (shard,) = list_shards(RECORDED / "parquet")
    record = encode_one(shard, tmp_path)
    downloaded = successes(RECORDED / "parquet/00001_stats.json")
    assert shard.expected == downloaded == 7
    assert (
        record.counts.read == 10 and record.counts.rejected == {"no_image": 3} and record.counts.written == 7
    )
    found = read_table(shard_path(tmp_path, "00001", ".parquet"), ROW_SCHEMA).to_pylist()
    assert next(row for row in found if row["key"] == "000015")["captions"] == ["two lines"]


def test_an_unfinished_shard_is_refused_or_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(RECORDED / "jpg", tmp_path / "in")
    (tmp_path / "in/00002_stats.json").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards without _stats.json.*00002.tar.*unfinished_shards"):
        list_shards(tmp_path / "in")
    shards = list_shards(tmp_path / "in", SourceOptions(unfinished="leave_out"))
    assert [shard.stem for shard in shards] == ["00000"]
    assert "1 of 2 shards" in caplog.text and "00002.tar" in caplog.text


def test_a_shard_with_fewer_keys_than_successes_is_condemned(tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "jpg", tmp_path / "in")
    stats = tmp_path / "in/00002_stats.json"
    stats.write_text(json.dumps(json.loads(stats.read_text()) | {"successes": 5}))
    with pytest.raises(DataError, match="5 samples expected, 3 found, 2 lost"):
        list(list_shards(tmp_path / "in")[1].samples())
