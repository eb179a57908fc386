"""What the network is trained to say, and how far off it is: E || target - network(z_t, t, tau(y)) ||^2.

Shape letters: B batch, C channels, H W latent height and width, L text tokens, D text width.
"""

from typing import Literal, Protocol

from torch import Tensor

from pipeline.diffusion.schedule import Schedule, add_noise, per_sample

Prediction = Literal["epsilon", "v_prediction"]


class Network(Protocol):
    """The denoiser: (z_t [B, C, H, W], timesteps [B], text [B, L, D]) -> prediction [B, C, H, W]."""

    def __call__(self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Return the prediction for noisy latents."""
        ...


def target(
    prediction: Prediction, x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor
) -> Tensor:
    """Return what the network should predict, [B, C, H, W].

    epsilon: the noise (DDPM eq. 14). v_prediction: v = alpha_t eps - sigma_t x0 (Salimans & Ho 2022, app. D).
    """
    if prediction == "epsilon":
        return noise_BCHW
    return per_sample(alpha_B, x0_BCHW) * noise_BCHW - per_sample(sigma_B, x0_BCHW) * x0_BCHW


def x0_from_prediction(
    prediction: Prediction, predicted_BCHW: Tensor, z_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor
) -> Tensor:
    """Return the clean latents that a prediction implies: the inverse of `target` at z_t."""
    alpha, sigma = per_sample(alpha_B, z_BCHW), per_sample(sigma_B, z_BCHW)
    if prediction == "epsilon":
        return (z_BCHW - sigma * predicted_BCHW) / alpha
    return alpha * z_BCHW - sigma * predicted_BCHW


def per_sample_loss(predicted_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Return the mean squared error of each sample as float32 [B], whatever the network's precision."""
    return (predicted_BCHW.float() - target_BCHW.float()).square().flatten(1).mean(1)


def denoising_loss(
    network: Network,
    x0_BCHW: Tensor,
    text_BLD: Tensor,
    noise_BCHW: Tensor,
    timesteps_B: Tensor,
    schedule: Schedule,
    prediction: Prediction,
) -> Tensor:
    """Return the loss of each sample, float32 [B], for scaled latents `x0_BCHW`. Source: LDM eq. 3."""
    alpha_B, sigma_B = schedule.alpha_sigma(timesteps_B)
    z_BCHW = add_noise(x0_BCHW, noise_BCHW, alpha_B, sigma_B)
    predicted_BCHW = network(z_BCHW, timesteps_B, text_BLD)
    return per_sample_loss(predicted_BCHW, target(prediction, x0_BCHW, noise_BCHW, alpha_B, sigma_B))
