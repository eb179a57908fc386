"""`ldm train-autoencoder`: a KL autoencoder from prepared pictures, and what must be measured on it.

Loss: L1 + kl_weight * KL, both summed over the picture as in LDM and divided by its number of values, so that
neither the learning rate nor the weight depends on the picture's size.
Source: Rombach et al. 2022, appendix G, without the perceptual and adversarial terms.

Scaling is measured here and applied elsewhere (`diffusion/posterior.py`). Shape letters: B batch, C latent
channels, H W sides of the image, h w of the latent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import AutoencoderConfig, RunConfig
from pipeline.errors import ConfigError, DivergedError
from pipeline.first_stage import resume
from pipeline.first_stage.loop import Recipe, Stage, StepLoss, fit, start_accelerator
from pipeline.first_stage.measure import image_batches, latent_statistics, reconstruction_psnr_db
from pipeline.first_stage.pairs import (
    FLIP,
    POSTERIOR,
    EpochOrder,
    PairTable,
    PreparedPair,
    draws,
    read_pairs,
    share,
)
from pipeline.models.autoencoder import (
    REMEDY,
    WEIGHTS_STEM,
    AutoencoderKL,
    build_autoencoder,
    moments_of,
    save_autoencoder,
)
from pipeline.models.model_folder import model_digest, open_model_folder
from pipeline.models.pixels import images_from_pixels
from pipeline.paths import RunPaths
from pipeline.publish import whole_folder, write_json

KIND = "autoencoder"
REPORT = "first_stage.json"
MEASURED_IMAGES = 1024


def train_autoencoder(config: RunConfig, pairs: Sequence[PreparedPair], paths: RunPaths) -> Path:
    """Return `paths.autoencoder`, a diffusers folder with a `first_stage.json`, after training what is left to do.

    Killed and called again it goes on from the newest whole checkpoint and ends with the same bits as a straight
    run; called on a finished folder it returns at once.

    Raises:
        ConfigError: without `first_stage` in the config, or when the folder or the checkpoints belong to others.
    """
    if config.first_stage is None:
        raise ConfigError("first_stage: null, so there is nothing to train; add first_stage.autoencoder")
    section = config.first_stage.autoencoder
    table = read_pairs(pairs, config.encode.image_size)
    stage = Stage(
        config=config,
        paths=paths,
        accelerator=start_accelerator(section.batch, "first_stage.autoencoder.batch"),
        recipe=_recipe(section),
        settings={
            **section.model_dump(mode="json", exclude={"checkpoint_every", "log_every"}),
            "image_size": config.encode.image_size,
            "seed": config.seed,
            "pairs": table.digest,
        },
    )
    if not resume.is_finished(paths.autoencoder, REPORT, stage.settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_autoencoder(section, config.encode.image_size)
        noted = fit(stage, AutoencoderLoss(model, section), _step_loss(stage, section, table))
        if stage.accelerator.is_main_process:
            _publish(stage, model.eval(), table, noted)
    if stage.accelerator.is_main_process:
        resume.clear(stage.checkpoints, paths.autoencoder)
    stage.accelerator.wait_for_everyone()
    return paths.autoencoder


class AutoencoderLoss(nn.Module):
    """An autoencoder as the trainer sees it: images and noise in, losses out."""

    def __init__(self, model: AutoencoderKL, config: AutoencoderConfig) -> None:
        super().__init__()
        self.model = model
        self._kl_weight = config.kl_weight
        self._bf16 = config.precision == "bf16"

    def forward(self, images_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, L1 and KL, fp32 scalars: nats and absolute error a value of the image, averaged."""
        with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=self._bf16):
            mean, logvar = moments_of(self.model, images_BCHW)
            latents_BCHW = mean + torch.exp(0.5 * logvar) * noise_BCHW
            decoded_BCHW = self.model.decode(latents_BCHW).sample
        l1 = (decoded_BCHW.float() - images_BCHW).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum() / images_BCHW.numel()
        return l1 + self._kl_weight * kl, l1, kl


def _recipe(section: AutoencoderConfig) -> Recipe:
    return Recipe(
        kind=KIND,
        batch=section.batch,
        steps=section.steps,
        warmup_steps=section.warmup_steps,
        learning_rate=section.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        clip_grad_norm=section.clip_grad_norm,
        checkpoint_every=section.checkpoint_every,
        log_every=section.log_every,
    )


def _step_loss(stage: Stage, section: AutoencoderConfig, table: PairTable) -> StepLoss:
    """Return step -> the loss on this process's share: pictures, flips and noise are drawn for the whole batch."""
    seed, accelerator = stage.config.seed, stage.accelerator
    order = EpochOrder(table.train, batch=section.batch, seed=seed)
    side = stage.config.encode.image_size // section.downsampling

    def loss(network: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        places = order.batch(step)
        flips = draws(seed, FLIP, step).random(len(places)) < 0.5
        noise = draws(seed, POSTERIOR, step).standard_normal(
            (len(places), section.latent_channels, side, side), dtype=np.float32
        )
        mine = share(places, accelerator.process_index, accelerator.num_processes)
        pixels = table.pixels(places[mine])
        pixels[flips[mine]] = pixels[flips[mine], :, ::-1]
        images_BCHW = images_from_pixels(pixels).to(accelerator.device)
        total, l1, kl = network(images_BCHW, torch.from_numpy(noise[mine]).to(accelerator.device))
        return total, {"loss": total, "l1": l1, "kl": kl}

    return loss


def _publish(stage: Stage, model: AutoencoderKL, table: PairTable, noted: dict[str, float]) -> None:
    """Measure the trained model and put its folder in place, whole."""
    device = stage.accelerator.device
    measured = table.train[:MEASURED_IMAGES]
    statistics = latent_statistics(model, image_batches(table, measured, device))
    if not statistics.std > 0.0:
        raise DivergedError(
            f"autoencoder: the latents' std is {statistics.std} over {statistics.images} pictures, so they carry "
            f"nothing; lower first_stage.autoencoder.kl_weight or learning_rate"
        )
    psnr_db = reconstruction_psnr_db(model, image_batches(table, table.validation, device))
    with whole_folder(stage.paths.autoencoder) as folder:
        save_autoencoder(model, folder, statistics.scaling_factor)
        found = open_model_folder(folder, WEIGHTS_STEM, REMEDY)
        report: dict[str, Any] = {
            "kind": KIND,
            "settings": stage.settings,
            "steps": stage.recipe.steps,
            **noted,
            "psnr_db": psnr_db,
            "validation_images": len(table.validation),
            "scaling_factor": statistics.scaling_factor,
            "latent_mean": statistics.mean,
            "latent_std": statistics.std,
            "channel_mean": list(statistics.channel_mean),
            "channel_std": list(statistics.channel_std),
            "measured_images": statistics.images,
            "digest": model_digest(found, found.config),
        }
        write_json(folder / REPORT, report)
