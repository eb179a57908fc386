"""The schedule against published values, the objective against its own inverse."""

import pytest
import torch
from diffusers import DDPMScheduler

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import denoising_loss, per_sample_loss, target, x0_from_prediction
from pipeline.diffusion.schedule import Schedule, add_noise, betas

# Stable Diffusion's schedule: beta = linspace(sqrt(0.00085), sqrt(0.012), 1000)^2, computed in float64.
PUBLISHED = {
    # t: (beta, alpha-bar, SNR)
    0: (0.00085, 0.99915, 1175.470588),
    249: (0.0024198376, 0.6754324137, 2.081022),
    499: (0.0048037930, 0.2776696505, 0.384408),
    999: (0.012, 0.0046600985, 0.0046819),
}


def test_published_values_of_the_stable_diffusion_schedule() -> None:
    objective = ObjectiveConfig()
    schedule = Schedule.from_config(objective)
    for t, (beta, alpha_bar, snr) in PUBLISHED.items():
        assert betas(objective)[t].item() == pytest.approx(beta, rel=1e-8)
        assert schedule.alphas_cumprod[t].item() == pytest.approx(alpha_bar, rel=1e-8)
        assert schedule.snr()[t].item() == pytest.approx(snr, rel=1e-4)
    wrong = Schedule.from_config(ObjectiveConfig(schedule="linear"))
    assert wrong.alphas_cumprod[999].item() == pytest.approx(0.00157896, rel=1e-5)
    ddpm = Schedule.from_config(ObjectiveConfig(schedule="linear", beta_start=1e-4, beta_end=0.02))
    assert ddpm.alphas_cumprod[999].item() == pytest.approx(4.0358297654e-05, rel=1e-8)


def test_noise_and_velocity_equal_the_reference_library() -> None:
    schedule = Schedule.from_config(ObjectiveConfig())
    reference = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(4, 3, 2, 2, generator=generator), torch.randn(4, 3, 2, 2, generator=generator)
    t = torch.tensor([0, 250, 700, 999])
    alpha, sigma = schedule.alpha_sigma(t)
    assert torch.allclose(add_noise(x0, noise, alpha, sigma), reference.add_noise(x0, noise, t), atol=1e-5)
    velocity = target("v_prediction", x0, noise, alpha, sigma)
    assert torch.allclose(velocity, reference.get_velocity(x0, noise, t), atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_target_inverts_to_the_clean_latents(prediction) -> None:
    schedule = Schedule.from_config(ObjectiveConfig())
    x0, noise = torch.randn(8, 4, 4, 4).double(), torch.randn(8, 4, 4, 4).double()
    alpha_sigma = [part.double() for part in schedule.alpha_sigma(torch.arange(8) * 100)]
    z = add_noise(x0, noise, *alpha_sigma)
    said = target(prediction, x0, noise, *alpha_sigma)
    assert torch.allclose(x0_from_prediction(prediction, said, z, *alpha_sigma), x0, atol=1e-6)


def test_the_loss_is_zero_for_the_truth_and_one_for_silence() -> None:
    schedule = Schedule.from_config(ObjectiveConfig())
    x0, noise, text = torch.zeros(64, 4, 8, 8), torch.randn(64, 4, 8, 8), torch.zeros(64, 1, 1)
    t = torch.arange(64) * 15

    def truth(z, timesteps, text):
        return z / schedule.alpha_sigma(timesteps)[1].view(-1, 1, 1, 1)

    exact = denoising_loss(truth, x0, text, noise, t, schedule, "epsilon")
    silent = denoising_loss(lambda z, *_: torch.zeros_like(z), x0, text, noise, t, schedule, "epsilon")
    assert exact.shape == (64,) and exact.max() < 1e-6
    assert silent.mean().item() == pytest.approx(1.0, abs=0.05)
    assert per_sample_loss(torch.ones(2, 1, 2, 2).bfloat16(), torch.zeros(2, 1, 2, 2)).dtype == torch.float32
