"""What is measured, painted and recorded."""

from typing import Literal

from pydantic import Field

from pipeline.config.base import Count, Fraction, Name, Positive, Section
from pipeline.config.objective import ObjectiveConfig

SamplerKind = Literal[
    "ddim",
    "ddpm",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_solver_2m",
    "dpm_solver_sde",
    "unipc",
    "flow_euler",
]
FLOW_SAMPLERS: tuple[SamplerKind, ...] = ("flow_euler", "dpm_solver_2m", "dpm_solver_sde", "unipc")


def sampler_problem(kind: SamplerKind, objective: ObjectiveConfig) -> str:
    """Return why `kind` cannot sample `objective`, empty if it can."""
    if objective.prediction == "flow" and kind not in FLOW_SAMPLERS:
        return f"{kind} does not run a flow backwards; use one of {', '.join(FLOW_SAMPLERS)}"
    if objective.prediction != "flow" and kind == "flow_euler":
        return f"flow_euler needs objective.prediction flow, not {objective.prediction}; use euler"
    if objective.prediction == "x0" and kind in ("euler_ancestral", "heun"):
        return f"{kind} is not written for prediction x0; use euler"
    if objective.zero_terminal_snr and kind == "heun":
        return "heun does not begin at zero terminal SNR; use ddim, euler or dpm_solver_2m"
    return ""


PictureMetric = Literal["kid", "frechet", "precision_recall", "clip", "memorisation"]


class EvaluateConfig(Section):
    """Validation loss with fixed noise at fixed timesteps, and metrics of pictures painted from validation captions."""

    timesteps: Positive = Field(
        8, description="equidistant timesteps; the mean over them is the validation loss"
    )
    batch: Positive = Field(64, description="samples at once; whole batches are dealt to the ranks")
    max_samples: Positive = Field(1024, description="validation samples used")
    every: Positive | None = Field(
        None, description="steps between evaluations while training, of raw and EMA; null = none"
    )
    metrics: tuple[PictureMetric, ...] = Field(
        (), description="of pictures painted with `sample` and `sample.weights`; empty = the loss alone"
    )
    pictures: Positive = Field(64, description="painted at most, one a validation caption")
    features: str | None = Field(
        None,
        description="a CLIP folder or a file of FID's Inception weights to compare in; null = the run's own CLIP",
    )
    clip: str | None = Field(
        None, description="folder of the CLIP that judges captions; null = the run's own, a lenient judge"
    )
    reference: str | None = Field(
        None, description="folder of real pictures to compare with; null = decoded validation latents"
    )
    searched: Positive = Field(100_000, description="training latents searched for memorised pictures")


class SampleConfig(Section):
    """Pictures from prompts under classifier-free guidance."""

    prompts: tuple[str, ...] = Field((), description="empty = captions of the validation split")
    num_prompts: Positive = Field(16, description="how many captions are taken when no prompts are given")
    sampler: SamplerKind = Field(
        "dpm_solver_2m", description="DPM-Solver++ needs fewest steps; it runs flows too"
    )
    steps: Positive = Field(25, description="network evaluations a picture")
    guidance_scale: float = Field(5.0, ge=0.0, description="1 = conditional only, 0 = unconditional")
    guidance_rescale: Fraction = Field(
        0.0, description="share of the contrast that guidance adds which is taken back; about 0.7 if used"
    )
    guidance_interval: tuple[Fraction, Fraction] = Field(
        (0.0, 1.0), description="times t / T between which guidance is on; outside it half the work is saved"
    )
    negative_prompt: str = Field("", description="painted away from; empty = the null text")
    weights: Name = Field(
        "ema", description="raw, ema, another average of the checkpoint, or one made by `ldm ema`"
    )
    seed: Count = 0
    every: Positive | None = Field(
        None, description="steps between grids while training, painted with `weights`; null = none"
    )


class TrackingConfig(Section):
    """Where records go after metrics.jsonl."""

    mlflow: str = Field(
        "auto", description="auto = RUNS/mlflow.db unless under Slurm; off; or a tracking URI"
    )
    experiment: str = Field("ldm", min_length=1)
    register_model: bool = Field(
        True, description="`ldm export` makes its pipeline a version of MLflow's registered model NAME too"
    )
