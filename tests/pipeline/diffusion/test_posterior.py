"""Moments -> latents: the posterior's own distribution, and the scaling factor exactly once."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from pipeline.diffusion.guidance import guide
from pipeline.diffusion.posterior import sample_posterior, scale_latents, split_moments, unscale_latents


def test_the_sample_is_the_reference_librarys() -> None:
    moments, noise = torch.randn(2, 8, 4, 4) * 3, torch.randn(2, 4, 4, 4)
    reference = DiagonalGaussianDistribution(moments)
    assert torch.allclose(sample_posterior(moments, noise), reference.mean + reference.std * noise)
    mean, logvar = split_moments(torch.full((1, 8, 1, 1), 99.0), 4)
    assert logvar is not None and logvar.max() == 20.0 and mean.max() == 99.0


def test_means_alone_need_no_noise() -> None:
    mean = torch.randn(2, 4, 4, 4).half()
    assert torch.equal(sample_posterior(mean, torch.randn(2, 4, 4, 4)), mean.float())


def test_scaled_latents_have_unit_variance_only_when_scaled_once() -> None:
    z = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 5.49 + 0.3
    once = scale_latents(z, 0.18215, 0.3)
    assert once.std().item() == pytest.approx(1.0, abs=0.02)
    assert scale_latents(once, 0.18215, 0.3).std() < 0.5 and z.std() > 2
    assert torch.allclose(unscale_latents(once, 0.18215, 0.3), z, atol=1e-5)


def test_guidance_ends() -> None:
    unconditional, conditional = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    assert torch.allclose(guide(unconditional, conditional, 1.0), conditional, atol=1e-6)
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)
