"""Temporary files that belong to a living writer, and publishing where others may have been first.

Each temporary file is held by a lock as long as its writer lives. A file that can be locked by somebody else is
the leftover of a killed worker and goes; where the file system knows no locks, leftovers stay until they are
removed by hand. Correctness never rests on this: it only keeps the folder tidy.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError
from pipeline.publish import TEMPORARY_MARK, file_digest, publish_first, temporary_beside


@contextlib.contextmanager
def claimed_temporary(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`, locked while the block runs and gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        beside = temporary_beside(path)
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if beside.exists():  # else it was cleared away between the two calls
            break
        os.close(descriptor)
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)
        os.close(descriptor)


def remove_dead_temporaries(dataset: Path) -> int:
    """Remove what killed workers left in the shard folders of `dataset`; return how many files went."""
    removed = 0
    for left in dataset.glob(f"*/.*{TEMPORARY_MARK}*"):
        try:
            descriptor = os.open(left, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its writer lives, or there are no locks here
            continue
        else:
            left.unlink(missing_ok=True)
            removed += 1
        finally:
            os.close(descriptor)
    return removed


def publish_same(finished: Path, path: Path, digest: str) -> None:
    """Give the finished file the name `path`, or make sure that the file of that name holds the same bytes.

    `digest` is the finished file's sha256.

    Raises:
        DataError: when another file has the name. It was not committed by a marker, so nothing is lost with it.
    """
    if publish_first(finished, path):
        return
    found = file_digest(path)
    if found != digest:
        raise DataError(
            f"{path}: there already with sha256 {found[:16]}... instead of {digest[:16]}...: left by a worker with "
            "other settings, versions or another machine type; remove this file and encode again"
        )
