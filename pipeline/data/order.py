"""Position of a stream -> sample of a group: stateless keyed bijections, so a run resumes from one integer.

Epoch e = k // N visits every sample once in an order that is computed for any k alone, with no table of N: a
Feistel network with cycle walking. Rank and world size only choose which positions a process looks up.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

ROUNDS = 6
KEPT_LAYOUTS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SEED_MASK = 0xFFFFFFFFFFFFFFFF
# Keeps the order of shards apart from that of samples where both have the same seed and epoch.
_SHARDS, _WINDOWS = np.uint64(0x51AD), np.uint64(0x71D0)


class Order(Protocol):
    """The order of one group of samples that have one shape."""

    @property
    def count(self) -> int:
        """Samples in the group."""
        ...

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample in [0, count) of each position of the group's stream, int64."""
        ...

    def lanes_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the lane of each position, int64: a rank takes slots of neighbouring lanes."""
        ...


def _mix(values: np.ndarray) -> np.ndarray:
    """Return splitmix64's finaliser of uint64 values: every input bit moves about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _keys(seed: int, *parts: np.ndarray | np.uint64) -> np.ndarray:
    """Return one uint64 key for each row of `parts`: different (seed, parts) give unrelated keys."""
    with np.errstate(over="ignore"):
        key = np.asarray(np.uint64(seed & _SEED_MASK))
        for part in parts:
            key = np.asarray(_mix(key * _GOLDEN + part))
    return key


def _half_bits(count: int) -> int:
    return max(1, (max(count - 1, 1).bit_length() + 1) // 2)


def _feistel(places: np.ndarray, counts: np.ndarray | int, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """Return the image of each place in [0, count) under its key's bijection of [0, count), int64.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains" (Feistel and cycle walking).
    """
    half_mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    bounds = np.broadcast_to(np.asarray(counts, np.uint64), places.shape)
    with np.errstate(over="ignore"):
        rounds = [_mix(keys + np.uint64(number + 1) * _GOLDEN) for number in range(ROUNDS)]
        out = places.astype(np.uint64)
        pending = np.arange(len(out))
        while len(pending):
            left, right = out[pending] >> shift, out[pending] & half_mask
            for key in rounds:
                left, right = right, left ^ (_mix(right + key[pending]) & half_mask)
            out[pending] = (left << shift) | right
            pending = pending[out[pending] >= bounds[pending]]
    return out.astype(np.int64)


def permute(places: np.ndarray, count: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Return the image of each place in [0, count) under the bijection of (seed, epoch), int64."""
    keys = _keys(seed, epochs.astype(np.uint64))
    return _feistel(places, count, keys, _half_bits(count))


def derived_seed(seed: int, *numbers: int) -> int:
    """Return a seed for one of several orders of a run; all numbers 0 give `seed` itself."""
    return int(_keys(seed, *map(np.uint64, numbers))) if any(numbers) else seed


@dataclass(frozen=True)
class GlobalOrder:
    """Uniform over the whole group: for local disks, where a read costs the same anywhere."""

    count: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse an empty group: its caller has named it to the user before."""
        assert self.count > 0, self.count

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample index in [0, count) of each position, int64."""
        epochs, places = np.divmod(positions.astype(np.int64), self.count)
        return permute(places, self.count, self.seed, epochs)

    def lanes_of(self, positions: np.ndarray) -> np.ndarray:
        """Return zeros: any rank may read anything."""
        return np.zeros(len(positions), np.int64)

    def epoch(self, position: int) -> int:
        """Return the epoch that position k belongs to."""
        return position // self.count


class LaneOrder:
    """Few shards at a time on each node, many in each batch: for shared file systems and object stores.

    An epoch lays its permuted shards end to end. Lane l of L owns a contiguous stretch of that line and shuffles
    inside windows of it; place t of the epoch belongs to lane t mod L. So a batch mixes L far-apart stretches, and
    a node that takes the slots of L / n lanes reads L / n stretches: each shard by one node, but for the ends.
    """

    def __init__(self, shard_rows: np.ndarray, seed: int, lanes: int, window: int) -> None:
        """Order the samples of shards with `shard_rows` rows each.

        `lanes` and `window` (samples that a lane shuffles among) are part of the run's definition.
        """
        self._rows = np.asarray(shard_rows, np.int64)
        self._starts = np.cumsum(self._rows) - self._rows
        self.count = int(self._rows.sum())
        assert self.count > 0 and lanes > 0 and window > 0, (self.count, lanes, window)
        self.lanes, self.window, self.seed = min(lanes, self.count), window, seed
        self._half_bits = _half_bits(min(2 * window, self.count))
        self._layouts: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def lanes_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the lane of each position, int64."""
        return positions % self.count % self.lanes

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample index in [0, count) of each position, int64."""
        epochs, places = np.divmod(positions.astype(np.int64), self.count)
        lines = self._lines(epochs, places)
        out = np.empty_like(lines)
        for epoch in np.unique(epochs):
            shards, ends = self._layout(int(epoch))
            of_epoch = epochs == epoch
            number = np.searchsorted(ends, lines[of_epoch], side="right")
            shard = shards[number]
            out[of_epoch] = self._starts[shard] + lines[of_epoch] - (ends[number] - self._rows[shard])
        return out

    def _lines(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return where each place of an epoch lies on the epoch's line of shards."""
        lane, step = places % self.lanes, places // self.lanes
        short, longer = divmod(self.count, self.lanes)
        length = short + (lane < longer)
        start = lane * short + np.minimum(lane, longer)
        # Windows of w to 2w samples, evenly cut: no short one at the end, whose walk would be long.
        windows = np.maximum(1, length // self.window)
        window = ((step + 1) * windows - 1) // length
        first, end = window * length // windows, (window + 1) * length // windows
        keys = _keys(self.seed, _WINDOWS, *(part.astype(np.uint64) for part in (epochs, lane, window)))
        return start + first + _feistel(step - first, end - first, keys, self._half_bits)

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (shards in the order of the epoch's line, where each ends on it)."""
        with self._lock:
            if epoch not in self._layouts:
                numbers = np.arange(len(self._rows))
                keys = np.broadcast_to(_keys(self.seed, _SHARDS, np.uint64(epoch)), numbers.shape)
                shards = _feistel(numbers, len(numbers), keys, _half_bits(len(numbers)))
                self._layouts[epoch] = shards, np.cumsum(self._rows[shards])
                if len(self._layouts) > KEPT_LAYOUTS:
                    self._layouts.popitem(last=False)
            self._layouts.move_to_end(epoch)
            return self._layouts[epoch]
