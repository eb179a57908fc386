"""The segment table: runs of equal-sized samples inside shards, and index -> place in constant time.

A segment is a stretch of one shard with one split and one bucket. 10^9 samples in 10^5 shards are about
4 MB a bucket, read through a memory map that the ranks of a node share.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.latents.shard import SPLITS, Segment

SEGMENT_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("split", "<u2"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("json_bytes", "<u4"),
        ("first_row", "<u4"),
        ("rows", "<u4"),
        ("stride", "<u4"),
        ("first_offset", "<u8"),
    ]
)


def segments_array(segments: Iterable[Segment]) -> np.ndarray:
    """Return the segments as the structured array that segments.npy stores, in the order given."""
    rows = [
        (
            s.shard,
            SPLITS.index(s.split),
            s.height,
            s.width,
            s.json_bytes,
            s.first_row,
            s.rows,
            s.stride,
            s.first_offset,
        )
        for s in segments
    ]
    return np.array(rows, dtype=SEGMENT_DTYPE)


@dataclass(frozen=True)
class Place:
    """Where a sample lies: bytes [offset, offset + stride) of a shard's tar."""

    shard: int
    row: int
    offset: int
    stride: int
    json_bytes: int
    bucket: tuple[int, int]


@dataclass(frozen=True)
class Places:
    """Where several samples lie: arrays of equal length, one entry a sample."""

    segment: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    json_bytes: np.ndarray


class SegmentTable:
    """The segments of one split; samples are found by binary search, one or many at a time."""

    def __init__(self, segments: np.ndarray, split: str) -> None:
        """Select `split` ("train", "validation") from the structured array `segments`."""
        self.segments = segments[segments["split"] == SPLITS.index(split)]
        self._ends = np.cumsum(self.segments["rows"], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of samples in the split."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def places(self, indices: np.ndarray) -> Places:
        """Return where the samples `indices` of the split lie."""
        number = np.searchsorted(self._ends, indices, side="right")
        segment = self.segments[number]
        within = indices - (self._ends[number] - segment["rows"])
        return Places(
            segment=number,
            shard=segment["shard"].astype(np.int64),
            row=segment["first_row"] + within,
            offset=segment["first_offset"].astype(np.int64) + within * segment["stride"].astype(np.int64),
            json_bytes=segment["json_bytes"].astype(np.int64),
        )

    def place(self, index: int) -> Place:
        """Return where sample `index` of the split lies."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a split of {len(self)}")
        found = self.places(np.array([index]))
        segment = self.segments[found.segment[0]]
        return Place(
            shard=int(found.shard[0]),
            row=int(found.row[0]),
            offset=int(found.offset[0]),
            stride=int(segment["stride"]),
            json_bytes=int(found.json_bytes[0]),
            bucket=(int(segment["height"]), int(segment["width"])),
        )

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """The distinct (height, width) of the split in pixels, sorted."""
        shapes = np.unique(np.stack([self.segments["height"], self.segments["width"]], axis=1), axis=0)
        return [(int(height), int(width)) for height, width in shapes]

    def rows_of(self, bucket: tuple[int, int]) -> np.ndarray:
        """Return the samples that each segment of `bucket` holds, int64, in table order."""
        return self.segments["rows"][self._of(bucket)].astype(np.int64)

    def indices_of(self, bucket: tuple[int, int]) -> "BucketIndices":
        """Return the map from the n-th sample of `bucket` to its number in the split."""
        chosen = self._of(bucket)
        return BucketIndices(self._ends[chosen] - self.segments["rows"][chosen], self.rows_of(bucket))

    def _of(self, bucket: tuple[int, int]) -> np.ndarray:
        return (self.segments["height"] == bucket[0]) & (self.segments["width"] == bucket[1])


class BucketIndices:
    """The n-th sample of one bucket -> its number in the split."""

    def __init__(self, starts: np.ndarray, rows: np.ndarray) -> None:
        """Take for each segment of the bucket its first number in the split, and its rows."""
        self._ends = np.cumsum(rows)
        self._shift = starts - (self._ends - rows)

    def __getitem__(self, samples: np.ndarray) -> np.ndarray:
        """Return the numbers in the split, int64."""
        return samples + self._shift[np.searchsorted(self._ends, samples, side="right")]


def load_segments(path: Path) -> np.ndarray:
    """Return the memory-mapped segment table at `path`.

    Raises:
        DataError: when the file is missing or holds something else.
    """
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a segment table ({error}); run `ldm finalize` again") from None
    if table.dtype != SEGMENT_DTYPE:
        raise DataError(f"{path}: has the columns {table.dtype.names}, format 1 has {SEGMENT_DTYPE.names}")
    return table
