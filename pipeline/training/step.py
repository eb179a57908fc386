"""From the micro-batches of a step to accumulated gradients."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.loader import LatentBatch
from pipeline.diffusion.objective import denoising_loss, training_weight
from pipeline.diffusion.posterior import sample_posterior, scale_latents
from pipeline.diffusion.schedule import Schedule
from pipeline.latents.spec import LatentSpec
from pipeline.training.engine import Engine
from pipeline.training.text import TextSource
from pipeline.training.world import World

TIMESTEP_BINS = 10


@dataclass(frozen=True)
class Losses:
    """What the micro-batches of one step lost on this rank, on the device and detached."""

    per_sample: list[Tensor]
    """float32 [b] for each micro-batch."""
    total: Tensor
    """Sum over the samples, fillers left out, scalar."""
    by_timestep_2K: Tensor
    """The same sum, and the weight of the samples, in each of `TIMESTEP_BINS` equal stretches of the timesteps."""


class TrainStep:
    """From the micro-batches of a step to accumulated gradients."""

    def __init__(
        self, config: RunConfig, world: World, engine: Engine, spec: LatentSpec, text: TextSource
    ) -> None:
        """Keep what every step needs on the device."""
        self._config, self._world, self._engine, self._spec = config, world, engine, spec
        self._schedule = Schedule.from_config(config.objective, world.device)
        self.text = text

    def accumulate(self, micro_batches: Sequence[LatentBatch], step: int) -> Losses:
        """Run forward and backward of this rank's micro-batches and return what they lost.

        The loss of the step is the mean over the global batch whatever the split: DeepSpeed divides by ranks and
        micro-batches, which is undone here; fillers weigh nothing.
        """
        config = self._config
        scale = self._world.world_size * len(micro_batches) / config.engine.global_batch
        per_sample, sums, binned = [], [], []
        for number, batch in enumerate(micro_batches):
            torch.manual_seed(micro_batch_seed(config.seed, step, number, self._world.rank))
            here = batch.to(self._world.device)
            loss_B, weight_B = self._losses(here)
            loss = (loss_B * weight_B).sum()
            self._engine.backward(loss * scale)
            per_sample.append(loss_B.detach())
            sums.append(loss.detach())
            binned.append(by_timestep(loss_B.detach(), weight_B, here.timesteps, config.objective.timesteps))
        return Losses(per_sample, torch.stack(sums).sum(), torch.stack(binned).sum(dim=0))

    def _losses(self, batch: LatentBatch) -> tuple[Tensor, Tensor]:
        z_BCHW = sample_posterior(batch.moments, batch.posterior_noise)
        x0_BCHW = scale_latents(z_BCHW, self._spec.scaling_factor, self._spec.shift_factor)
        conditions = self.text.conditions(batch)
        objective = self._config.objective
        loss_B = denoising_loss(
            self._engine,
            x0_BCHW,
            conditions,
            batch.noise,
            batch.timesteps,
            self._schedule,
            objective.prediction,
            batch.input_noise,
        )
        size = x0_BCHW.shape[2:]
        weight_B = training_weight(objective, self._schedule, batch.timesteps, *size)
        return loss_B * weight_B, batch.weight


def by_timestep(loss_B: Tensor, weight_B: Tensor, timesteps_B: Tensor, timesteps: int) -> Tensor:
    """Return [2, K]: weighted losses and weights, summed in K equal stretches of the timesteps 0 to `timesteps`.

    By comparison and sum, in a fixed order: scattered additions on a GPU are not, and the record would not be the
    same after a resume.
    """
    bin_B = (timesteps_B.double() * TIMESTEP_BINS / timesteps).long().clamp(0, TIMESTEP_BINS - 1)
    in_bin_BK = bin_B[:, None] == torch.arange(TIMESTEP_BINS, device=bin_B.device)
    parts_2B = torch.stack([loss_B.float() * weight_B, weight_B.float()])
    return (parts_2B[:, :, None] * in_bin_BK).sum(dim=1)


def micro_batch_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return the seed of torch's generator for dropout inside one micro-batch, below 2^63.

    Dropout is the one draw that depends on rank and micro-batch: with `model.dropout` above 0 a run is repeatable
    at the same world size and split, and elsewhere only in distribution.
    """
    digest = hashlib.sha256(f"dropout/{seed}/{step}/{micro_batch}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
