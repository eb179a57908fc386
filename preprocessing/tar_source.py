"""WebDataset tars as img2dataset writes them: pax headers, unsorted keys, gaps, `STEM_stats.json` and `STEM.parquet`.

A tar in an object store is fetched whole into an unnamed local file first: every byte is needed anyway, and the
strict walk over its headers wants cheap seeks.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.errors import DataError
from preprocessing.markers import REMEDY, STATS_SUFFIX, lost
from preprocessing.samples import NO_COLUMNS, Content, FileShard, Run, samples_in
from preprocessing.strict_tar import BLOCK, DamagedTarError, Member, walk_open_tar
from preprocessing.tables import rows_by_key


class TarShard(FileShard):
    """A WebDataset tar; `expected` is what its marker promises.

    `table` is the place of the parquet of the same name and `columns` what is read from it; None and () where
    no filter asks for a column.
    """

    def __init__(
        self, place: str, expected: int | None, table: str | None = None, columns: tuple[str, ...] = ()
    ) -> None:
        self.place, self.name = place, place.rpartition("/")[2]
        self.stem = self.name.rpartition(".")[0]
        self.expected = self.estimate = expected
        self._table, self._wanted = table, columns
        self._rows: Mapping[str, Mapping[str, Any]] = {}

    @contextmanager
    def opened(self) -> Iterator[Content]:
        """Open the tar and yield its members.

        Raises:
            DataError: when the tar is damaged or does not hold the samples that its marker promises; names
                shard and byte, and says how many samples are lost.
        """
        self._rows = {} if self._table is None else rows_by_key(self._table, self._wanted)
        with self._stream() as stream:
            try:
                members = walk_open_tar(stream, self.place)
            except DamagedTarError as damage:
                said = lost(self.expected, samples_in(damage.members))
                raise DataError(f"{damage}; {said}; {REMEDY}") from None
            read = samples_in(members)
            if self.expected is not None and read != self.expected:
                end = members[-1].offset + -(-members[-1].size // BLOCK) * BLOCK if members else 0
                raise DataError(
                    f"{self.place}: its last member ends at byte {end}; {lost(self.expected, read)} (the tar itself is "
                    f"whole: its tail was zeroed, or it is not the one that its {STATS_SUFFIX} describes); {REMEDY}"
                )
            yield _OpenTar(self.place, stream, members)

    @contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        if not storage.is_remote(self.place):
            with storage.open_file(self.place) as stream:
                yield stream
            return
        with tempfile.TemporaryFile() as copy:
            storage.fetch(self.place, copy)
            yield copy

    def size_bytes(self) -> int:
        """Return the size of the tar."""
        return storage.stat_file(self.place).size_bytes

    def version(self) -> str:
        """Return that of the tar, and of its table where a filter reads it."""
        places = [self.place] if self._table is None else [self.place, self._table]
        return " ".join(storage.stat_file(place).version for place in places)

    def _label(self, run: Run) -> str:
        return self.name

    def _columns(self, run: Run) -> Mapping[str, Any]:
        return self._rows.get(run.source_key, NO_COLUMNS)


class _OpenTar:
    def __init__(self, place: str, stream: BinaryIO, members: list[Member]) -> None:
        self.members = members
        self._place, self._stream = place, stream

    def read(self, member: Member) -> bytes:
        content = os.pread(self._stream.fileno(), member.size, member.offset)
        if len(content) != member.size:
            raise DataError(f"{self._place}: {member.name!r} ended early: the file shrank while it was read")
        return content
