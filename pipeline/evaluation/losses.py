"""Validation loss at fixed timesteps with fixed noise: the same question at every step, of raw and EMA weights.

The noise of a sample at a timestep follows from its key alone, so results of different steps, runs, batch sizes
and grown data sets differ only by what the network learned. Follows MLPerf's stable-diffusion benchmark in
fixing the timesteps, and takes the posterior's mean, which has no noise of its own.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.conditions import require_sizes, time_ids
from pipeline.data.held_out import HeldOut
from pipeline.diffusion import draws
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.objective import Network, denoising_loss
from pipeline.diffusion.posterior import scale_latents, split_moments
from pipeline.diffusion.schedule import Schedule
from pipeline.evaluation.together import in_turns
from pipeline.generate import refuse_differences
from pipeline.latents.record import LatentSample
from pipeline.models.text_pair import TextEncoder, load_text_encoder
from pipeline.paths import RunPaths, text_encoder_folder
from pipeline.progress import Progress
from pipeline.trained_network import TrainedNetwork
from pipeline.training.world import World

# One for all runs: their validation losses can be compared.
NOISE_SEED = 0


class Evaluator:
    """Asks one network for its loss on fixed samples at fixed timesteps with fixed noise."""

    def __init__(
        self,
        network: Network,
        config: RunConfig,
        device: torch.device,
        dataset: HeldOut,
        text_encoder: TextEncoder | None,
    ) -> None:
        """`config` is the training's; `text_encoder` is needed only for a data set that stores tokens."""
        self._network, self._prediction, self._device = network, config.objective.prediction, device
        self._schedule = Schedule.from_config(config.objective, device)
        self._sized = config.model.addition_embed_type is not None
        self._dataset, self._text_encoder = dataset, text_encoder

    @classmethod
    def of(cls, trained: TrainedNetwork, dataset: HeldOut, text_encoder: TextEncoder | None) -> Self:
        """Return the evaluator of a trained network, on the device that it lies on."""
        device = next(trained.network.parameters()).device
        return cls(trained.network, trained.config, device, dataset, text_encoder)

    @torch.no_grad()
    def losses(
        self,
        samples: int,
        timesteps: list[int],
        batch: int,
        progress: Progress,
        *,
        world: World | None = None,
    ) -> np.ndarray:
        """Return the loss of each of the first `samples` samples at each timestep, float64 [N, T], on every rank.

        Whole batches are dealt to the ranks of `world` (default: alone), so that a sample's loss is the same bits at any
        world size. Every rank makes equally many forward passes: at ZeRO stage 3 each is a collective.

        Raises:
            DataError: on all ranks, when any cannot read its samples.
        """
        world = World() if world is None else world
        losses_NT = np.zeros((samples, len(timesteps)))
        batches = self._batches(samples, batch)
        for number, part, filler in in_turns(
            world, len(batches), lambda piece: [self._dataset.read(index) for index in batches[piece]]
        ):
            indices = batches[number]
            x0_BCHW, conditions = self._latents(part), self._conditions(part, indices[0])
            for column, timestep in enumerate(timesteps):
                noise = [validation_noise(sample.key, timestep, x0_BCHW.shape[1:]) for sample in part]
                loss_B = denoising_loss(
                    self._network,
                    x0_BCHW,
                    conditions,
                    torch.from_numpy(np.stack(noise)).to(self._device),
                    torch.full((len(part),), timestep, device=self._device),
                    self._schedule,
                    self._prediction,
                )
                if not filler:
                    losses_NT[indices, column] = loss_B.double().cpu().numpy()
                    progress.advance(len(part))
        # Every other rank has 0 in its place: the sum is exact.
        return np.array(world.sum(losses_NT.ravel().tolist())).reshape(losses_NT.shape)

    def _batches(self, samples: int, batch: int) -> list[list[int]]:
        """Return the indices of up to `batch` neighbours of one latent shape; the split is ordered by bucket."""
        batches: list[list[int]] = []
        bucket: tuple[int, int] | None = None
        for index in range(samples):
            found = self._dataset.bucket(index)
            if found != bucket or len(batches[-1]) == batch:
                batches.append([])
            batches[-1].append(index)
            bucket = found
        return batches

    def _latents(self, part: list[LatentSample]) -> Tensor:
        """Return scaled posterior means, float32 [B, C, H, W]."""
        spec = self._dataset.spec
        moments_BMHW = torch.from_numpy(np.stack([sample.arrays["latent"] for sample in part]))
        mean_BCHW, _ = split_moments(moments_BMHW.to(self._device), spec.channels)
        return scale_latents(mean_BCHW, spec.scaling_factor, spec.shift_factor)

    def _conditions(self, part: list[LatentSample], index: int) -> Conditioning:
        """Return the conditions of each first caption, float32; `index` is that of any sample of the part."""
        if self._text_encoder is None:
            text_BLD = self._first(part, "text").float()
            pooled_BP = self._first(part, "pooled").float() if self._sized else None
        else:
            text_BLD, pooled_BP = self._text_encoder.encode_pooled(self._first(part, "tokens").long())
        if not self._sized:
            return Conditioning(text_BLD)
        bucket = self._dataset.bucket(index)
        time_ids_BS = time_ids([sample.record for sample in part], bucket, np.zeros(len(part), bool))
        return Conditioning(text_BLD, pooled_BP, require_sizes(time_ids_BS).to(self._device))

    def _first(self, part: list[LatentSample], name: str) -> Tensor:
        """Return the member `name` of each first caption, stacked, on the device."""
        stored = np.stack([sample.arrays[name][0] for sample in part])
        return torch.from_numpy(stored.astype(np.int64) if stored.dtype == np.uint16 else stored).to(
            self._device
        )


