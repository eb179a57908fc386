"""(seed, k, purpose) -> noise, timestep, caption choice, dropout: randomness as a pure function of a position.

Every random number of a training comes from here, drawn on the host with counter-based Philox. Rank, world
size, micro-batches, threads and restarts do not enter, so they cannot change a run. About 190 us for a
4x64x64 noise.
"""

from enum import IntEnum
from functools import partial

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


def stream(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """Return the generator of one (seed, position, purpose): the same numbers on every machine."""
    philox = np.random.Philox(
        key=np.array([seed & KEY_MASK, purpose], np.uint64), counter=[0, 0, position, 0]
    )
    return np.random.Generator(philox)


def normal(seed: int, position: int, purpose: Purpose, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal float32 of `shape`."""
    return stream(seed, position, purpose).standard_normal(shape, dtype=np.float32)


def uniform(seed: int, position: int, purpose: Purpose) -> float:
    """Return one float64 in [0, 1)."""
    return float(stream(seed, position, purpose).random())


def timestep(seed: int, position: int, objective: ObjectiveConfig, global_batch: int) -> int:
    """Return t in [0, T) for position k of the run.

    "stratified" cuts [0, T) into `global_batch` strata and draws slot k mod B from its own stratum: still
    uniform over t for every sample, with a lower variance of the batch's loss (Kingma et al., VDM, I.1).
    """
    u = uniform(seed, position, Purpose.TIMESTEP)
    if objective.timestep_draw == "stratified":
        u = (position % global_batch + u) / global_batch
    return min(int(u * objective.timesteps), objective.timesteps - 1)


def drops_caption(seed: int, position: int, probability: float) -> bool:
    """Return whether position k trains on the null text (classifier-free guidance, Ho & Salimans)."""
    return uniform(seed, position, Purpose.DROPOUT) < probability


def caption_choice(seed: int, position: int, captions: int) -> int:
    """Return which of a sample's `captions` captions position k trains on."""
    return min(int(uniform(seed, position, Purpose.CAPTION) * captions), captions - 1)


posterior_noise = partial(normal, purpose=Purpose.POSTERIOR)
training_noise = partial(normal, purpose=Purpose.NOISE)
