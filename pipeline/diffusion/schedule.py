"""The forward process: alpha_t, sigma_t and z_t = alpha_t x0 + sigma_t eps, for training and sampling alike.

Shape letters: B batch, C channels, H W latent height and width, T timesteps.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig


def betas(objective: ObjectiveConfig) -> Tensor:
    """Return beta_t as float64 [T].

    "scaled_linear" is linear in sqrt(beta), what LDM and Stable Diffusion call their linear schedule.
    Source: DDPM, section 4; latent-diffusion's `make_beta_schedule`.
    """
    start, end, steps = objective.beta_start, objective.beta_end, objective.timesteps
    if objective.schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


@dataclass(frozen=True)
class Schedule:
    """The variance-preserving schedule: alpha_t^2 + sigma_t^2 = 1."""

    alphas_cumprod: Tensor
    """alpha-bar_t = alpha_t^2, float64 [T]."""
    alpha: Tensor
    """sqrt(alpha-bar_t), float32 [T]."""
    sigma: Tensor
    """sqrt(1 - alpha-bar_t), float32 [T]."""

    @classmethod
    def from_config(cls, objective: ObjectiveConfig, device: torch.device | str = "cpu") -> Self:
        """Return the schedule of `objective`, computed in float64 and kept in float32 on `device`."""
        alphas_cumprod = torch.cumprod(1.0 - betas(objective), dim=0)
        alpha, sigma = alphas_cumprod.sqrt().float(), (1.0 - alphas_cumprod).sqrt().float()
        return cls(alphas_cumprod, alpha.to(device), sigma.to(device))

    def alpha_sigma(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t) as float32 [B] for integer timesteps [B] on the schedule's device."""
        return self.alpha[timesteps_B], self.sigma[timesteps_B]

    def snr(self) -> Tensor:
        """Return the signal-to-noise ratio alpha_t^2 / sigma_t^2, float64 [T]."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)


def per_sample(values_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """Return `values_B` as [B, 1, 1, 1], ready to multiply `like_BCHW`."""
    return values_B.view(-1, *[1] * (like_BCHW.dim() - 1))


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
    """Return z_t = alpha_t x0 + sigma_t eps. Source: DDPM eq. 4."""
    return per_sample(alpha_B, x0_BCHW) * x0_BCHW + per_sample(sigma_B, x0_BCHW) * noise_BCHW
