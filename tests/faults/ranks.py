"""Runs one function in several processes as the ranks of a job, and names the rank that failed first.

sums = run_ranks("tests.faults.rank_work:all_reduced", world_size=2, args={"value": 3.0}, timeout_seconds=60)
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.outcome import ROOT, end_session, ended_within
from tests.faults.ports import reserved_port

TAIL_LINES = 40
# After the last result a rank meets the others once more and leaves; a dead one is not waited for.
TEARDOWN_SECONDS = 10.0
# From SIGABRT to SIGKILL at a time-out: enough to write every thread's stack.
STACKS_SECONDS = 2.0
# From the closing of a dying rank's sockets to its end: gigabytes may have to be given back.
ENDING_SECONDS = 10.0
# In /proc/PID/stat after the name: state is field 0, flags are field 6 (proc(5)); the bit is in linux/sched.h.
PROCESS_FLAGS_FIELD, PF_EXITING = 6, 0x4
# Another launcher's settings must not reach these ranks.
FOREIGN_ENVIRONMENT = ("SLURM_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_", "GROUP_", "ROLE_")


class RankError(AssertionError):
    """A job in which a rank failed: `rank` is the first, `exit_code` its own (minus the signal's number).

    `results` are those of the ranks that did give one, by rank; `stderr` is all that the first failing rank said.
    """

    def __init__(self, message: str, rank: int, exit_code: int, stderr: str, results: dict[int, Any]) -> None:
        super().__init__(message)
        self.rank, self.exit_code, self.stderr, self.results = rank, exit_code, stderr, results


class RanksTimeoutError(AssertionError):
    """A job past its limit: `alive` are the ranks that had neither ended nor given a result."""

    def __init__(self, message: str, alive: list[int], results: dict[int, Any]) -> None:
        super().__init__(message)
        self.alive, self.results = alive, results


@dataclass
class _Rank:
    """One process of the job and what it leaves in the job's folder."""

    number: int
    folder: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None or ended_within(self.process.pid, 0.0)

    @property
    def ending(self) -> bool:
        """Whether the kernel is taking it apart: its sockets are closed well before it counts as ended."""
        if self.ended:
            return True
        after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return bool(int(after_name[PROCESS_FLAGS_FIELD]) & PF_EXITING)

    def left(self, kind: str) -> dict[str, Any] | None:
        path = self.folder / f"{kind}-{self.number}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def stderr(self) -> str:
        return (self.folder / f"stderr-{self.number}").read_text(errors="replace")


def run_ranks(
    function: str,
    world_size: int,
    args: Mapping[str, Any],
    timeout_seconds: float,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Return what "module:function" returned on each rank, called as `function(**args)`, in the order of ranks.

    Arguments and results travel as JSON. Each rank is a fresh Python in the repository's root with RANK,
    LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, one thread and a private
    TORCH_EXTENSIONS_DIR; `env` is added last. The function itself joins the process group, if it wants one.
    A result counts as soon as it is written; the end of a rank after that is reported as a warning if it fails.
    At the first failure, and at the end, every process of the job is killed; ranks die with this process too.

    Raises: RankError naming the rank that failed first; RanksTimeoutError naming the ranks still alive.
    """
    deadline_seconds = time.monotonic() + timeout_seconds
    with _started(function, world_size, args, env) as ranks:
        while missing := [rank for rank in ranks if rank.left("result") is None]:
            failed = [rank for rank in missing if rank.ended and rank.left("result") is None]
            if failed or any(rank.left("failure") for rank in missing):
                raise _rank_error(ranks)
            if time.monotonic() > deadline_seconds:
                raise _timeout_error(ranks, missing, timeout_seconds)
            _wait_for_any(missing, min(0.05, max(0.0, deadline_seconds - time.monotonic())))
        _see_off(ranks)
        return [(rank.left("result") or {})["result"] for rank in ranks]


@contextmanager
def _started(
    function: str, world_size: int, args: Mapping[str, Any], env: Mapping[str, str] | None
) -> Iterator[list[_Rank]]:
    """Yield the running ranks; whatever happens, none of their processes is left afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ldm-ranks-")))
        port = stack.enter_context(reserved_port())
        task = {"function": function, "args": dict(args), "launcher": os.getpid()}
        (folder / "task.json").write_text(json.dumps(task))
        shared = _shared_environment(folder, world_size, port)
        ranks: list[_Rank] = []
        stack.callback(_end_all, ranks)
        for number in range(world_size):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            ranks.append(_Rank(number, folder, _spawn(folder, number, shared | own | dict(env or {}))))
        yield ranks


def _shared_environment(folder: Path, world_size: int, port: int) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_ENVIRONMENT)
    }
    return inherited | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"),
    }


