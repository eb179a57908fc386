"""Position of the run -> (data set, sample): buckets take turns by batches, data sets by samples, both in closed form.

Every step has one shape on all ranks. Each bucket of each data set is a group with an order, and epochs, of its own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.interleave import Interleave
from pipeline.data.order import GlobalOrder, LaneOrder, Order, derived_seed
from pipeline.errors import ConfigError, DataError
from pipeline.latents.reader import LatentDataset
from pipeline.latents.record import LatentSample
from pipeline.latents.segments import BucketIndices
from pipeline.latents.spec import Bucket, LatentSpec

logger = logging.getLogger(__name__)

MANY_SHARDS = 1000
LOCAL_FILE_SYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "bcachefs"}
)


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of one bucket in one data set, and the order they come in."""

    set_number: int
    weight: float
    order: Order
    indices: BucketIndices


@dataclass(frozen=True, eq=False)
class Shape:
    """All groups of one bucket: they share batches."""

    bucket: Bucket
    groups: tuple[Group, ...]
    turns: Interleave


@dataclass(frozen=True)
class Lookup:
    """What several positions of one step read: `sets` and `indices` (in the set's split) are int64 [b]."""

    shape: Shape
    sets: np.ndarray
    indices: np.ndarray


class Mixture:
    """The order of a run over one or more data sets: a pure function of (seed, data sets, config)."""

    def __init__(
        self,
        sets: Sequence[LatentDataset],
        *,
        seed: int,
        global_batch: int,
        data: DataConfig,
        origin: int = 0,
    ) -> None:
        """Order the samples of `sets`, weighted by `data.mix` (a single set needs none).

        `origin`: the position of the run at which the first epoch of these data sets begins (see `accept_change`).

        Raises:
            ConfigError, DataError: the sets do not go together, or a split is empty.
        """
        self.sets, self.global_batch, self.origin = list(sets), global_batch, origin
        weights = np.array([entry.weight for entry in data.mix] or [1.0])
        assert len(weights) == len(self.sets), (len(weights), len(self.sets))
        self.weights = weights / weights.sum()
        self._starts = np.cumsum([0, *(len(dataset) for dataset in self.sets)])
        _refuse_unlike(self.sets)
        self.has_lanes = any(uses_lanes(data, dataset) for dataset in self.sets)
        self.shapes = self._shapes(seed, data)
        self._schedule = Interleave([sum(group.weight for group in shape.groups) for shape in self.shapes])

    def _shapes(self, seed: int, data: DataConfig) -> list[Shape]:
        groups: dict[Bucket, list[Group]] = {}
        for number, dataset in enumerate(self.sets):
            for place, bucket in enumerate(dataset.table.buckets):
                rows = dataset.table.rows_of(bucket)
                count, own_seed = int(rows.sum()), derived_seed(seed, number, place)
                order: Order = GlobalOrder(count, own_seed)
                if self.has_lanes:
                    order = LaneOrder(rows, own_seed, data.lanes, data.lane_window)
                weight = float(self.weights[number]) * count / len(dataset)
                group = Group(number, weight, order, dataset.table.indices_of(bucket))
                groups.setdefault(bucket, []).append(group)
        return [
            Shape(bucket, tuple(groups[bucket]), Interleave([group.weight for group in groups[bucket]]))
            for bucket in sorted(groups)
        ]

    def check_start(self, consumed: int) -> None:
        """Raise ConfigError where `consumed` is no boundary between batches and batches have shapes."""
        if len(self.shapes) > 1 and (consumed - self.origin) % self.global_batch:
            raise ConfigError(
                f"engine.global_batch {self.global_batch} does not divide the {consumed - self.origin} samples consumed "
                "so far: with several buckets each batch has one shape; keep the former global_batch, or a divisor"
            )

    def look_up(self, positions: np.ndarray) -> Lookup:
        """Return what these positions, all of one step, read."""
        return self.look_up_all([positions])[0]

    def look_up_all(self, parts: Sequence[np.ndarray]) -> list[Lookup]:
        """Return what each part, with positions of one step, reads: far cheaper at once than one by one."""
        shapes, places = zip(*(self._places(positions) for positions in parts), strict=True)
        found: list[Lookup | None] = [None] * len(parts)
        for shape in dict.fromkeys(shapes):
            chosen = [number for number, other in enumerate(shapes) if other is shape]
            sets, indices = self._read_at(shape, np.concatenate([places[number] for number in chosen]))
            cuts = np.cumsum([len(places[number]) for number in chosen])[:-1]
            pieces = zip(chosen, np.split(sets, cuts), np.split(indices, cuts), strict=True)
            for number, own_sets, own_indices in pieces:
                found[number] = Lookup(shape, own_sets, own_indices)
        return [lookup for lookup in found if lookup is not None]

    def _read_at(self, shape: Shape, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, sample in its split) at places of a shape's stream."""
        parts, turns = shape.turns.turns(places)
        sets, indices = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for number, group in enumerate(shape.groups):
            chosen = parts == number
            if chosen.any():
                sets[chosen] = group.set_number
                indices[chosen] = group.indices[group.order.samples(turns[chosen])]
        return sets, indices

    def _places(self, positions: np.ndarray) -> tuple[Shape, np.ndarray]:
        """Return the shape of a step and the place of each of its positions in that shape's stream."""
        relative = positions.astype(np.int64) - self.origin
        if len(self.shapes) == 1:
            return self.shapes[0], relative
        steps, slots = np.divmod(relative, self.global_batch)
        assert (steps == steps[0]).all(), positions
        shapes, batches = self._schedule.turns(steps[:1])
        return self.shapes[int(shapes[0])], batches[0] * self.global_batch + slots

    def by_lane(self, positions: np.ndarray) -> np.ndarray:
        """Return the positions of a step so that neighbours read the same stretches: ranks take cuts of this."""
        shape, places = self._places(positions)
        parts, turns = shape.turns.turns(places)
        lanes = np.empty(len(positions), np.int64)
        for number in np.unique(parts):
            lanes[parts == number] = shape.groups[number].order.lanes_of(turns[parts == number])
        return positions[np.argsort(lanes, kind="stable")]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return the number of each position's sample, int64: sets end to end, in the order of the config."""
        out = np.empty(len(positions), np.int64)
        steps = (
            (positions - self.origin) // self.global_batch
            if len(self.shapes) > 1
            else np.zeros(len(positions))
        )
        for step in np.unique(steps):
            found = self.look_up(positions[steps == step])
            out[steps == step] = self.numbers(found)
        return out

    def numbers(self, found: Lookup) -> np.ndarray:
        """Return the sample numbers of a look-up, int64."""
        return self._starts[found.sets] + found.indices

    def sample_of(self, number: int) -> tuple[int, int]:
        """Return (data set, sample in its split) of a sample number."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return place, number - int(self._starts[place])

    def read(self, number: int) -> LatentSample:
        """Return the sample with this number."""
        place, index = self.sample_of(number)
        return self.sets[place].read(index)

    def report(self, consumed: int) -> list[dict[str, Any]]:
        """Return for each data set its folder, share of the batches, samples drawn before `consumed`, and epochs."""
        drawn = np.zeros(len(self.sets), np.int64)
        relative = consumed - self.origin
        batches = self._schedule.counts(relative // self.global_batch) if len(self.shapes) > 1 else None
        shares = np.zeros(len(self.sets))
        for number, (shape, share) in enumerate(zip(self.shapes, self._schedule.shares, strict=True)):
            length = relative if batches is None else int(batches[number]) * self.global_batch
            counts = shape.turns.counts(length)
            for place, group in enumerate(shape.groups):
                drawn[group.set_number] += counts[place]
                shares[group.set_number] += share * shape.turns.shares[place]
        return [
            {
                "dataset": str(dataset.folder),
                "share": float(shares[number]),
                "samples": int(drawn[number]),
                "epochs": float(drawn[number]) / len(dataset),
            }
            for number, dataset in enumerate(self.sets)
        ]

    def figures(self, consumed: int) -> dict[str, float]:
        """Return what a record says of `report`: the epochs, and of several sets also the share, numbered as in `data.mix`."""
        told = self.report(consumed)
        if len(told) == 1:
            return {"data_epochs": told[0]["epochs"]}
        return {
            f"data_{name}/{number}": one[name]
            for number, one in enumerate(told)
            for name in ("share", "epochs")
        }

    @property
    def spec(self) -> LatentSpec:
        """The spec that all sets have."""
        return self.sets[0].spec


def uses_lanes(data: DataConfig, dataset: LatentDataset) -> bool:
    """Return whether the set is read in lanes; warns where `global` will hurt."""
    shards = len(dataset.shard_names)
    if data.order == "global" and shards > MANY_SHARDS and not is_local_disk(dataset.folder):
        logger.warning(
            "%s: data.order global opens any of %d shards for each sample, and this is no local disk: lanes reads few at a time",
            dataset.folder,
            shards,
        )
    return data.order == "lanes" or (data.order == "auto" and shards > MANY_SHARDS)


def is_local_disk(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Return whether the folder lies on a file system of this machine; unknown systems count as remote."""
    best, kind = "", ""
    resolved = f"{folder.resolve()}/"
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, found, *_ = line.split(" ")
        if resolved.startswith(f"{point.rstrip('/')}/") and len(point) >= len(best):
            best, kind = point, found
    return kind in LOCAL_FILE_SYSTEMS


def _refuse_unlike(sets: Sequence[LatentDataset]) -> None:
    """Raise where a split is empty or the sets could not stand in one batch."""
    for dataset in sets:
        if len(dataset) == 0:
            raise DataError(f"{dataset.folder}: the split {dataset.split!r} has no samples")
    first = sets[0]
    lines = []
    for dataset in sets[1:]:
        ours: Mapping[str, Any] = {**first.spec.as_dict(), **first.manifest.encoder}
        theirs: Mapping[str, Any] = {**dataset.spec.as_dict(), **dataset.manifest.encoder}
        lines += [
            f"data.mix: {name} of {dataset.folder} is {theirs.get(name)!r}, of {first.folder} it is {ours[name]!r}"
            for name in ours
            if ours[name] != theirs.get(name)
        ]
    if lines:
        raise ConfigError(lines)
