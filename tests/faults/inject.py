"""Kills a process after so many written bytes: one function for callables, one for Python programs.

    for n in range(total_bytes + 1):
        outcome = killed_after(lambda: save(folder), Watched(folder), n)
        assert outcome.killed
        ...                       # the oracle: what may be on the disk now?

Bytes are those that Python code writes (`tests/faults/counting.py` says what that leaves out).
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.counting import Budget, Watched, counted_bytes, install, places_that_write
from tests.faults.outcome import Outcome, end_session, ended_within, run_to_end

__all__ = ["ByteOutcome", "Watched", "command_killed_after", "killed_after"]


@dataclass(frozen=True)
class ByteOutcome(Outcome):
    """An ended process and the number of watched bytes that it had written by then."""

    written_bytes: int


def killed_after(
    work: Callable[[], object], watched: Watched, after_bytes: int | None, timeout_seconds: float = 60.0
) -> ByteOutcome:
    """Run `work()` in a fork of this process that dies once `after_bytes` watched bytes are written.

    None: nothing dies, the bytes are counted, which gives the range of a sweep. A fork costs milliseconds, so
    this is the way for sweeps; it takes over no threads, so `work` must not need any that run already (torch's
    pool with more than one thread). An exception in `work` ends the fork with exit code 1 and its traceback.

    Raises: TimeoutError past the limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        count, out, err = (Path(folder, name) for name in ("count", "out", "err"))
        sys.stdout.flush()
        sys.stderr.flush()
        places_that_write(len(sys.modules))  # Found once here, not anew in every fork.
        pid = os.fork()
        if pid == 0:
            _be_the_fork(work, watched, after_bytes, (count, out, err))
        in_time = ended_within(pid, timeout_seconds)
        end_session(pid)
        _, status = os.waitpid(pid, 0)
        said = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
        if not in_time:
            raise TimeoutError(f"work still ran after {timeout_seconds} s\n{said[1][-2000:]}")
        return ByteOutcome(os.waitstatus_to_exitcode(status), said[0], said[1], counted_bytes(count))


def command_killed_after(
    python_argv: Sequence[str], watched: Watched, after_bytes: int | None, timeout_seconds: float = 120.0
) -> ByteOutcome:
    """Run `python *python_argv` ("script.py ...", "-m module ..." or "-c code ...") until so many watched bytes.

    A fresh interpreter, the patches in place before the program's first import; from the repository's root.

    Raises: TimeoutError past the limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        count = Path(folder, "count")
        limit = "none" if after_bytes is None else str(after_bytes)
        ours = ["-m", "tests.faults.counted_main", str(watched.place), watched.pattern, limit, str(count)]
        outcome = run_to_end([sys.executable, *ours, *python_argv], timeout_seconds=timeout_seconds)
        return ByteOutcome(
            outcome.exit_code, outcome.stdout, outcome.stderr, written_bytes=counted_bytes(count)
        )


def _be_the_fork(
    work: Callable[[], object], watched: Watched, after_bytes: int | None, files: tuple[Path, Path, Path]
) -> None:
    """Run the work as the forked child and leave by `os._exit`: nothing of the parent's is cleaned up twice."""
    exit_code = 1
    try:
        os.setsid()
        count, *streams = files
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        install(Budget(watched, after_bytes, count))
        work()
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
