"""Records of a run: one JSON line each in `metrics.jsonl`, which is the truth; trackers are fed from the file.

A record is on its way to the disk before anybody else hears of it. What the machine did meanwhile is in
`system.jsonl`; what is to be kept beside numbers (pictures, files, the exported model) in `artifacts.jsonl`.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pipeline.errors import StoppedError
from pipeline.tracking.goodput import goodput
from pipeline.tracking.machine import Machine, Watch
from pipeline.tracking.redaction import say

Status = Literal["finished", "failed", "stopped"]
What = Literal["image", "file", "model"]
RECORD_FIELDS = frozenset({"time", "kind", "attempt", "step", "samples", "resumed_step", "nonfinite"})
CLOSE_SECONDS = 20.0
SECONDS_BETWEEN_SYSTEM_RECORDS = 10.0


class Sender(Protocol):
    """What carries records from the files to a tracking server, in the background."""

    def wake(self) -> None:
        """Say that the files have grown."""

    def close(self, status: Status, wait_seconds: float) -> int:
        """Send what is left for at most `wait_seconds`, end the run there; return how many records were not sent."""


class Lines:
    """A file of JSON lines that only grows; a full disk costs no line and stops nobody."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._held, self._said = path, b"", False
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _end_torn_line(self._descriptor)

    def add(self, value: Mapping[str, Any]) -> None:
        """Append one line: one `write`, so that a kill tears at most the last one and two writers never mix theirs.

        What the disk does not take is held and comes first the next time.
        """
        assert self._descriptor is not None, "add() after close()"
        self._held += (json.dumps(value, allow_nan=False) + "\n").encode()
        self._flush()

    def close(self) -> None:
        """Force the lines to the disk."""
        if self._descriptor is None:
            return
        try:
            self._flush()
            os.fsync(self._descriptor)
        except OSError as error:
            say(f"{self._path}: {error.strerror}; the last records may be lost")
        if self._held:
            say(f"{self._path}: {self._held.count(10)} lines could not be written and are lost")
        os.close(self._descriptor)
        self._descriptor = None

    @property
    def closed(self) -> bool:
        """Whether no more can be added."""
        return self._descriptor is None

    def _flush(self) -> None:
        assert self._descriptor is not None
        try:
            while self._held:
                self._held = self._held[os.write(self._descriptor, self._held) :]
            self._said = False
        except OSError as error:
            if not self._said:
                self._said = True
                say(
                    f"{self._path}: {error.strerror}; records are held in memory and written when it takes them"
                )


