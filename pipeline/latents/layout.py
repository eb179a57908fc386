"""How one sample's bytes are cut: members go straight into arrays, what stands between them into scratch.

A positional read takes a list of buffers, so the payloads of a sample land in the batch without a copy, and the
npy headers between them are compared for the whole batch at once.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.latents.record import TAR_BLOCK, in_tar_bytes, member_bytes, npy_header
from pipeline.latents.segments import Places
from pipeline.latents.spec import Bucket, LatentSpec, Member


@dataclass(frozen=True)
class Gap:
    """What stands in front of a member's payload: the padding before it, its tar header, its npy header."""

    start: int
    """Of the gap in the scratch row, bytes."""
    npy_start: int
    """Of the npy header in the scratch row, bytes."""
    end: int
    npy_header: bytes


@dataclass(frozen=True)
class Layout:
    """The cuts of every sample of one bucket, up to the json, whose length may differ between segments."""

    members: tuple[Member, ...]
    gaps: tuple[Gap, ...]
    scratch_bytes: int
    """Of one sample: all gaps end to end."""
    before_json_bytes: int
    """From the sample's first byte to the end of the last payload."""
    padding_bytes: int
    """From there to the tar header of the json member."""

    def tail_bytes(self, json_bytes: int) -> int:
        """Return the bytes from the end of the last payload to the end of the sample."""
        return self.padding_bytes + in_tar_bytes(json_bytes)

    def record_start(self) -> int:
        """Return where the json text begins in the tail."""
        return self.padding_bytes + TAR_BLOCK


@lru_cache(maxsize=256)
def sample_layout(spec: LatentSpec, bucket: Bucket) -> Layout:
    """Return the cuts of the samples of `bucket`."""
    members, gaps, scratch, position, padding = spec.members(bucket), [], 0, 0, 0
    for member in members:
        header = npy_header(member.dtype, member.shape)
        end = scratch + padding + TAR_BLOCK + len(header)
        gaps.append(Gap(scratch, end - len(header), end, header))
        scratch = end
        position += padding + TAR_BLOCK + member_bytes(member)
        padding = in_tar_bytes(member_bytes(member)) - TAR_BLOCK - member_bytes(member)
    return Layout(members, tuple(gaps), scratch, position, padding)


def sample_views(
    layout: Layout, arrays: Mapping[str, np.ndarray], scratch: np.ndarray
) -> Sequence[list[memoryview]]:
    """Return for each sample the buffers, in file order, that its bytes up to the json go into.

    `arrays` are [b, *member.shape], C-contiguous, by member name; `scratch` is uint8 [b, scratch_bytes].
    """
    count = len(scratch)
    parts: list[list[memoryview]] = []
    rows = scratch.reshape(-1).data
    step = layout.scratch_bytes
    for gap, member in zip(layout.gaps, layout.members, strict=True):
        parts.append([rows[at + gap.start : at + gap.end] for at in range(0, count * step, step)])
        flat, size = arrays[member.name].reshape(-1).view(np.uint8).data, member.payload_bytes
        parts.append([flat[at : at + size] for at in range(0, count * size, size)])
    return [list(buffers) for buffers in zip(*parts, strict=True)]


def wrong_headers(layout: Layout, scratch: np.ndarray) -> dict[int, str]:
    """Return for each sample with a wrong npy header its number in the batch and the member's name."""
    wrong: dict[int, str] = {}
    for gap, member in zip(layout.gaps, layout.members, strict=True):
        expected = np.frombuffer(gap.npy_header, np.uint8)
        same = (scratch[:, gap.npy_start : gap.end] == expected).all(axis=1)
        for number in np.flatnonzero(~same):
            wrong.setdefault(int(number), member.name)
    return wrong


@dataclass(frozen=True)
class BatchBytes:
    """One read of several samples."""

    places: Places
    buffers: Sequence[list[Any]]
    layout: Layout
    scratch: np.ndarray
    tails: list[bytearray]
    verify: bool

    def crc32(self, number: int) -> int:
        """Return the checksum of the sample's bytes in file order."""
        value = 0
        for part in self.buffers[number]:
            value = zlib.crc32(part, value)
        return value
