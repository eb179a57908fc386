"""The reverse process: our noise schedule as a `diffusers` scheduler, for sampling here and for the export.

What paints a picture in this package and what stands in an exported pipeline's `scheduler_config.json` come
from the same call, so they cannot differ.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.config.outcome import SamplerKind, sampler_problem
from pipeline.diffusion.schedule import flow_shift
from pipeline.errors import ConfigError

KINDS: tuple[SamplerKind, ...] = get_args(SamplerKind)
PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "x0": "sample",
    "flow": "flow_prediction",
}
# Latents are not pixels: cutting x0 to [-1, 1], some schedulers' default, would be wrong.
LATENTS = {"clip_sample": False}
# StableDiffusionPipeline sets any other offset to 1 by itself.
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 1}
# DDIM ends at alpha-bar_0, which is what the network has seen, not at 1.
BUILDERS: dict[SamplerKind, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {**LATENTS, **LEADING, "set_alpha_to_one": False}),
    "ddpm": (DDPMScheduler, {**LATENTS, **LEADING}),
    "euler": (EulerDiscreteScheduler, LINSPACE),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, LINSPACE),
    "heun": (HeunDiscreteScheduler, LINSPACE),
    "dpm_solver_2m": (DPMSolverMultistepScheduler, {**LINSPACE, "algorithm_type": "dpmsolver++"}),
    "dpm_solver_sde": (DPMSolverMultistepScheduler, {**LINSPACE, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, LINSPACE),
    # Of first order DPM-Solver++ is DDIM, which on straight lines is Euler's method; unlike diffusers' class of
    # that name this one has what StableDiffusionPipeline asks of a scheduler.
    "flow_euler": (
        DPMSolverMultistepScheduler,
        {**LINSPACE, "algorithm_type": "dpmsolver++", "solver_order": 1},
    ),
}
Generators = Sequence[torch.Generator]


class Sampler(Protocol):
    """What is used of a diffusers scheduler; it counts its own steps, so one serves one batch at a time."""

    config: Any
    timesteps: Tensor
    init_noise_sigma: float

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps and forget earlier steps."""
        ...

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the latents as the network expects them at `timestep`."""
        ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **more: Any) -> Any:
        """Return the less noisy latents as the field `prev_sample`."""
        ...

    def save_config(self, folder: Path) -> None:
        """Write `scheduler_config.json` into the folder."""
        ...


def make_sampler(kind: SamplerKind, objective: ObjectiveConfig, latent_pixels: int = 1) -> Sampler:
    """Return the diffusers scheduler that runs `objective`'s schedule backwards, with Stable Diffusion's settings.

    "ddim" is deterministic (eta 0). `latent_pixels` (height times width of the latents) matters only to a flow whose
    shift grows with the size.

    Source: Ho et al. 2020 (ddpm); Song et al. 2021, eq. 12 (ddim); Karras et al. 2022, algorithm 1 (euler, heun);
    Lu et al. 2022, DPM-Solver++ algorithm 2 and its SDE variant; Zhao et al. 2023 (unipc); Liu et al. 2022 (flow_euler).

    Raises:
        ConfigError: when the sampler cannot run this objective backwards; the ones that can are listed.
    """
    problem = sampler_problem(kind, objective)
    if problem:
        raise ConfigError(f"sample.sampler: {problem}")
    build, settings = BUILDERS[kind]
    settings = {**settings, "num_train_timesteps": objective.timesteps}
    settings["prediction_type"] = PREDICTION_TYPES[objective.prediction]
    if objective.prediction == "flow":
        return cast(
            Sampler,
            build(**settings, use_flow_sigmas=True, flow_shift=flow_shift(objective, latent_pixels)),
        )
    names = {"cosine": "squaredcos_cap_v2"}
    settings["beta_schedule"] = names.get(objective.schedule, objective.schedule)
    settings |= {"beta_start": objective.beta_start, "beta_end": objective.beta_end}
    if objective.zero_terminal_snr:
        # The first step has to be the one at pure noise: that is what the schedule was changed for.
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return cast(Sampler, build(**settings))


def sampling_timesteps(sampler: Sampler, steps: int) -> Tensor:
    """Prepare `sampler` for one picture or batch in `steps` steps and return its times, [steps], descending.

    Heun's method asks the network twice a step, so its list is longer.

    Raises:
        ConfigError: when the schedule has too few timesteps for that many distinct steps.
    """
    most = sampler.config.num_train_timesteps - 1
    if steps > most:
        raise ConfigError(
            f"sample.steps: {steps} is more than objective.timesteps {most + 1} allows; give at most {most}"
        )
    sampler.set_timesteps(steps)
    return sampler.timesteps


def step_back(
    sampler: Sampler, predicted: Tensor, time: Tensor, z_BCHW: Tensor, generators: Generators
) -> Tensor:
    """Return the less noisy latents; `generators`, one a picture, give the noise of the samplers that add some."""
    more: dict[str, Any] = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        more["generator"] = list(generators)
    stepped: Tensor = sampler.step(predicted, time, z_BCHW, **more).prev_sample
    return stepped
