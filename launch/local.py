"""Several ranks on this machine without a cluster: start, watch, forward signals, name who failed first.

One loop in one thread: SIGCHLD and the signals to forward arrive as bytes in a pipe beside the output of the ranks.
No rank outlives the launcher: each gets the kernel's KILL when the launcher dies, however it dies, and is the head of
a process group, so that what it started goes with it.
"""

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from launch.nodes import COMMON, OPENMPI, TORCHRUN, free_port
from launch.supervisor.exits import FINAL_CODES, STOP_SIGNAL_CODES
from launch.supervisor.hang import Judge, name_guilty
from launch.supervisor.history import newest_step
from pipeline.config.health import HealthConfig
from pipeline.errors import NoProgressError, PipelineError, StoppedError, ToolError
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import read_heartbeats

# How long after the first failure others may follow: a rank that was killed often takes its peers along within
# milliseconds, and the one killed is the one to name.
SETTLE_SECONDS = 0.5
# From TERM to KILL for ranks whose world is broken: they can write their logs, no longer a checkpoint.
END_SECONDS = 5.0
# Ranks leave together after a stop; one that still runs so long after the first is stuck (as srun --wait=60).
STOP_SECONDS = 60.0
# How often heartbeats are looked at.
LOOK_SECONDS = 0.5
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class _Rank:
    """One rank: its process, the code it ended with (128 + n for signal n), and output without a line's end yet."""

    number: int
    process: subprocess.Popen[bytes]
    code: int | None = None
    by_signal: bool = False
    unfinished: bytes = b""


@dataclass
class Heartbeats:
    """Where the ranks of a training leave their signs of life, and who judges them."""

    run: RunPaths
    judge: Judge

    @classmethod
    def expected(cls, run: RunPaths, health: HealthConfig, processes: int) -> "Heartbeats":
        """Return those of a start that is about to begin; an earlier start's are removed."""
        for old in run.heartbeats.glob("rank-*.json"):
            old.unlink(missing_ok=True)
        return cls(run, Judge(health, processes))


@dataclass
class _World:
    """All ranks of one run, who failed within the settling time, and when their end is due (monotonic seconds)."""

    heartbeats: Heartbeats | None = None
    stuck: bool = False
    ranks: list[_Rank] = field(default_factory=list)
    failed: list[_Rank] = field(default_factory=list)
    blamed: _Rank | None = None
    terminate_at: float | None = None
    kill_at: float | None = None
    interrupts: int = 0

    @property
    def running(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.code is None]


def run_local(
    argv: Sequence[str],
    processes: int,
    *,
    threads: int,
    environment: Mapping[str, str] | None = None,
    heartbeats: Heartbeats | None = None,
) -> int:
    """Run `processes` copies of `argv` as one world on this machine and return the exit code of the whole.

    0 if all ended with 0; 75 if they stopped on request; else the code of the rank that failed first (128 + n for a
    signal n), which is named on standard error while the others are ended. TERM, INT and USR2 go to every rank; a
    second INT ends them at once. Rank 0 owns the terminal, the lines of the others get their rank in front.
    With `heartbeats`, ranks that hang leave their stacks in the run folder, the guilty one is named, all are killed,
    and the code is 1. `environment` replaces this process's; `threads` is OMP_NUM_THREADS. Call it from the main thread.

    Raises:
        ToolError: if the command cannot be started.
    """
    world = _World(heartbeats)
    base = _clean_environment(os.environ if environment is None else environment)
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(os.getpid()))}
    base |= {"OMP_NUM_THREADS": str(threads)}
    with _signals_as_bytes() as wake, selectors.DefaultSelector() as selector:
        selector.register(wake, selectors.EVENT_READ)
        try:
            for number in range(processes):
                rank = _start(argv, number, processes, base)
                world.ranks.append(rank)
                if rank.process.stdout is not None:
                    selector.register(rank.process.stdout, selectors.EVENT_READ, rank)
            while world.running:
                _wait_once(world, wake, selector)
            _drain(selector, wake)
            _blame(world)
        finally:
            _end(world.running, signal.SIGKILL)
            for rank in world.ranks:
                rank.process.wait()
    return _exit_code(world)


