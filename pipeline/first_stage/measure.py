"""What is measured on a trained first stage: latents' moments, reconstruction, retrieval. Nothing is drawn.

Shape letters: B batch, C latent channels, H W sides of the image, N pairs, D width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.first_stage.pairs import PairTable
from pipeline.models.autoencoder import AutoencoderKL, moments_of
from pipeline.models.pixels import images_from_pixels

MEASURE_BATCH = 32


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

    @property
    def scaling_factor(self) -> float:
        """1 / std over all values of z, so that scaled latents have unit variance (LDM, appendix G)."""
        return 1.0 / self.std


@torch.no_grad()
def latent_statistics(model: AutoencoderKL, batches: Iterator[Tensor]) -> LatentStatistics:
    """Return the moments of z ~ N(mean, exp(logvar)) over `batches` of images [B, 3, H, W] in [-1, 1].

    By the law of total variance, Var z = E[mean^2 + variance] - (E mean)^2: exact, without drawing samples.
    """
    images, values = 0, 0
    sums = squares = torch.zeros(1, dtype=torch.float64)
    for images_BCHW in batches:
        mean, logvar = (part.double().cpu() for part in moments_of(model, images_BCHW))
        sums = sums + mean.sum(dim=(0, 2, 3))
        squares = squares + (mean.square() + logvar.exp()).sum(dim=(0, 2, 3))
        images += len(mean)
        values += mean[:, 0].numel()
    channel_mean, channel_square = sums / values, squares / values
    mean_z = float(channel_mean.mean())
    return LatentStatistics(
        images=images,
        mean=mean_z,
        std=math.sqrt(float(channel_square.mean()) - mean_z**2),
        channel_mean=tuple(channel_mean.tolist()),
        channel_std=tuple((channel_square - channel_mean.square()).sqrt().tolist()),
    )


@torch.no_grad()
def reconstruction_psnr_db(model: AutoencoderKL, batches: Iterator[Tensor]) -> float | None:
    """Return the mean over images of the PSNR in dB of decoding the posterior mean, or None without images.

    Images lie in [-1, 1], so the peak is 2; the reconstruction is cut to that range first.
    """
    values: list[float] = []
    for images_BCHW in batches:
        mean, _ = moments_of(model, images_BCHW)
        decoded_BCHW = model.decode(mean).sample.float().clamp(-1.0, 1.0)
        error = (decoded_BCHW - images_BCHW).double().square().mean(dim=(1, 2, 3))
        values += (10.0 * torch.log10(4.0 / error.clamp_min(1e-10))).tolist()
    return float(np.mean(values)) if values else None


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
