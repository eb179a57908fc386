"""What a paired benchmark found: every sample, and the ratio of its sides."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.harness.measure import Sample
from benchmarks.harness.ratio import Ratio, paired_ratio


@dataclass(frozen=True)
class Comparison:
    """Every sample of a paired benchmark with the ratio B / A of wall (and CPU) seconds.

    A ratio above 1 says that B takes longer: put the new code at A and the peer at B to read it as a speed-up.
    """

    name: str
    side_a: str
    side_b: str
    samples: tuple[Sample, ...]
    wall: Ratio
    cpu: Ratio | None
    conditions: Mapping[str, str]

    @property
    def ratio(self) -> float:
        """B / A of the wall seconds: exp of the median of the paired log-ratios."""
        return self.wall.value

    @property
    def low(self) -> float:
        """The lower end of the ratio's 95 % interval."""
        return self.wall.low

    @property
    def high(self) -> float:
        """The upper end of the ratio's 95 % interval."""
        return self.wall.high

    @property
    def rounds(self) -> int:
        """The number of measured rounds, each with one run of A and one of B."""
        return len(self.samples) // 2

    @property
    def median_a_seconds(self) -> float:
        """The median wall seconds of side A."""
        return statistics.median(self.wall_seconds("a"))

    @property
    def median_b_seconds(self) -> float:
        """The median wall seconds of side B."""
        return statistics.median(self.wall_seconds("b"))

    def wall_seconds(self, side: str) -> list[float]:
        """Return the wall seconds of side "a" or "b" in the order of the rounds."""
        return [sample.wall_seconds for sample in self.samples if sample.side == side]

    def cpu_seconds(self, side: str) -> list[float]:
        """Return the CPU seconds of side "a" or "b" in the order of the rounds; empty if not measured."""
        of_side = [sample.cpu_seconds for sample in self.samples if sample.side == side]
        return [seconds for seconds in of_side if seconds is not None]


def comparison_of(
    names: tuple[str, str, str], samples: tuple[Sample, ...], conditions: Mapping[str, str]
) -> Comparison:
    """Return the comparison that the samples make; `names` are its own, side A's and side B's.

    The bootstrap's seed is `conditions["seed"]`. There is a CPU ratio only if every sample saw CPU time: the
    log of a zero is no ratio.
    """
    seed = int(conditions["seed"])
    wall = {side: [s.wall_seconds for s in samples if s.side == side] for side in "ab"}
    cpu = {side: [s.cpu_seconds or 0.0 for s in samples if s.side == side] for side in "ab"}
    return Comparison(
        *names,
        samples=samples,
        wall=paired_ratio(wall["a"], wall["b"], seed=seed),
        cpu=paired_ratio(cpu["a"], cpu["b"], seed=seed) if all(cpu["a"] + cpu["b"]) else None,
        conditions=dict(conditions),
    )
