"""One output shard on disk: tar, parquet, commit marker, in this order, each published first-wins.

Samples are spooled to an unnamed file until all are known, because the order inside the tar is (split, bucket)
and the split depends on which samples were written. After writing, the tar is read back: offsets, headers and
checksums come from what is on disk, not from what should be there.
"""

import hashlib
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from webdataset.writer import TarWriter

from pipeline.errors import DataError
from pipeline.latents.record import (
    LatentSample,
    json_length,
    npy_bytes,
    padded_json,
    parse_sample,
    stride_bytes,
)
from pipeline.latents.rows import ROW_SCHEMA, write_table
from pipeline.latents.segments import SPLITS, Segment
from pipeline.latents.shard import shard_path
from pipeline.latents.spec import Bucket, LatentSpec
from pipeline.publish import file_digest
from preprocessing.claims import claimed_temporary, publish_same


@dataclass
class SpooledSample:
    """One encoded sample: its arrays lie in the spool, the rest is here."""

    key: str
    bucket: Bucket
    record: dict[str, Any]
    row: dict[str, Any]
    offset: int
    sizes: list[int]


class Spool:
    """Encoded samples of one shard in arrival order, in a file without a name: a kill leaves nothing behind."""

    def __init__(self, folder: Path, spec: LatentSpec) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.spec = spec
        self.samples: list[SpooledSample] = []
        self._stream: Any = tempfile.TemporaryFile(dir=folder)
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, sample: LatentSample, bucket: Bucket, row: dict[str, Any]) -> None:
        """Take one sample; `row` is what the table will say of it, place and checksum still missing."""
        members = self.spec.members(bucket)
        found = {name: (array.dtype.str, array.shape) for name, array in sample.arrays.items()}
        assert found == {member.name: (member.dtype, member.shape) for member in members}, (found, members)
        blobs = [npy_bytes(sample.arrays[member.name]) for member in members]
        self._stream.write(b"".join(blobs))
        self.samples.append(
            SpooledSample(sample.key, bucket, sample.record, row, self._end, [len(blob) for blob in blobs])
        )
        self._end += sum(self.samples[-1].sizes)

    def members(self, sample: SpooledSample) -> Iterator[tuple[str, bytes]]:
        """Yield (name, npy file) of the sample's arrays in tar order."""
        self._stream.seek(sample.offset)
        for member, size in zip(self.spec.members(sample.bucket), sample.sizes, strict=True):
            yield member.name, self._stream.read(size)


@dataclass(frozen=True)
class Stretch:
    """Samples of one split and bucket in tar order: they become one segment."""

    split: str
    bucket: Bucket
    samples: list[SpooledSample]


@dataclass(frozen=True)
class WrittenShard:
    """What was published, measured on the finished files."""

    segments: list[Segment]
    tar_bytes: int
    tar_digest: str
    parquet_digest: str
    rows: list[dict[str, Any]] = field(repr=False)


def validation_keys(keys: Sequence[str], validation_samples: int) -> frozenset[str]:
    """Return the keys of a shard that are kept from training: those with the smallest sha256.

    The choice never moves, whoever encodes and in whatever order.
    """
    by_hash = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
    return frozenset(by_hash[:validation_samples])


def arrange(samples: Sequence[SpooledSample], validation_samples: int) -> list[Stretch]:
    """Return the shard's stretches in tar order: by split (train first), then bucket; arrival order inside."""
    validation = validation_keys([sample.key for sample in samples], validation_samples)
    stretches: dict[tuple[int, Bucket], list[SpooledSample]] = {}
    for sample in samples:
        place = (SPLITS.index("validation" if sample.key in validation else "train"), sample.bucket)
        stretches.setdefault(place, []).append(sample)
    return [Stretch(SPLITS[split], bucket, stretches[split, bucket]) for split, bucket in sorted(stretches)]


def write_shard(
    dataset: Path, stem: str, spool: Spool, stretches: list[Stretch], other_rows: list[dict[str, Any]]
) -> WrittenShard:
    """Publish tar and parquet of the shard and return what they hold; `other_rows` are of unwritten samples.

    Raises:
        DataError: when a file of that name is there already with other bytes.
    """
    tar_path, parquet_path = shard_path(dataset, stem, ".tar"), shard_path(dataset, stem, ".parquet")
    with claimed_temporary(tar_path) as beside:
        with beside.open("wb") as stream:
            segments = _write_tar(stream, spool, stretches)
        rows = _read_back(beside, segments, stretches, spool.spec)
        tar_bytes, tar_digest = beside.stat().st_size, file_digest(beside)
        publish_same(beside, tar_path, tar_digest)
    rows += other_rows
    with claimed_temporary(parquet_path) as beside:
        write_table(beside, rows, ROW_SCHEMA)
        parquet_digest = file_digest(beside)
        publish_same(beside, parquet_path, parquet_digest)
    return WrittenShard(segments, tar_bytes, tar_digest, parquet_digest, rows)


def _write_tar(stream: BinaryIO, spool: Spool, stretches: list[Stretch]) -> list[Segment]:
    """Write all samples and return the segments by arithmetic; `_read_back` holds the tar against them."""
    segments = []
    first_row = first_offset = 0
    # mtime 0 as an integer: a float would put a pax header, and the time of day, in front of each member.
    with TarWriter(stream, encoder=False, mtime=0) as tar:
        for stretch in stretches:
            json_bytes = json_length(sample.record for sample in stretch.samples)
            for sample in stretch.samples:
                # One call a member: TarWriter would sort the members of one call by name.
                for name, npy in spool.members(sample):
                    tar.write({"__key__": sample.key, f"{name}.npy": npy})
                tar.write({"__key__": sample.key, "json": padded_json(sample.record, json_bytes)})
            segment = Segment(
                shard=0,
                split=stretch.split,
                height=stretch.bucket[0],
                width=stretch.bucket[1],
                json_bytes=json_bytes,
                first_row=first_row,
                rows=len(stretch.samples),
                stride=stride_bytes(spool.spec.members(stretch.bucket), json_bytes),
                first_offset=first_offset,
            )
            segments.append(segment)
            first_row += segment.rows
            first_offset += segment.rows * segment.stride
    return segments


def _read_back(
    path: Path, segments: list[Segment], stretches: list[Stretch], spec: LatentSpec
) -> list[dict[str, Any]]:
    """Return the rows of the written samples, with offset and checksum of what is on disk."""
    rows: list[dict[str, Any]] = []
    with path.open("rb") as stream:
        for segment, stretch in zip(segments, stretches, strict=True):
            for sample in stretch.samples:
                offset = stream.tell()
                block = stream.read(segment.stride)
                found = parse_sample(
                    block, spec.members(stretch.bucket), segment.json_bytes, f"{path}: {sample.key}"
                )
                if found.record != sample.record or offset != segment.first_offset + segment.stride * (
                    len(rows) - segment.first_row
                ):
                    raise DataError(
                        f"{path}: {sample.key} is not where it was written; is the disk at fault?"
                    )
                row = {**sample.row, "split": stretch.split, "offset": offset, "crc32": zlib.crc32(block)}
                rows.append(row)
        if stream.read().strip(b"\0"):
            raise DataError(f"{path}: data after the last sample; is the disk at fault?")
    return rows
