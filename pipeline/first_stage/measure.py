"""What is measured on a trained first stage: latents' moments, reconstruction, retrieval. Nothing is drawn.

Shape letters: B batch, C latent channels, H W sides of the image, h w of the latent, N pairs, D width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.first_stage.features import FeatureNetwork
from pipeline.first_stage.pairs import PairTable
from pipeline.models.autoencoder import AutoencoderKL, moments_of
from pipeline.models.pixels import images_from_pixels

MEASURE_BATCH = 32
# SSIM: Gaussian window of 11 pixels and std 1.5, K1 = 0.01, K2 = 0.03 (Wang et al. 2004, section III).
SSIM_SIDE, SSIM_STD, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


def image_batches(table: PairTable, places: np.ndarray, device: torch.device) -> Iterator[Tensor]:
    """Yield the pictures at `places` as fp32 images [B, 3, H, W] in [-1, 1], 32 at a time, unflipped."""
    for first in range(0, len(places), MEASURE_BATCH):
        yield images_from_pixels(table.pixels(places[first : first + MEASURE_BATCH])).to(device)


@dataclass(frozen=True)
class LatentStatistics:
    """Moments of the posterior samples z over the measured training images, before any scaling."""

    images: int
    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    channel_posterior_std: tuple[float, ...]
    """Root of the mean variance of the posterior: how far a sample lies from the mean."""
    channel_kl_nats: tuple[float, ...]
    """Mean KL to N(0, 1) of one value: near 0 = the channel carries nothing."""

    @property
    def scaling_factor(self) -> float:
        """1 / std over all values of z, so that scaled latents have unit variance (LDM, appendix G)."""
        return 1.0 / self.std

    def report(self) -> dict[str, Any]:
        """Return the entries of `first_stage.json`."""
        return {
            "scaling_factor": self.scaling_factor,
            "latent_mean": self.mean,
            "latent_std": self.std,
            "channel_mean": list(self.channel_mean),
            "channel_std": list(self.channel_std),
            "channel_posterior_std": list(self.channel_posterior_std),
            "channel_kl_nats": list(self.channel_kl_nats),
            "measured_images": self.images,
        }


@torch.no_grad()
def latent_statistics(model: AutoencoderKL, batches: Iterator[Tensor]) -> LatentStatistics:
    """Return the moments of z ~ N(mean, exp(logvar)) over `batches` of images [B, 3, H, W] in [-1, 1].

    By the law of total variance, Var z = E[mean^2 + variance] - (E mean)^2: exact, without drawing samples.
    """
    images, values = 0, 0
    sums = torch.zeros(4, 1, dtype=torch.float64)
    for images_BCHW in batches:
        mean, logvar = (part.double().cpu() for part in moments_of(model, images_BCHW))
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        parts = (mean, mean.square() + logvar.exp(), logvar.exp(), kl)
        sums = sums + torch.stack([part.sum(dim=(0, 2, 3)) for part in parts])
        images += len(mean)
        values += mean[:, 0].numel()
    channel_mean, channel_square, channel_variance, channel_kl = sums / values
    mean_z = float(channel_mean.mean())
    return LatentStatistics(
        images=images,
        mean=mean_z,
        std=math.sqrt(float(channel_square.mean()) - mean_z**2),
        channel_mean=tuple(channel_mean.tolist()),
        channel_std=tuple((channel_square - channel_mean.square()).sqrt().tolist()),
        channel_posterior_std=tuple(channel_variance.sqrt().tolist()),
        channel_kl_nats=tuple(channel_kl.tolist()),
    )


@dataclass(frozen=True)
class Quality:
    """How well pictures come back: means over the pictures, None without pictures or without a network."""

    psnr_db: float | None
    ssim: float | None
    feature_distance: float | None

    def report(self) -> dict[str, Any]:
        """Return the entries of `first_stage.json`."""
        return {
            "psnr_db": self.psnr_db,
            "ssim": self.ssim,
            "feature_distance": self.feature_distance,
        }


@torch.no_grad()
def reconstruction_quality(
    model: AutoencoderKL, batches: Iterator[Tensor], features: FeatureNetwork | None = None
) -> Quality:
    """Return PSNR, SSIM and the distance in `features` of decoding the posterior mean, which is cut to [-1, 1] first."""
    found: dict[str, list[float]] = {"psnr": [], "ssim": [], "distance": []}
    for images_BCHW in batches:
        mean, _ = moments_of(model, images_BCHW)
        decoded_BCHW = model.decode(mean).sample.float().clamp(-1.0, 1.0)
        found["psnr"] += psnr_db(decoded_BCHW, images_BCHW).tolist()
        found["ssim"] += ssim(decoded_BCHW, images_BCHW).tolist()
        if features is not None:
            found["distance"] += features.distances(decoded_BCHW, images_BCHW).tolist()
    means = {name: float(np.mean(values)) if values else None for name, values in found.items()}
    return Quality(means["psnr"], means["ssim"], means["distance"])


def psnr_db(decoded_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Return 10 log10(peak^2 / mean square error) of each picture, dB, [B]; images lie in [-1, 1], so the peak is 2."""
    error_B = (decoded_BCHW - images_BCHW).double().square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(4.0 / error_B.clamp_min(1e-10))


def ssim(decoded_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
    """Return the structural similarity of each picture, at most 1, [B]: mean over colours and whole windows.

    A picture smaller than the window of 11 pixels has a smaller one. Source: Wang et al. 2004, eq. 13.
    """
    side = min(SSIM_SIDE, *decoded_BCHW.shape[2:])
    places = torch.arange(side, dtype=torch.float64, device=decoded_BCHW.device) - (side - 1) / 2
    line = torch.exp(-places.square() / (2 * SSIM_STD**2))
    window = torch.outer(line, line) / line.sum() ** 2
    x, y = ((part.double() + 1.0) / 2.0 for part in (decoded_BCHW, images_BCHW))

    def local(values_BCHW: Tensor) -> Tensor:
        kernel = window.expand(values_BCHW.shape[1], 1, side, side)
        return functional.conv2d(values_BCHW, kernel, groups=values_BCHW.shape[1])

    mean_x, mean_y = local(x), local(y)
    variance_x, variance_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (alike / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean(dim=(1, 2, 3))


@torch.no_grad()
def retrieval(image_ND: Tensor, text_ND: Tensor, caption_ids_N: Tensor) -> dict[str, float]:
    """Return recall at 1 and 5 in both directions for N pairs with unit embeddings [N, D].

    An answer is right when its caption equals the question's, so equal captions are no mistakes.
    """
    same_NN = caption_ids_N[:, None] == caption_ids_N[None, :]
    similarity_NN = (text_ND.double() @ image_ND.double().T).cpu()
    found: dict[str, float] = {"pairs": len(caption_ids_N)}
    for name, scores_NN in (("text_to_image", similarity_NN), ("image_to_text", similarity_NN.T)):
        ranked_NN = scores_NN.argsort(dim=1, descending=True, stable=True)
        right_NN = same_NN.gather(1, ranked_NN)
        for k in (1, 5):
            found[f"{name}_r{k}"] = float(right_NN[:, :k].any(dim=1).double().mean())
    return found
