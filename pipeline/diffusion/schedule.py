"""The forward process: alpha_t, sigma_t and z_t = alpha_t x0 + sigma_t eps, for training and sampling alike.

Two families share it: the variance-preserving schedules of DDPM and Stable Diffusion (alpha^2 + sigma^2 = 1), and the
straight lines of rectified flow (alpha + sigma = 1). Shape letters: B batch, C channels, H W latent height and
width, T timesteps.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig

MAX_BETA = 0.999


def betas(objective: ObjectiveConfig) -> Tensor:
    """Return beta_t as float64 [T].

    "scaled_linear" is linear in sqrt(beta), what LDM and Stable Diffusion call their linear schedule; "cosine" is
    that of Nichol & Dhariwal 2021, eq. 17, its betas cut at 0.999.
    Source: DDPM, section 4; latent-diffusion's `make_beta_schedule`; Lin et al. 2023, algorithm 1, for zero terminal SNR.
    """
    start, end, steps = objective.beta_start, objective.beta_end, objective.timesteps
    if objective.schedule == "linear":
        found = torch.linspace(start, end, steps, dtype=torch.float64)
    elif objective.schedule == "cosine":
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((times + 0.008) / 1.008 * (math.pi / 2)) ** 2
        found = (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)
    else:
        found = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return zero_terminal_snr(found) if objective.zero_terminal_snr else found


def zero_terminal_snr(betas_T: Tensor) -> Tensor:
    """Return the betas, float64 [T], whose sqrt(alpha-bar) is stretched to end at 0 exactly and begin as before.

    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = torch.cumprod(1.0 - betas_T, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True, eq=False)
class Schedule:
    """alpha_t and sigma_t of every timestep, and the time that the network is told."""

    alpha: Tensor
    """float32 [T]."""
    sigma: Tensor
    """float32 [T]."""
    times: Tensor
    """What the network is given for timestep t: t itself, int64 [T], or sigma_t T of a flow, float32 [T]."""
    alphas_cumprod: Tensor
    """alpha_t^2, float64 [T] on the CPU."""
    objective: ObjectiveConfig

    @classmethod
    def from_config(cls, objective: ObjectiveConfig, device: torch.device | str = "cpu") -> Self:
        """Return the schedule of `objective`, computed in float64 and kept in float32 on `device`."""
        if objective.prediction == "flow":
            return cls._flow(objective, objective.flow_shift, device)
        alphas_cumprod = torch.cumprod(1.0 - betas(objective), dim=0)
        alpha, sigma = alphas_cumprod.sqrt().float(), (1.0 - alphas_cumprod).sqrt().float()
        times = torch.arange(objective.timesteps, device=device)
        return cls(alpha.to(device), sigma.to(device), times, alphas_cumprod, objective)

    @classmethod
    def _flow(cls, objective: ObjectiveConfig, shift: float, device: torch.device | str) -> Self:
        """Return sigma_t = (t + 1) / T, shifted, and alpha_t = 1 - sigma_t.

        Source: Liu et al. 2022 (rectified flow), eq. 1; Esser et al. 2024 (SD3), eq. 23 for the shift.
        """
        sigma = torch.arange(1, objective.timesteps + 1, dtype=torch.float64) / objective.timesteps
        sigma = shift * sigma / (1.0 + (shift - 1.0) * sigma)
        alpha, times = 1.0 - sigma, (sigma * objective.timesteps).float()
        return cls(alpha.float().to(device), sigma.float().to(device), times.to(device), alpha**2, objective)

    def for_latents(self, height: int, width: int) -> "Schedule":
        """Return the schedule for latents of `height` x `width`: larger ones need more noise to look as noisy.

        Only a flow with `objective.flow_shift_side` depends on the size; all others are this one.
        """
        if self.objective.prediction != "flow" or self.objective.flow_shift_side is None:
            return self
        return _resized_flow(self.objective, height * width, str(self.alpha.device))

    def alpha_sigma(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t) as float32 [B] for integer timesteps [B] on the schedule's device."""
        return self.alpha[timesteps_B], self.sigma[timesteps_B]

    def at(self, time: float) -> tuple[float, float]:
        """Return (alpha, sigma) at a time as the network is told it: a whole timestep, or any of a flow's."""
        if self.objective.prediction == "flow":
            sigma = time / self.objective.timesteps
            return 1.0 - sigma, sigma
        return float(self.alpha[int(time)]), float(self.sigma[int(time)])

    def snr(self) -> Tensor:
        """Return the signal-to-noise ratio alpha_t^2 / sigma_t^2, float64 [T]; 0 at the end of zero terminal SNR."""
        sigma2 = (
            self.sigma.double().cpu() ** 2
            if self.objective.prediction == "flow"
            else 1.0 - self.alphas_cumprod
        )
        return self.alphas_cumprod / sigma2


def flow_shift(objective: ObjectiveConfig, latent_pixels: int) -> float:
    """Return the shift for latents of that many pixels: `flow_shift` times the ratio of sides to `flow_shift_side`.

    Source: Esser et al. 2024 (SD3), eq. 23: sqrt(m / n).
    """
    if objective.flow_shift_side is None:
        return objective.flow_shift
    return objective.flow_shift * math.sqrt(latent_pixels) / objective.flow_shift_side


@cache
def _resized_flow(objective: ObjectiveConfig, latent_pixels: int, device: str) -> Schedule:
    return Schedule._flow(objective, flow_shift(objective, latent_pixels), device)


def per_sample(values_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """Return `values_B` as [B, 1, 1, 1], ready to multiply `like_BCHW`."""
    return values_B.view(-1, *[1] * (like_BCHW.dim() - 1))


def add_noise(x0_BCHW: Tensor, noise_BCHW: Tensor, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
    """Return z_t = alpha_t x0 + sigma_t eps. Source: DDPM eq. 4."""
    return per_sample(alpha_B, x0_BCHW) * x0_BCHW + per_sample(sigma_B, x0_BCHW) * noise_BCHW
