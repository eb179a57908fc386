"""(seed, k, purpose) -> noise, timestep, caption choice, dropout: randomness as a pure function of a position.

Every random number of a training comes from here, drawn on the host with counter-based Philox. Rank, world
size, micro-batches, threads and restarts do not enter, so they cannot change a run. About 190 us for a
4x64x64 noise.
"""

import math
from enum import IntEnum
from functools import partial
from statistics import NormalDist

import numpy as np

from pipeline.config import ObjectiveConfig

KEY_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a stream is for; the numbers are part of every run's definition and are never reused."""

    POSTERIOR = 1
    NOISE = 2
    TIMESTEP = 3
    DROPOUT = 4
    CAPTION = 5
    PICTURE = 6
    VALIDATION_NOISE = 7
    FIRST_STAGE = 8
    OFFSET = 9
    PERTURBATION = 10
    SAMPLER = 11
    FLIP = 12
    SUBSTITUTE = 13


def stream(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """Return the generator of one (seed, position, purpose): the same numbers on every machine."""
    philox = np.random.Philox(
        key=np.array([seed & KEY_MASK, purpose], np.uint64), counter=[0, 0, position, 0]
    )
    return np.random.Generator(philox)


def normal(seed: int, position: int, purpose: Purpose, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal float32 of `shape`."""
    return stream(seed, position, purpose).standard_normal(shape, dtype=np.float32)


def fill_normal(out: np.ndarray, seed: int, position: int, purpose: Purpose) -> None:
    """Fill float32 `out`, C-contiguous, with the numbers that `normal` returns for its shape."""
    stream(seed, position, purpose).standard_normal(out=out, dtype=np.float32)


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """Return one float64 in [0, 1)."""
    return float(stream(seed, position, purpose).random())


def timestep(seed: int, position: int, objective: ObjectiveConfig, global_batch: int) -> int:
    """Return t in [0, T) for position k of the run.

    "stratified" cuts the quantiles [0, 1) into `global_batch` strata and draws slot k mod B from its own stratum:
    every sample still follows the density, with a lower variance of the batch's loss (Kingma et al., VDM, I.1).
    """
    u = uniform(seed, position, Purpose.TIMESTEP)
    if objective.timestep_draw == "stratified":
        u = (position % global_batch + u) / global_batch
    return min(int(quantile(u, objective) * objective.timesteps), objective.timesteps - 1)


def quantile(u: float, objective: ObjectiveConfig) -> float:
    """Return the point of [0, 1] below which the share `u` of the drawn times t / T lies.

    Source: Esser et al. 2024 (SD3), section 3.1: logit-normal, eq. 19; mode with heavy tails, eq. 20, whose time
    runs from data to noise as ours does.
    """
    if objective.timestep_density == "logit_normal":
        normal_quantile = NormalDist(objective.logit_mean, objective.logit_std).inv_cdf
        return 1.0 / (1.0 + math.exp(-normal_quantile(min(max(u, 1e-12), 1.0 - 1e-12))))
    if objective.timestep_density == "mode":
        # The equation falls from 1 to 0: the mirrored u keeps the strata in order.
        v = 1.0 - u
        return 1.0 - v - objective.mode_scale * (math.cos(math.pi * v / 2.0) ** 2 - 1.0 + v)
    return u


def drops_caption(seed: int, position: int, probability: float) -> bool:
    """Return whether position k trains on the null text (classifier-free guidance, Ho & Salimans)."""
    return uniform(seed, position, Purpose.DROPOUT) < probability


def caption_choice(seed: int, position: int, captions: int) -> int:
    """Return which of a sample's `captions` captions position k trains on."""
    return min(int(uniform(seed, position, Purpose.CAPTION) * captions), captions - 1)


def flips(seed: int, position: int) -> bool:
    """Return whether position k trains on the mirrored latent: every second one."""
    return uniform(seed, position, Purpose.FLIP) < 0.5


def substitute(seed: int, position: int, count: int, attempt: int) -> int:
    """Return which of `count` samples takes the place of one that cannot be read, at the given attempt."""
    draw = stream(seed, position, Purpose.SUBSTITUTE).integers(count, size=attempt + 1)
    return int(draw[attempt])


def picture_seed(seed: int, picture: int) -> int:
    """Return the seed of the generator that a stochastic sampler draws from for one numbered picture."""
    return int(stream(seed, picture, Purpose.SAMPLER).integers(2**63))


posterior_noise = partial(normal, purpose=Purpose.POSTERIOR)
training_noise = partial(normal, purpose=Purpose.NOISE)
