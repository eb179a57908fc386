"""The step: optimizer, batch, processes, precision, ZeRO stage."""

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Refusal:
    """Settings of `engine` that do not go together: all of `settings` at once, each with any of its values."""

    settings: Mapping[str, tuple[Any, ...]]
    reason: str
    remedy: str

    def applies(self, engine: "EngineConfig") -> bool:
        """Return whether `engine` is such a combination."""
        return all(getattr(engine, name) in values for name, values in self.settings.items())

    def __str__(self) -> str:
        """Return the combination and why not, on one line."""
        named = (f"{name} {'|'.join(map(_yaml, values))}" for name, values in self.settings.items())
        return f"{' with '.join(named)}: {self.reason}; {self.remedy}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


REFUSALS = (
    Refusal(
        {"zero_stage": (0,), "precision": ("bf16", "fp16")},
        "DeepSpeed takes a stray Adam step at start, which decays the weights and shifts the bias correction by one",
        "use zero_stage 1, on one GPU too, or precision autocast_bf16",
    ),
    Refusal(
        {"zero_stage": (0,), "offload_optimizer": (True,)},
        "there is no ZeRO partition that could lie in host memory",
        "use zero_stage 1, 2 or 3",
    ),
    Refusal(
        {"zero_stage": (1,), "precision": ("bf16", "fp16"), "offload_optimizer": (True,)},
        "after one step with a gradient that is not finite DeepSpeed skips all that follow",
        "use zero_stage 2, which needs less memory as well",
    ),
)
"""What `ldm check` refuses of `engine`; all else is held against plain torch by tests/distributed/test_engine.py."""


class EngineConfig(Section):
    """Batch, processes, precision and ZeRO stage: DeepSpeed's own config is derived from these."""

    global_batch: Positive = Field(description="samples a step over all ranks: part of the run's mathematics")
    micro_batch: Positive = Field(description="most samples a rank holds at once: only memory and speed")
    processes: Positive = Field(
        1, description="processes `ldm train` starts on this machine outside of Slurm"
    )
    threads: Positive = Field(1, description="CPU threads a process")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="1 shards masters, moments and EMA over the ranks")
    reduction: Literal["auto", "during_backward", "after_backward"] = Field(
        "auto",
        description="of gradients at stage 1: during the backward pass, by a hook on every tensor, or after it; auto = after "
        "it on CPUs and on one GPU, where nothing would be hidden",
    )
    precision: Literal["fp32", "bf16", "autocast_bf16", "fp16"] = Field(
        "bf16",
        description="bf16 halves the weights' memory; autocast keeps fp32 weights; fp16 for GPUs without bf16",
    )
    activation_checkpointing: bool = Field(False, description="a third more compute for far less memory")
    offload_optimizer: bool = Field(False, description="masters and moments in host memory, updated there")
    compile: bool = Field(
        False, description="torch.compile of the U-Net: minutes at start; not worth it on CPUs"
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="merged last into DeepSpeed's config")

    @model_validator(mode="after")
    def _known_traps(self) -> Self:
        refused = [str(refusal) for refusal in REFUSALS if refusal.applies(self)]
        if refused:
            raise ValueError("; ".join(refused))
        if self.global_batch < self.processes:
            raise ValueError(
                f"global_batch {self.global_batch} is smaller than processes {self.processes}: every rank needs a sample a step"
            )
        return self
