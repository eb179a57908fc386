"""What is measured, painted and recorded."""

from typing import Literal

from pydantic import Field

from pipeline.config.base import Count, Positive, Section


class EvaluateConfig(Section):
    """Validation loss with fixed noise at fixed timesteps."""

    timesteps: Positive = Field(
        8, description="equidistant timesteps; the mean over them is the validation loss"
    )
    batch: Positive = Field(64, description="samples at once")
    max_samples: Positive = Field(1024, description="validation samples used")


class SampleConfig(Section):
    """Pictures from prompts under classifier-free guidance."""

    prompts: tuple[str, ...] = Field((), description="empty = captions of the validation split")
    num_prompts: Positive = Field(16, description="how many captions are taken when no prompts are given")
    sampler: Literal["ddim", "dpm_solver_2m"] = Field(
        "dpm_solver_2m", description="DPM-Solver++ needs fewest steps"
    )
    steps: Positive = Field(25, description="network evaluations a picture")
    guidance_scale: float = Field(5.0, ge=0.0, description="1 = conditional only, 0 = unconditional")
    weights: Literal["ema", "raw"] = "ema"
    seed: Count = 0


class TrackingConfig(Section):
    """Where records go after metrics.jsonl."""

    mlflow: str = Field(
        "auto", description="auto = RUNS/mlflow.db unless under Slurm; off; or a tracking URI"
    )
    experiment: str = Field("ldm", min_length=1)
