"""KID and Frechet distance: closed forms, another implementation, and intervals that cover the truth."""

import numpy as np
import pytest
from numpy.random import Generator, default_rng
from scipy import linalg, stats

from pipeline.evaluation import distances
from pipeline.evaluation.distances import frechet, has_frechet_interval, kid, squared_frechet
from pipeline.evaluation.estimates import Estimate, group_jackknife, mean_estimate, student_quantile

DRAWS = 100


def with_moments(draw: Generator, count: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return samples whose own mean and covariance (divisor n - 1) are exactly those given."""
    raw = draw.standard_normal((count, len(mean)))
    centred = raw - raw.mean(axis=0)
    white = centred @ np.linalg.inv(linalg.cholesky(np.cov(centred, rowvar=False)))
    return mean + white @ linalg.cholesky(covariance)


def covariance(draw: Generator, width: int) -> np.ndarray:
    root = draw.standard_normal((width, width))
    return root @ root.T / width + 0.05 * np.eye(width)


def by_matrix_root(x: np.ndarray, y: np.ndarray) -> float:
    """Return the distance as Heusel's code has it: means, covariances, scipy's root of their product."""
    sigma_x, sigma_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(sigma_x @ sigma_y)
    return float(
        np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sigma_x + sigma_y) - 2 * np.trace(root).real
    )


def test_frechet_of_gaussians_along_the_axes_is_the_closed_form() -> None:
    draw = default_rng(0)
    mean_x, mean_y = draw.standard_normal(6), draw.standard_normal(6)
    deviation_x, deviation_y = draw.uniform(0.2, 2, 6), draw.uniform(0.2, 2, 6)
    x = with_moments(draw, 40, mean_x, np.diag(deviation_x**2))
    y = with_moments(draw, 30, mean_y, np.diag(deviation_y**2))
    expected = np.square(mean_x - mean_y).sum() + np.square(deviation_x - deviation_y).sum()
    assert squared_frechet(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_correlated_gaussians_is_that_of_the_matrix_root() -> None:
    draw = default_rng(1)
    x = with_moments(draw, 50, draw.standard_normal(12), covariance(draw, 12))
    y = with_moments(draw, 40, draw.standard_normal(12), covariance(draw, 12))
    assert squared_frechet(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-8)


def test_frechet_is_that_of_an_independent_implementation() -> None:
    """The numbers are torch-fidelity 0.4.0's for these samples: its FID, and its KID unbiased and as U-statistic."""
    x, y, z = recorded()
    assert squared_frechet(x, y) == pytest.approx(2.1667593478497267, rel=1e-9)
    assert kid(x[:50], y)["value"] == pytest.approx(0.4747871836061983, rel=1e-9)
    assert kid(x, z, paired=True)["value"] == pytest.approx(0.16043724153812455, rel=1e-9)


def recorded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = default_rng(11)
    x = draw.standard_normal((60, 8))
    y = 0.3 + 1.2 * draw.standard_normal((50, 8))
    return x, y, x @ np.diag(np.linspace(0.5, 1.5, 8)) + 0.2 * draw.standard_normal((60, 8))


def test_fewer_samples_than_features_are_stable() -> None:
    """Singular covariances: a set is at 0 of itself and of its copy in another order, and nothing is complex or negative."""
    draw = default_rng(2)
    x, y = 100 * draw.standard_normal((10, 64)), 100 * draw.standard_normal((12, 64))
    scale = np.square(x).sum()
    assert abs(squared_frechet(x, x[::-1])) < 1e-10 * scale
    # tr (S_x S_y)^(1/2) of singular matrices by the eigenvalues of their product.
    eigenvalues = np.linalg.eigvals(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    largest = np.sort(eigenvalues)[::-1][:9]
    plain = np.square(x.mean(0) - y.mean(0)).sum() + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
    assert squared_frechet(x, y) == pytest.approx(plain - 2 * np.sqrt(largest).sum(), rel=1e-6)
    found = frechet(x, y)
    assert found["low"] is None and found["value"] == found["plug_in"] > 0


def test_an_interval_needs_more_samples_than_features() -> None:
    assert not has_frechet_interval(39, 4) and has_frechet_interval(40, 4)
    assert not has_frechet_interval(67, 64) and has_frechet_interval(68, 64)
    assert not has_frechet_interval(2155, 2048) and has_frechet_interval(2156, 2048)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_frechet_interval_covers_the_truth_where_the_plug_in_does_not(shift: float) -> None:
    """80 samples in 20 features: the textbook estimate is far above, the corrected one is in the middle."""
    draw, width, count = default_rng(3), 20, 80
    deviation_x = 1 / np.sqrt(np.arange(1, width + 1))
    deviation_y = deviation_x * (1 + shift * np.linspace(-1, 1, width))
    truth = width * shift**2 + np.square(deviation_x - deviation_y).sum()
    found = [
        frechet(
            draw.standard_normal((count, width)) * deviation_x,
            shift + draw.standard_normal((count, width)) * deviation_y,
        )
        for _ in range(DRAWS)
    ]
    assert sum(one["low"] <= truth <= one["high"] for one in found) >= 90
    spread = np.std([one["value"] for one in found])
    assert np.mean([one["value"] for one in found]) == pytest.approx(truth, abs=0.4 * spread)
    reaches = [one["high"] - one["value"] for one in found]
    plain = [abs(one["plug_in"] - truth) <= reach for one, reach in zip(found, reaches, strict=True)]
    assert sum(plain) < 70


def true_mmd2(
    mean: np.ndarray, deviation: np.ndarray, other: np.ndarray, deviation_other: np.ndarray
) -> float:
    """Return MMD^2 of two Gaussians along the axes: (1 + a.b/D)^3 is a sum over moments, each a squared difference."""

    def moments(m: np.ndarray, s: np.ndarray) -> list[np.ndarray]:
        sigma = np.diag(s**2)
        third = np.einsum("i,j,k->ijk", m, m, m)
        for order in ("i,jk->ijk", "j,ik->ijk", "k,ij->ijk"):
            third = third + np.einsum(order, m, sigma)
        return [m, np.outer(m, m) + sigma, third]

    width, weights = len(mean), (3, 3, 1)
    pairs = zip(moments(mean, deviation), moments(other, deviation_other), strict=True)
    return float(
        sum(
            weight * np.square(a - b).sum() / width**power
            for power, (weight, (a, b)) in enumerate(zip(weights, pairs, strict=True), 1)
        )
    )


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_interval_of_kid_covers_the_truth(
    paired: bool, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs share most of their noise: an interval that took them for independent would be wrong, one of the pairs is not."""
    monkeypatch.setattr(distances, "SUBSETS", 1)
    draw, width, count = default_rng(4), 8, 40
    one, two = np.full(width, 0.2), np.full(width, 0.2 + shift)
    deviation = np.linspace(0.6, 1.2, width)
    truth = true_mmd2(one, deviation, two, deviation)
    assert truth == pytest.approx(0, abs=1e-12) if shift == 0 else truth > 0.5
    covered, values = 0, []
    for _ in range(DRAWS):
        shared = draw.standard_normal((count, width))
        x = shared if paired else draw.standard_normal((count, width))
        y = 0.9 * shared + np.sqrt(1 - 0.81) * draw.standard_normal((count, width))
        found = kid(one + deviation * x, two + deviation * y, paired=paired)
        covered += found["low"] <= truth <= found["high"]
        values.append(found["value"])
    assert covered >= 90
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / np.sqrt(DRAWS))


def test_kid_in_blocks_is_kid_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = default_rng(5)
    x, y = draw.standard_normal((23, 5)), 1 + draw.standard_normal((17, 5))
    whole = kid(x, y)
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 7)
    assert kid(x, y)["value"] == pytest.approx(whole["value"], rel=1e-12)


def test_the_jackknife_of_kid_is_the_one_that_really_leaves_out() -> None:
    draw = default_rng(6)
    x, y = draw.standard_normal((9, 4)), 1 + draw.standard_normal((7, 4))
    found = kid(x, y)
    without = [
        [kid(np.delete(x, n, 0), y)["value"] for n in range(9)],
        [kid(x, np.delete(y, n, 0))["value"] for n in range(7)],
    ]
    variance = sum((len(part) - 1) / len(part) * np.square(part - np.mean(part)).sum() for part in without)
    assert found["standard_error"] == pytest.approx(np.sqrt(variance), rel=1e-9)
    pairs = kid(x[:7], y, paired=True)
    left = np.array([kid(np.delete(x[:7], n, 0), np.delete(y, n, 0), paired=True)["value"] for n in range(7)])
    assert pairs["standard_error"] == pytest.approx(
        np.sqrt(6 / 7 * np.square(left - left.mean()).sum()), rel=1e-9
    )


def test_subsets_have_the_mean_of_the_whole() -> None:
    draw = default_rng(7)
    found = kid(draw.standard_normal((60, 6)), 0.5 + draw.standard_normal((60, 6)))
    assert (found["subsets"]["size"], found["subsets"]["count"]) == (30, 100)
    error = found["subsets"]["deviation"] / np.sqrt(100)
    assert found["subsets"]["mean"] == pytest.approx(found["value"], abs=4 * error)
    assert kid(np.eye(3), np.eye(3))["subsets"]["mean"] is None


def test_students_quantile_is_scipys() -> None:
    for degrees in (1, 2, 3, 5, 7, 19, 63, 1000):
        assert student_quantile(0.975, degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


def test_the_mean_has_students_interval() -> None:
    values = np.array([1.0, 2.0, 4.0, 7.0])
    low, high = stats.t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    found = mean_estimate(values)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert mean_estimate(np.array([3.0])) == Estimate(3.0)


def test_the_group_jackknife_takes_a_bias_of_one_over_n_away() -> None:
    """The variance with divisor n is too small by 1/n: corrected it is the one with n - 1, exactly, at one sample a group."""
    values = default_rng(8).standard_normal(20)
    found = group_jackknife(lambda kept: float(values[kept].var()))
    assert found.value == pytest.approx(values.var(ddof=1), rel=1e-12)
