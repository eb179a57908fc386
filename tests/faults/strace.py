"""Kills a program at its k-th system call, or makes that call fail: any program, C and Rust libraries included.

    for call in syscalls_of(argv, folder):          # first an undisturbed run, to see what there is
        fresh(folder)
        outcome = killed_at(argv, call)             # dies on entering the call: it has no effect any more
        ...                                         # the oracle
        fresh(folder)
        failed_at(argv, call, "ENOSPC")             # or: the call is not made and returns this error

strace counts each thread and process by itself, and each kind of call by itself: "the third rename of a
thread". With several threads the first to come to its k-th call is struck; `StruckOutcome.struck` tells where a
blow fell, and a test of a program with threads should look at it. Its `--seccomp-bpf` is not used: with it
strace 6.1 lets signals be injected at no call at all and does not say so.
"""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.outcome import ROOT, Outcome, run_to_end
from tests.requirements import require_command, require_tool

# What changes a disk, and `close`, where some file systems report a full one.
DISK_CALLS = (
    "open openat creat write pwrite64 writev pwritev pwritev2 sendfile copy_file_range splice truncate ftruncate "
    "fallocate fsync fdatasync sync_file_range syncfs rename renameat renameat2 link linkat symlink symlinkat "
    "unlink unlinkat mkdir mkdirat rmdir chmod fchmod fchmodat utimensat close"
).split()
BYTE_CALLS = frozenset("write pwrite64 writev pwritev pwritev2 sendfile copy_file_range splice".split())

_STARTED = re.compile(r"(\d+) +(\w+)\((.*)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")
_RESULT = re.compile(r"\) += (-?\d+|\?)(?:<.*?>)?(?: (E[A-Z]+)\b.*)?$")
_KILLED = re.compile(r"(\d+) +\+\+\+ killed by SIG\w+")
_QUOTED = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"\b\d+<([^>]*)>")


@dataclass(frozen=True)
class Call:
    """One system call of a run: the `ordinal`-th (from 1) of its name in its thread, and how it ended.

    `result` is None where it never returned; `error` is the errno's name. `paths` are absolute.
    """

    thread: int
    name: str
    ordinal: int
    paths: tuple[str, ...]
    result: int | None
    error: str | None

    def __str__(self) -> str:
        return f"{self.name}#{self.ordinal} {' '.join(os.path.basename(path) for path in self.paths)}"

    def touches(self, folder: Path) -> bool:
        """Return whether the call names `folder` or anything under it."""
        top = os.path.realpath(folder)
        return any(path == top or path.startswith(top + os.sep) for path in self.paths)


@dataclass(frozen=True)
class StruckOutcome(Outcome):
    """A disturbed run: how it ended, and the call that the blow fell on (None: it never came to that call)."""

    struck: Call | None


def syscalls_of(
    argv: Sequence[str],
    folder: Path,
    *,
    names: Sequence[str] = DISK_CALLS,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
) -> list[Call]:
    """Return the calls by which an undisturbed run touches `folder`, in order; it must exit 0."""
    outcome, log = _traced(argv, names, [], env, timeout_seconds)
    assert outcome.finished, f"{list(argv)} ended with {outcome.exit_code} undisturbed\n{outcome.stderr}"
    return [call for call in parsed(log) if call.touches(folder)]


def killed_at(
    argv: Sequence[str], call: Call, *, env: Mapping[str, str] | None = None, timeout_seconds: float = 120.0
) -> StruckOutcome:
    """Run the command again and end it by SIGKILL as it enters `call`, which then does nothing."""
    injection = f"inject={call.name}:signal=KILL:when={call.ordinal}"
    outcome, log = _traced(argv, [call.name], [injection], env, timeout_seconds)
    killed = {int(found.group(1)) for found in map(_KILLED.match, log.splitlines()) if found}
    entered = (seen for seen in parsed(log) if seen.ordinal == call.ordinal and seen.result is None)
    struck = next((seen for seen in entered if seen.thread in killed), None)
    return StruckOutcome(outcome.exit_code, outcome.stdout, outcome.stderr, struck)