def train_local(
    argv: Sequence[str], processes: int, run: RunPaths, *, threads: int, health: HealthConfig
) -> int:
    """Run the training `argv` of `run` as `run_local` does, again after a crash or hang behind a newer checkpoint.

    Returns what `run_local` does: done, stopped and what would only happen again end it, and so does a crash before
    the first checkpoint. 6 when a start that went on from a checkpoint has crashed before the next one.
    """
    crashed = False
    while True:
        before = newest_step(run)
        heartbeats = Heartbeats.expected(run, health, processes)
        code = run_local(argv, processes, threads=threads, heartbeats=heartbeats)
        if code in (0, StoppedError.exit_code) or code in FINAL_CODES or code in STOP_SIGNAL_CODES:
            return code
        newest = newest_step(run)
        if newest == before:
            if not crashed:
                return code
            _say(f"no progress: it has crashed again at step {newest}'s checkpoint")
            return NoProgressError.exit_code
        crashed = True
        _say(f"starts again from the checkpoint of step {newest}")


def _clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a copy without what another launcher left there."""
    stale = {*COMMON, *OPENMPI.numbers, *TORCHRUN.marks, "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in environment.items() if name not in stale}


def _start(argv: Sequence[str], number: int, processes: int, base: Mapping[str, str]) -> _Rank:
    place = dict(zip(COMMON, map(str, (number, processes, number, processes)), strict=True))
    launcher = os.getpid()

    def die_with_launcher() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died between fork and prctl
            os._exit(128 + signal.SIGKILL)

    try:
        process = subprocess.Popen(
            list(argv),
            env={**base, **place},
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else subprocess.PIPE,
            stderr=None if number == 0 else subprocess.STDOUT,
            process_group=0,
            # Two system calls, neither of which takes a lock that another thread could hold at the fork.
            preexec_fn=die_with_launcher,
        )
    except OSError as error:
        raise ToolError(
            f"{argv[0]}: cannot be started ({error.strerror}); is it installed and executable?"
        ) from None
    return _Rank(number, process)


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[int]:
    """Yield a descriptor that gives a byte, the signal's number, for SIGCHLD and each signal to forward."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)

    def nothing(number: int, frame: FrameType | None) -> None:
        """Only a handler makes Python write the byte."""

    old_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, nothing) for number in (signal.SIGCHLD, *FORWARDED)}
    try:
        yield read_end
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        os.close(read_end)
        os.close(write_end)


def _wait_once(world: _World, wake: int, selector: selectors.BaseSelector) -> None:
    """Sleep until something happens, then do what it asks for."""
    dues = [due for due in (world.terminate_at, world.kill_at) if due is not None]
    timeout = max(0.0, min(dues) - time.monotonic()) if dues else (LOOK_SECONDS if world.heartbeats else None)
    for key, _ in selector.select(timeout):
        if key.fd == wake:
            for number in os.read(wake, 4096):
                if number in FORWARDED:
                    _forward(world, number)
        else:
            _pass_output(selector, key.data)
    for rank in world.running:
        _note_end(world, rank)
    now = time.monotonic()
    if world.terminate_at is not None and now >= world.terminate_at:
        world.terminate_at = None
        _blame(world)
        _end(world.running, signal.SIGTERM)
        world.kill_at = now + END_SECONDS
    elif world.kill_at is not None and now >= world.kill_at:
        world.kill_at = None
        for rank in world.running:
            _say(f"rank {rank.number} still runs and is killed")
        _end(world.running, signal.SIGKILL)
    elif not dues and world.heartbeats is not None and world.running:
        _end_if_stuck(world, world.heartbeats)


