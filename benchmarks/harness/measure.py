"""One timed run of one side: a callable in this process, or a command in a process of its own."""

import gc
import os
import resource
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

STDERR_TAIL_CHARACTERS = 2000


class CommandError(Exception):
    """A command under the clock failed or ran past its limit, so that its time means nothing."""


class Clock(Protocol):
    """Where seconds come from: an argument, so that the tests of the harness are exact."""

    def wall_seconds(self) -> float:
        """Return seconds on a clock that never goes back."""
        ...

    def cpu_seconds(self) -> float:
        """Return CPU seconds (user and system) of this process and of its children that have ended."""
        ...


class HostClock:
    """The machine's own clocks: CLOCK_MONOTONIC, and rusage of this process with its ended children."""

    def wall_seconds(self) -> float:
        """Return `time.perf_counter()`."""
        return time.perf_counter()

    def cpu_seconds(self) -> float:
        """Return user + system seconds of all threads of this process and of every child waited for."""
        usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)


HOST_CLOCK = HostClock()


@dataclass(frozen=True)
class Side:
    """What is timed under `name`: a callable without arguments, or an argv list that must exit 0.

    `calls` runs a callable that often inside one timed run, for work shorter than the clock can see; the
    seconds reported are for one call. Work on an accelerator must wait for the device before it returns.
    """

    name: str
    work: Callable[[], object] | Sequence[str]
    calls: int = 1
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    timeout_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.calls < 1 or (self.calls > 1 and not callable(self.work)):
            raise ValueError(
                f"side {self.name!r}: calls {self.calls}; allowed: 1 for a command, >= 1 otherwise"
            )


@dataclass(frozen=True)
class Sample:
    """The seconds of one call of side "a" or "b" in one round; CPU seconds count ended children too."""

    side: str
    round: int
    wall_seconds: float
    cpu_seconds: float | None


def run_once(side: Side) -> object:
    """Return what the side gives untimed: a callable's value, or a command's standard output as bytes."""
    if callable(side.work):
        return side.work()
    with tempfile.TemporaryFile() as stdout:
        _run_command(side, stdout)
        stdout.seek(0)
        return stdout.read()


def time_once(side: Side, clock: Clock) -> tuple[float, float]:
    """Return (wall, CPU) seconds of one call of the side.

    Garbage is collected before the clock starts, so that no side pays for what the other left behind. A
    command's CPU seconds come from `wait4` on that very process (its own ended children included).
    """
    if callable(side.work):
        gc.collect()
        cpu, wall = clock.cpu_seconds(), clock.wall_seconds()
        for _ in range(side.calls):
            side.work()
        wall, cpu = clock.wall_seconds() - wall, clock.cpu_seconds() - cpu
        return wall / side.calls, cpu / side.calls
    with open(os.devnull, "wb") as stdout:
        wall = clock.wall_seconds()
        cpu = _run_command(side, stdout)
        return clock.wall_seconds() - wall, cpu


def _run_command(side: Side, stdout: BinaryIO) -> float:
    """Return the CPU seconds of the side's command, run to its end in a session of its own."""
    assert not callable(side.work)
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            list(side.work),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=None if side.env is None else dict(side.env),
            cwd=side.cwd,
            start_new_session=True,
        )
        in_time = _ended_within(process.pid, side.timeout_seconds)
        if not in_time:
            os.killpg(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if in_time and process.returncode == 0:
            return usage.ru_utime + usage.ru_stime
        stderr.seek(0)
        tail = stderr.read().decode(errors="replace")[-STDERR_TAIL_CHARACTERS:].strip()
    fate = f"exit code {process.returncode}" if in_time else f"still running after {side.timeout_seconds} s"
    raise CommandError(f"benchmark side {side.name!r}: {fate}; only a command that exits 0 is timed\n{tail}")


def _ended_within(pid: int, timeout_seconds: float) -> bool:
    """Return whether the child ended in time; it is not reaped, so `wait4` can still read its usage."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], timeout_seconds)[0])
    finally:
        os.close(descriptor)
