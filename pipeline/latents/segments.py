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


class SegmentTable:
    """The segments of one split; sample `i` of the split is found by one binary search."""

    def __init__(self, segments: np.ndarray, split: str) -> None:
        """Select `split` ("train", "validation") from the structured array `segments`."""
        self.segments = segments[segments["split"] == SPLITS.index(split)]
        self._ends = np.cumsum(self.segments["rows"], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of samples in the split."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, index: int) -> Place:
        """Return where sample `index` of the split lies."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a split of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        segment = self.segments[number]
        within = index - (int(self._ends[number]) - int(segment["rows"]))
        return Place(
            shard=int(segment["shard"]),
            row=int(segment["first_row"]) + within,
            offset=int(segment["first_offset"]) + within * int(segment["stride"]),
            stride=int(segment["stride"]),
            json_bytes=int(segment["json_bytes"]),
            bucket=(int(segment["height"]), int(segment["width"])),
        )

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """The distinct (height, width) of the split in pixels, sorted."""
        return sorted({(int(row["height"]), int(row["width"])) for row in self.segments})


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
