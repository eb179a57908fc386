"""One output shard on disk: tar, parquet, commit marker, in this order, each published first-wins.

Samples are spooled to an unnamed file until all are known, because the order inside the tar is (split, bucket)
and the split depends on which samples were written. Digest and checksums are taken of what is meant while it is
written, in one pass; what a disk makes of it is held against them by `ldm verify`.
"""

import hashlib
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from pipeline.errors import DataError
from pipeline.latents.record import LatentSample, npy_header, padded_length, record_json, stride_bytes
from pipeline.latents.rows import ROW_SCHEMA, write_table
from pipeline.latents.segments import SPLITS, Segment
from pipeline.latents.shard import shard_path
from pipeline.latents.spec import Bucket, LatentSpec
from pipeline.publish import file_digest
from preprocessing.claims import claimed_temporary, publish_same
from preprocessing.tar_blocks import padding, tar_end, tar_header


@dataclass
class SpooledSample:
    """One encoded sample: the tar bytes of its arrays lie in the spool, the rest is here."""

    key: str
    bucket: Bucket
    json: bytes
    row: dict[str, Any]
    offset: int
    size_bytes: int


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
        size = 0
        for member in members:
            payload, header = (
                np.ascontiguousarray(sample.arrays[member.name]),
                npy_header(member.dtype, member.shape),
            )
            file_bytes = len(header) + payload.nbytes
            front = tar_header(f"{sample.key}.{member.name}.npy", file_bytes) + header
            after = padding(file_bytes)
            self._stream.write(front)
            self._stream.write(payload.data)
            self._stream.write(after)
            size += len(front) + payload.nbytes + len(after)
        text = record_json(sample.record)
        self.samples.append(SpooledSample(sample.key, bucket, text, row, self._end, size))
        self._end += size

    def arrays(self, sample: SpooledSample) -> bytes:
        """Return the tar bytes of the sample's arrays: all of its members but the json."""
        self._stream.seek(sample.offset)
        content: bytes = self._stream.read(sample.size_bytes)
        assert len(content) == sample.size_bytes, (sample.key, len(content))
        return content


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
            tar = _Tar(stream)
            segments = [tar.write_stretch(stretch, spool) for stretch in stretches]
            tar.end()
        found = beside.stat().st_size
        if found != tar.size_bytes:
            raise DataError(f"{beside}: {tar.size_bytes} bytes written, {found} there; is the disk at fault?")
        digest = tar.digest.hexdigest()
        publish_same(beside, tar_path, digest)
    rows = tar.rows + other_rows
    with claimed_temporary(parquet_path) as beside:
        write_table(beside, rows, ROW_SCHEMA)
        parquet_digest = file_digest(beside)
        publish_same(beside, parquet_path, parquet_digest)
    return WrittenShard(segments, tar.size_bytes, digest, parquet_digest, rows)


class _Tar:
    """A tar that is being written: its digest and the rows of its samples grow with it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.size_bytes, self.rows = 0, list[dict[str, Any]]()
        self.digest = hashlib.sha256()
        self._stream = stream

    def write_stretch(self, stretch: Stretch, spool: Spool) -> Segment:
        """Write all samples of the stretch, equally long each, and return its segment."""
        json_length = padded_length(max(len(sample.json) for sample in stretch.samples))
        segment = Segment(
            shard=0,
            split=stretch.split,
            height=stretch.bucket[0],
            width=stretch.bucket[1],
            json_bytes=json_length,
            first_row=len(self.rows),
            rows=len(stretch.samples),
            stride=stride_bytes(spool.spec.members(stretch.bucket), json_length),
            first_offset=self.size_bytes,
        )
        for sample in stretch.samples:
            offset, arrays = self.size_bytes, spool.arrays(sample)
            text = tar_header(f"{sample.key}.json", json_length) + sample.json.ljust(json_length)
            text += padding(json_length)
            self._write(arrays)
            self._write(text)
            assert self.size_bytes == offset + segment.stride, (sample.key, segment)
            checksum = zlib.crc32(text, zlib.crc32(arrays))
            self.rows.append({**sample.row, "split": stretch.split, "offset": offset, "crc32": checksum})
        return segment

    def end(self) -> None:
        """Write the end mark."""
        self._write(tar_end(self.size_bytes))

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self.digest.update(content)
        self.size_bytes += len(content)
