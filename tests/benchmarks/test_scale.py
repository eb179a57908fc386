"""The simulation of failures against the formula, and against cases that can be worked out by hand."""

import numpy as np
import pytest

from benchmarks.scale import NODES, goodputs, simulate, tables
from pipeline.plan.goodput import Saving, best_interval_seconds, goodput, mttf_seconds


class Regular(np.random.Generator):
    """Failures at a fixed distance."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def exponential(self, scale: float = 1.0, size: object = None) -> float:  # type: ignore[override]
        """Return the mean itself."""
        return scale


def test_failures_at_a_fixed_distance_are_arithmetic() -> None:
    """1,000 s apart, 100 s to restart: 900 s hold 8 periods of 101 s whose save is safe 50 s later; 800 s are kept."""
    share, failures = simulate(Saving(1.0, 1.0, 50.0), 100.0, 1000.0, 100.0, Regular())
    assert (share, failures) == (0.8, 2000)


def test_a_job_that_never_comes_back_keeps_nothing() -> None:
    assert simulate(Saving(1.0, 1.0, 1.0), 100.0, 50.0, 100.0, Regular())[0] == 0.0


@pytest.mark.parametrize("nodes", [8, 128, 1024])
def test_the_formula_is_what_happens(nodes: int) -> None:
    saving, mttf = Saving(1e10, 1.0, 3.0), mttf_seconds(nodes, 0.005)
    interval = best_interval_seconds(saving, mttf)
    shares = [simulate(saving, interval, mttf, 120.0, np.random.default_rng(seed))[0] for seed in range(5)]
    assert np.mean(shares) == pytest.approx(goodput(saving, interval, mttf, 120.0), abs=0.004)


def test_every_size_is_in_the_table() -> None:
    rows = goodputs(15.0, "measured here")
    assert [row.nodes for row in rows] == [nodes for nodes in NODES for _ in range(2)]
    assert all(row.simulated == pytest.approx(row.formula, abs=0.01) for row in rows)
    page = tables({}, rows)
    assert (
        page.count("measured here") == len(NODES)
        and "Llama 3" in page
        and "HLAT" in page
        and "ByteRobust" in page
    )
