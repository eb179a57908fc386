"""Who slows all down: the rank that never waits for the others, while they wait for it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from launch.supervisor.step import StepPlan
from pipeline.training.health.heartbeat import Beat

# A rank is named when the others spend so much more of their time waiting than it does.
MARGIN = 0.2
LEAST_STEPS = 5


@dataclass
class Stragglers:
    """Compares, every so often, how much of the time since the last look each rank has waited."""

    plan: StepPlan
    every_seconds: float
    clock: Callable[[], float] = time.monotonic
    _before: dict[int, Beat] = field(default_factory=dict)
    _looked: float = field(init=False)

    def __post_init__(self) -> None:
        self._looked = self.clock()

    def look(self, beats: Sequence[Beat]) -> list[str]:
        """Return a line about the rank that the others wait for, if one stands out; at most one each time."""
        now = self.clock()
        stepping = {beat.rank: beat for beat in beats if beat.phase == "step"}
        if now - self._looked < self.every_seconds or len(stepping) < max(2, self.plan.world_size):
            return []
        before, self._before, self._looked = self._before, stepping, now
        shares = {}
        for rank, beat in stepping.items():
            old = before.get(rank)
            if old is None or beat.pid != old.pid or beat.step - old.step < LEAST_STEPS:
                return []
            shares[rank] = (beat.waited_seconds - old.waited_seconds) / (
                beat.monotonic_seconds - old.monotonic_seconds
            )
        rank = min(shares, key=lambda one: shares[one])
        others = median(share for one, share in shares.items() if one != rank)
        if others - shares[rank] < MARGIN:
            return []
        return [
            f"straggler: rank {rank} on {self.plan.host_of(rank)} waits {shares[rank]:.0%} of the time for the others, "
            f"they wait {others:.0%} for it: about {(others - shares[rank]):.0%} of the run's speed"
        ]
