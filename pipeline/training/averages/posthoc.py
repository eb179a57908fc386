"""The mathematics of post-hoc averages: power-function profiles, and any profile as a combination of stored ones.

An average with the profile p_(gamma, T)(t) = (gamma + 1) t^gamma / T^(gamma + 1) weighs the weights at time t <= T.
Snapshots of two such averages at several times span nearly every other one: least squares over the profiles,
whose inner products are closed forms, gives the factors, and the same factors applied to the snapshots give the
average. Everything here is float64.

Source: Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1 and
appendix C.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

# The width falls with gamma from here on; below there are two exponents to a width.
WIDEST_SIGMA_REL = 12**-0.5


@cache
def gamma_of(sigma_rel: float) -> float:
    """Return the exponent >= 0 of the power function whose standard deviation is `sigma_rel` of the training.

    It is the largest root of (g + 1) / ((g + 2)^2 (g + 3)) = sigma_rel^2.

    Source: Karras et al. 2023, appendix C.1, algorithm 2.

    Raises:
        ValueError: the width is not in (0, 12^-1/2].
    """
    if not 0.0 < sigma_rel <= WIDEST_SIGMA_REL:
        raise ValueError(f"sigma_rel {sigma_rel}: must be above 0 and at most {WIDEST_SIGMA_REL:.4f}")
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """Return the standard deviation of the profile t^gamma as a part of the training: the inverse of `gamma_of`."""
    return float(np.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0))))


@dataclass(frozen=True)
class Profiles:
    """n power-function profiles: each ends at its time and has its exponent; float64 [n] both."""

    times: np.ndarray
    gammas: np.ndarray


def inner_products(a: Profiles, b: Profiles) -> np.ndarray:
    """Return the integrals over t of p_a(t) p_b(t), float64 [n_a, n_b].

    For T_a <= T_b: (g_a + 1)(g_b + 1) (T_a / T_b)^g_b / ((g_a + g_b + 1) T_b). Source: Karras et al., eq. 123 ff.
    """
    times_a, gammas_a = a.times[:, None], a.gammas[:, None]
    times_b, gammas_b = b.times[None, :], b.gammas[None, :]
    ratio = np.minimum(times_a, times_b) / np.maximum(times_a, times_b)
    exponent = np.where(times_a < times_b, gammas_b, gammas_a)
    product: np.ndarray = (gammas_a + 1) * (gammas_b + 1) * ratio**exponent
    return product / ((gammas_a + gammas_b + 1) * np.maximum(times_a, times_b))


@dataclass(frozen=True)
class Combination:
    """How to make one average of stored ones."""

    factors: np.ndarray
    """float64 [n], one for each stored profile; they add up to nearly 1."""
    error: float
    """|| made profile - wanted profile || / || wanted profile || in L2: 0 where the wanted one is stored."""


def combine(stored: Profiles, time: float, gamma: float) -> Combination:
    """Return the least-squares combination of the stored profiles for the one that ends at `time` with `gamma`.

    The profiles are scaled to norm 1 and the smallest directions left out (at 1e-13 of the largest): many
    snapshots are nearly dependent, and huge factors of opposite signs would enlarge their rounding.
    """
    wanted = Profiles(np.array([time], np.float64), np.array([gamma], np.float64))
    gram = inner_products(stored, stored)
    right = inner_products(stored, wanted)[:, 0]
    norm = float(inner_products(wanted, wanted)[0, 0])
    scale = 1.0 / np.sqrt(np.diag(gram))
    solution, *_ = np.linalg.lstsq(gram * scale[:, None] * scale[None, :], right * scale, rcond=1e-13)
    factors = solution * scale
    squared = norm - 2.0 * float(factors @ right) + float(factors @ gram @ factors)
    return Combination(factors, float(np.sqrt(max(squared, 0.0) / norm)))
