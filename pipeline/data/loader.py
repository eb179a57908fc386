"""Positions -> `LatentBatch` with its draws: what a rank trains on, a pure function of (seed, data sets, k).

A few threads of this process read ahead with positional reads; no worker processes, which cost more for
latents than they save. The loader has no state: `steps(consumed)` starts anywhere.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.batch import LatentBatch
from pipeline.data.buffers import Buffers
from pipeline.data.conditions import chosen_captions, time_ids
from pipeline.data.mixture import Lookup, Mixture
from pipeline.data.shares import micro_batches_per_step, share, split_share
from pipeline.data.substitutes import Substitutes
from pipeline.diffusion import draws
from pipeline.errors import DataError
from pipeline.latents.reader import LatentDataset

__all__ = ["LatentBatch", "LatentLoader"]

logger = logging.getLogger(__name__)

CHECKED_SHARDS_A_RANK = 32
LOOKED_UP_AT_ONCE = 2048
Result = TypeVar("Result")
Arrays = tuple[np.ndarray, dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """One micro-batch to be read: positions of one step, what they read, and whether it only fills up."""

    positions: np.ndarray
    found: Lookup
    filler: bool = False


class LatentLoader:
    """The micro-batches of one rank, in order, for ever."""

    def __init__(
        self,
        dataset: LatentDataset | Sequence[LatentDataset],
        *,
        seed: int,
        engine: EngineConfig,
        objective: ObjectiveConfig,
        data: DataConfig,
        rank: int,
        world_size: int,
        origin: int = 0,
        substituted: Mapping[int, int] | None = None,
    ) -> None:
        """Prepare to read for `rank` of `world_size`; several data sets go with the entries of `data.mix`.

        `origin`: the position at which the first epoch of this data begins, above 0 once a change of the data was
        accepted. `substituted`: what took the place of which position before (see `substituted`).

        Raises:
            ConfigError, DataError: a split is empty, sets do not go together, a checked sample is damaged, or a step
                needs more ranks than samples.
        """
        sets = [dataset] if isinstance(dataset, LatentDataset) else list(dataset)
        self.order = Mixture(sets, seed=seed, global_batch=engine.global_batch, data=data, origin=origin)
        if engine.global_batch < world_size:
            raise DataError(
                f"engine.global_batch {engine.global_batch} is smaller than the world size {world_size}: "
                "every rank needs a sample a step; raise global_batch or use fewer processes"
            )
        self.dataset: LatentDataset | Mixture = sets[0] if len(sets) == 1 else self.order
        self.seed, self.objective, self.data = seed, objective, data
        self.global_batch, self.rank, self.world_size = engine.global_batch, rank, world_size
        self.micro_batches = micro_batches_per_step(engine.global_batch, engine.micro_batch, world_size)
        self._substitutes = Substitutes(self.order, seed, data, substituted or {})
        # Latents and all noises may have one size: as many as can be in flight at once.
        in_flight = (4 if objective.input_perturbation else 3) * (data.prefetch + 3 * self.micro_batches)
        self._buffers = Buffers(pinned=torch.cuda.is_available(), kept=in_flight)
        pooled = self.order.spec.pooled_width is not None
        self._null_pooled = sets[0].null_text()["pooled"][0] if pooled else None
        for opened in sets:
            if data.verify != "off" and not opened.shards.verified:
                opened.check_samples(range(rank, len(opened.shard_names), world_size)[:CHECKED_SHARDS_A_RANK])

    @property
    def substituted(self) -> dict[int, int]:
        """Position -> sample number that took the place of one that could not be read, on this rank so far."""
        return dict(self._substitutes.taken)

    def resume(self, origin: int, substituted: Mapping[int, int]) -> None:
        """Take up what a checkpoint says, before `steps`: see the arguments of the same names.

        What this process has substituted itself since stays, unless its epochs now begin elsewhere.
        """
        own = self._substitutes.taken if origin == self.order.origin else {}
        self.order.origin = origin
        self._substitutes.taken = {**own, **substituted}

    def steps(self, consumed: int) -> Iterator[tuple[LatentBatch, ...]]:
        """Yield the micro-batches of each step from `consumed` samples on; closing the iterator ends its threads.

        Raises:
            ConfigError: `consumed` lies inside a batch of one shape.
            DataError, OSError: a sample is damaged or cannot be read, and may not be substituted.
        """
        return self._ahead(consumed, self.batch)

    def reads(self, consumed: int) -> Iterator[tuple[Arrays, ...]]:
        """Yield what `steps` reads for its micro-batches, (sample numbers, members [b, *shape]), without draws."""
        return self._ahead(consumed, self._members)

    def _ahead(self, consumed: int, work: Callable[[Part], Result]) -> Iterator[tuple[Result, ...]]:
        self.order.check_start(consumed)
        pending: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(self.data.threads, thread_name_prefix="latents") as pool:
            upcoming = self.parts(consumed)
            ahead = max(self.data.prefetch, self.micro_batches)
            try:
                while True:
                    while len(pending) < ahead + self.micro_batches:
                        pending.append(pool.submit(work, next(upcoming)))
                    yield tuple(pending.popleft().result() for _ in range(self.micro_batches))
            finally:
                for future in pending:
                    future.cancel()

    def parts(self, consumed: int) -> Iterator[Part]:
        """Yield the micro-batches of this rank as positions and what they read, looked up many at a time."""
        mine = share(0, self.global_batch, self.rank, self.world_size)
        cuts = split_share(mine, self.micro_batches)
        # Lanes sort the slots of a whole step, so many ranks look up few steps at once.
        of_step = self.global_batch if self.order.has_lanes else max(1, len(mine))
        most, steps, first = max(1, LOOKED_UP_AT_ONCE // of_step), 1, consumed
        while True:
            starts = range(first, first + steps * self.global_batch, self.global_batch)
            first, steps = starts.stop, min(2 * steps, most)
            slots = [self._slots(start, mine) for start in starts]
            # A rank without samples for a micro-batch runs one of weight zero.
            parts = [(row[_within(cut or mine[:1], mine)], not cut) for row in slots for cut in cuts]
            found = self.order.look_up_all([positions for positions, _ in parts])
            for (positions, filler), lookup in zip(parts, found, strict=True):
                yield Part(positions, lookup, filler)

    def _slots(self, start: int, mine: range) -> np.ndarray:
        """Return the positions that this rank reads of the step at `start`."""
        if not self.order.has_lanes:
            return np.arange(start + mine.start, start + mine.stop)
        return self.order.by_lane(np.arange(start, start + self.global_batch))[mine.start : mine.stop]

    def _members(self, part: Part) -> Arrays:
        found, tensors, _ = self._read(part)
        return self.order.numbers(found), tensors

    def batch(self, part: Part) -> LatentBatch:
        """Return the batch of these positions of one step: read, stacked, with all draws."""
        positions, filler = part.positions, part.filler
        found, arrays, records = self._read(part)
        seed, objective, spec = self.seed, self.objective, self.order.spec
        moments = arrays["latent"]
        shape = (len(positions), spec.channels, *moments.shape[2:])
        numbers = positions.tolist()
        dropped = torch.tensor([draws.drops_caption(seed, k, objective.caption_dropout) for k in numbers])
        flipped = np.array([self.data.flip and draws.flips(seed, k) for k in numbers])
        if flipped.any():
            moments[torch.from_numpy(flipped)] = moments[torch.from_numpy(flipped)].flip(-1)
        captions = chosen_captions(seed, numbers, records, arrays)
        pooled = captions.get("pooled")
        if pooled is not None:
            pooled[dropped] = torch.from_numpy(self._null_pooled)
        noise, input_noise = self._noises(shape, numbers)
        return LatentBatch(
            moments=moments,
            text=captions.get("text"),
            tokens=captions["tokens"].to(torch.int64),
            noise=noise,
            posterior_noise=self._normal(shape, numbers, draws.Purpose.POSTERIOR),
            timesteps=torch.tensor([draws.timestep(seed, k, objective, self.global_batch) for k in numbers]),
            dropped=dropped,
            weight=torch.full((len(positions),), 0.0 if filler else 1.0),
            positions=torch.from_numpy(positions.copy()),
            indices=torch.from_numpy(self.order.numbers(found)),
            pooled=pooled,
            time_ids=None if pooled is None else time_ids(records, found.shape.bucket, flipped),
            input_noise=input_noise,
        )

    def _read(self, part: Part) -> tuple[Lookup, dict[str, Tensor], list[dict[str, Any]]]:
        """Return what was read, its members [b, *shape], and the json of the samples where anything depends on it."""
        spec, positions = self.order.spec, part.positions
        found = self._substitutes.apply(positions, part.found)
        tensors = {
            member.name: self._buffers.take((len(positions), *member.shape), member.dtype)
            for member in spec.members(found.shape.bucket)
        }
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        with_records = spec.max_captions > 1 or spec.pooled_width is not None
        return found, tensors, self._substitutes.read(positions, found, arrays, with_records=with_records)

    def _noises(self, shape: tuple[int, ...], positions: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return the noise that the target names, and the one mixed in where input perturbation makes it another.

        Source: offset noise, Guttenberg 2023 (CrossLabs); input perturbation, Ning et al. 2023, algorithm 1.
        """
        offset, perturbation = self.objective.offset_noise, self.objective.input_perturbation
        noise = self._normal(shape, positions, draws.Purpose.NOISE)
        if offset:
            for row, position in zip(noise.numpy(), positions, strict=True):
                row += offset * draws.normal(self.seed, position, draws.Purpose.OFFSET, (shape[1], 1, 1))
        if not perturbation:
            return noise, None
        input_noise = self._normal(shape, positions, draws.Purpose.PERTURBATION)
        return noise, input_noise.mul_(perturbation).add_(noise)

    def _normal(self, shape: tuple[int, ...], positions: list[int], purpose: draws.Purpose) -> Tensor:
        tensor = self._buffers.take(shape, "<f4")
        for row, position in zip(tensor.numpy(), positions, strict=True):
            draws.fill_normal(row, self.seed, position, purpose)
        return tensor


def _within(cut: range, mine: range) -> slice:
    return slice(cut.start - mine.start, cut.stop - mine.start)
