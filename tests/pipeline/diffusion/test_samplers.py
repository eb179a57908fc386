"""Samplers against exact answers: the ideal denoiser of Gaussian data is known, and every step is linear."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.config.outcome import SamplerKind
from pipeline.diffusion.objective import target
from pipeline.diffusion.samplers import make_sampler, sampling_timesteps, step_back
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import ConfigError

KINDS: tuple[SamplerKind, ...] = ("ddim", "dpm_solver_2m")
# The sampler, the objective, and how far off its std is at 100 steps: first order, second order.
GAUSSIAN: list[tuple[SamplerKind, dict[str, object], float]] = [
    ("ddim", {}, 0.02),
    ("ddim", {"prediction": "x0", "schedule": "cosine"}, 0.02),
    ("ddim", {"prediction": "v_prediction", "zero_terminal_snr": True}, 0.02),
    ("ddpm", {}, 0.06),
    ("euler", {}, 0.03),
    ("euler", {"prediction": "v_prediction"}, 0.03),
    ("euler_ancestral", {}, 0.06),
    ("heun", {}, 0.005),
    ("dpm_solver_2m", {}, 0.005),
    ("dpm_solver_2m", {"prediction": "flow"}, 0.01),
    ("dpm_solver_sde", {}, 0.03),
    ("unipc", {}, 0.005),
    ("unipc", {"prediction": "flow", "flow_shift": 3.0}, 0.01),
    ("flow_euler", {"prediction": "flow"}, 0.02),
    ("flow_euler", {"prediction": "flow", "flow_shift": 3.0}, 0.03),
]


def painted_std(kind: SamplerKind, objective: ObjectiveConfig, steps: int, data_std: float) -> float:
    """Return the std of what the sampler paints from N(0, 1) when the data is N(0, data_std^2).

    The ideal prediction is linear in z, so a latent of 1 is carried to the std of all.
    """
    schedule, sampler = Schedule.from_config(objective), make_sampler(kind, objective)
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for timestep in sampling_timesteps(sampler, steps):
        alpha_bar = schedule.alphas_cumprod[timestep]
        alpha, sigma = alpha_bar.sqrt().view(1), (1 - alpha_bar).sqrt().view(1)
        variance = alpha_bar * data_std**2 + 1 - alpha_bar
        x0, noise = alpha * data_std**2 * z / variance, sigma * z / variance
        predicted = target(objective.prediction, x0, noise, alpha, sigma)
        z = sampler.step(predicted, timestep, z).prev_sample
    return float(z)


def ddim_closed_form(objective: ObjectiveConfig, steps: int, data_std: float) -> float:
    """Return what exact DDIM makes of a latent 1: in z / alpha a step from s to s' scales by (d^2 + s s') / (d^2 + s^2)."""
    alpha_bar = Schedule.from_config(objective).alphas_cumprod.numpy()
    noise_levels = np.sqrt((1 - alpha_bar) / alpha_bar)
    timesteps = 1 + np.arange(steps)[::-1] * (objective.timesteps // steps)
    levels = [*noise_levels[timesteps], noise_levels[0]]
    value = 1 / np.sqrt(alpha_bar[timesteps[0]])
    for level, following in pairwise(levels):
        value *= (data_std**2 + level * following) / (data_std**2 + level**2)
    return float(value * np.sqrt(alpha_bar[0]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [3, 10, 50, 200])
@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
def test_ddim_is_the_closed_form(prediction: str, steps: int, data_std: float) -> None:
    objective = ObjectiveConfig(prediction=prediction)  # type: ignore[arg-type]
    painted = painted_std("ddim", objective, steps, data_std)
    assert painted == pytest.approx(ddim_closed_form(objective, steps, data_std), rel=1e-5)


@pytest.mark.parametrize(("steps", "std"), [(10, 0.8804), (50, 0.9736), (200, 0.9932)])
def test_ddim_over_stable_diffusions_schedule_has_the_known_std(steps: int, std: float) -> None:
    assert painted_std("ddim", ObjectiveConfig(), steps, 1.0) == pytest.approx(std, abs=5e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
def test_dpm_solver_is_closer_at_equal_steps_and_converges(prediction: str, data_std: float) -> None:
    objective = ObjectiveConfig(prediction=prediction)  # type: ignore[arg-type]
    for steps in (10, 20, 50):
        wrong = {kind: abs(painted_std(kind, objective, steps, data_std) / data_std - 1) for kind in KINDS}
        assert wrong["dpm_solver_2m"] < wrong["ddim"]
    assert painted_std("dpm_solver_2m", objective, 100, data_std) == pytest.approx(data_std, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
def test_sampling_and_training_share_one_schedule(kind: SamplerKind, schedule: str) -> None:
    objective = ObjectiveConfig(schedule=schedule, timesteps=500, beta_end=0.02)  # type: ignore[arg-type]
    ours = Schedule.from_config(objective).alphas_cumprod
    theirs: Tensor = make_sampler(kind, objective).alphas_cumprod  # type: ignore[attr-defined]
    torch.testing.assert_close(theirs.double(), ours, rtol=2e-5, atol=0)


def test_ddims_timesteps_are_stable_diffusions() -> None:
    sampler = make_sampler("ddim", ObjectiveConfig())
    assert sampling_timesteps(sampler, 4).tolist() == [751, 501, 251, 1]
    assert float(sampler.final_alpha_cumprod) == pytest.approx(0.99915)
    assert not sampler.config.clip_sample


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_steps_work_and_one_more_is_refused(kind: SamplerKind) -> None:
    objective = ObjectiveConfig(timesteps=20)
    sampler = make_sampler(kind, objective)
    timesteps = sampling_timesteps(sampler, 19).tolist()
    assert timesteps == sorted(set(timesteps), reverse=True) and 0 < timesteps[0] < 20
    assert np.isfinite(painted_std(kind, objective, 19, 1.0))
    with pytest.raises(ConfigError, match=r"sample\.steps: 20 .* at most 19"):
        sampling_timesteps(sampler, 20)


def sampled_std(kind: SamplerKind, objective: ObjectiveConfig, steps: int, data_std: float) -> float:
    """Return the std of 100,000 numbers painted from noise with the ideal denoiser of N(0, data_std^2)."""
    schedule, sampler = Schedule.from_config(objective), make_sampler(kind, objective)
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    z = torch.cat([torch.randn(1, 1, 1, 25_000, generator=generator) for generator in generators]).double()
    times = sampling_timesteps(sampler, steps)
    z = z * sampler.init_noise_sigma
    for time in times:
        seen = sampler.scale_model_input(z, time).double()
        if objective.prediction == "flow":
            sigma = (time.double() / objective.timesteps).view(1)
            alpha = 1.0 - sigma
        else:
            alpha_bar = schedule.alphas_cumprod[time.round().long()].view(1)
            alpha, sigma = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        variance = alpha**2 * data_std**2 + sigma**2
        x0, noise = alpha * data_std**2 * seen / variance, sigma * seen / variance
        predicted = target(objective.prediction, x0, noise, alpha, sigma)
        z = step_back(sampler, predicted, time, z, generators).double()
    return float(z.std())


@pytest.mark.parametrize(("kind", "fields", "allowed"), GAUSSIAN)
@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
def test_every_sampler_paints_gaussian_data_with_its_std(
    kind: SamplerKind, fields: dict[str, object], allowed: float, data_std: float
) -> None:
    painted = sampled_std(kind, ObjectiveConfig.model_validate(fields), 100, data_std)
    assert painted == pytest.approx(data_std, rel=allowed + 0.01)


def test_heun_is_closer_than_euler_at_equal_calls() -> None:
    objective = ObjectiveConfig()
    euler = abs(sampled_std("euler", objective, 21, 0.5) - 0.5)
    assert len(sampling_timesteps(make_sampler("heun", objective), 11)) == 21
    assert abs(sampled_std("heun", objective, 11, 0.5) - 0.5) < euler


def test_flow_euler_is_eulers_method_on_straight_lines() -> None:
    """From sigma to the next, z moves by the difference times the velocity; the last step ends at the picture."""
    objective = ObjectiveConfig(prediction="flow")
    sampler = make_sampler("flow_euler", objective)
    times = sampling_timesteps(sampler, 4)
    z = by_hand = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    sigmas = [float(sigma) for sigma in sampler.sigmas]  # type: ignore[attr-defined]
    assert sigmas[0] == pytest.approx(1.0, abs=2e-3) and sigmas[-1] == 0.0
    for time, (sigma, following) in zip(times, pairwise(sigmas), strict=True):
        velocity = torch.full_like(z, float(time) / 500 - 0.7)
        by_hand = by_hand + (following - sigma) * velocity
        z = step_back(sampler, velocity, time, z, []).double()
    assert float(z) == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("ddim", {"prediction": "flow"}, "use one of flow_euler"),
        ("flow_euler", {}, "needs objective.prediction flow"),
        ("heun", {"prediction": "v_prediction", "zero_terminal_snr": True}, "zero terminal SNR"),
        ("heun", {"prediction": "x0"}, "use euler"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused_with_one_that_does(
    kind: SamplerKind, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"sample.sampler: .*{said}"):
        make_sampler(kind, ObjectiveConfig.model_validate(fields))


def test_a_stochastic_sampler_draws_from_the_pictures_own_generator() -> None:
    """The second picture of two is the one painted alone from its generator."""
    objective = ObjectiveConfig()

    def paint(seeds: list[int]) -> Tensor:
        sampler = make_sampler("euler_ancestral", objective)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        z = torch.ones(len(seeds), 1, 2, 2)
        for time in sampling_timesteps(sampler, 5):
            z = step_back(sampler, torch.zeros_like(z), time, sampler.scale_model_input(z, time), generators)
        return z

    assert torch.equal(paint([1, 2])[1], paint([2])[0]) and not torch.equal(paint([1])[0], paint([2])[0])
