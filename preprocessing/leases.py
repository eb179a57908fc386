"""Leases: who is at work on which shard, so that no two workers do the same work while both live.

A lease is a file `DATASET/.leases/STEM.lease`, made by `O_EXCL`: a counter, which its worker raises a few times
within the life of a lease, and who the worker is. A reader holds a worker for dead when the counter stood still for
`lease_seconds` on the READER's own monotonic clock, so that no two clocks are ever compared; on the same machine
also when the process is gone. A dead worker's lease is taken over by renaming it, which one of many can do.

Correctness never rests on this: a worker that was only asleep finishes its shard and finds the names taken.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.publish import write_json

LEASE_FOLDER = ".leases"
LEASE_SUFFIX = ".lease"
WORK_NAME = "work.json"
COUNTER_DIGITS = 12
BEATS = 6
"""How often a counter is raised within the life of a lease: one slow write must not cost it."""


@dataclass(frozen=True)
class Owner:
    """A process: its host for people, the rest so that the same machine can tell whether it still runs."""

    host: str
    pid: int
    machine: str
    started: str

    @classmethod
    def here(cls) -> Self:
        """Return this process."""
        return cls(socket.gethostname(), os.getpid(), _machine(), _start_of(os.getpid()) or "")

    def is_gone(self) -> bool:
        """Return whether the process ended for sure: it was one of this machine and is here no more."""
        known = bool(self.machine) and self.machine == _machine()
        return known and _start_of(self.pid) != self.started


@dataclass
class Lease:
    """A shard that is ours while the counter goes up."""

    stem: str
    path: Path
    descriptor: int
    counter: int = 0

    def beat(self) -> None:
        """Raise the counter. Taken over, the file has another name by now, and nobody reads it there."""
        self.counter += 1
        os.pwrite(self.descriptor, f"{self.counter:0{COUNTER_DIGITS}d}".encode(), 0)
        os.fsync(self.descriptor)  # readers on other nodes see it only then

    def release(self) -> None:
        """Give the shard back, unless somebody took it over."""
        with contextlib.suppress(OSError):
            ours, there = os.fstat(self.descriptor), self.path.stat()
            if (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino):
                self.path.unlink()
        os.close(self.descriptor)


class Leases:
    """The leases of one worker on the data set in the folder `dataset`, with the thread that keeps them alive."""

    def __init__(
        self, dataset: Path, lease_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._life_seconds, self._clock = dataset / LEASE_FOLDER, lease_seconds, clock
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._held: dict[str, Lease] = {}
        self._lock, self._end = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._keep_alive, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._heart.join()
        for stem in list(self._held):
            self.release(stem)

    def take(self, stem: str) -> bool:
        """Return whether the shard is ours now: it was free, or its worker is dead. Ask again later if not."""
        path = self._folder / f"{stem}{LEASE_SUFFIX}"
        if self._create(stem, path):
            return True
        found = _content(path)
        if found is None or not self._is_dead(stem, found):
            return False
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            os.rename(path, aside)
        except FileNotFoundError:  # another was faster
            return False
        if (
            _content(aside) != found
        ):  # taken over and alive since we looked: put it back if nobody came between
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)
        return self._create(stem, path)

    def release(self, stem: str) -> None:
        """Give back the shard if it was ours: a shard that was found finished needs no lease."""
        with self._lock:
            lease = self._held.pop(stem, None)
        if lease is not None:
            lease.release()

    def tidy(self, stem: str) -> None:
        """Remove the lease of a worker that died between finishing the shard and giving it back: nobody takes it over."""
        path = self._folder / f"{stem}{LEASE_SUFFIX}"
        found = _content(path)
        if found is not None and self._is_dead(stem, found):
            path.unlink(missing_ok=True)

    def _create(self, stem: str, path: Path) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except (FileExistsError, FileNotFoundError):  # held; or the folder went as the last worker left
            return False
        lease = Lease(stem, path, descriptor)
        os.pwrite(descriptor, f"{0:0{COUNTER_DIGITS}d} {json.dumps(asdict(Owner.here()))}\n".encode(), 0)
        with self._lock:
            self._held[stem] = lease
        self._seen.pop(stem, None)
        return True

    def _is_dead(self, stem: str, found: bytes) -> bool:
        owner, now = owner_of(found), self._clock()
        if owner is not None and owner.is_gone():
            return True
        seen, since = self._seen.get(stem, (None, now))
        if seen != found:
            self._seen[stem] = (found, now)
            return False
        return now - since >= self._life_seconds

    def _keep_alive(self) -> None:
        while not self._end.wait(self._life_seconds / BEATS):
            with self._lock:
                for lease in self._held.values():
                    # A disk that fails here fails the worker's own writes too; those have the better message.
                    with contextlib.suppress(OSError):
                        lease.beat()


def note_work(dataset: Path, shards: int) -> None:
    """Leave word of how many shards there are in all, for `ldm status`."""
    path = dataset / LEASE_FOLDER / WORK_NAME
    if known_work(dataset) != shards:
        with contextlib.suppress(FileNotFoundError):  # `finalize` has cleared up: everything is done
            write_json(path, {"shards": shards})


def known_work(dataset: Path) -> int | None:
    """Return how many input shards the workers on this data set know of, or None when nobody is at work."""
    try:
        return int(json.loads((dataset / LEASE_FOLDER / WORK_NAME).read_text())["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def leased(dataset: Path) -> dict[str, Owner | None]:
    """Return who holds which shard, by stem."""
    return {
        path.name.removesuffix(LEASE_SUFFIX): owner_of(_content(path) or b"")
        for path in sorted((dataset / LEASE_FOLDER).glob(f"*{LEASE_SUFFIX}"))
        if not path.name.startswith(".")
    }


def remove_leases(dataset: Path) -> None:
    """Remove the folder of leases: every shard is finished."""
    shutil.rmtree(dataset / LEASE_FOLDER, ignore_errors=True)


def owner_of(content: bytes) -> Owner | None:
    """Return the process that a lease names, or None where it was killed before it wrote its name."""
    try:
        return Owner(**json.loads(content[COUNTER_DIGITS:]))
    except (ValueError, TypeError):
        return None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()  # opened anew each time: an open file may show an old state on NFS
    except OSError:
        return None


@cache
def _machine() -> str:
    """Return what tells this running machine, and this container on it, from all others; "" if that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """Return when the process started, in the kernel's ticks since boot, or None if it is gone or a zombie."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, start = facts[0], facts[19]
    return None if state in "ZX" else start
