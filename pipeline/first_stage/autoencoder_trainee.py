"""The autoencoder in training: a step of its own weights, one of the discriminator's, one of the average's.

Shape letters: B this process's share, C latent channels, H W sides of the crop, h w of its latent.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config import AutoencoderConfig
from pipeline.first_stage.discriminator import PatchDiscriminator
from pipeline.first_stage.features import FeatureNetwork
from pipeline.first_stage.grid import draw_reconstructions
from pipeline.first_stage.measure import image_batches
from pipeline.first_stage.pairs import CROP, FLIP, POSTERIOR, EpochOrder, PairTable, draws, share
from pipeline.first_stage.stage import Average, Learner, Parts, Stage, joined
from pipeline.first_stage.terms import (
    adaptive_weight,
    gradient_l1_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss,
    l1_loss,
)
from pipeline.models.autoencoder import AutoencoderKL, moments_of
from pipeline.models.pixels import images_from_pixels

SHOWN_IMAGES = 8
# A record that crosses one of these looks collapsed.
NO_NOISE, NO_SPREAD, FLAT_OUTPUT, FLAT_IMAGES, NO_CONTEST = 1e-6, 0.02, 0.02, 0.05, 1e-3


class Reconstruction(nn.Module):
    """An autoencoder as the trainer sees it: images and noise in, pictures and moments out, in its precision."""

    def __init__(self, model: AutoencoderKL, precision: str) -> None:
        super().__init__()
        self.model = model
        self._autocast = autocast_of(precision)

    def forward(self, images_BCHW: Tensor, noise_BChw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return decoded [B, 3, H, W] of a posterior sample, and mean and log-variance [B, C, h, w], all fp32."""
        with self._autocast(images_BCHW.device.type):
            mean, logvar = moments_of(self.model, images_BCHW)
            decoded_BCHW = self.model.decode(mean + torch.exp(0.5 * logvar) * noise_BChw).sample
        return decoded_BCHW.float(), mean, logvar


def autocast_of(precision: str) -> Callable[[str], AbstractContextManager[None]]:
    """Return device type -> the context of `fp32` or `bf16` arithmetic over fp32 weights."""
    return lambda device: torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


