"""Positions -> `LatentBatch` with its draws: what a rank trains on, a pure function of (seed, data set, k).

A few threads of this process read ahead with positional reads; no worker processes, which cost more for
latents than they save. The loader has no state: `steps(consumed)` starts anywhere.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.order import GlobalOrder
from pipeline.data.shares import micro_batches_per_step, share, split_share
from pipeline.diffusion import draws
from pipeline.errors import DataError
from pipeline.latents.reader import LatentDataset


@dataclass(frozen=True)
class LatentBatch:
    """One micro-batch of b samples with every random number its step needs.

    Shape letters: b samples, C latent channels, M stored channels (2C for moments), h w latent sides.
    """

    moments: Tensor
    """float16 [b, M, h, w], unscaled."""
    text: Tensor | None
    """float16 [b, L, D] of the caption chosen; None when the data set stores tokens only."""
    tokens: Tensor
    """int64 [b, L] of the caption chosen."""
    noise: Tensor
    """float32 [b, C, h, w]."""
    posterior_noise: Tensor
    """float32 [b, C, h, w]."""
    timesteps: Tensor
    """int64 [b]."""
    dropped: Tensor
    """bool [b]: trains on the null text."""
    weight: Tensor
    """float32 [b]: 1, or 0 for a filler that keeps the number of micro-batches equal on all ranks."""
    positions: Tensor
    """int64 [b]: k of the run."""
    indices: Tensor
    """int64 [b]: sample in the split."""

    @property
    def size(self) -> int:
        """Number of samples, fillers included."""
        return len(self.positions)

    def to(self, device: torch.device | str) -> "LatentBatch":
        """Return the batch on `device`; the copy does not wait where memory is pinned."""
        tensors: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }
        return LatentBatch(**moved)


class LatentLoader:
    """The micro-batches of one rank, in order, for ever."""

    def __init__(
        self,
        dataset: LatentDataset,
        *,
        seed: int,
        engine: EngineConfig,
        objective: ObjectiveConfig,
        data: DataConfig,
        rank: int,
        world_size: int,
    ) -> None:
        """Prepare to read for `rank` of `world_size`.

        Raises:
            DataError: when the split is empty or a step needs more ranks than samples.
        """
        if len(dataset) == 0:
            raise DataError(f"{dataset.folder}: the split {dataset.split!r} has no samples")
        if engine.global_batch < world_size:
            raise DataError(
                f"engine.global_batch {engine.global_batch} is smaller than the world size {world_size}: "
                "every rank needs a sample a step; raise global_batch or use fewer processes"
            )
        self.dataset = dataset
        self.order = GlobalOrder(len(dataset), seed)
        self.seed, self.objective, self.data = seed, objective, data
        self.global_batch, self.rank, self.world_size = engine.global_batch, rank, world_size
        self.micro_batches = micro_batches_per_step(engine.global_batch, engine.micro_batch, world_size)

    def steps(self, consumed: int) -> Iterator[tuple[LatentBatch, ...]]:
        """Yield the micro-batches of each step from `consumed` samples on; closing the iterator ends its threads."""
        pending: deque[Future[LatentBatch]] = deque()
        with ThreadPoolExecutor(self.data.threads, thread_name_prefix="latents") as pool:
            upcoming = self._micro_batch_positions(consumed)
            ahead = max(self.data.prefetch, self.micro_batches)
            try:
                while True:
                    while len(pending) < ahead + self.micro_batches:
                        pending.append(pool.submit(self.batch, *next(upcoming)))
                    yield tuple(pending.popleft().result() for _ in range(self.micro_batches))
            finally:
                for future in pending:
                    future.cancel()

    def _micro_batch_positions(self, consumed: int) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield (positions, whether they are a filler) of each micro-batch of this rank."""
        for step in count():
            mine = share(consumed + step * self.global_batch, self.global_batch, self.rank, self.world_size)
            for part in split_share(mine, self.micro_batches):
                filler = len(part) == 0
                yield np.array(mine[:1] if filler else part, np.int64), filler

    def batch(self, positions: np.ndarray, filler: bool = False) -> LatentBatch:
        """Return the batch of these positions of the run: read, stacked, with all draws."""
        indices = self.order.samples(positions)
        seed, spec = self.seed, self.dataset.spec
        samples = [self.dataset.read(int(index)) for index in indices]
        latent = np.stack([sample.arrays["latent"] for sample in samples])
        chosen = [
            draws.caption_choice(seed, int(k), len(sample.record["captions"]))
            for k, sample in zip(positions, samples, strict=True)
        ]
        shape = (spec.channels, *latent.shape[2:])
        objective = self.objective
        return LatentBatch(
            moments=torch.from_numpy(latent),
            text=self._text(samples, chosen),
            tokens=torch.from_numpy(_chosen(samples, "tokens", chosen).astype(np.int64)),
            noise=torch.from_numpy(
                np.stack([draws.training_noise(seed, int(k), shape=shape) for k in positions])
            ),
            posterior_noise=torch.from_numpy(
                np.stack([draws.posterior_noise(seed, int(k), shape=shape) for k in positions])
            ),
            timesteps=torch.tensor(
                [draws.timestep(seed, int(k), objective, self.global_batch) for k in positions]
            ),
            dropped=torch.tensor(
                [draws.drops_caption(seed, int(k), objective.caption_dropout) for k in positions]
            ),
            weight=torch.full((len(positions),), 0.0 if filler else 1.0),
            positions=torch.from_numpy(positions.copy()),
            indices=torch.from_numpy(indices),
        )

    def _text(self, samples: list, chosen: list[int]) -> Tensor | None:
        if self.dataset.spec.text == "tokens":
            return None
        return torch.from_numpy(_chosen(samples, "text", chosen))


def _chosen(samples: list, member: str, chosen: list[int]) -> np.ndarray:
    return np.stack([sample.arrays[member][number] for sample, number in zip(samples, chosen, strict=True)])
