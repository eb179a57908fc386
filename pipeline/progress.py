"""How far a long piece of work is: a bar with the time left on a terminal, plain lines elsewhere.

Only rank 0 opens one. Everything goes to stderr: the output of a verb stays clean. `LDM_QUIET=1` shows
nothing. A batch job's log gets one line at most every ten seconds, without control characters.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

SECONDS_BETWEEN_LINES = 10.0
QUIET = "LDM_QUIET"
Shown = float | str
Item = TypeVar("Item")


class Progress:
    """Counts work done; the base class shows nothing, which is what `LDM_QUIET=1` asks for."""

    def __init__(self, total: int, *, done: int = 0) -> None:
        self.total = total
        self.done = done
        self.shown: dict[str, Shown] = {}

    def advance(self, n: int = 1, **shown: Shown) -> None:
        """Count `n` more units as done and show the named values beside the count from now on."""
        self.done += n
        self.shown |= shown
        self.refresh()

    def refresh(self) -> None:
        """Show the present state, or leave it for later."""

    def finish(self) -> None:
        """Show the last state; called once, also when the work ends early."""


class PlainProgress(Progress):
    """Writes whole lines: one at most every ten seconds, the first after ten, and the last state at the end."""

    def __init__(
        self,
        total: int,
        label: str,
        *,
        done: int = 0,
        unit: str = "step",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(total, done=done)
        self._label, self._unit = label, unit
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started_seconds = self._written_seconds = clock()
        self._started_done = done
        self._last_line = ""

    def refresh(self) -> None:
        """Write a line if ten seconds have passed since the last one."""
        if self._clock() - self._written_seconds >= SECONDS_BETWEEN_LINES:
            self._write()

    def finish(self) -> None:
        """Write the last state unless that very line was the last one written."""
        self._write()

    def _write(self) -> None:
        self._written_seconds = self._clock()
        line = self._line()
        if line != self._last_line:
            self._last_line = line
            print(line, file=self._stream, flush=True)

    def _line(self) -> str:
        elapsed_seconds = self._clock() - self._started_seconds
        rate = (self.done - self._started_done) / elapsed_seconds if elapsed_seconds > 0 else 0.0
        parts = [f"{self._label}: {self.done}/{self.total} {self._unit}"]
        if rate > 0:
            parts.append(rate_text(rate, self._unit))
            if self.done < self.total:
                parts.append(f"{clock_text((self.total - self.done) / rate)} left")
        return ", ".join(parts + shown_texts(self.shown))


class BarProgress(Progress):
    """A bar on a terminal that repaints itself."""

    def __init__(self, total: int, label: str, *, done: int = 0, unit: str = "step") -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(total, done=done)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(escape(unit)),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=Console(file=sys.stderr),
        )
        self._task = self._bar.add_task(escape(label), total=total, completed=done, values="")
        self._bar.start()

    def refresh(self) -> None:
        """Hand the state to the bar, whose own thread repaints it."""
        self._bar.update(self._task, completed=self.done, values=", ".join(shown_texts(self.shown)))

    def finish(self) -> None:
        """Leave the bar standing in its last state and give the terminal back."""
        self.refresh()
        self._bar.stop()


@contextmanager
def progress_bar(total: int, label: str, *, done: int = 0, unit: str = "step") -> Iterator[Progress]:
    """Yield the progress of `total` units of work, of which `done` are behind us, shown on stderr."""
    progress = _open(total, label, done=done, unit=unit)
    try:
        yield progress
    finally:
        progress.finish()


def followed(items: Sequence[Item], label: str, *, unit: str) -> Iterator[Item]:
    """Yield the items, with a bar over them."""
    with progress_bar(len(items), label, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()


def _open(total: int, label: str, *, done: int, unit: str) -> Progress:
    if os.environ.get(QUIET) == "1":
        return Progress(total, done=done)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return BarProgress(total, label, done=done, unit=unit)
    return PlainProgress(total, label, done=done, unit=unit)


def rate_text(per_second: float, unit: str) -> str:
    """Return a rate in the unit that reads best: units a second, or seconds a unit when slower than one."""
    if per_second >= 1:
        return f"{per_second:.1f} {unit}/s"
    return f"{1 / per_second:.1f} s/{unit}"


def clock_text(seconds: float) -> str:
    """Return a duration as `h:mm:ss`, or `m:ss` below an hour, rounded to the second."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shown_texts(values: Mapping[str, Shown]) -> list[str]:
    """Return `name value` for each value, numbers with four significant digits."""
    return [f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in values.items()]