def evaluation_timesteps(count: int, timesteps: int) -> list[int]:
    """Return `count` timesteps in [0, T), the middles of equal parts: their mean estimates the mean over all T."""
    count = min(count, timesteps)
    return [(2 * place + 1) * timesteps // (2 * count) for place in range(count)]


def validation_noise(key: str, timestep: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the noise, float32 of `shape`, of the sample `key` at `timestep`: the same in every evaluation."""
    name = hashlib.sha256(f"{key}\n{timestep}".encode()).digest()
    position = int.from_bytes(name[:8], "little") >> 1
    return draws.normal(NOISE_SEED, position, draws.Purpose.VALIDATION_NOISE, tuple(shape))


def summary(losses_NT: np.ndarray) -> dict[str, Any]:
    """Return the mean loss, its standard error over the samples, and the mean at each timestep."""
    means_N = losses_NT.mean(axis=1)
    spread = float(means_N.std(ddof=1)) if len(means_N) > 1 else 0.0
    return {
        "loss": float(means_N.mean()),
        "standard_error": spread / math.sqrt(len(means_N)),
        "loss_by_timestep": losses_NT.mean(axis=0).tolist(),
    }


def loss_values(weights: str, timesteps: list[int], summed: Mapping[str, Any]) -> dict[str, float]:
    """Return what is recorded of one `summary`: `val_loss_raw`, and `val_loss_raw/t0500` for each timestep."""
    name = f"val_loss_{weights}"
    by_timestep = zip(timesteps, summed["loss_by_timestep"], strict=True)
    return {name: summed["loss"]} | {f"{name}/t{timestep:04d}": loss for timestep, loss in by_timestep}


def validation_text_encoder(
    config: RunConfig, dataset: HeldOut, paths: RunPaths, device: torch.device
) -> TextEncoder | None:
    """Return the text encoder that the data set's tokens need, None for one that stores embeddings.

    Raises:
        DataError: it is not the one that the data set was made with.
    """
    if dataset.spec.text == "embeddings":
        return None
    folder = text_encoder_folder(config, paths)
    encoder = load_text_encoder(config.encode, folder, device)
    refuse_differences(
        dataset.where, {"encoder.text_encoder": (dataset.encoder["text_encoder"], encoder.digest)}
    )
    return encoder
