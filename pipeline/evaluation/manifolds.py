"""Improved precision and recall: which share of one set lies within the other's neighbourhoods.

Source: Kynkaanniemi et al. 2019, eq. 1 and 2. Shape letters: N and M samples, D features.
"""

import numpy as np

NEIGHBOURS = 3
ROWS_AT_ONCE = 1024


def precision_recall(
    painted_ND: np.ndarray, real_MD: np.ndarray, neighbours: int = NEIGHBOURS
) -> dict[str, float]:
    """Return the share of painted samples within the real ones' balls, and of real ones within the painted ones'.

    The ball of a sample reaches to its `neighbours`-th nearest neighbour in its own set.
    """
    painted, real = painted_ND.astype(np.float64), real_MD.astype(np.float64)
    return {"precision": _covered(painted, real, neighbours), "recall": _covered(real, painted, neighbours)}


def squared_distances(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Return |a - b|^2 of all pairs, float64 [N, M]; rounding cannot make it negative."""
    square_N, square_M = np.square(a_ND).sum(axis=1), np.square(b_MD).sum(axis=1)
    return np.maximum(square_N[:, None] + square_M[None, :] - 2 * (a_ND @ b_MD.T), 0.0)


def _covered(points: np.ndarray, centres: np.ndarray, neighbours: int) -> float:
    """Return the share of `points` within the ball of any of `centres`."""
    neighbours = min(neighbours, len(centres) - 1)
    if neighbours < 1:
        return 0.0
    radius = np.empty(len(centres))
    for first in range(0, len(centres), ROWS_AT_ONCE):
        part = squared_distances(centres[first : first + ROWS_AT_ONCE], centres)
        np.fill_diagonal(part[:, first:], 0.0)  # The nearest is the sample itself, whatever rounding says.
        radius[first : first + len(part)] = np.partition(part, neighbours, axis=1)[:, neighbours]
    inside = 0
    for first in range(0, len(points), ROWS_AT_ONCE):
        part = squared_distances(points[first : first + ROWS_AT_ONCE], centres)
        inside += int((part <= radius).any(axis=1).sum())
    return inside / len(points)
