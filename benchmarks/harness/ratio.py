"""The ratio of two paired series and how sure we are of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_PAIRS = 6


@dataclass(frozen=True)
class Ratio:
    """A ratio B / A with the ends of its 95 % interval; above 1, B takes more."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def paired_ratio(a: Sequence[float], b: Sequence[float], *, seed: int, resamples: int = 10_000) -> Ratio:
    """Return exp(median(log b_i - log a_i)) with a 95 % percentile-bootstrap interval over the pairs.

    Pairs, because the two runs of a round see the same neighbours on the machine: their common slow-down
    cancels in the difference of logs. The median, because the noise of a clock has a long tail upwards.

    Raises: ValueError for series of unequal length, under 6 pairs (below that the whole range of the pairs
    covers the median in fewer than 95 % of cases), or a time that is not above zero.
    Source: Efron 1979, percentile bootstrap.
    """
    if len(a) != len(b) or len(a) < LEAST_PAIRS:
        raise ValueError(
            f"paired_ratio: {len(a)} and {len(b)} values; needs as many of each, {LEAST_PAIRS} or more"
        )
    times = np.asarray([a, b], dtype=np.float64)
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise ValueError(
            f"paired_ratio: smallest value {times.min()}; a ratio needs finite values above zero"
        )
    logs = np.log(times[1]) - np.log(times[0])
    random = np.random.Generator(np.random.Philox(seed))
    drawn = logs[random.integers(len(logs), size=(resamples, len(logs)))]
    low, high = np.exp(np.percentile(np.median(drawn, axis=1), [2.5, 97.5]))
    return Ratio(float(np.exp(np.median(logs))), float(low), float(high))