class Records:
    """The open record book of one attempt; a context manager that closes itself with the right status."""

    def __init__(
        self,
        metrics: Path,
        *,
        kind: str,
        attempt: str,
        resumed_step: int = 0,
        sender: Sender | None = None,
        watched: bool = False,
        global_batch: int | None = None,
    ) -> None:
        """Open `metrics`; `watched` records the machine too, and with a `global_batch` the run's goodput."""
        self._kind, self._attempt, self._resumed_step = kind, attempt, resumed_step
        self._sender, self._rewinds, self._folder = sender, 0, metrics.parent
        self._lines, self._artifacts = Lines(metrics), metrics.with_name("artifacts.jsonl")
        self._system_lines = Lines(metrics.with_name("system.jsonl")) if watched else None
        self._machine = Machine(metrics.parent)
        self._global_batch = global_batch
        self._truth = read_records(metrics, kind) if global_batch else []
        self._watch = Watch(SECONDS_BETWEEN_SYSTEM_RECORDS)
        self._opened_seconds, self.blocked_seconds = time.monotonic(), 0.0

    def log(self, step: int, values: Mapping[str, float], *, samples: int | None = None) -> None:
        """Append one record of `values` at optimizer step `step`; a non-finite value becomes null and is named."""
        with self._counted():
            record = self._record(step, values) | {"samples": samples}
            self._lines.add(record)
            self._remember(record)
            if self._system_lines is not None and self._watch.due():
                self._system_lines.add(self._record(step, self._system()))
            if self._sender:
                self._sender.wake()

    def rewind(self, step: int) -> None:
        """Let the records that follow replace those after `step`, as a new attempt's would: the run has gone back."""
        self._rewinds += 1
        self._attempt = f"{self._attempt.partition('+')[0]}+{self._rewinds}"
        self._resumed_step = step

    def image(self, path: Path, step: int, name: str) -> None:
        """Keep the picture as image `name` of `step` on the tracking server; it must stay in place until it is sent."""
        self.keep("image", path, step, name)

    def artifact(self, path: Path, folder: str) -> None:
        """Keep the file as `FOLDER/FILE` on the tracking server; it must stay in place until it is sent."""
        self.keep("file", path, 0, folder)

    def keep(self, what: What, path: Path, step: int, name: str) -> None:
        """Write down that the file or folder belongs on the tracking server as `name`, and wake who takes it there."""
        with self._counted():
            inside = path.resolve().is_relative_to(self._folder.resolve())
            place = path.resolve().relative_to(self._folder.resolve()) if inside else path.resolve()
            entry = {"time": time.time(), "kind": self._kind, "attempt": self._attempt, "step": int(step)}
            lines = Lines(self._artifacts)
            lines.add(entry | {"what": what, "name": name, "path": place.as_posix()})
            lines.close()
            if self._sender:
                self._sender.wake()

    def close(self, status: Status = "finished", *, wait_seconds: float | None = None) -> None:
        """Force the records to the disk and give the tracking server at most 20 seconds to take the rest."""
        if self._lines.closed:
            return
        self._lines.close()
        if self._system_lines is not None:
            self._system_lines.close()
        if self._sender:
            self._sender.close(status, CLOSE_SECONDS if wait_seconds is None else wait_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, StoppedError | KeyboardInterrupt)
        self.close("finished" if error is None else "stopped" if stopped else "failed")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Add the block to the seconds that the tracker has kept its caller waiting."""
        began_seconds = time.perf_counter()
        yield
        self.blocked_seconds += time.perf_counter() - began_seconds

    def _record(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        assert not RECORD_FIELDS & values.keys(), f"a value may not be called {RECORD_FIELDS & values.keys()}"
        record: dict[str, Any] = {"time": time.time(), "kind": self._kind, "attempt": self._attempt}
        record["step"] = int(step)
        if self._resumed_step:
            record["resumed_step"] = self._resumed_step
        plain = {name: value if type(value) is int else float(value) for name, value in values.items()}
        record |= {name: value if math.isfinite(value) else None for name, value in plain.items()}
        nonfinite = sorted(name for name, value in plain.items() if not math.isfinite(value))
        if nonfinite:
            record["nonfinite"] = nonfinite
        return record

    def _remember(self, record: dict[str, Any]) -> None:
        """Keep the run's truth, as far as goodput needs it."""
        if self._global_batch:
            while self._truth and self._truth[-1]["step"] >= record["step"]:
                self._truth.pop()
            self._truth.append(record)

    def _system(self) -> dict[str, float]:
        """Return the machine's figures, what the tracker itself has cost so far, and the run's goodput."""
        open_seconds = max(time.monotonic() - self._opened_seconds, 1e-9)
        values = self._machine.figures() | {
            "tracker/blocked_seconds": self.blocked_seconds,
            "tracker/blocked_percent": 100 * self.blocked_seconds / open_seconds,
        }
        share = goodput(self._truth, self._global_batch) if self._global_batch else None
        return values if share is None else values | {"goodput": share}


class NoRecords(Records):
    """Records that go nowhere: for the ranks above 0."""

    def __init__(self) -> None:
        self.blocked_seconds = 0.0

    def log(self, step: int, values: Mapping[str, float], *, samples: int | None = None) -> None:
        """Do nothing: rank 0 writes."""

    def rewind(self, step: int) -> None:
        """Do nothing: rank 0 writes."""

    def keep(self, what: What, path: Path, step: int, name: str) -> None:
        """Do nothing: rank 0 writes."""

    def close(self, status: Status = "finished", *, wait_seconds: float | None = None) -> None:
        """Do nothing: rank 0 writes."""


def read_records(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the records of `kind` in the order of their steps' truth: a later attempt replaces earlier ones.

    An attempt replaces every record after the step it resumed from. What a stale process of an older attempt
    still writes afterwards is left out. A torn last line is left out; damage elsewhere is left out and counted
    aloud.
    """
    records: list[dict[str, Any]] = []
    attempts: list[str] = []
    for record in readable_records(path):
        if record["kind"] != kind:
            continue
        attempt = record["attempt"]
        if attempt not in attempts:
            attempts.append(attempt)
            resumed_step = record.get("resumed_step", 0)
            records = [earlier for earlier in records if earlier["step"] <= resumed_step]
        if attempt == attempts[-1]:
            records.append(record)
    return records


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record on one line of `metrics.jsonl`, or None if the line is not a whole record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole and {"time", "kind", "attempt"} <= record.keys() else None


def record_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite values of a record by name, without the fields that say when and by whom."""
    return {name: value for name, value in record.items() if name not in RECORD_FIELDS and value is not None}


def readable_records(path: Path) -> list[dict[str, Any]]:
    """Return every whole record of the file, of all kinds and attempts; says aloud how many lines are damaged."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    # What follows the last newline is torn, or empty.
    parsed = [parse_record(line) for line in lines[:-1] if line]
    damaged = parsed.count(None)
    if damaged:
        say(f"{path}: {damaged} of {len(parsed)} lines are not whole records (cut off by a kill); left out")
    return [record for record in parsed if record is not None]


def _end_torn_line(descriptor: int) -> None:
    """Give a line that a kill cut off its end, so that the next record starts on a line of its own."""
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
        os.write(descriptor, b"\n")
