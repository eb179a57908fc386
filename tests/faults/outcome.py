"""How a process that a test disturbed came to its end."""

import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """An ended process: its exit code (minus the signal's number where one ended it) and what it said."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.exit_code == -signal.SIGKILL

    @property
    def finished(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.exit_code == 0


def run_to_end(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_seconds: float
) -> Outcome:
    """Return how the command ended, run from the repository's root with `env` added to the environment.

    The same run makes the same system calls: no byte code is written, hashes have a fixed seed. Everything that
    it started ends with it.

    Raises: TimeoutError past the limit, after a SIGKILL to its session.
    """
    steady = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            list(argv),
            cwd=ROOT,
            env=os.environ | steady | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        in_time = ended_within(process.pid, timeout_seconds)
        end_session(process.pid)
        process.wait()
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    if not in_time:
        raise TimeoutError(f"{argv[0]} ... still ran after {timeout_seconds} s\n{texts[1][-2000:]}")
    return Outcome(process.returncode, *texts)


def ended_within(pid: int, timeout_seconds: float) -> bool:
    """Return whether the child `pid` ended in time; it is left to be waited for."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], timeout_seconds)[0])
    finally:
        os.close(descriptor)


def end_session(leader: int) -> None:
    """Send SIGKILL to the child `leader`, not yet waited for, and to every process of the session it began."""
    os.kill(leader, signal.SIGKILL)
    with suppress(ProcessLookupError):  # It may not have come as far as to begin one.
        os.killpg(leader, signal.SIGKILL)
