"""When checkpoints are saved and which are kept, and what a save on its way is."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipeline.config import TrainConfig
from pipeline.training.saving.commit import Draft
from pipeline.training.saving.retention import Retention


@dataclass(frozen=True)
class Plan:
    """When to save and what to keep."""

    retention: Retention
    every_seconds: float | None = None
    """A save is due this long after the last one began, beside those due by step."""


def save_plan(config: TrainConfig) -> Plan:
    """Return the plan that the config asks for."""
    return Plan(Retention(config.keep_last, config.keep_every), config.checkpoint_every_seconds)


class Phase(Enum):
    """Where the save in flight stands: the same on all ranks, for it moves only by what they agree on."""

    IDLE = "idle"
    WRITING = "writing"
    COMMITTING = "committing"


# What a rank tells the others in each phase; the largest counts. BUSY is above every ending.
COMMITTED, FAILED, STALE, BUSY = range(4)


@dataclass(frozen=True)
class Flight:
    """A save on its way: its draft and what its manifest will say."""

    draft: Draft
    step: int
    numbers: Mapping[str, Any]
    need_bytes: int
    began_seconds: float
