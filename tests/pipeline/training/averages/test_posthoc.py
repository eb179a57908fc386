"""Post-hoc averages: published exponents, inner products against dense quadrature, least squares against a dense solve."""

import numpy as np
import pytest

from pipeline.training.averages.posthoc import Profiles, combine, gamma_of, inner_products, sigma_rel_of

PUBLISHED = {
    0.05: 16.972198602303447,
    0.10: 6.937203937601809,
    0.15: 3.5578687748994646,
    0.25: 0.71982395800071,
}
GRID = (np.arange(200_000) + 0.5) / 200_000
"""Midpoints of equal parts of the training, whose end is 1."""


def dense(profiles: Profiles) -> np.ndarray:
    """Return the profiles on the grid, float64 [n, 200000]: zero after their end."""
    times, gammas = profiles.times[:, None], profiles.gammas[:, None]
    return (gammas + 1) * GRID**gammas / times ** (gammas + 1) * (GRID <= times)


def snapshots(count: int = 8, widths: tuple[float, ...] = (0.05, 0.10)) -> Profiles:
    times = np.repeat(np.arange(1, count + 1) / count, len(widths))
    return Profiles(times, np.tile([gamma_of(width) for width in widths], count))


@pytest.mark.parametrize(("sigma_rel", "gamma"), PUBLISHED.items())
def test_the_exponents_are_those_of_the_reference(sigma_rel: float, gamma: float) -> None:
    """Computed with the reference's root finder, NVlabs/edm2 `training/phema.py`, in float64."""
    assert gamma_of(sigma_rel) == pytest.approx(gamma, rel=1e-14)
    assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-14)


@pytest.mark.parametrize("sigma_rel", PUBLISHED)
def test_the_width_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    weights = dense(Profiles(np.array([1.0]), np.array([gamma_of(sigma_rel)])))[0] / len(GRID)
    mean = weights @ GRID
    assert np.sqrt(weights @ (GRID - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3])
def test_widths_that_no_power_has_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"must be above 0 and at most 0\.2887"):
        gamma_of(sigma_rel)


def test_inner_products_are_the_integrals() -> None:
    stored = snapshots()
    rows = dense(stored)
    assert inner_products(stored, stored) == pytest.approx(rows @ rows.T / len(GRID), rel=2e-4)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.25])
def test_the_combination_is_the_dense_least_squares_solution(sigma_rel: float) -> None:
    """The same profile is reached from 200,000 samples of every profile, and the error said is the error there."""
    stored = snapshots()
    rows = dense(stored)
    wanted = dense(Profiles(np.array([1.0]), np.array([gamma_of(sigma_rel)])))[0]
    solved = np.linalg.lstsq(rows.T, wanted, rcond=None)[0]
    found = combine(stored, 1.0, gamma_of(sigma_rel))
    norm = np.linalg.norm(wanted)
    assert np.linalg.norm((found.factors - solved) @ rows) / norm < 1e-4
    assert found.error == pytest.approx(np.linalg.norm(solved @ rows - wanted) / norm, rel=0.02)
    assert abs(found.factors.sum() - 1.0) < 0.07


@pytest.mark.parametrize("place", [0, 5, 15])
def test_a_stored_average_is_itself(place: int) -> None:
    stored = snapshots()
    found = combine(stored, float(stored.times[place]), float(stored.gammas[place]))
    assert found.factors == pytest.approx(np.eye(16)[place], abs=1e-9)
    assert found.error < 1e-7


def test_more_snapshots_fit_better() -> None:
    errors = [combine(snapshots(count), 1.0, gamma_of(0.15)).error for count in (2, 4, 8, 16, 64)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.005 < errors[0]


def test_hundreds_of_snapshots_have_no_huge_factors() -> None:
    """Nearly dependent profiles solved bluntly would enlarge the rounding of fp32 snapshots."""
    found = combine(snapshots(400), 1.0, gamma_of(0.12))
    assert np.abs(found.factors).sum() < 10 and found.error < 1e-3
