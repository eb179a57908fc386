"""Every start of a run under a supervisor, one JSON line each, over all jobs: where it began, how it ended."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.paths import RunPaths
from pipeline.training.saving.manifest import committed, step_of


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks and its end."""

    attempt: str
    """JOB.RESTART.NUMBER: the fence's name, and LDM_ATTEMPT of the ranks."""
    job: str
    started: float
    """Seconds since 1970."""
    ended: float
    first_checkpoint: int
    """Step of the newest checkpoint when it began, -1 without one."""
    last_checkpoint: int
    reached_step: int
    """Steps finished by the rank that was farthest, -1 if none said so."""
    outcome: str
    """done, stopped, failed, crashed, stuck, lost or superseded."""
    reason: str
    nodes: tuple[str, ...] = ()
    stage: str = "train"

    @property
    def lost_steps(self) -> int:
        """Steps that have to be done again."""
        return max(0, self.reached_step - max(self.last_checkpoint, 0))


def newest_step(run: RunPaths) -> int:
    """Return the step of the newest committed checkpoint, -1 without one."""
    found = committed(run.checkpoints)
    return step_of(found[-1]) if found else -1


def read_history(run: RunPaths) -> list[Attempt]:
    """Return all attempts, oldest first; a line that was cut off by a kill is left out."""
    if not run.attempts.exists():
        return []
    found = []
    for line in run.attempts.read_text(encoding="utf-8").splitlines():
        try:
            fields: dict[str, Any] = json.loads(line)
            found.append(Attempt(**(fields | {"nodes": tuple(fields["nodes"])})))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def add_attempt(run: RunPaths, attempt: Attempt) -> None:
    """Add a line behind the others and see it to the disk."""
    run.attempts.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(asdict(attempt)) + "\n").encode()
    descriptor = os.open(run.attempts, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def failures_without_progress(history: Sequence[Attempt], newest: int) -> int:
    """Return how many attempts in a row, up to the last, have failed with the newest checkpoint where it is now."""
    count = 0
    for attempt in reversed(history):
        if attempt.outcome in ("done", "stopped", "superseded") or attempt.first_checkpoint != newest:
            break
        count += 1
    return count
