"""The way back: to the last checkpoint before things went wrong, and on with the data after the bad stretch.

Which samples a step sees is a function of its position alone, so leaving a stretch out is exact: positions in it are
passed over, every other one is visited as before. The range is on record in the checkpoints that follow. A run that
is killed before the first of them comes upon the same trouble again, and goes the same way.

Source: PaLM (Chowdhery et al. 2022, section 5.1): restart about 100 steps before a spike, skip 200 to 500 batches.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.training.saving.manifest import committed, step_of

logger = logging.getLogger(__name__)

Ranges = Iterable[list[int]]
DIVERGED = "diverged-"


def beyond(position: int, ranges: Ranges) -> int:
    """Return the first position from `position` on that lies in none of the ranges [start, stop)."""
    for start, stop in sorted(ranges):
        if start <= position < stop:
            position = stop
    return position


def refuse_straddling(position: int, ranges: Ranges, global_batch: int) -> None:
    """Do nothing if a step at `position` ends before the next skipped range begins.

    Raises:
        ConfigError: it does not: the global batch was changed within reach of a range of another one.
    """
    for start, stop in ranges:
        if position < start < position + global_batch:
            raise ConfigError(
                f"engine.global_batch: {global_batch} does not divide the {start - position} positions up to the "
                f"skipped range [{start}, {stop}); give back the old one until that is passed"
            )


def bad_stretch(first_position: int, position: int, resumed_position: int, margin: int) -> list[int]:
    """Return the range [start, stop) to leave out: from `margin` positions before the first bad one to the present.

    Nothing before the checkpoint that the run goes back to: those samples are part of the state.
    """
    return [max(first_position - margin, resumed_position), position]


def merged(ranges: Ranges) -> list[list[int]]:
    """Return the ranges [start, stop) in order, those that touch joined, empty ones left out."""
    joined: list[list[int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        elif start < stop:
            joined.append([start, stop])
    return joined


def put_aside(checkpoints: Path, first_step: int) -> bool:
    """Rename checkpoints that hold step `first_step` or a later one to `diverged-step-...`; rank 0 alone.

    Returns whether an older one is left; False, and nothing renamed, if not: there is no way back.
    """
    found = committed(checkpoints)
    good = [path for path in found if step_of(path) < first_step]
    if not good:
        return False
    for path in found[len(good) :]:
        target = path.with_name(f"{DIVERGED}{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(path, target)
        logger.warning("%s holds steps that went wrong: put aside as %s", path, target.name)
    return True
