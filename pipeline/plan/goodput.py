"""Checkpoints and failures: how often to save, and how much of the time is left for training."""

import math
from dataclasses import dataclass

DAY_SECONDS = 86_400.0
RESTART_BASE_SECONDS, RESTART_DOUBLING_SECONDS = 60.0, 25.0
"""From a failure to the next step: about the published starts of MLPerf's runs (`init_s`), 135 s on 8, 310 s on 1024."""


@dataclass(frozen=True)
class Saving:
    """What a checkpoint costs: seconds that training waits, seconds until it is safe."""

    size_bytes: float
    stall_seconds: float
    write_seconds: float


def mttf_seconds(nodes: float, failures_per_node_day: float) -> float:
    """Return the mean seconds between failures of a job of so many nodes."""
    return DAY_SECONDS / (failures_per_node_day * nodes)


def restart_seconds(accelerators: int) -> float:
    """Return the seconds from a failure to the first step of the next attempt, after the published starts."""
    return RESTART_BASE_SECONDS + RESTART_DOUBLING_SECONDS * math.log2(max(accelerators, 1))


def best_interval_seconds(saving: Saving, mttf: float) -> float:
    """Return the interval that loses least: sqrt(2 x stall x MTTF), never shorter than a save takes.

    Source: Young 1974; Daly 2006.
    """
    return max(math.sqrt(2 * saving.stall_seconds * mttf), saving.write_seconds)


def goodput(saving: Saving, interval_seconds: float, mttf: float, restart: float) -> float:
    """Return the share of the time that is training which counts.

    A failure, whatever it hits, costs the restart and what is done again: half an interval, and the write, because a
    checkpoint counts only once it is safe. To first order in both; 0 where a job would get nowhere.
    """
    stalled = saving.stall_seconds / (interval_seconds + saving.stall_seconds)
    lost = (interval_seconds / 2 + saving.write_seconds + restart) / mttf
    return max(0.0, (1 - stalled) / (1 + lost))
