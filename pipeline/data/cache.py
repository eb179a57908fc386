"""Files on this node that stand for files of a store, within a size limit shared by all processes of the node.

A file appears whole (rename) and leaves by `unlink`: who has it open reads on. Each name is fetched by one process
at a time; the least recently opened go first when room is needed.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ConfigError
from pipeline.publish import TEMPORARY_MARK, temporary_beside


class NodeCache:
    """The cache in `folder`; several processes with the same folder share it."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Use `folder`, made if need be, and keep at most `limit_bytes` in it, downloads under way included."""
        self.folder, self.limit_bytes = folder, limit_bytes
        for name in ("files", "locks"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def open(self, name: str, size_bytes: int, fill: Callable[[BinaryIO], None]) -> int:
        """Return a descriptor of the file called `name`; `fill` writes its content where it is not there.

        Raises:
            ConfigError: the limit is smaller than the file.
            OSError: what `fill` or the disk says; nothing is left of the file then.
        """
        path = self.folder / "files" / hashlib.sha256(name.encode()).hexdigest()
        found = _open_used(path)
        if found is not None:
            return found
        with self._lock(path.name):
            found = _open_used(path)
            return self._fetch(path, name, size_bytes, fill) if found is None else found

    def _fetch(self, path: Path, name: str, size_bytes: int, fill: Callable[[BinaryIO], None]) -> int:
        if size_bytes > self.limit_bytes:
            raise ConfigError(
                f"data.cache_gib: the cache may hold {self.limit_bytes / 2**30:.3g} GiB, {name} alone has "
                f"{size_bytes / 2**30:.3g} GiB; raise data.cache_gib or set data.remote_reads: range"
            )
        beside = temporary_beside(path)
        with self._lock("room"):
            self._make_room(size_bytes)
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            # Held as long as this process lives: a temporary file without a holder is a leftover.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.truncate(descriptor, size_bytes)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                fill(stream)
            _mark_used(descriptor)
            with self._lock("room"):
                os.replace(beside, path)
            return descriptor
        except BaseException:
            os.close(descriptor)
            beside.unlink(missing_ok=True)
            raise

    def _make_room(self, need_bytes: int) -> None:
        """Remove the least recently used files until `need_bytes` more fit. Only with the lock "room" held."""
        entries, held_bytes = [], 0
        for entry in os.scandir(self.folder / "files"):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            if TEMPORARY_MARK in entry.name:
                held_bytes += 0 if _removed_leftover(Path(entry.path)) else status.st_size
            else:
                entries.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
                held_bytes += status.st_size
        for _, size_bytes, path in sorted(entries):
            if held_bytes + need_bytes <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            held_bytes -= size_bytes

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Hold the lock `name` of all processes and threads that use this folder."""
        # A descriptor of its own: flock tells open files apart, not processes.
        with open(self.folder / "locks" / name, "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _open_used(path: Path) -> int | None:
    """Return a descriptor of the file and mark it as used now; None where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    _mark_used(descriptor)
    return descriptor


def _mark_used(descriptor: int) -> None:
    """Set the times to now: the kernel's own are a few milliseconds coarse."""
    now_ns = time.time_ns()
    os.utime(descriptor, ns=(now_ns, now_ns))


def _removed_leftover(path: Path) -> bool:
    """Remove a temporary file whose writer is gone; return whether it was one."""
    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
