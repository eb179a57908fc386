"""The reverse process: our noise schedule as a `diffusers` scheduler, for sampling here and for the export.

What paints a picture in this package and what stands in an exported pipeline's `scheduler_config.json` come
from the same call, so they cannot differ.
"""

from pathlib import Path
from typing import Any, Literal, Protocol, cast

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from pipeline.config import ObjectiveConfig
from pipeline.errors import ConfigError

SamplerKind = Literal["ddim", "dpm_solver_2m"]


class Sampler(Protocol):
    """What is used of a diffusers scheduler; it counts its own steps, so one serves one batch at a time."""

    config: Any
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps and forget earlier steps."""
        ...

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Any:
        """Return the less noisy latents as the field `prev_sample`."""
        ...

    def save_config(self, folder: Path) -> None:
        """Write `scheduler_config.json` into the folder."""
        ...


def make_sampler(kind: SamplerKind, objective: ObjectiveConfig) -> Sampler:
    """Return the diffusers scheduler that runs `objective`'s schedule backwards, with Stable Diffusion's settings.

    "ddim" is deterministic DDIM (eta 0) at timesteps 1, 1 + T // n, ...; its last step ends at alpha-bar_0, which
    is what the network has seen, not at 1. "dpm_solver_2m" is DPM-Solver++(2M), of second order, at n equidistant
    timesteps from T - 1 down; its last step is of first order and ends at x0.

    Source: Song et al. 2021, eq. 12; Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """
    shared: dict[str, Any] = {
        "num_train_timesteps": objective.timesteps,
        "beta_schedule": objective.schedule,
        "beta_start": objective.beta_start,
        "beta_end": objective.beta_end,
        "prediction_type": objective.prediction,
        # StableDiffusionPipeline sets any other offset to 1 by itself.
        "steps_offset": 1,
    }
    if kind == "ddim":
        # Latents are not pixels: cutting x0 to [-1, 1], diffusers' default, would be wrong.
        ddim = DDIMScheduler(**shared, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=False)
        return cast(Sampler, ddim)
    solver = DPMSolverMultistepScheduler(
        **shared, timestep_spacing="linspace", algorithm_type="dpmsolver++", solver_order=2
    )
    return cast(Sampler, solver)


def sampling_timesteps(sampler: Sampler, steps: int) -> Tensor:
    """Prepare `sampler` for one picture or batch in `steps` steps and return its timesteps, int64 [steps], descending.

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