def failed_at(
    argv: Sequence[str],
    call: Call,
    error: str,
    *,
    ever_after: bool = False,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
) -> StruckOutcome:
    """Run the command again with `call` not made but returning `error` ("ENOSPC", "EIO", ...).

    `ever_after`: so does every later call of its name in that thread, as on a disk that stays full.
    """
    when = f"{call.ordinal}+" if ever_after else str(call.ordinal)
    injection = f"inject={call.name}:error={error}:when={when}"
    outcome, log = _traced(argv, [call.name], [injection], env, timeout_seconds)
    injected = (seen for seen in parsed(log) if seen.ordinal == call.ordinal and seen.error == error)
    return StruckOutcome(outcome.exit_code, outcome.stdout, outcome.stderr, next(injected, None))


def call_at_bytes(calls: Sequence[Call], after_bytes: int) -> Call:
    """Return the first of the calls to be killed at so that at most `after_bytes` written bytes are on the disk.

    That is the write that would go beyond; the cut falls between calls, never inside one.
    """
    written = 0
    for call in calls:
        if call.name in BYTE_CALLS:
            written += call.result or 0
            if written > after_bytes:
                return call
    raise ValueError(f"the run writes {written} bytes in all, never more than {after_bytes}")


def require_strace() -> None:
    """Leave the running test out unless strace is there and may trace."""
    require_command(str(require_tool("strace")), "-o", "/dev/null", "true")


def parsed(log: str, cwd: Path = ROOT) -> list[Call]:
    """Return the calls in a log of `strace -f -y -s 0`, in the order in which they began."""
    calls: list[Call] = []
    ordinals: Counter[tuple[int, str]] = Counter()
    begun: dict[int, int] = {}
    for line in log.splitlines():
        if found := _STARTED.match(line):
            thread, name, rest = int(found.group(1)), found.group(2), found.group(3)
            ordinals[thread, name] += 1
            begun[thread] = len(calls)
            paths = _paths(rest, cwd)
            calls.append(Call(thread, name, ordinals[thread, name], paths, *_result(rest)))
        elif found := _RESUMED.match(line):
            place = begun[int(found.group(1))]
            before = calls[place]
            paths = before.paths + _paths(found.group(2), cwd)
            calls[place] = Call(before.thread, before.name, before.ordinal, paths, *_result(found.group(2)))
    return calls


def _result(text: str) -> tuple[int | None, str | None]:
    found = _RESULT.search(text)
    if found is None or found.group(1) == "?":
        return None, None
    return int(found.group(1)), found.group(2)


def _paths(arguments: str, cwd: Path) -> tuple[str, ...]:
    """Return the absolute paths that a call names, by text or by an open file."""
    texts = [(folder or str(cwd), text) for folder, text in _QUOTED.findall(arguments)]
    named = [os.path.normpath(os.path.join(folder, text)) for folder, text in texts if text]
    opened = [
        path.removesuffix(" (deleted)") for path in _DESCRIPTOR.findall(arguments) if path.startswith("/")
    ]
    return tuple(dict.fromkeys(named + opened))


def _traced(
    argv: Sequence[str],
    names: Sequence[str],
    injections: Sequence[str],
    env: Mapping[str, str] | None,
    timeout_seconds: float,
) -> tuple[Outcome, str]:
    """Return the outcome of the command under strace and the log."""
    require_strace()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "strace.log")
        # `?`: not every machine has every call (arm64 has no `rename`, only `renameat2`).
        options = [
            "-f",
            "-y",
            "-s",
            "0",
            "-o",
            str(log),
            "-e",
            "trace=" + ",".join(f"?{name}" for name in names),
        ]
        for injection in injections:
            options += ["-e", injection]
        outcome = run_to_end(
            [str(require_tool("strace")), *options, "--", *argv], env=env, timeout_seconds=timeout_seconds
        )
        return outcome, log.read_text(errors="replace")
