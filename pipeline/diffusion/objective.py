"""What the network is trained to say, and how far off it is: E || target - network(z_t, t, tau(y)) ||^2.

Shape letters: B batch, C channels, H W latent height and width, L text tokens, D text width, P width of pooled
text, S sizes.
"""

from typing import Protocol

from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.schedule import Schedule, add_noise, per_sample
from pipeline.diffusion.weighting import Prediction, loss_weight


class Network(Protocol):
    """The denoiser: (z_t [B, C, H, W], times [B], conditions) -> prediction [B, C, H, W]."""

    def __call__(self, latents_BCHW: Tensor, timesteps_B: Tensor, /, *conditions: Tensor) -> Tensor:
        """Return the prediction for noisy latents under `Conditioning.inputs`."""
        ...


def target(
    prediction: Prediction, x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor
) -> Tensor:
    """Return what the network should predict, [B, C, H, W].

    epsilon: the noise (DDPM eq. 14). v_prediction: v = alpha_t eps - sigma_t x0 (Salimans & Ho 2022, app. D). x0: the
    clean latents. flow: eps - x0, the velocity of the straight line (Liu et al. 2022, eq. 1, time from data to noise).
    """
    if prediction == "epsilon":
        return noise_BCHW
    if prediction == "x0":
        return x0_BCHW
    if prediction == "flow":
        return noise_BCHW - x0_BCHW
    return per_sample(alpha_B, x0_BCHW) * noise_BCHW - per_sample(sigma_B, x0_BCHW) * x0_BCHW


def x0_from_prediction(
    prediction: Prediction, predicted_BCHW: Tensor, z_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor
) -> Tensor:
    """Return the clean latents that a prediction implies: the inverse of `target` at z_t."""
    alpha, sigma = per_sample(alpha_B, z_BCHW), per_sample(sigma_B, z_BCHW)
    if prediction == "epsilon":
        return (z_BCHW - sigma * predicted_BCHW) / alpha
    if prediction == "x0":
        return predicted_BCHW
    if prediction == "flow":
        return z_BCHW - sigma * predicted_BCHW
    return alpha * z_BCHW - sigma * predicted_BCHW


def per_sample_loss(predicted_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Return the mean squared error of each sample as float32 [B], whatever the network's precision."""
    return (predicted_BCHW.float() - target_BCHW.float()).square().flatten(1).mean(1)


def denoising_loss(
    network: Network,
    x0_BCHW: Tensor,
    conditions: Conditioning,
    noise_BCHW: Tensor,
    timesteps_B: Tensor,
    schedule: Schedule,
    prediction: Prediction,
    input_noise_BCHW: Tensor | None = None,
) -> Tensor:
    """Return the squared error of each sample, float32 [B], unweighted, for scaled latents `x0_BCHW`.

    `input_noise_BCHW` is mixed in instead of the noise that the target names: input perturbation (Ning et al.
    2023, algorithm 1). Source: LDM eq. 3.
    """
    schedule = schedule.for_latents(*x0_BCHW.shape[2:])
    alpha_B, sigma_B = schedule.alpha_sigma(timesteps_B)
    mixed_BCHW = noise_BCHW if input_noise_BCHW is None else input_noise_BCHW
    z_BCHW = add_noise(x0_BCHW, mixed_BCHW, alpha_B, sigma_B)
    predicted_BCHW = network(z_BCHW, schedule.times[timesteps_B], *conditions.inputs)
    return per_sample_loss(predicted_BCHW, target(prediction, x0_BCHW, noise_BCHW, alpha_B, sigma_B))


def training_weight(
    objective: ObjectiveConfig, schedule: Schedule, timesteps_B: Tensor, height: int, width: int
) -> Tensor:
    """Return how much each sample's squared error counts in training, float32 [B], for latents of that size."""
    alpha_B, sigma_B = schedule.for_latents(height, width).alpha_sigma(timesteps_B)
    return loss_weight(objective.weighting, objective.prediction, alpha_B, sigma_B, objective.snr_gamma)
