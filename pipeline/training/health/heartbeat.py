"""A sign of life from each rank: a record of fixed size, written in place, that anyone may read without a lock.

Only the loop writes it, never a thread of its own: a rank that hangs falls silent. Who judges the silence is not
this process (`launch.supervisor`). When a step lasts too long the rank writes its stacks by itself, from C, whatever
holds Python's lock.

One `beat` of a step in which nothing is due costs 0.5 us, one that writes about 0.2 ms (a busy two-core machine); one a
second is written at most, and one at each change of phase.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, Self, get_args

from pipeline.paths import RunPaths

Phase = Literal["start", "load", "step", "save", "evaluate", "stop"]
RECORD_BYTES = 512
SECONDS_BETWEEN_BEATS = 1.0
READS = 3


@dataclass(frozen=True)
class Beat:
    """The last sign of life of one rank."""

    rank: int
    step: int
    """Finished steps."""
    phase: Phase
    monotonic_seconds: float
    """CLOCK_MONOTONIC of `host` when it was written: for readers on the same machine."""
    time: float
    """Seconds since 1970 when it was written: for all others, as exact as the machines' clocks agree."""
    pid: int
    host: str
    waited_seconds: float = 0.0
    """How long of its life the loop stood in a collective, told from samples; the slowest rank never waits."""


class Waits:
    """Estimates how long this thread stands in collectives: a second thread looks 20 times a second where it is.

    A thread inside a collective has one of these files on its stack, whichever library called it.
    """

    PLACES = ("/torch/distributed/", "/deepspeed/comm/", "/pipeline/training/world.py")
    SECONDS_BETWEEN_LOOKS = 0.05
    FRAMES = 40

    def __init__(self) -> None:
        """Watch the thread that calls this."""
        self.seconds = 0.0
        self._watched, self._ended = threading.get_ident(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="waits", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the looking."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(self.SECONDS_BETWEEN_LOOKS):
            now = time.monotonic()
            if self._in_collective():
                self.seconds += now - before
            before = now

    def _in_collective(self) -> bool:
        frame = sys._current_frames().get(self._watched)
        for _ in range(self.FRAMES):
            if frame is None:
                return False
            if any(place in frame.f_code.co_filename for place in self.PLACES):
                return True
            frame = frame.f_back
        return False


class Heartbeat:
    """This rank's record; a context manager that is in phase "start" at its begin and "stop" at its end."""

    def __init__(
        self,
        paths: RunPaths,
        rank: int,
        *,
        hang_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open the record of `rank`; steps longer than `hang_seconds` leave their stacks in `paths.stacks(rank)`."""
        self._rank, self._hang_seconds, self._clock = rank, hang_seconds, clock
        self._step, self._phase, self._written_seconds = 0, "start", -SECONDS_BETWEEN_BEATS
        self._host, self._pid = socket.gethostname()[:64], os.getpid()
        self._path, self._stacks_path = paths.heartbeat(rank), paths.stacks(rank)
        self._descriptor = self._stacks = -1
        self._waits: Waits | None = None

    def beat(self, step: int) -> None:
        """Say that `step` steps are finished, and give the next one `hang_seconds` from now."""
        self._step = step
        now_seconds = self._clock()
        if now_seconds - self._written_seconds >= SECONDS_BETWEEN_BEATS:
            self._write(now_seconds)

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Be in `phase` for the block, and in the one before afterwards."""
        before, self._phase = self._phase, phase
        self._write(self._clock())
        try:
            yield
        finally:
            self._phase = before
            self._write(self._clock())

    def enter(self, phase: Phase) -> None:
        """Be in `phase` from now on."""
        self._phase = phase
        self._write(self._clock())

    def __enter__(self) -> Self:
        for path in (self._path, self._stacks_path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._stacks = os.open(
            self._stacks_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        self._waits = Waits()
        self._write(self._clock())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._waits is not None:
            self._waits.close()
        self._phase = "stop"
        self._write(self._clock(), armed=False)
        os.close(self._descriptor)
        empty = os.fstat(self._stacks).st_size == 0
        os.close(self._stacks)
        if empty:
            self._stacks_path.unlink(missing_ok=True)  # A newer attempt at this run may have removed it.

    def _write(self, now_seconds: float, *, armed: bool = True) -> None:
        self._written_seconds = now_seconds
        waited = round(self._waits.seconds, 2) if self._waits is not None else 0.0
        beat = Beat(
            self._rank,
            self._step,
            self._phase,  # type: ignore[arg-type]
            now_seconds,
            time.time(),
            self._pid,
            self._host,
            waited,
        )
        os.pwrite(self._descriptor, encode(beat), 0)
        if armed:
            # Here and not at every beat: it starts a thread, and a second more or less makes no difference.
            faulthandler.dump_traceback_later(self._hang_seconds, file=self._stacks)


def name_silent(beats: Sequence[Beat], rank: int) -> str:
    """Return which rank beside `rank` has been silent longest, in which step and phase, for a line to the user.

    Ages are relative to the newest beat of all, by the machines' clocks: a rank that was killed or stopped fell
    silent first, and those that wait for it a little later. Who has left a record of its end is not silent.
    """
    others = [beat for beat in beats if beat.rank != rank and beat.phase != "stop"]
    if not others:
        return "every other rank has said that it ends: see what it says"
    silent = min(others, key=lambda beat: (beat.step, beat.time))
    seconds = time.time() - silent.time
    return (
        f"silent longest: rank {silent.rank} on {silent.host}, pid {silent.pid}, for {seconds:.0f} s, "
        f"after step {silent.step}, phase {silent.phase}"
    )


def encode(beat: Beat) -> bytes:
    """Return the record: JSON padded with spaces to 512 bytes, a line's end last, its own CRC-32 in front."""
    text = json.dumps(asdict(beat)).encode()
    payload = text + b" " * (RECORD_BYTES - len(text) - 10) + b"\n"
    assert len(payload) == RECORD_BYTES - 9, beat
    return b"%08x " % zlib.crc32(payload) + payload


def decode(record: bytes) -> Beat | None:
    """Return the beat, or None for bytes that are not one whole record."""
    digest, _, payload = record.partition(b" ")
    if len(record) != RECORD_BYTES or digest != b"%08x" % zlib.crc32(payload):
        return None
    fields: dict[str, Any] = json.loads(payload)
    return Beat(**fields) if fields["phase"] in get_args(Phase) else None


def read_heartbeats(paths: RunPaths) -> list[Beat]:
    """Return the last beat of each rank that has left one, in the order of ranks.

    Takes no lock: a record that is caught half written is read again.
    """
    beats = []
    for path in sorted(paths.heartbeats.glob("rank-*.json")):
        for _ in range(READS):
            beat = decode(path.read_bytes())
            if beat is not None:
                beats.append(beat)
                break
    return beats
