"""Where the bytes of shards come from: the interface that the reader needs, and a folder as its plain form."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.latents.shard import shard_path


class OpenShard(Protocol):
    """A shard that can be read at any offset, by several threads at once."""

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> int:
        """Fill the buffers with what lies from `offset` on; return the bytes read, fewer only at the end."""
        ...


class Shards(Protocol):
    """Where the files of shards come from: a folder, or a store behind a cache."""

    @property
    def verified(self) -> bool:
        """Whether `open` holds the whole tar against its digest."""
        ...

    def open(self, stem: str) -> OpenShard:
        """Open the tar of a shard."""
        ...

    def sizes(self, stems: Sequence[str]) -> list[int | None]:
        """Return the size of each tar in bytes, None where it is missing."""
        ...

    def table(self, stem: str) -> Path:
        """Return a local path of the shard's parquet."""
        ...

    def where(self, stem: str) -> str:
        """Return the place of the shard's tar as a user knows it."""
        ...


class _LocalTar:
    """A descriptor that closes when its last user lets go of it.

    A thread that is reading keeps its own reference, so that another thread which opens many shards cannot
    close the number under it (or let a different file take that number).
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> int:
        return os.preadv(self.descriptor, buffers, offset)


@dataclass(frozen=True)
class LocalShards:
    """Shards in a folder of this machine or of a shared file system."""

    folder: Path
    verified: bool = False

    def open(self, stem: str) -> OpenShard:
        """Open the tar of a shard."""
        return _LocalTar(shard_path(self.folder, stem, ".tar"))

    def sizes(self, stems: Sequence[str]) -> list[int | None]:
        """Return the size of each tar in bytes, None where it is missing."""
        return [_size_bytes(shard_path(self.folder, stem, ".tar")) for stem in stems]

    def table(self, stem: str) -> Path:
        """Return the path of the shard's parquet."""
        return shard_path(self.folder, stem, ".parquet")

    def where(self, stem: str) -> str:
        """Return the path of the shard's tar."""
        return str(shard_path(self.folder, stem, ".tar"))


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