def _end_if_stuck(world: _World, heartbeats: Heartbeats) -> None:
    """Where a rank has been silent for too long: keep all stacks, name the guilty one, kill all."""
    silence = heartbeats.judge.look(read_heartbeats(heartbeats.run))
    if silence is None:
        return
    running = {rank.number: rank for rank in world.running}

    def ask() -> None:
        for rank in running.values():
            _tell(rank, signal.SIGUSR1)

    guilty, how = name_guilty(heartbeats.run, heartbeats.judge, silence, list(running), ask)
    _say(f"stuck: rank {guilty} of {len(world.ranks)} {how}")
    world.stuck, world.blamed = True, running[guilty]
    _end(world.running, signal.SIGKILL)


def _forward(world: _World, number: int) -> None:
    world.interrupts += number == signal.SIGINT
    if world.interrupts > 1:
        _end(world.running, signal.SIGKILL)
        return
    for rank in world.running:
        _tell(rank, number)


def _tell(rank: _Rank, number: int) -> None:
    # Not Popen.send_signal, which reaps: the zombie belongs to _note_end.
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank.process.pid, number)


def _note_end(world: _World, rank: _Rank) -> None:
    """Take note if the rank has ended, kill what it left behind, and set the time by which the others must follow."""
    # WNOWAIT leaves the zombie, and with it the group's number, in place until the group is killed.
    if os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.process.pid, signal.SIGKILL)
    code = rank.process.wait()
    rank.by_signal = code < 0
    rank.code = 128 - code if code < 0 else code
    now = time.monotonic()
    if rank.code == StoppedError.exit_code:
        if world.kill_at is None and world.terminate_at is None:
            world.kill_at = now + STOP_SECONDS
    elif rank.code != 0 and world.blamed is None and world.interrupts < 2:
        world.failed.append(rank)
        if len(world.failed) == 1:
            world.terminate_at, world.kill_at = now + SETTLE_SECONDS, None


def _blame(world: _World) -> None:
    """Name the rank that failed first, once; among those within the settling time, one that a signal ended."""
    if world.blamed is not None or not world.failed:
        return
    rank = world.blamed = min(world.failed, key=lambda rank: not rank.by_signal)
    how = f"exit code {rank.code}"
    if rank.by_signal:
        how = f"killed by {signal.Signals((rank.code or 0) - 128).name} ({how})"
        if rank.code == 128 + signal.SIGKILL:
            how += "; if nobody did that, the machine ran out of memory: see dmesg"
    _say(f"rank {rank.number} of {len(world.ranks)} failed first: {how}")


def _end(ranks: Sequence[_Rank], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, number)


def _pass_output(selector: selectors.BaseSelector, rank: _Rank) -> None:
    """Pass the lines a rank has written on to standard error, each with the rank in front."""
    stream = rank.process.stdout
    assert stream is not None
    payload = os.read(stream.fileno(), 65536)
    *lines, rank.unfinished = (rank.unfinished + payload).split(b"\n")
    if not payload:
        selector.unregister(stream)
        stream.close()
        lines, rank.unfinished = [rank.unfinished] if rank.unfinished else [], b""
    _write(b"".join(b"[rank %d] %s\n" % (rank.number, line) for line in lines))


def _drain(selector: selectors.BaseSelector, wake: int) -> None:
    """Pass on what is left in the pipes of ranks that have ended."""
    selector.unregister(wake)
    while selector.get_map():
        ready = selector.select(1.0)
        if not ready:  # a process that left its rank's group holds the pipe open
            return
        for key, _ in ready:
            _pass_output(selector, key.data)


def _exit_code(world: _World) -> int:
    if world.interrupts > 1:
        return 128 + signal.SIGINT
    if world.stuck:
        return PipelineError.exit_code
    if world.blamed is not None and world.blamed.code is not None:
        return world.blamed.code
    return max((rank.code or 0 for rank in world.ranks), default=0)


def _say(message: str) -> None:
    _write(f"ldm: {message}\n".encode())


def _write(payload: bytes) -> None:
    sys.stderr.flush()
    while payload:
        payload = payload[os.write(2, payload) :]
