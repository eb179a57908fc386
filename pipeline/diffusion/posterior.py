"""From stored moments to the latents that the network sees, and back.

This is the only place where the scaling factor is applied: data sets store unscaled moments, autoencoders
encode and decode unscaled latents, and everything between `scale_latents` and `unscale_latents` is scaled.
"""

import torch
from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


def split_moments(moments_BMHW: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Return (mean, logvar) as float32 [B, C, H, W]; logvar is None when only means are stored (M = C)."""
    moments_BMHW = moments_BMHW.float()
    if moments_BMHW.shape[1] == channels:
        return moments_BMHW, None
    assert moments_BMHW.shape[1] == 2 * channels, moments_BMHW.shape
    mean, logvar = moments_BMHW.chunk(2, dim=1)
    return mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)


def sample_posterior(moments_BMHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Return z = mean + std * noise, unscaled float32 [B, C, H, W]. Source: Kingma & Welling 2013, eq. 10."""
    mean, logvar = split_moments(moments_BMHW, noise_BCHW.shape[1])
    if logvar is None:
        return mean
    return mean + torch.exp(0.5 * logvar) * noise_BCHW


def scale_latents(z_BCHW: Tensor, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Return (z - shift) * scale: latents of about unit variance. Source: LDM, section D.1; SD3 for the shift."""
    return (z_BCHW - shift_factor) * scaling_factor


def unscale_latents(latents_BCHW: Tensor, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Return what the autoencoder decodes: the inverse of `scale_latents`."""
    return latents_BCHW / scaling_factor + shift_factor