class AutoencoderTrainee:
    """Autoencoder, discriminator and average of one training; a term of weight 0 is not built and not computed."""

    def __init__(
        self, stage: Stage, section: AutoencoderConfig, table: PairTable, features: FeatureNetwork | None
    ) -> None:
        """Take the frozen feature network, if any; the rest comes later by `with_model`."""
        self._stage, self.section, self._table, self._features = stage, section, table, features
        if features is not None:
            features.to(stage.accelerator.device)
        self._order = EpochOrder(table.train, batch=section.batch, seed=stage.config.seed)
        self._autocast = autocast_of(section.precision)

    def with_model(self, model: AutoencoderKL) -> "AutoencoderTrainee":
        """Return this trainee with `model` under AdamW; the discriminator is drawn from torch's generator."""
        section = self.section
        self.model = model
        self._main = Learner(self._stage, Reconstruction(model, section.precision))
        self._last_kernel: Tensor = model.decoder.conv_out.weight
        self._average = Average(model, section.ema_decay) if section.ema_decay else None
        self._discriminator: PatchDiscriminator | None = None
        if section.adversarial.weight:
            self._discriminator = PatchDiscriminator(section.adversarial)
            rate = section.adversarial.learning_rate
            self._critic = Learner(
                self._stage, self._discriminator, learning_rate=rate, prefix="discriminator_"
            )
        return self

    def step(self, step: int, *, measured: bool) -> dict[str, Tensor]:
        """Take step `step`: autoencoder, then discriminator on the same reconstructions, then average."""
        images_BCHW, noise_BChw = self._batch(step)
        decoded_BCHW, mean, logvar = self._main.wrapped(images_BCHW, noise_BChw)
        terms = self._terms(decoded_BCHW, images_BCHW)
        kl = kl_loss(mean, logvar, images_BCHW.numel())
        reconstruction = torch.stack(list(terms.values())).sum()
        loss = reconstruction + self.section.kl_weight * kl
        values = {name: term.detach() / self._weights[name] for name, term in terms.items()}
        values |= {"kl": kl, "loss": loss.detach()}
        plays = self._discriminator is not None and step >= self.section.adversarial.start
        if plays:
            slope_BCHW, found = self._adversarial(decoded_BCHW, reconstruction)
            # The same gradient as that of the sum of all terms: features and discriminator are gone through once.
            loss = (decoded_BCHW * slope_BCHW).sum() + self.section.kl_weight * kl
            values |= found
        values["grad_norm"] = self._main.learn(loss, step)
        if plays:
            values |= self._criticise(images_BCHW, decoded_BCHW.detach(), step)
        if self._average is not None:
            self._average.update(step)
        return values | (_spreads(images_BCHW, decoded_BCHW, mean, logvar) if measured else {})

    @property
    def _weights(self) -> dict[str, float]:
        return {
            "l1": 1.0,
            "gradient": self.section.gradient_weight,
            "perceptual": self.section.perceptual.weight,
        }

    def _terms(self, decoded_BCHW: Tensor, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms that compare the pictures, those of weight 0 left out."""
        weights = self._weights
        terms = {"l1": l1_loss(decoded_BCHW, images_BCHW)}
        if weights["gradient"]:
            terms["gradient"] = weights["gradient"] * gradient_l1_loss(decoded_BCHW, images_BCHW)
        if weights["perceptual"]:
            assert self._features is not None
            with self._autocast(images_BCHW.device.type):
                distances_B = self._features.distances(decoded_BCHW, images_BCHW)
            terms["perceptual"] = weights["perceptual"] * distances_B.float().mean()
        return terms

    def _adversarial(self, decoded_BCHW: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return d(reconstruction + w lambda adversarial)/d(decoded), [B, 3, H, W], and what is recorded of it."""
        assert self._discriminator is not None
        with self._autocast(decoded_BCHW.device.type):
            logits = self._discriminator.frozen(decoded_BCHW)
        adversarial = hinge_generator_loss(logits.float())
        slopes = [
            torch.autograd.grad(term, decoded_BCHW, retain_graph=True)[0]
            for term in (reconstruction, adversarial)
        ]
        at_last = [
            torch.autograd.grad(decoded_BCHW, self._last_kernel, slope, retain_graph=True)[0]
            for slope in slopes
        ]
        # Of the global batch: with each process's own ratio, two processes would not be one.
        both = self._stage.accelerator.reduce(torch.stack(at_last), "mean")
        adaptive = adaptive_weight(both[0], both[1])
        total = slopes[0] + self.section.adversarial.weight * adaptive * slopes[1]
        return total, {"adversarial": adversarial.detach(), "adaptive_weight": adaptive}

    def _criticise(self, images_BCHW: Tensor, decoded_BCHW: Tensor, step: int) -> dict[str, Tensor]:
        with self._autocast(images_BCHW.device.type):
            logits = self._critic.wrapped(torch.cat([images_BCHW, decoded_BCHW]))
        real, fake = logits.float().chunk(2)
        loss = hinge_discriminator_loss(real, fake)
        return {
            "discriminator_grad_norm": self._critic.learn(loss, step),
            "discriminator_loss": loss.detach(),
            "discriminator_real": real.mean(),
            "discriminator_fake": fake.mean(),
        }

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this process's images and noise: pictures, flips, crops and noise are drawn for the whole batch."""
        section, seed, accelerator = self.section, self._stage.config.seed, self._stage.accelerator
        places = self._order.batch(step)
        whole = self._stage.config.encode.image_size
        side = section.crop or whole
        flips = draws(seed, FLIP, step).random(len(places)) < 0.5
        corners = draws(seed, CROP, step).integers(0, whole - side, (len(places), 2), endpoint=True)
        latent = (section.latent_channels, side // section.downsampling, side // section.downsampling)
        noise = draws(seed, POSTERIOR, step).standard_normal((len(places), *latent), dtype=np.float32)
        mine = share(places, accelerator.process_index, accelerator.num_processes)
        pixels = self._table.pixels(places[mine])
        pixels[flips[mine]] = pixels[flips[mine], :, ::-1]
        if side < whole:
            windows = zip(pixels, corners[mine], strict=True)
            pixels = np.stack([picture[y : y + side, x : x + side] for picture, (y, x) in windows])
        device = accelerator.device
        return images_from_pixels(pixels).to(device), torch.from_numpy(noise[mine]).to(device)

    def parts(self) -> Parts:
        """Return weights, average and discriminator with the state of both optimizers."""
        return joined(saver.parts() for saver in self._savers())

    def restore(self, parts: Parts) -> None:
        """Lay all of them in."""
        for saver in self._savers():
            saver.restore(parts)

    def _savers(self) -> list[Learner | Average]:
        savers: list[Learner | Average] = [self._main]
        savers += [self._average] if self._average is not None else []
        return savers + ([self._critic] if self._discriminator is not None else [])

    def collapse(self, shown: dict[str, float]) -> str | None:
        """Return what one record says has collapsed."""
        return collapse_of(shown)

    def picture(self) -> Image.Image | None:
        """Return pictures kept from training above what the raw weights make of them."""
        places = self._table.validation if len(self._table.validation) else self._table.train
        device = self._stage.accelerator.device
        self.model.eval()
        drawn = draw_reconstructions(
            self.model, list(image_batches(self._table, places[:SHOWN_IMAGES], device))
        )
        self.model.train()
        return drawn

    def published(self) -> AutoencoderKL:
        """Return the model to measure and publish, in eval mode: its weights are the average's from here on."""
        if self._average is not None:
            self._average.into_weights()
        return self.model.eval()


@torch.no_grad()
def _spreads(images_BCHW: Tensor, decoded_BCHW: Tensor, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """Return the spreads that tell a collapse: of the posterior, of its mean, of the pictures on both sides."""
    return {
        "posterior_std": torch.exp(0.5 * logvar).mean(),
        "latent_std": mean.std(dim=(0, 2, 3)).mean(),
        "image_std": images_BCHW.std(),
        "decoded_std": decoded_BCHW.std(),
    }


def collapse_of(shown: dict[str, float]) -> str | None:
    """Return what has collapsed and what to do, from one record's values, or None."""
    posterior, latent = shown["posterior_std"], shown["latent_std"]
    if posterior < NO_NOISE:
        return (
            f"the posterior's std is {posterior:.3g}, so nothing holds the latents together; raise "
            f"first_stage.autoencoder.kl_weight"
        )
    if abs(posterior - 1.0) < NO_SPREAD and latent < NO_SPREAD:
        return (
            f"the posterior is the prior (std {posterior:.3f}, std of its mean {latent:.3g}), so the latents carry "
            f"nothing; lower first_stage.autoencoder.kl_weight"
        )
    if shown["image_std"] > FLAT_IMAGES and shown["decoded_std"] < FLAT_OUTPUT * shown["image_std"]:
        return (
            f"every picture is decoded to the same colour (std {shown['decoded_std']:.3g}, of the pictures "
            f"{shown['image_std']:.3g}); lower first_stage.autoencoder.learning_rate or kl_weight"
        )
    if shown.get("discriminator_loss", 1.0) < NO_CONTEST:
        return (
            f"the discriminator wins outright (loss {shown['discriminator_loss']:.3g} of 1), so it teaches nothing; lower "
            f"first_stage.autoencoder.adversarial.learning_rate or weight, or start it later"
        )
    return None
