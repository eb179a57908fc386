"""Position k of the run -> sample of the data set: stateless, so a run resumes from one integer.

Epoch e = k // N visits every sample once in the order of a keyed bijection of [0, N): a Feistel network with
cycle walking, computed for any k in about a microsecond and with no table of N. Rank and world size only
choose which positions a process looks up.
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(values: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser of uint64 values: every input bit moves about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def permute(places: np.ndarray, count: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Return the image of each place in [0, count) under the bijection of (seed, epoch), int64.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains" (Feistel and cycle walking).
    """
    half_bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    half_mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    with np.errstate(over="ignore"):
        base = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) * _GOLDEN + epochs.astype(np.uint64))
        keys = [_mix(base + np.uint64(number + 1) * _GOLDEN) for number in range(ROUNDS)]
        out = places.astype(np.uint64)
        pending = np.arange(len(out))
        while len(pending):
            left, right = out[pending] >> shift, out[pending] & half_mask
            for key in keys:
                left, right = right, left ^ (_mix(right + key[pending]) & half_mask)
            out[pending] = (left << shift) | right
            pending = pending[out[pending] >= count]
    return out.astype(np.int64)


@dataclass(frozen=True)
class GlobalOrder:
    """Uniform over the whole split: for local disks, where a read costs the same anywhere."""

    count: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse an empty split: its caller has named it to the user before."""
        assert self.count > 0, self.count

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample index in [0, count) of each position of the run, int64."""
        epochs, places = np.divmod(positions.astype(np.int64), self.count)
        return permute(places, self.count, self.seed, epochs)

    def epoch(self, position: int) -> int:
        """Return the epoch that position k belongs to."""
        return position // self.count
