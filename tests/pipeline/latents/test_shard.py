"""The commit marker: counts that add up, and differences by name."""

import json
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.latents.segments import Segment
from pipeline.latents.shard import ChannelStatistics, Counts, ShardRecord, fingerprint_difference, shard_path

RECORD = ShardRecord(
    stem="00012",
    counts=Counts(5, 3, {"aspect": 1}, {"OSError": 1}),
    tar_bytes=10240,
    tar_digest="a",
    parquet_digest="b",
    fingerprint={"encoder": {"autoencoder": "x"}, "code": 1},
    segments=[Segment(0, "train", 16, 16, 256, 0, 3, 4096, 0)],
    statistics=ChannelStatistics(12, [0.1, 0.2], [1.0, 2.0], []),
    extra={"seconds": 1.5},
)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [("00000", "00/00000"), ("00999", "00/00999"), ("01000", "01/01000"), ("123456", "123/123456")],
)
def test_a_thousand_numbered_shards_a_folder(stem: str, expected: str) -> None:
    assert shard_path(Path("d"), stem, ".tar") == Path(f"d/{expected}.tar")


def test_other_names_are_spread() -> None:
    folders = {shard_path(Path(), f"train-{number}", ".tar").parent.name for number in range(300)}
    assert len(folders) > 100 and all(len(name) == 2 for name in folders)


def test_counts_add_up_or_say_what_is_missing() -> None:
    assert RECORD.counts.unaccounted == 0 and Counts(7, 3, {"a": 1}, {}).unaccounted == 3
    total = RECORD.counts.plus(Counts(4, 1, {"aspect": 2, "empty": 1}, {}))
    assert total == Counts(9, 4, {"aspect": 3, "empty": 1}, {"OSError": 1})


def test_statistics_merge() -> None:
    one, two = ChannelStatistics(2, [1.0], [2.0], [3.0]), ChannelStatistics(3, [10.0], [20.0], [30.0])
    assert one.plus(two) == ChannelStatistics(5, [11.0], [22.0], [33.0])
    with pytest.raises(ValueError, match="zip"):
        one.plus(RECORD.statistics)


def test_marker_and_back(tmp_path: Path) -> None:
    path = tmp_path / "00012.json"
    path.write_text(json.dumps(RECORD.to_json()))
    assert ShardRecord.load(path) == RECORD


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": 1}', json.dumps({**RECORD.to_json(), "format": 2}),
     json.dumps({**RECORD.to_json(), "more": 2}), json.dumps({**RECORD.to_json(), "counts": {"read": 1, "what": 2}}),
     json.dumps({**RECORD.to_json(), "segments": [{}]})],
)  # fmt: skip
def test_damaged_markers_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "00012.json"
    path.write_text(content)
    with pytest.raises(DataError, match=str(path)):
        ShardRecord.load(path)


def test_a_missing_marker(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such shard marker; run `ldm encode`"):
        ShardRecord.load(tmp_path / "x.json")


def test_differences_name_field_and_both_values() -> None:
    found = {"encoder": {"autoencoder": "x", "precision": "fp32"}, "code": 1}
    wanted = {"encoder": {"autoencoder": "y", "precision": "fp32"}, "code": 1, "new": True}
    assert fingerprint_difference(found, wanted) == [
        "encoder.autoencoder: 'x' on disk, 'y' wanted",
        "new: None on disk, True wanted",
    ]
    assert fingerprint_difference(found, found) == []
