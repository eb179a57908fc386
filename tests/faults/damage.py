"""Damage to files that are at rest: what a disk, a cable or a full quota leaves behind.

Times of the file are kept, as real damage keeps them: a reader that trusts the modification time is fooled.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

PAGE_BYTES = 4096


def flip_bit(path: Path, byte_offset: int, bit: int = 0) -> None:
    """Flip one bit (0 = lowest) of the byte at `byte_offset`, counted from the end where negative."""
    assert 0 <= bit < 8, bit
    with _kept_times(path), open(path, "r+b") as file:
        place = _place(path, byte_offset)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def truncate(path: Path, size_bytes: int) -> None:
    """Cut the file down to its first `size_bytes`, or cut that many off its end where negative."""
    size = path.stat().st_size
    left = size + size_bytes if size_bytes < 0 else size_bytes
    assert 0 <= left < size, f"{path}: {size} bytes cannot be cut to {left}"
    with _kept_times(path):
        os.truncate(path, left)


def zero_page(path: Path, page: int, page_bytes: int = PAGE_BYTES) -> None:
    """Fill page number `page` with zeros, the length of the file unchanged: a block that never reached the disk."""
    start = _place(path, page * page_bytes)
    length = min(page_bytes, path.stat().st_size - start)
    with _kept_times(path), open(path, "r+b") as file:
        file.seek(start)
        assert any(file.read(length)), f"{path}: page {page} holds only zeros, zeroing it is no damage"
        file.seek(start)
        file.write(bytes(length))


@contextmanager
def restored(path: Path) -> Iterator[Path]:
    """Yield `path` for any damage, its removal too, and put its bytes and times back afterwards."""
    content, times = path.read_bytes(), path.stat()
    try:
        yield path
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def spread_offsets(size_bytes: int, count: int, seed: int) -> list[int]:
    """Return up to `count` distinct sorted byte offsets below `size_bytes`: both ends, and one in each stretch.

    Stratified, so that few offsets still reach the header, the middle and the tail of a file.
    """
    assert size_bytes > 0 and count >= 2, (size_bytes, count)
    if count >= size_bytes:
        return list(range(size_bytes))
    random = np.random.Generator(np.random.Philox(seed))
    edges = np.linspace(1, size_bytes - 1, count - 1).astype(np.int64)
    inner = [int(random.integers(low, high)) for low, high in pairwise(edges) if low < high]
    return sorted({0, size_bytes - 1, *inner})


def _place(path: Path, byte_offset: int) -> int:
    size = path.stat().st_size
    place = size + byte_offset if byte_offset < 0 else byte_offset
    assert 0 <= place < size, f"{path}: no byte {byte_offset} in {size} bytes"
    return place


@contextmanager
def _kept_times(path: Path) -> Iterator[None]:
    before = path.stat()
    yield
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
