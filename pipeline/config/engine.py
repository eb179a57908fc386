"""The step: optimizer, batch, processes, precision, ZeRO stage."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Count, Positive, Section


class OptimizerConfig(Section):
    """AdamW on the fp32 masters."""

    learning_rate: float = Field(1e-4, gt=0.0, le=1.0)
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = Field(
        "constant", description="after the warm-up"
    )
    warmup_steps: Count = Field(1000, description="linear from 0")
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.999, ge=0.0, lt=1.0)
    epsilon: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.01, ge=0.0, description="on matrices and kernels; none on biases and norms")
    clip_grad_norm: float = Field(1.0, gt=0.0, description="bound of the global gradient norm")


class EngineConfig(Section):
    """Batch, processes, precision and ZeRO stage: DeepSpeed's own config is derived from these."""

    global_batch: Positive = Field(description="samples a step over all ranks: part of the run's mathematics")
    micro_batch: Positive = Field(description="most samples a rank holds at once: only memory and speed")
    processes: Positive = Field(
        1, description="processes `ldm train` starts on this machine outside of Slurm"
    )
    threads: Positive = Field(1, description="CPU threads a process")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="1 shards masters, moments and EMA over the ranks")
    precision: Literal["fp32", "bf16", "autocast_bf16"] = Field(
        "bf16", description="autocast keeps true fp32 weights; bf16 halves the weights' memory"
    )
    activation_checkpointing: bool = Field(False, description="a third more compute for far less memory")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="merged last into DeepSpeed's config")

    @model_validator(mode="after")
    def _known_traps(self) -> Self:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 at zero_stage 0 takes a stray Adam step at start (DeepSpeed): use zero_stage 1 or autocast_bf16"
            )
        if self.global_batch < self.processes:
            raise ValueError(
                f"global_batch {self.global_batch} is smaller than processes {self.processes}: every rank needs a sample a step"
            )
        return self
