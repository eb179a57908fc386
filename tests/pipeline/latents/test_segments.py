"""Sample numbers lead to their places: against a plain list of all places."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.latents.segments import SPLITS, Segment, SegmentTable, load_segments, segments_array


def segment(shard: int, split: str, rows: int, first_row: int, **changes: int) -> Segment:
    values = {"height": 16, "width": 16, "json_bytes": 256, "stride": 4096, "first_offset": first_row * 4096}
    return Segment(shard=shard, split=split, first_row=first_row, rows=rows, **(values | changes))


SEGMENTS = [
    segment(0, "train", 5, 0),
    segment(0, "validation", 2, 5),
    segment(1, "train", 1, 0, height=16, width=32, stride=8192, json_bytes=70_144),
    segment(1, "train", 3, 1, first_offset=8192),
    segment(3, "validation", 1, 0),
]


def test_every_sample_has_its_place() -> None:
    for split in SPLITS:
        table = SegmentTable(segments_array(SEGMENTS), split)
        expected = [(s, row) for s in SEGMENTS if s.split == split for row in range(s.rows)]
        assert len(table) == len(expected)
        for index, (s, row) in enumerate(expected):
            place = table.place(index)
            assert (place.shard, place.row) == (s.shard, s.first_row + row)
            assert place.offset == s.first_offset + row * s.stride
            assert (place.stride, place.json_bytes, place.bucket) == (
                s.stride,
                s.json_bytes,
                (s.height, s.width),
            )
        for index in (-1, len(expected)):
            with pytest.raises(IndexError):
                table.place(index)


def test_json_of_many_captions_fits() -> None:
    """16 bits would end at 65,535 bytes: 16 captions of 2,000 characters of 4 bytes are more."""
    stored = segments_array([segment(0, "train", 1, 0, json_bytes=1 << 20)])
    assert SegmentTable(stored, "train").place(0).json_bytes == 1 << 20


def test_large_offsets() -> None:
    stored = segments_array([segment(0, "train", 2**31, 0, stride=2**31)])
    assert SegmentTable(stored, "train").place(2**31 - 1).offset == (2**31 - 1) * 2**31


def test_an_empty_split() -> None:
    table = SegmentTable(segments_array([]), "train")
    assert len(table) == 0 and table.buckets == []
    assert SegmentTable(segments_array(SEGMENTS), "train").buckets == [(16, 16), (16, 32)]


def test_the_table_is_mapped_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "segments.npy"
    np.save(path, segments_array(SEGMENTS))
    stored = load_segments(path)
    assert isinstance(stored, np.memmap) and np.array_equal(stored, segments_array(SEGMENTS))
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match="has the columns None"):
        load_segments(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not a segment table"):
        load_segments(path)
    for content in (b"", b"rubbish"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a segment table"):
            load_segments(path)
    path.unlink()
    with pytest.raises(DataError, match="not a segment table"):
        load_segments(path)
