"""Positional reader: sample `i` of a split by one `pread` at a computed offset.

A sample of 126 KB costs one system call and no copy beyond it; tar headers are never parsed. File
descriptors are kept open per process (a forked reader opens its own).
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.record import LatentSample, parse_sample
from pipeline.latents.rows import SHARD_SCHEMA, read_table
from pipeline.latents.segments import SegmentTable, load_segments
from pipeline.latents.shard import shard_path
from pipeline.publish import file_digest

MAX_OPEN_SHARDS = 64


class _OpenShard:
    """A descriptor that closes when its last user lets go of it.

    A thread that is reading keeps its own reference, so that another thread which opens many shards cannot
    close the number under it (or let a different file take that number).
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class LatentDataset:
    """The samples of one split of the finished data set in `folder`."""

    def __init__(self, folder: Path, split: str = "train") -> None:
        """Open the data set and check its tables and the size of every shard.

        Raises:
            DataError: naming every file that is missing, short, or not the one in the manifest.
        """
        self.folder = folder
        self.split = split
        self.manifest = Manifest.load(folder)
        self.spec = self.manifest.spec
        for name in (SHARDS_NAME, SEGMENTS_NAME):
            self._check_table(name)
        shards = read_table(folder / SHARDS_NAME, SHARD_SCHEMA)
        self.shard_names: list[str] = shards.column("name").to_pylist()
        self.shard_bytes: list[int] = shards.column("bytes").to_pylist()
        self.table = SegmentTable(load_segments(folder / SEGMENTS_NAME), split)
        self._check_shards()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
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

    def _check_shards(self) -> None:
        wrong = []
        for name, size_bytes in zip(self.shard_names, self.shard_bytes, strict=True):
            path = shard_path(self.folder, name, ".tar")
            found = path.stat().st_size if path.is_file() else None
            if found != size_bytes:
                wrong.append(
                    f"{path} ({'missing' if found is None else f'{found} bytes instead of {size_bytes}'})"
                )
        if wrong:
            raise DataError(
                f"{self.folder}: {len(wrong)} damaged or missing shards: {', '.join(wrong[:20])}; restore or encode them again"
            )

    def read(self, index: int) -> LatentSample:
        """Return sample `index` of the split; its arrays are read-only views of one buffer.

        Raises:
            DataError: when the bytes are not what the format says, naming shard and row.
        """
        place = self.table.place(index)
        path = shard_path(self.folder, self.shard_names[place.shard], ".tar")
        shard = self._open_shard(place.shard, path)
        block = os.pread(shard.descriptor, place.stride, place.offset)
        return parse_sample(
            block, self.spec.members(place.bucket), place.json_bytes, f"{path}: row {place.row}"
        )

    def _open_shard(self, number: int, path: Path) -> _OpenShard:
        with self._lock:
            if self._owner != os.getpid():
                self._open, self._owner = OrderedDict(), os.getpid()
            if number in self._open:
                self._open.move_to_end(number)
            else:
                self._open[number] = _OpenShard(path)
                if len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            return self._open[number]

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