def _spawn(folder: Path, number: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with open(folder / f"stdout-{number}", "wb") as stdout, open(folder / f"stderr-{number}", "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.rank_main", str(folder)],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def _wait_for_any(ranks: list[_Rank], seconds: float) -> None:
    """Return at the first end of a rank's process, or after so many seconds: results are files, so we look."""
    descriptors = [os.pidfd_open(rank.process.pid) for rank in ranks]
    try:
        select.select(descriptors, [], [], seconds)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _rank_error(ranks: list[_Rank]) -> RankError:
    """Return the error for the rank that failed first; all processes are ended by then.

    A dying rank's victims may well be out before the kernel has taken it apart, so its end is waited for.
    """
    without = [rank for rank in ranks if rank.left("result") is None]
    candidates = [rank for rank in without if rank.ending or rank.left("failure")]
    for rank in candidates:
        ended_within(rank.process.pid, ENDING_SECONDS)
    _end_all([rank for rank in ranks if rank not in candidates])
    alive_then = {rank.number for rank in without if rank not in candidates}
    _end_all(candidates)
    notes = {rank.number: rank.left("failure") for rank in candidates}
    first = ranks[
        first_to_fail({n: note["monotonic_seconds"] if note else None for n, note in notes.items()})
    ]
    lines = [f"rank {first.number} of {len(ranks)} failed first: {_fate(first)}"]
    for rank in ranks:
        if rank is not first:
            told = "was alive, killed by the launcher" if rank.number in alive_then else _fate(rank)
            lines.append(f"  rank {rank.number}: {told}")
    lines.append(f"--- the end of rank {first.number}'s stderr\n{_tail(first)}")
    results = {rank.number: note["result"] for rank in ranks if (note := rank.left("result"))}
    return RankError("\n".join(lines), first.number, first.process.returncode, first.stderr(), results)


def first_to_fail(failed_at_seconds: Mapping[int, float | None]) -> int:
    """Return the rank that failed first, from the moment of each failed rank's note (None: it left none).

    A rank that a signal ended left no note and pulled the others down: it comes before any exception. Among
    exceptions the earliest note counts: a rank may write it and yet end after those that it pulled down.
    """
    return min(failed_at_seconds, key=lambda rank: (failed_at_seconds[rank] or 0.0, rank))


def _timeout_error(ranks: list[_Rank], missing: list[_Rank], timeout_seconds: float) -> RanksTimeoutError:
    """Return the error that names the ranks still at work, with the stacks that SIGABRT makes them write."""
    for rank in missing:
        os.kill(rank.process.pid, signal.SIGABRT)
    for rank in missing:
        ended_within(rank.process.pid, STACKS_SECONDS)
    _end_all(ranks)
    alive = [rank.number for rank in missing]
    lines = [f"after {timeout_seconds} s of {len(ranks)} ranks these gave no result and are alive: {alive}"]
    lines += [f"--- the end of rank {rank.number}'s stderr\n{_tail(rank)}" for rank in missing]
    results = {rank.number: note["result"] for rank in ranks if (note := rank.left("result"))}
    return RanksTimeoutError("\n".join(lines), alive, results)


def _see_off(ranks: list[_Rank]) -> None:
    """Wait for all ranks to leave; what goes wrong after the results is told as a warning."""
    deadline_seconds = time.monotonic() + TEARDOWN_SECONDS
    for rank in ranks:
        left = ended_within(rank.process.pid, max(0.0, deadline_seconds - time.monotonic()))
        _end_all([rank])
        if not left or rank.process.returncode != 0:
            fate = _fate(rank) if left else f"did not leave within {TEARDOWN_SECONDS} s"
            warnings.warn(f"rank {rank.number} gave its result, then: {fate}\n{_tail(rank)}", stacklevel=3)


def _end_all(ranks: list[_Rank]) -> None:
    """Kill every process of these ranks' sessions and reap the ranks."""
    for rank in ranks:
        if rank.process.returncode is None:
            end_session(rank.process.pid)
            rank.process.wait()


def _fate(rank: _Rank) -> str:
    code = rank.process.returncode
    if code is None:
        return "alive"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    failure = rank.left("failure")
    if failure is not None:
        return f"exit code {code}, {failure['error']}"
    return f"exit code {code}" + ("" if rank.left("result") else " without a result")


def _tail(rank: _Rank) -> str:
    return "\n".join(rank.stderr().splitlines()[-TAIL_LINES:])
