"""Counts the bytes that Python code writes under a folder, and ends the process by SIGKILL at a chosen one.

`open` for writing becomes `_pyio.open`, the standard library's own Python twin of it, which writes through
`os.write`; that and its kin are replaced by versions that ask a `Budget` first. A write that reaches the budget
is cut at that very byte, and then the process dies: no buffer is flushed, no `finally` runs.

Not seen: writes that a C or Rust library makes itself (safetensors to a path, pyarrow to a path, pillow to a
path, mmap) and those of child processes. For these `tests/faults/strace.py` looks at the system calls.
"""

import _pyio
import io
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

COUNT = struct.Struct("<q")
WRITE_FLAGS = frozenset("wax+")
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Watched:
    """The writes that count: to `place` itself or to files under it whose own name matches `pattern`."""

    place: Path
    pattern: str = "*"


class Budget:
    """The bytes that may still be written, and the running count in a file that survives the kill."""

    def __init__(self, watched: Watched, after_bytes: int | None, count_file: Path) -> None:
        self.place = os.path.realpath(watched.place)
        self.pattern = watched.pattern
        self.after_bytes = after_bytes
        self.written = 0
        self.process = os.getpid()
        self.count_descriptor = os.open(count_file, os.O_WRONLY | os.O_CREAT, 0o600)

    def watches(self, descriptor: int) -> bool:
        """Return whether writes to this open file count; a forked child's never do."""
        if os.getpid() != self.process:
            return False
        path = os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
        inside = path == self.place or path.startswith(self.place + os.sep)
        return inside and fnmatch(os.path.basename(path), self.pattern)

    def allowed(self, size_bytes: int) -> int:
        """Return how many of so many bytes may be written before the end."""
        if self.after_bytes is None:
            return size_bytes
        return min(size_bytes, self.after_bytes - self.written)

    def spend(self, size_bytes: int) -> None:
        """Count bytes that were written, and die where the budget is used up."""
        self.written += size_bytes
        _REAL_PWRITE(self.count_descriptor, COUNT.pack(self.written), 0)
        if self.after_bytes is not None and self.written >= self.after_bytes:
            die()


def die() -> NoReturn:
    """End this process by SIGKILL, now."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived its own SIGKILL")


def counted_bytes(count_file: Path) -> int:
    """Return the count that a `Budget` left in its file."""
    content = count_file.read_bytes() if count_file.exists() else b""
    return int(COUNT.unpack(content)[0]) if content else 0


def install(budget: Budget) -> None:
    """Replace every way in which Python code writes, in all modules loaded so far, for the rest of this process."""
    replacements: dict[int, object] = {
        id(io.open): _counted_open,
        id(io.FileIO): _pyio.FileIO,
        id(os.write): _counted_write(budget),
        id(os.pwrite): _counted_pwrite(budget),
        id(os.writev): _counted_writev(budget),
        id(os.pwritev): _counted_pwritev(budget),
        id(os.sendfile): _counted_sendfile(budget),
        id(os.copy_file_range): _counted_copy_file_range(budget),
        id(os.splice): _counted_splice(budget),
    }
    for module, name in places_that_write(len(sys.modules)):
        setattr(module, name, replacements[id(getattr(module, name))])


@cache
def places_that_write(loaded: int) -> list[tuple[ModuleType, str]]:
    """Return where the loaded modules keep a real way to write; `loaded` is how many they are, for the cache.

    Modules keep names of their own for `open` (tarfile does), so each is looked through. This one and `_pyio`
    keep theirs: they are what the replacements are made of.
    """
    ways = {id(way) for way in _WAYS}
    own = (_pyio, sys.modules[__name__])
    others = [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and module not in own
    ]
    return [
        (module, name) for module in others for name, value in list(vars(module).items()) if id(value) in ways
    ]


_REAL_OPEN, _REAL_WRITE, _REAL_PWRITE = io.open, os.write, os.pwrite
_WAYS = (
    io.open,
    io.FileIO,
    os.write,
    os.pwrite,
    os.writev,
    os.pwritev,
    os.sendfile,
    os.copy_file_range,
    os.splice,
)


def _counted_open(file: Any, mode: str = "r", *options: Any, **named: Any) -> Any:
    opened = _pyio.open if WRITE_FLAGS & set(mode) else _REAL_OPEN
    return opened(file, mode, *options, **named)


def _counted_write(budget: Budget) -> Callable[[int, Buffer], int]:
    def write(descriptor: int, data: Buffer) -> int:
        if not budget.watches(descriptor):
            return _REAL_WRITE(descriptor, data)
        view = memoryview(data).cast("B")
        allowed = budget.allowed(len(view))
        written = _REAL_WRITE(descriptor, view[:allowed]) if allowed else 0
        budget.spend(written)
        return written

    return write


def _counted_pwrite(budget: Budget) -> Callable[[int, Buffer, int], int]:
    def pwrite(descriptor: int, data: Buffer, offset: int) -> int:
        if not budget.watches(descriptor):
            return _REAL_PWRITE(descriptor, data, offset)
        view = memoryview(data).cast("B")
        allowed = budget.allowed(len(view))
        written = _REAL_PWRITE(descriptor, view[:allowed], offset) if allowed else 0
        budget.spend(written)
        return written

    return pwrite


def _counted_writev(budget: Budget) -> Callable[[int, Iterable[Buffer]], int]:
    write = _counted_write(budget)

    def writev(descriptor: int, buffers: Iterable[Buffer]) -> int:
        return write(descriptor, b"".join(bytes(buffer) for buffer in buffers))

    return writev


def _counted_pwritev(budget: Budget) -> Callable[..., int]:
    pwrite = _counted_pwrite(budget)

    def pwritev(descriptor: int, buffers: Iterable[Buffer], offset: int, flags: int = 0) -> int:
        return pwrite(descriptor, b"".join(bytes(buffer) for buffer in buffers), offset)

    return pwritev


def _counted_sendfile(budget: Budget) -> Callable[..., int]:
    real = os.sendfile

    def sendfile(out_fd: int, in_fd: int, offset: int | None, count: int) -> int:
        return _limited(budget, out_fd, count, lambda allowed: real(out_fd, in_fd, offset, allowed))

    return sendfile


def _counted_copy_file_range(budget: Budget) -> Callable[..., int]:
    real = os.copy_file_range

    def copy_file_range(src: int, dst: int, count: int, *offsets: Any, **named: Any) -> int:
        return _limited(budget, dst, count, lambda allowed: real(src, dst, allowed, *offsets, **named))

    return copy_file_range


def _counted_splice(budget: Budget) -> Callable[..., int]:
    real = os.splice

    def splice(src: int, dst: int, count: int, *offsets: Any, **named: Any) -> int:
        return _limited(budget, dst, count, lambda allowed: real(src, dst, allowed, *offsets, **named))

    return splice


def _limited(budget: Budget, descriptor: int, count: int, copy: Callable[[int], int]) -> int:
    """Return what the copy inside the kernel moved; with a budget of none left it does not run."""
    if not budget.watches(descriptor):
        return copy(count)
    allowed = budget.allowed(count)
    copied = copy(allowed) if allowed else 0
    budget.spend(copied)
    return copied
