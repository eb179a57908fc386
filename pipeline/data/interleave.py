"""Shares -> which part comes at place n, and how often it came before: a table of one period, so any n at once.

Buckets take turns by batches, data sets by samples. At any prefix every part has come within one turn of its
share, which random turns do not give: a rare bucket would pile up or stay away.
"""

import heapq
from collections.abc import Sequence

import numpy as np

PERIOD = 1 << 14


class Interleave:
    """Parts in turn by shares that are multiples of 1 / PERIOD, for ever."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Cut the weights to shares of a period: the nearest multiples, none zero, that add up to one."""
        self._quota = _quotas(weights)
        period = int(self._quota.sum())
        self._parts = _one_period(self._quota, period)
        self._before = np.empty(period, np.int64)
        for part in range(len(self._quota)):
            turns = self._parts == part
            self._before[turns] = np.arange(int(turns.sum()))

    @property
    def shares(self) -> list[float]:
        """The share of each part."""
        return [float(quota) / len(self._parts) for quota in self._quota]

    def turns(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (part, how many turns that part had before) of each place, int64."""
        periods, within = np.divmod(places.astype(np.int64), len(self._parts))
        parts = self._parts[within]
        return parts, periods * self._quota[parts] + self._before[within]

    def counts(self, place: int) -> np.ndarray:
        """Return how many turns each part had before `place`, int64."""
        periods, within = divmod(place, len(self._parts))
        return periods * self._quota + np.bincount(self._parts[:within], minlength=len(self._quota))


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Return the turns of each part in a period: largest remainders, at least one each."""
    values = np.asarray(weights, np.float64)
    assert len(values) and (values > 0).all() and len(values) <= PERIOD, weights
    if len(values) == 1:
        return np.ones(1, np.int64)
    exact = values / values.sum() * PERIOD
    quota = np.maximum(1, np.floor(exact)).astype(np.int64)
    while missing := PERIOD - int(quota.sum()):
        # A part raised to one turn may make the sum too large: then the most favoured ones give back.
        order = np.argsort(-(exact - quota) * np.sign(missing), kind="stable")
        order = order if missing > 0 else order[quota[order] > 1]
        chosen = order[: abs(missing)]
        quota[chosen] += int(np.sign(missing))
    return quota // np.gcd.reduce(quota)


def _one_period(quota: np.ndarray, period: int) -> np.ndarray:
    """Return the part of each place of a period, every prefix within one turn of its share.

    Turn j of a part with q turns may come from place (j - 1) period / q on and must have come by j period / q;
    the earliest deadline first meets all of them.
    Source: Steiner & Yeomans 1993, "Level schedules for mixed-model, just-in-time processes"; Tijdeman 1980.
    """
    parts = np.repeat(np.arange(len(quota)), quota)
    turns = np.concatenate([np.arange(count) for count in quota])
    release = turns * period // quota[parts]
    deadline = -(-(turns + 1) * period // quota[parts])
    by_release = np.argsort(release, kind="stable")
    jobs = list(
        zip(
            release[by_release].tolist(),
            deadline[by_release].tolist(),
            parts[by_release].tolist(),
            strict=True,
        )
    )
    out, waiting, upcoming = [], list[tuple[int, int]](), 0
    for place in range(period):
        while upcoming < period and jobs[upcoming][0] <= place:
            heapq.heappush(waiting, jobs[upcoming][1:])
            upcoming += 1
        out.append(heapq.heappop(waiting)[1])
    return np.array(out, np.int64)
