"""A data set in an object store: its tables are copied to this node, its shards come whole into a cache or in ranges.

Transient faults are tried again by the store's client (`pipeline.storage`); what it gives up on is an `OSError`, which
the reader tries a few times more.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from pipeline import storage
from pipeline.data.cache import NodeCache
from pipeline.errors import DataError
from pipeline.latents.manifest import MANIFEST_NAME, SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.rows import SHARD_SCHEMA, read_table
from pipeline.latents.shard import shard_path
from pipeline.latents.shard_files import OpenShard
from pipeline.publish import whole_folder

LISTED_ABOVE = 32
PARALLEL_REQUESTS = 8


class RemoteShards:
    """The shards below `url`: whole ones through `cache`, or ranges where there is no cache."""

    def __init__(self, url: str, tables: Path, cache: NodeCache | None) -> None:
        """Take digests and sizes from the copy of the tables in the local folder `tables`."""
        self._url, self._tables, self._cache = url, tables, cache
        shards = read_table(tables / SHARDS_NAME, SHARD_SCHEMA).to_pylist()
        self._known = {row["name"]: (int(row["bytes"]), str(row["digest"])) for row in shards}

    @property
    def verified(self) -> bool:
        """Whether `open` holds the whole tar against its digest: not where only ranges are read."""
        return self._cache is not None

    def open(self, stem: str) -> OpenShard:
        """Open the tar of a shard; a whole one is fetched first, and held against its digest."""
        if self._cache is None:
            return _RangedTar(self.where(stem))
        size_bytes, digest = self._known[stem]

        def fill(into: BinaryIO) -> None:
            found = storage.fetch(self.where(stem), into)
            if found != digest:
                raise DataError(
                    f"{self.where(stem)}: sha256 {found[:16]}, the manifest's is {digest[:16]}; upload it again"
                )

        return _CachedTar(self._cache.open(f"{self.where(stem)}@{digest}", size_bytes, fill))

    def sizes(self, stems: Sequence[str]) -> list[int | None]:
        """Return the size of each tar in bytes, None where it is missing."""
        if len(stems) > LISTED_ABOVE:
            listed = {file.name: file.size_bytes for file in storage.list_files(self._url, below=True)}
            return [listed.get(_name(stem, ".tar")) for stem in stems]
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return list(pool.map(self._size, stems))

    def _size(self, stem: str) -> int | None:
        try:
            return storage.stat_file(self.where(stem)).size_bytes
        except FileNotFoundError:
            return None

    def table(self, stem: str) -> Path:
        """Return a local copy of the shard's parquet."""
        path = self._tables / _name(stem, ".parquet")
        if not path.exists():
            place = storage.join(self._url, _name(stem, ".parquet"))
            content = storage.read_file(place)
            _write_whole(path, content)
        return path

    def where(self, stem: str) -> str:
        """Return the URL of the shard's tar."""
        return storage.join(self._url, _name(stem, ".tar"))


class _CachedTar:
    """A descriptor of a cached file: valid even when the file has left the cache."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> int:
        return os.preadv(self._descriptor, buffers, offset)


class _RangedTar:
    """A tar of which every read is a request."""

    def __init__(self, url: str) -> None:
        self._url = url

    def readv(self, buffers: Sequence[memoryview | bytearray], offset: int) -> int:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        wanted = sum(map(len, views))
        block = storage.read_range(self._url, offset, wanted)
        if len(block) != wanted:
            raise OSError(
                f"{self._url}: {len(block)} bytes came from offset {offset}, {wanted} were asked for"
            )
        at = 0
        for view in views:
            view[:] = block[at : at + len(view)]
            at += len(view)
        return at


def copy_tables(url: str, folder: Path) -> Path:
    """Return a local folder with manifest, tables and null texts of the data set at `url`, copied below `folder`.

    The copy is named after the manifest's bytes: a data set that changed has another one.

    Raises:
        DataError: there is no manifest.
    """
    try:
        manifest = storage.read_file(storage.join(url, MANIFEST_NAME))
    except FileNotFoundError:
        raise DataError(
            f"{url}: the data set has no manifest.json: upload a finalized data set (training reads finished ones only)"
        ) from None
    name = hashlib.sha256(url.encode() + manifest).hexdigest()
    target = folder / "tables" / name
    if not target.is_dir():
        with whole_folder(target) as beside:
            (beside / MANIFEST_NAME).write_bytes(manifest)
            loaded = Manifest.load(beside)
            nulls = [f"null/{member.name}.npy" for member in loaded.spec.text_members(1)]
            for file in (SHARDS_NAME, SEGMENTS_NAME, *nulls):
                path = beside / file
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(storage.read_file(storage.join(url, file)))
    return target


def _name(stem: str, suffix: str) -> str:
    return shard_path(Path(), stem, suffix).as_posix()


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)
