"""Errors that a user can act on, and the exit code of each.

A message says where, what, the value, what is allowed and what to do, in one line: the command line prints
it without a traceback and leaves with `exit_code`. Schedulers read the code: 2 to 6 mean that running again
changes nothing, 75 asks for a requeue, everything else is retried only when a checkpoint moved.
"""

from collections.abc import Sequence
from typing import ClassVar


class PipelineError(Exception):
    """Base of all errors that a user can act on; `exit_code` is what the process leaves with."""

    exit_code: ClassVar[int] = 1


class ConfigError(PipelineError):
    """A wrong setting: unknown key, impossible value or combination, missing file named by the config."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Keep every problem found, one line each: a user mends them all in one go."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(PipelineError):
    """Damage or mismatch in a data set that a second read confirms."""

    exit_code = 3


class CheckpointError(PipelineError):
    """No checkpoint that can be trusted where one is needed."""

    exit_code = 4


class DivergedError(PipelineError):
    """The loss or the gradients are no longer finite, or beyond the budget for skipped steps."""

    exit_code = 5


class NoProgressError(PipelineError):
    """Restarted again and again without a new checkpoint."""

    exit_code = 6


class StoppedError(PipelineError):
    """Stopped on request with the state saved: run the same command again to go on."""

    exit_code = 75


class ToolError(PipelineError):
    """A program or package that this verb needs is missing or answered with a failure."""

    exit_code = 1
