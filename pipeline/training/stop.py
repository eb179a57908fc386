"""Signals, a stop file or the clock -> one wish to stop, agreed by all ranks one step late and without waiting.

Handlers only note the signal. At each step every rank sends its wish in an asynchronous maximum and reads the
one sent at the step before: all ranks stop after the same step, and no step waits for the agreement.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pipeline.training.world import Pending, World

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STACKS_SIGNAL = signal.SIGUSR1
SECONDS_BETWEEN_LOOKS = 1.0


def answer_with_stacks(path: Path) -> None:
    """Add the stacks of all threads to the file `path` whenever USR1 comes, from now on until a `Stop` does so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    faulthandler.register(STACKS_SIGNAL, file=descriptor, all_threads=True)


class Reason(IntEnum):
    """Why a run stops early; where ranks differ the largest is what all of them say."""

    NONE = 0
    MAX_SECONDS = 1
    STOP_FILE = 2
    SIGNAL = 3

    def __str__(self) -> str:
        """Return the words for a person."""
        return self.name.lower().replace("_", " ") if self else ""


class Stop:
    """The wish to stop of this process and the agreement of all; a context manager that holds the handlers.

    The first TERM, INT or USR2 asks for a save and a clean end; a second Ctrl-C ends the process at once. USR1
    writes the stacks of all threads and changes nothing.
    """

    def __init__(
        self,
        world: World,
        *,
        stop_file: Path | None = None,
        max_seconds: float | None = None,
        stacks: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch from now on: `max_seconds` counts from here. Only rank 0 looks for the file, once a second.

        USR1 adds the stacks to the file `stacks` (to stderr without one) from C, whoever holds Python's lock, and then
        writes them to stderr too when Python comes to it.
        """
        self._world, self._clock = world, clock
        self._stop_file = stop_file if world.is_first else None
        self._deadline_seconds = None if max_seconds is None else clock() + max_seconds
        self._looked_seconds = -SECONDS_BETWEEN_LOOKS
        self._signalled = False
        self._stacks_path, self._stacks = stacks, -1
        self._pending: Pending | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()
        self.reason = Reason.NONE

    def agreed(self) -> bool:
        """Return whether all ranks stop now; every rank calls this once a step, and gets the same answer."""
        if self._pending is not None:
            self.reason = Reason(self._pending.wait())
            self._pending = None
        if self.reason:
            if self._stop_file is not None and self.reason is Reason.STOP_FILE:
                self._stop_file.unlink(missing_ok=True)  # Obeyed: the same command then goes on.
            return True
        self._pending = self._world.start_max(self._wish())
        return False

    def _wish(self) -> Reason:
        now_seconds = self._clock()
        if self._signalled:
            return Reason.SIGNAL
        if self._stop_file is not None and now_seconds - self._looked_seconds >= SECONDS_BETWEEN_LOOKS:
            self._looked_seconds = now_seconds
            if self._stop_file.exists():
                return Reason.STOP_FILE
        if self._deadline_seconds is not None and now_seconds >= self._deadline_seconds:
            return Reason.MAX_SECONDS
        return Reason.NONE

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
            if self._stacks_path is not None:
                self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._stacks = os.open(self._stacks_path, flags, 0o644)
            # faulthandler writes from C, at once, to one place; it then passes the signal on to this one.
            self._previous[STACKS_SIGNAL] = signal.signal(STACKS_SIGNAL, self._tell_stacks)
        if self._stacks >= 0:
            faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True, chain=True)
        elif sys.__stderr__ is not None:
            faulthandler.register(STACKS_SIGNAL, file=sys.__stderr__, all_threads=True, chain=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._pending is not None:
            self._pending.wait()
        self._pending = None
        faulthandler.unregister(STACKS_SIGNAL)
        for number, handler in self._previous.items():
            # None: set by something other than Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._stacks >= 0:
            os.close(self._stacks)
            self._stacks = -1

    def _tell_stacks(self, number: int, frame: FrameType | None) -> None:
        if self._stacks >= 0 and sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # A forked child got it with the group; the run's process decides.
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
