"""Positional reader: samples of a split by one `preadv` each at a computed offset, straight into the batch.

A sample of 126 KB costs one system call and no copy beyond it; tar headers are never parsed. File descriptors are
kept open per process (a forked reader opens its own).
"""

import json
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.latents.checksums import Checksums
from pipeline.latents.layout import BatchBytes, sample_layout, sample_views, wrong_headers
from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.record import LatentSample, parse_sample
from pipeline.latents.rows import SHARD_SCHEMA, read_table
from pipeline.latents.segments import Places, SegmentTable, load_segments
from pipeline.latents.shard_files import LocalShards, OpenShard, Shards
from pipeline.publish import file_digest

MAX_OPEN_SHARDS = 512
# Before the second, third and fourth attempt at a read that the system refused.
PAUSES_SECONDS = (0.1, 0.5, 2.0)


@dataclass
class BatchRead:
    """What a read of several samples gave beside the arrays it filled."""

    records: list[dict[str, Any]]
    """The json of each sample where it was asked for, otherwise empty."""
    failed: dict[int, DataError | OSError]
    """The samples, by their number in the batch, that could not be read or are damaged, each confirmed."""


class LatentDataset:
    """The samples of one split of the finished data set in `folder`."""

    def __init__(
        self,
        folder: Path,
        split: str = "train",
        *,
        shards: Shards | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Open the data set and check its tables, and the size of every shard that is this rank's to check.

        Rank r checks the shards r, r + W, ...; one that finds damage looks at all. `shards`: default, in `folder`.

        Raises:
            DataError: naming every file that is missing, short, or not the one in the manifest.
        """
        self.folder = folder
        self.split = split
        self.shards: Shards = LocalShards(folder) if shards is None else shards
        self.manifest = Manifest.load(folder)
        self.spec = self.manifest.spec
        for name in (SHARDS_NAME, SEGMENTS_NAME):
            self._check_table(name)
        table = read_table(folder / SHARDS_NAME, SHARD_SCHEMA)
        self.shard_names: list[str] = table.column("name").to_pylist()
        self.shard_bytes: np.ndarray = table.column("bytes").to_numpy()
        self.table = SegmentTable(load_segments(folder / SEGMENTS_NAME), split)
        self.checksums = Checksums(self.shards.table)
        self.opens = self.bytes_read = 0
        self._check_shards(rank, world_size)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of samples in the split."""
        return len(self.table)

    def _check_table(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file() or file_digest(path) != self.manifest.tables[name]:
            state = "is not the one in the manifest" if path.is_file() else "is missing"
            raise DataError(f"{path}: {state}; run `ldm finalize` again, then `ldm verify`")

    def _check_shards(self, rank: int, world_size: int) -> None:
        mine = range(rank, len(self.shard_names), world_size)
        wrong = self._wrong_sizes(mine)
        if wrong and world_size > 1:
            wrong = self._wrong_sizes(range(len(self.shard_names)))
        if wrong:
            raise DataError(
                f"{self.folder}: {len(wrong)} damaged or missing shards: {', '.join(wrong)}; restore or encode them again"
            )

    def _wrong_sizes(self, numbers: Iterable[int]) -> list[str]:
        stems = [self.shard_names[number] for number in numbers]
        wrong = []
        for number, stem, found in zip(numbers, stems, self.shards.sizes(stems), strict=True):
            expected = int(self.shard_bytes[number])
            if found != expected:
                state = "missing" if found is None else f"{found} bytes instead of {expected}"
                wrong.append(f"{self.shards.where(stem)} ({state})")
        return wrong

    def check_samples(self, shards: Sequence[int]) -> None:
        """Hold one sample of the split in each of `shards` against its checksum.

        Raises:
            DataError: naming shard and key of every sample that is not as it was written.
        """
        found, first = np.unique(self.table.segments["shard"], return_index=True)
        firsts = dict(zip(found.tolist(), first.tolist(), strict=True))
        starts = np.cumsum(self.table.segments["rows"], dtype=np.int64) - self.table.segments["rows"]
        wrong: list[str] = []
        for shard in shards:
            if shard in firsts:
                rows = int(self.table.segments["rows"][firsts[shard]])
                index = np.array([starts[firsts[shard]] + (shard * 7919) % rows])
                arrays = self.empty_arrays(self.table.place(int(index[0])).bucket, 1)
                wrong += map(str, self.read_batch(index, arrays, verify=True).failed.values())
        if wrong:
            raise DataError(f"{self.folder}: {len(wrong)} damaged samples: {'; '.join(wrong)}")

    def empty_arrays(self, bucket: tuple[int, int], count: int) -> dict[str, np.ndarray]:
        """Return an uninitialised array [count, *shape] for each member of the samples of `bucket`."""
        members = self.spec.members(bucket)
        return {member.name: np.empty((count, *member.shape), member.dtype) for member in members}

    def read_batch(
        self,
        indices: np.ndarray,
        arrays: Mapping[str, np.ndarray],
        *,
        records: bool = False,
        verify: bool = False,
    ) -> BatchRead:
        """Read samples of one bucket into `arrays` ([b, *shape] by member name) and return what else they say.

        Headers are always compared; `verify` holds every byte against the stored checksum. Damage counts when a
        second read confirms it, a refused read after four attempts.
        """
        places = self.table.places(indices)
        first = self.table.segments[places.segment[0]]
        layout = sample_layout(self.spec, (int(first["height"]), int(first["width"])))
        scratch = np.empty((len(indices), layout.scratch_bytes), np.uint8)
        buffers: Sequence[list[Any]] = sample_views(layout, arrays, scratch)
        tails: list[bytearray] = []
        if records or verify:
            tails = [bytearray(layout.tail_bytes(int(json_bytes))) for json_bytes in places.json_bytes]
            buffers = [[*parts, tail] for parts, tail in zip(buffers, tails, strict=True)]
        failed = self._fill(places, buffers, layout.before_json_bytes, [len(tail) for tail in tails])
        job = BatchBytes(places, buffers, layout, scratch, tails, verify)
        suspects = self._suspects(job, range(len(indices)), failed)
        for number in suspects:
            failed |= self._fill(
                places, buffers, layout.before_json_bytes, [len(tail) for tail in tails], number
            )
        if suspects:
            confirmed = self._suspects(job, suspects, failed)
            failed |= {number: self._damaged(job, number, what) for number, what in confirmed.items()}
        found: list[dict[str, Any]] = []
        if records:
            found = [self._record(job, number, failed) for number in range(len(indices))]
        return BatchRead(found, failed)

    def _fill(
        self,
        places: Places,
        buffers: Sequence[list[Any]],
        head_bytes: int,
        tail_bytes: list[int],
        only: int | None = None,
    ) -> dict[int, DataError | OSError]:
        """Read each sample (or `only` one) into its buffers; return those that could not be read."""
        failed: dict[int, DataError | OSError] = {}
        shards, offsets = places.shard.tolist(), places.offset.tolist()
        numbers = np.lexsort((places.offset, places.shard)).tolist() if only is None else [only]
        opened: dict[int, OpenShard] = {}
        for number in numbers:
            wanted = head_bytes + (tail_bytes[number] if tail_bytes else 0)
            try:
                shard = opened.get(shards[number])
                if shard is None:
                    shard = opened[shards[number]] = self._opened(shards[number])
                found = shard.readv(buffers[number], offsets[number])
                if found != wanted:
                    found = self._read_again(shards[number], buffers[number], offsets[number], wanted)
                self.bytes_read += found
            except OSError as error:
                try:
                    self._read_again(shards[number], buffers[number], offsets[number], wanted, error)
                except OSError as last:
                    failed[number] = _unreadable(last, self._where(places, number))
        return failed

    def _read_again(
        self, shard: int, buffers: list[Any], offset: int, wanted: int, error: OSError | None = None
    ) -> int:
        """Read once more into one piece, with pauses; a shard is opened anew, its descriptor may be stale."""
        for pause_seconds in PAUSES_SECONDS:
            if error is not None:
                time.sleep(pause_seconds)
            self._forget(shard)
            try:
                block, got = memoryview(bytearray(wanted)), 0
                while got < wanted and (step := self._opened(shard).readv([block[got:]], offset + got)):
                    got += step
                at = 0
                for buffer in buffers:
                    target = memoryview(buffer).cast("B")
                    target[:] = block[at : at + len(target)]
                    at += len(target)
                return got
            except OSError as again:
                error = again
        assert error is not None
        raise error

    def _suspects(
        self, job: BatchBytes, numbers: Iterable[int], failed: Mapping[int, Exception]
    ) -> dict[int, str]:
        """Return what is wrong with those of the samples whose bytes were read and are not as the format says."""
        headers = wrong_headers(job.layout, job.scratch)
        wrong = {}
        for number in numbers if job.verify else [number for number in numbers if number in headers]:
            if number in failed:
                continue
            if number in headers:
                wrong[number] = f"member {headers[number]!r} has not its header"
            elif job.verify and job.crc32(number) != self._checksum(job.places, number):
                wrong[number] = "its bytes have another checksum than when they were written"
        return wrong

    def _checksum(self, places: Places, number: int) -> int:
        stem = self.shard_names[int(places.shard[number])]
        return self.checksums.crc32(stem, int(places.row[number]))

    def _damaged(self, job: BatchBytes, number: int, what: str) -> DataError:
        return DataError(f"{self._where(job.places, number)}: {what}; run `ldm verify`")

    def _where(self, places: Places, number: int) -> str:
        """Return shard, row and, where the shard's table can be read, key of a sample."""
        stem, row = self.shard_names[int(places.shard[number])], int(places.row[number])
        try:
            return f"{self.shards.where(stem)}: row {row}, key {self.checksums.key(stem, row)!r}"
        except (DataError, OSError):
            return f"{self.shards.where(stem)}: row {row}"

    def _record(self, job: BatchBytes, number: int, failed: dict[int, DataError | OSError]) -> dict[str, Any]:
        if number in failed:
            return {}
        start = job.layout.record_start()
        try:
            record = json.loads(job.tails[number][start : start + int(job.places.json_bytes[number])])
            record["key"], record["captions"]
        except (ValueError, KeyError, TypeError):
            failed[number] = self._damaged(job, number, "its json member is damaged")
            return {}
        found: dict[str, Any] = record
        return found

    def read(self, index: int) -> LatentSample:
        """Return sample `index` of the split; its arrays are views of one buffer.

        Raises:
            DataError: when the bytes are not what the format says, naming shard and row.
        """
        place = self.table.place(index)
        where = f"{self.shards.where(self.shard_names[place.shard])}: row {place.row}"
        block = bytearray(place.stride)
        try:
            found = self._opened(place.shard).readv([block], place.offset)
            if found != place.stride:
                found = self._read_again(place.shard, [block], place.offset, place.stride)
        except OSError as error:
            try:
                found = self._read_again(place.shard, [block], place.offset, place.stride, error)
            except OSError as last:
                raise _unreadable(last, where) from None
        content = memoryview(block)[:found].toreadonly()
        return parse_sample(content, self.spec.members(place.bucket), place.json_bytes, where)

    def _opened(self, number: int) -> OpenShard:
        with self._lock:
            if self._owner != os.getpid():
                self._open, self._owner = OrderedDict(), os.getpid()
            found = self._open.get(number)
            if found is None:
                found = self._open[number] = self.shards.open(self.shard_names[number])
                self.opens += 1
                if len(self._open) > _most_open():
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return found

    def _forget(self, number: int) -> None:
        with self._lock:
            self._open.pop(number, None)

    def null_text(self) -> dict[str, np.ndarray]:
        """Return the text members of the empty caption, each with n = 1.

        Raises:
            DataError: when a file is missing or not the one in the manifest.
        """
        arrays = {}
        for member in self.spec.text_members(1):
            path = self.folder / "null" / f"{member.name}.npy"
            if not path.is_file() or file_digest(path) != self.manifest.null[member.name]:
                raise DataError(f"{path}: missing or not the one in the manifest; run `ldm finalize` again")
            arrays[member.name] = np.load(path, allow_pickle=False)
        return arrays

    def close(self) -> None:
        """Close the descriptors of this process; a read that is under way ends first."""
        with self._lock:
            self._open.clear()


def _unreadable(error: OSError, where: str) -> OSError:
    attempts = len(PAUSES_SECONDS) + 1
    return OSError(
        error.errno, f"{where}: cannot be read after {attempts} attempts ({error.strerror or error})"
    )


def _most_open() -> int:
    """Return how many shards may be open at once: half of what the system allows this process."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_OPEN_SHARDS if limit == resource.RLIM_INFINITY else min(MAX_OPEN_SHARDS, max(1, limit // 2))
