"""Decoding in processes of its own, each with a limit on CPU seconds and on memory for a picture.

A decode in a thread cannot be stopped, so there only the header's arithmetic protects (`image_header`). Here the
kernel does: RLIMIT_CPU ends a process whose picture takes too long, RLIMIT_AS refuses the memory, and a crash of a
codec takes a process nobody misses. The child answers with a header in JSON and raw pixels, never with a pickle:
it has read untrusted bytes. What a limit stops is failed(error), not rejected, because it depends on the machine.
"""

import contextlib
import json
import os
import queue
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from preprocessing.filters import Failure, Rejection, Rules
from preprocessing.images import Picture

LENGTH = struct.Struct("<I")
OUT_OF_TIME, OUT_OF_MEMORY, CRASHED = "DecodeTimeLimit", "DecodeMemoryLimit", "DecoderCrashed"
SIGXCPU_CODES = (-24, -9)
"""SIGXCPU, or SIGKILL from the hard limit a second later."""


@dataclass(frozen=True)
class Limits:
    """What one picture may cost."""

    cpu_seconds: float
    memory_bytes: int


class DecodeProcesses:
    """A crew of decode processes; `decode` may be called from as many threads and waits for a free one."""

    def __init__(self, count: int, rules: Rules, limits: Limits) -> None:
        """Start `count` processes that decode by `rules`."""
        self._rules, self._limits = rules, limits
        self._idle: queue.Queue[_Process] = queue.Queue()
        for _ in range(count):
            self._idle.put(_Process(rules, limits))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while True:
            with contextlib.suppress(queue.Empty):
                self._idle.get_nowait().end()
                continue
            return

    def decode(self, payload: bytes, rules: Rules) -> Picture | Rejection | Failure:
        """Return what `prepare_image` makes of the picture, or which limit it broke."""
        assert rules == self._rules, "the processes were started with other rules"
        process = self._idle.get()
        try:
            outcome = process.ask(payload)
            if outcome is None:
                code = process.end()
                process = _Process(self._rules, self._limits)
                return Failure(OUT_OF_TIME if code in SIGXCPU_CODES else CRASHED)
            return outcome
        finally:
            self._idle.put(process)


class _Process:
    def __init__(self, rules: Rules, limits: Limits) -> None:
        settings = {"rules": rules.as_dict(), "seconds": limits.cpu_seconds, "memory": limits.memory_bytes}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "preprocessing.decode_child", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, payload: bytes) -> Picture | Rejection | Failure | None:
        """Return the child's answer, or None when it is gone."""
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(LENGTH.pack(len(payload)) + payload)
            self._child.stdin.flush()
            return read_outcome(self._child.stdout)
        except (BrokenPipeError, EOFError):
            return None

    def end(self) -> int:
        """Close the pipes, end the child and return its exit code."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            code = self._child.wait(5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        self._child.stdout.close()
        return code


def write_outcome(stream: IO[bytes], outcome: Picture | Rejection | Failure) -> None:
    """Write the outcome as a JSON header and, for a picture, its pixels."""
    header: dict[str, Any]
    pixels = b""
    if isinstance(outcome, Picture):
        pixels = outcome.pixels.tobytes()
        height, width, _ = outcome.pixels.shape
        size = [outcome.original_height, outcome.original_width]
        facts = {
            "original": size,
            "crop": outcome.crop,
            "scaling": outcome.scaling,
            "remarks": outcome.remarks,
        }
        header = {"picture": [height, width], **facts}
    elif isinstance(outcome, Rejection):
        header = {"reason": outcome.reason}
    else:
        header = {"error": outcome.error}
    text = json.dumps(header).encode()
    stream.write(LENGTH.pack(len(text)) + text + pixels)
    stream.flush()


def read_outcome(stream: IO[bytes]) -> Picture | Rejection | Failure:
    """Return the outcome that `write_outcome` wrote.

    Raises:
        EOFError: when the stream ends early.
    """
    (length,) = LENGTH.unpack(read_exactly(stream, LENGTH.size))
    header = json.loads(read_exactly(stream, length))
    if "reason" in header:
        return Rejection(str(header["reason"]))
    if "error" in header:
        return Failure(str(header["error"]))
    height, width = (int(side) for side in header["picture"])
    pixels = np.frombuffer(read_exactly(stream, height * width * 3), np.uint8).reshape(height, width, 3)
    top, left, crop_height, crop_width = (int(side) for side in header["crop"])
    original = [int(side) for side in header["original"]]
    remarks = tuple(str(remark) for remark in header["remarks"])
    crop = (top, left, crop_height, crop_width)
    return Picture(pixels, original[0], original[1], crop, int(header["scaling"]), remarks)


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """Return `size` bytes; raise EOFError when the stream ends before."""
    content = stream.read(size)
    if len(content) != size:
        raise EOFError(f"{len(content)} of {size} bytes")
    return content


@contextlib.contextmanager
def open_decoder(count: int, rules: Rules, limits: Limits) -> Iterator[DecodeProcesses | None]:
    """Yield a crew of `count` decode processes, or None for 0: decoding in the worker itself."""
    if count == 0:
        yield None
        return
    with DecodeProcesses(count, rules, limits) as processes:
        yield processes
