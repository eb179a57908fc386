"""The writing half of a checkpoint, without torch: a safetensors file as a stream, and the one thread that writes.

Stock safetensors reads the files. It does not write them: its writer keeps no running hash and answers a full
disk without the system's words; this one raises the plain OSError and costs one pass over the bytes.
"""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError

CHUNK_BYTES = 8 * 2**20


def write_file(
    path: Path, tensors: Mapping[str, memoryview], stop: threading.Event | None = None
) -> dict[str, int | str]:
    """Write flat float32 tensors to the new file at `path`, force it to the disk, and return its {"bytes", "sha256"}.

    Hashes while writing, a chunk at a time. `stop`, once set, ends it between two chunks.

    Raises:
        OSError: as the system says it; what is written stays for the caller to remove.
        PipelineError: `stop` was set.
    """
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as stream:
        for block in (memoryview(_header(tensors)), *tensors.values()):
            for at in range(0, len(block), CHUNK_BYTES):
                if stop is not None and stop.is_set():
                    raise PipelineError(f"{path}: writing was broken off")
                chunk = block[at : at + CHUNK_BYTES]
                digest.update(chunk)
                put(stream, chunk)
        os.fsync(stream.fileno())
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


def put(stream: FileIO, chunk: memoryview) -> None:
    """Write the whole chunk; the system may take it in parts."""
    while chunk:
        chunk = chunk[stream.write(chunk) :]


class Writer:
    """One background thread with at most one piece of work."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint-writer")
        self._work: Future[Any] | None = None
        self.stop = threading.Event()

    def begin(self, work: Callable[[], Any]) -> None:
        """Begin the work; the one before must have been taken."""
        assert self._work is None, "one save in flight"
        self._work = self._pool.submit(work)

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return self._work is not None and not self._work.done()

    def wait(self) -> None:
        """Return when no work is under way; its result stays to be taken."""
        if self._work is not None:
            self._work.exception()

    def take(self) -> Any:
        """Return the finished work's result, or raise what it raised; waits for it."""
        assert self._work is not None, "nothing was begun"
        work, self._work = self._work, None
        return work.result()

    def close(self) -> None:
        """Break off what is under way and end the thread."""
        self.stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def explain_os_error(error: OSError, path: Path) -> str:
    """Return one line with the system's words and the path (`path` if the error names none); how much is free if it is full."""
    where = Path(error.filename or path)
    words = os.strerror(error.errno) if error.errno else str(error)
    notes = [error.strerror] if error.strerror and error.strerror != words else []
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(folder for folder in (where, *where.resolve().parents) if folder.exists())
        status = os.statvfs(there)
        notes.append(f"{status.f_bavail * status.f_frsize} bytes and {status.f_favail} names free")
    return f"{words}: {where}" + (f" ({'; '.join(notes)})" if notes else "")


def _header(tensors: Mapping[str, memoryview]) -> bytes:
    """Return the file's beginning: eight bytes of length, then JSON padded so that the data is aligned."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for key, view in tensors.items():
        assert view.format == "B" and len(view) and len(view) % 4 == 0, key
        offsets = [offset, offset + len(view)]
        header[key] = {"dtype": "F32", "shape": [len(view) // 4], "data_offsets": offsets}
        offset += len(view)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
