"""Every sample of a shard with what its names say, and the bytes of a spread few.

The verdicts are those of `encode`, because its own shards give them: only the reading of contents is held back.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.init.parquet_rows import GlancedRows
from preprocessing.keys import output_key
from preprocessing.parquet_source import ParquetShard
from preprocessing.samples import IMAGE_SUFFIXES, Content, FileShard, InputShard, RawSample, Run, runs_of
from preprocessing.strict_tar import Member


@dataclass(frozen=True)
class Glance:
    """A sample as `encode` would meet it; unless `read`, its picture and text were left alone and are empty."""

    raw: RawSample
    read: bool


def spread(total: int, wanted: int) -> list[int]:
    """Return at most `wanted` evenly spaced places of `total`, the first and the last among them."""
    if wanted <= 0 or total == 0:
        return []
    return sorted({int(place) for place in np.linspace(0, total - 1, min(total, wanted)).round()})


def glances(shard: InputShard, wanted: int) -> Iterator[Glance]:
    """Yield every sample of `shard` in input order, `wanted` of them with their bytes.

    Raises:
        DataError: when the shard is damaged, with what `encode` would say of it.
    """
    if isinstance(shard, ParquetShard):
        rows = GlancedRows(shard, wanted)
        for raw in rows.samples():
            yield Glance(raw, rows.has_read(raw))
        return
    assert isinstance(shard, FileShard), type(shard)
    files = _GlancedFiles(shard, wanted)
    for raw in files.samples():
        yield Glance(raw, raw.problem is None and raw.key in files.wanted_keys)


class _GlancedFiles(FileShard):
    """A shard of files whose contents are read for the chosen keys only."""

    def __init__(self, shard: FileShard, wanted: int) -> None:
        self.stem, self.expected, self.estimate = shard.stem, shard.expected, shard.estimate
        self._shard, self._wanted = shard, wanted
        self.wanted_keys: frozenset[str] = frozenset()

    @contextmanager
    def opened(self) -> Iterator[Content]:
        """Open the shard and choose the samples whose contents will be read."""
        with self._shard.opened() as content:
            runs = [run for run in runs_of(content.members) if run.having(IMAGE_SUFFIXES)]
            chosen = [runs[place] for place in spread(len(runs), self._wanted)]
            self.wanted_keys = frozenset(output_key(run.source_key) for run in chosen)
            yield _FewContents(content, {member for run in chosen for _, member in run.members})

    def samples(self, only: Container[str] | None = None) -> Iterator[RawSample]:
        """Yield the samples of files, then those that only a table beside them names."""
        seen: set[str] = set()
        for raw in super().samples(only):
            seen.add(raw.key)
            yield raw
        yield from self._shard.samples(only=_Unseen(seen))

    def size_bytes(self) -> int:
        """Return the bytes of the input."""
        return self._shard.size_bytes()

    def version(self) -> str:
        """Return what changes when the input is written anew."""
        return self._shard.version()

    def _label(self, run: Run) -> str:
        return self._shard._label(run)

    def _columns(self, run: Run) -> Mapping[str, Any]:
        return self._shard._columns(run)


class _FewContents:
    def __init__(self, content: Content, wanted: set[Member]) -> None:
        self._content, self._wanted = content, wanted

    @property
    def members(self) -> Sequence[Member]:
        return self._content.members

    def read(self, member: Member) -> bytes:
        return self._content.read(member) if member in self._wanted else b""


class _Unseen(Container[str]):
    """All keys but those seen: what is left are rows of a table without files."""

    def __init__(self, seen: set[str]) -> None:
        self._seen = seen

    def __contains__(self, key: object) -> bool:
        return key not in self._seen
