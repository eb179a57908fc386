"""How far two sets of feature vectors lie apart: KID and the Frechet distance, each with a confidence interval.

Everything is float64. `paired` says that row i of both sets came of the same caption: the two are then one sample of
pairs, which the unbiased estimate and the intervals have to know. Shape letters: N and M samples, D features.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.evaluation.estimates import GROUPS, Estimate, group_jackknife

SUBSETS, SUBSET_SIZE = 100, 1000
ROWS_AT_ONCE = 2048


def kid(x_ND: np.ndarray, y_MD: np.ndarray, *, paired: bool = False) -> dict[str, Any]:
    """Return the kernel inception distance as `Estimate`'s fields, and mean and spread over `subsets`.

    The value is the unbiased MMD^2 with the kernel (a . b / D + 1)^3 over all samples (Binkowski et al. 2018, eq. 4;
    Gretton et al. 2012, lemma 6; for pairs their eq. 4, which leaves out i = j). It can fall below 0 by chance. The
    interval is the delete-one jackknife's: exact for a U-statistic up to order 1/n^2, and too wide rather than too narrow
    where both sets have one distribution (Efron and Stein 1981). `subsets` are what other programs print.
    """
    x, y = x_ND.astype(np.float64), y_MD.astype(np.float64)
    sums = _KernelSums.of(x, y, paired)
    n, m = len(x), len(y)
    value = sums.mmd2()
    found = Estimate(value)
    if min(n, m) >= 3:
        variance = _spread(sums.without_x()) + (0.0 if paired else _spread(sums.without_y()))
        found = Estimate.around(value, float(np.sqrt(variance)), min(n, m) - 1)
    return asdict(found) | {"subsets": _over_subsets(x, y, paired)}


class _KernelSums:
    """Sums over the rows of the three kernel matrices, without the terms that an unbiased estimate leaves out."""

    def __init__(self, xx_N: np.ndarray, yy_M: np.ndarray, xy_N: np.ndarray, yx_M: np.ndarray, paired: bool):
        self.xx, self.yy, self.xy, self.yx, self.paired = xx_N, yy_M, xy_N, yx_M, paired

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, paired: bool) -> "_KernelSums":
        assert not paired or len(x) == len(y), (len(x), len(y))
        xx, yy = _row_sums(x, x) - _kernel_of_pairs(x, x), _row_sums(y, y) - _kernel_of_pairs(y, y)
        same = _kernel_of_pairs(x, y) if paired else 0.0
        return cls(xx, yy, _row_sums(x, y) - same, _row_sums(y, x) - same, paired)

    def mmd2(self) -> float:
        """Return the unbiased estimate from all samples."""
        n, m = len(self.xx), len(self.yy)
        return float(self._of(self.xx.sum(), n, self.yy.sum(), m, self.xy.sum()))

    def without_x(self) -> np.ndarray:
        """Return the estimates without one sample of x each, or without one pair each."""
        n, m = len(self.xx), len(self.yy)
        xx = self.xx.sum() - 2 * self.xx
        if self.paired:
            return self._of(xx, n - 1, self.yy.sum() - 2 * self.yy, n - 1, self.xy.sum() - self.xy - self.yx)
        return self._of(xx, n - 1, self.yy.sum(), m, self.xy.sum() - self.xy)

    def without_y(self) -> np.ndarray:
        """Return the estimates without one sample of y each."""
        n, m = len(self.xx), len(self.yy)
        return self._of(self.xx.sum(), n, self.yy.sum() - 2 * self.yy, m - 1, self.xy.sum() - self.yx)

    def _of(self, xx: Any, n: int, yy: Any, m: int, xy: Any) -> Any:
        across = n * (n - 1) if self.paired else n * m
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / across


def _kernel(inner: np.ndarray, width: int) -> np.ndarray:
    return (inner / width + 1.0) ** 3


def _row_sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    parts = [
        _kernel(a[first : first + ROWS_AT_ONCE] @ b.T, a.shape[1]).sum(axis=1)
        for first in range(0, len(a), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)


def _kernel_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _kernel(np.einsum("nd,nd->n", a, b), a.shape[1])


def _spread(left_out: np.ndarray) -> float:
    """Return the jackknife's variance from the estimates that leave one out each."""
    n = len(left_out)
    return float((n - 1) / n * np.square(left_out - left_out.mean()).sum())


def _over_subsets(x: np.ndarray, y: np.ndarray, paired: bool) -> dict[str, Any]:
    """Return mean and standard deviation over random subsets of at most 1000, half of a smaller sample."""
    fewest = min(len(x), len(y))
    size = SUBSET_SIZE if fewest >= SUBSET_SIZE else fewest // 2
    if size < 2:
        return {"size": size, "count": 0, "mean": None, "deviation": None}
    draw = np.random.default_rng(0)
    values = []
    for _ in range(SUBSETS):
        of_x = draw.choice(len(x), size, replace=False)
        of_y = of_x if paired else draw.choice(len(y), size, replace=False)
        values.append(_KernelSums.of(x[of_x], y[of_y], paired).mmd2())
    return {
        "size": size,
        "count": SUBSETS,
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values)),
    }


def frechet(x_ND: np.ndarray, y_MD: np.ndarray) -> dict[str, Any]:
    """Return the squared Frechet distance of the two Gaussians that fit the sets, as `Estimate`'s fields.

    `plug_in` is the textbook estimate, which other programs print. It is too large by about a / n (Chong and Forsyth
    2020, who extrapolate in 1 / n); the value here is the group jackknife's, in which that term cancels, and its interval
    covers the distance of the true distributions. Group g is left out of both sets at once, so pairs stay together.

    With no more samples than features, less a group, the covariances are singular, the error no longer falls as 1 / n, and
    no interval is honest: there is none, and the value is `plug_in`, an upper bound on average.
    """
    x, y = x_ND.astype(np.float64), y_MD.astype(np.float64)
    plug_in = squared_frechet(x, y)
    fewest = min(len(x), len(y))
    if not has_frechet_interval(fewest, x.shape[1]):
        return asdict(Estimate(plug_in)) | {"plug_in": plug_in}
    group_of_x, group_of_y = np.arange(len(x)) % GROUPS, np.arange(len(y)) % GROUPS
    found = group_jackknife(lambda kept: squared_frechet(x[kept[group_of_x]], y[kept[group_of_y]]))
    return asdict(found) | {"plug_in": plug_in}


def has_frechet_interval(samples: int, width: int) -> bool:
    """Return whether so many samples are enough for an interval in `width` features."""
    return samples >= 2 * GROUPS and samples * (GROUPS - 1) > width * GROUPS


def squared_frechet(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Return |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)) of float64 samples; S with the divisor n - 1.

    The trace of the root is the sum of the singular values of R_x R_y^T, where R^T R = S by QR of the centred samples:
    the square roots of the eigenvalues of S_x S_y, without forming S, whose condition is the square, and without a root
    of a singular matrix. So N < D is no trouble. Source: Dowson and Landau 1982; Heusel et al. 2017, eq. 6.
    """
    mean_x, mean_y = x_ND.mean(axis=0), y_MD.mean(axis=0)
    root_x, root_y = (
        np.linalg.qr(z - mean, mode="r") / np.sqrt(len(z) - 1) for z, mean in ((x_ND, mean_x), (y_MD, mean_y))
    )
    traces = np.square(root_x).sum() + np.square(root_y).sum()
    shared = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    return float(np.square(mean_x - mean_y).sum() + traces - 2 * shared)
