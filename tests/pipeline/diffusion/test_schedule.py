"""The schedule against published values, the objective against its own inverse."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from pydantic import ValidationError

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.conditioning import Conditioning
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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "x0"])
def test_the_target_inverts_to_the_clean_latents(prediction) -> None:
    schedule = Schedule.from_config(ObjectiveConfig())
    x0, noise = torch.randn(8, 4, 4, 4).double(), torch.randn(8, 4, 4, 4).double()
    alpha_sigma = [part.double() for part in schedule.alpha_sigma(torch.arange(8) * 100)]
    z = add_noise(x0, noise, *alpha_sigma)
    said = target(prediction, x0, noise, *alpha_sigma)
    assert torch.allclose(x0_from_prediction(prediction, said, z, *alpha_sigma), x0, atol=1e-6)


def test_the_loss_is_zero_for_the_truth_and_one_for_silence() -> None:
    schedule = Schedule.from_config(ObjectiveConfig())
    x0, noise, text = torch.zeros(64, 4, 8, 8), torch.randn(64, 4, 8, 8), Conditioning(torch.zeros(64, 1, 1))
    t = torch.arange(64) * 15

    def truth(z, timesteps, text):
        return z / schedule.alpha_sigma(timesteps)[1].view(-1, 1, 1, 1)

    exact = denoising_loss(truth, x0, text, noise, t, schedule, "epsilon")
    silent = denoising_loss(lambda z, *_: torch.zeros_like(z), x0, text, noise, t, schedule, "epsilon")
    assert exact.shape == (64,) and exact.max() < 1e-6
    assert silent.mean().item() == pytest.approx(1.0, abs=0.05)
    assert per_sample_loss(torch.ones(2, 1, 2, 2).bfloat16(), torch.zeros(2, 1, 2, 2)).dtype == torch.float32


def test_zero_terminal_snr_has_the_published_values() -> None:
    """Lin et al.'s rescaling of Stable Diffusion's schedule, computed in float64: the end is 0, not nearly."""
    schedule = Schedule.from_config(ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True))
    alpha_bar = schedule.alphas_cumprod
    for t, value in {0: 0.99915, 499: 0.2423591666, 500: 0.2410187828, 998: 1.96788806e-07}.items():
        assert alpha_bar[t].item() == pytest.approx(value, rel=1e-6)
    assert alpha_bar[999].item() == 0.0 and schedule.sigma[999].item() == 1.0
    assert schedule.snr()[999].item() == 0.0
    reference = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
    )
    torch.testing.assert_close(reference.alphas_cumprod.double()[:-1], alpha_bar[:-1], rtol=1e-3, atol=1e-7)


def test_the_cosine_schedule_is_the_reference_librarys() -> None:
    ours = Schedule.from_config(ObjectiveConfig(schedule="cosine")).alphas_cumprod
    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-9)
    assert ours[500].item() == pytest.approx(0.4923, abs=1e-3), "half of the signal is left in the middle"


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_pure_noise_says_nothing_of_the_picture(prediction: str) -> None:
    with pytest.raises(ValidationError, match=r"zero_terminal_snr goes with v_prediction or x0, not with"):
        ObjectiveConfig.model_validate({"prediction": prediction, "zero_terminal_snr": True})
    with pytest.raises(ValidationError, match=r"flow_shift goes with prediction flow"):
        ObjectiveConfig(flow_shift=3.0)


def test_a_flow_runs_on_straight_lines_to_pure_noise() -> None:
    schedule = Schedule.from_config(ObjectiveConfig(prediction="flow"))
    torch.testing.assert_close(schedule.alpha + schedule.sigma, torch.ones(1000))
    assert schedule.sigma[[0, 499, 999]].tolist() == pytest.approx([0.001, 0.5, 1.0])
    assert schedule.times[[0, 499, 999]].tolist() == pytest.approx([1.0, 500.0, 1000.0])
    x0, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([200, 700]))
    z = add_noise(x0, noise, alpha, sigma)
    nearer = add_noise(x0, noise, *schedule.alpha_sigma(torch.tensor([199, 699])))
    torch.testing.assert_close(
        z - nearer, 0.001 * target("flow", x0, noise, alpha, sigma), atol=1e-5, rtol=1e-3
    )


def test_a_larger_latent_is_trained_at_more_noise() -> None:
    """SD3's shift sqrt(m / n), and Stable Diffusion 3's own value 3 for a shift of 3."""
    fixed = Schedule.from_config(ObjectiveConfig(prediction="flow", flow_shift=3.0))
    assert fixed.sigma[499].item() == pytest.approx(0.75), "3 / 2 over 1 + 2 / 2"
    assert fixed.for_latents(64, 64) is fixed
    grows = Schedule.from_config(ObjectiveConfig(prediction="flow", flow_shift_side=32))
    assert grows.for_latents(32, 32).sigma[499].item() == pytest.approx(0.5)
    larger = grows.for_latents(64, 64)
    assert larger.sigma[499].item() == pytest.approx(2 / 3), "twice the side, shift 2"
    assert larger.times[499].item() == pytest.approx(1000 * 2 / 3)
    assert grows.for_latents(128, 32).sigma[499].item() == larger.sigma[499].item(), "as many pixels"
    still = Schedule.from_config(ObjectiveConfig())
    assert still.for_latents(64, 64) is still


def test_the_loss_uses_the_schedule_of_its_size_and_tells_the_network_its_time() -> None:
    objective = ObjectiveConfig(prediction="flow", flow_shift_side=4)
    schedule = Schedule.from_config(objective)
    seen: list[torch.Tensor] = []

    def silent(z, times, text):
        seen.append(times)
        return torch.zeros_like(z)

    x0, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    loss = denoising_loss(
        silent, x0, Conditioning(torch.zeros(1, 1, 1)), noise, torch.tensor([499]), schedule, "flow"
    )
    assert seen[0].tolist() == pytest.approx([1000 * 2 / 3])
    torch.testing.assert_close(loss, (noise - x0).square().mean().view(1))


def test_input_perturbation_changes_the_input_and_not_the_target() -> None:
    schedule, t = Schedule.from_config(ObjectiveConfig()), torch.tensor([500])
    x0, noise, mixed = (torch.randn(1, 4, 8, 8) for _ in range(3))
    seen: list[torch.Tensor] = []

    def silent(z, times, text):
        seen.append(z)
        return torch.zeros_like(z)

    loss = denoising_loss(
        silent, x0, Conditioning(torch.zeros(1, 1, 1)), noise, t, schedule, "epsilon", mixed
    )
    torch.testing.assert_close(loss, noise.square().mean().view(1))
    torch.testing.assert_close(seen[0], add_noise(x0, mixed, *schedule.alpha_sigma(t)))
