"""The learning rate against values worked out by hand."""

import math
from itertools import pairwise
from typing import Any

import pytest

from pipeline.config import OptimizerConfig
from pipeline.training.learning_rate import learning_rate


def rates(steps: int, **optimizer: Any) -> list[float]:
    section = OptimizerConfig(**({"learning_rate": 0.1, "warmup_steps": 4} | optimizer))
    return [learning_rate(section, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_its_first_update_moves() -> None:
    assert rates(6) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_no_warm_up() -> None:
    for schedule in ("constant", "cosine", "inverse_sqrt"):
        assert rates(3, warmup_steps=0, schedule=schedule)[0] == pytest.approx(0.1)


def test_cosine_is_half_way_in_the_middle_and_near_zero_at_the_end() -> None:
    found = rates(104, schedule="cosine")
    assert found[4] == pytest.approx(0.1) and found[54] == pytest.approx(0.05)
    assert found[29] == pytest.approx(0.05 * (1 + math.sqrt(0.5)))
    assert 0 < found[-1] < 1e-4
    assert all(later < earlier for earlier, later in pairwise(found[4:]))


def test_cosine_stays_at_zero_after_the_end() -> None:
    section = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="cosine")
    assert learning_rate(section, 20, 10) == pytest.approx(0.0, abs=1e-12)


def test_inverse_square_root_goes_on_where_the_warm_up_ends() -> None:
    found = rates(16, schedule="inverse_sqrt")
    assert found[3] == pytest.approx(0.1) and found[4] == pytest.approx(0.1 * math.sqrt(4 / 5))
    assert found[15] == pytest.approx(0.05)
