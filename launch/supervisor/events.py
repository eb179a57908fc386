"""Telling somebody: the user's own command, run without a shell when something happens to a job."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

from pipeline.paths import RunPaths

Event = Literal["done", "failed", "stuck", "requeued"]
SECONDS = 60.0


def tell(command: Sequence[str], event: Event, run: RunPaths, message: str) -> None:
    """Run `command` with the event, the run folder and the message as its last arguments, for at most a minute.

    Whatever it does, the job goes on: what went wrong is said on standard error.
    """
    if not command:
        return
    try:
        done = subprocess.run(
            [*command, event, str(run.root), message],
            env={**os.environ, "LDM_EVENT": event},
            stdin=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"ldm: health.on_event {command[0]!r} for {event!r}: {error}", file=sys.stderr, flush=True)
        return
    if done.returncode:
        print(
            f"ldm: health.on_event {command[0]!r} for {event!r}: exit code {done.returncode}",
            file=sys.stderr,
            flush=True,
        )
