"""Improved precision and recall against pictures on paper, plain loops and torch-fidelity."""

import numpy as np
import pytest
from numpy.random import default_rng

from pipeline.evaluation import manifolds
from pipeline.evaluation.manifolds import precision_recall, squared_distances
from tests.pipeline.evaluation.test_distances import recorded


def by_loops(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    inside = 0
    for point in points:
        for number, centre in enumerate(centres):
            others = sorted(np.linalg.norm(centre - other) for n, other in enumerate(centres) if n != number)
            if np.linalg.norm(point - centre) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("rows", [3, 1024])
def test_it_is_the_definition_in_plain_loops(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifolds, "ROWS_AT_ONCE", rows)
    draw = default_rng(0)
    painted, real = 0.7 * draw.standard_normal((12, 3)) + 0.5, draw.standard_normal((15, 3))
    found = precision_recall(painted, real)
    assert found == {"precision": by_loops(painted, real, 3), "recall": by_loops(real, painted, 3)}
    assert 0 < found["recall"] < 1


def test_it_is_that_of_an_independent_implementation() -> None:
    """torch-fidelity 0.4.0's `calculate_precision_recall_full` for these samples."""
    x, y, _ = recorded()
    found = precision_recall(x, y)
    assert (found["precision"], found["recall"]) == pytest.approx((0.9333333, 0.6), rel=1e-6)


def test_half_of_the_kinds_are_half_of_the_recall() -> None:
    """Two far islands of real pictures; the painted ones are good and all on one of them."""
    draw = default_rng(1)
    island = draw.uniform(-1, 1, (60, 2))
    real = np.concatenate([island, island + 100])
    painted = 0.5 * draw.uniform(-1, 1, (60, 2))
    found = precision_recall(painted, real)
    assert found["precision"] > 0.9 and 0.1 < found["recall"] <= 0.5
    assert precision_recall(painted + 1000, real) == {"precision": 0.0, "recall": 0.0}
    assert precision_recall(real, real) == {"precision": 1.0, "recall": 1.0}


def test_distances_are_never_negative() -> None:
    x = 1e6 + default_rng(2).standard_normal((20, 4))
    assert (squared_distances(x, x) >= 0).all()
