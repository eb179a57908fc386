"""DeepSpeed's JSON derived from our config: a pure function without torch, so that `ldm check` can show it.

Nothing is configured twice: what follows from `engine` and `optimizer` may not be set again in the escape hatch
`engine.deepspeed`, which is merged last.
"""

from collections.abc import Mapping
from typing import Any

from pipeline.config import EngineConfig, OptimizerConfig
from pipeline.errors import ConfigError

BUCKET_ELEMENTS = 144_000_000
"""A sixth of SD 1.x's parameters: six reductions to hide behind backward, and 0.6 GB instead of 2 of buffer."""

DERIVED = {
    "train_batch_size": "engine.global_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "engine.global_batch and engine.micro_batch",
    "managed_gradient_accumulation": "engine.global_batch and engine.micro_batch",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "fp16.enabled": "engine.precision",
    "bf16.enabled": "engine.precision",
    "bfloat16": "engine.precision",
    "torch_autocast": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "activation_checkpointing": "engine.activation_checkpointing",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "compile": "engine.compile",
    "data_types": "engine.precision",
}
REFUSED: dict[str, tuple[Any, str]] = {
    "bf16.check_grad_overflow": (False, "NaN gradients would poison the weights instead of being skipped"),
    "bf16.bf16_master_weights_and_grads": (True, "checkpoints and the EMA are of fp32 masters"),
    "zero_optimization.compute_grad_norm": (False, "clipping and the check for NaN need the norm"),
    "zero_optimization.round_robin_gradients": (
        True,
        "DeepSpeed 0.19 then names the wrong weights for its shards, and checkpoints would be silently wrong",
    ),
    "fp16.fp16_master_weights_and_grads": (True, "checkpoints and the EMA are of fp32 masters"),
    "zero_force_ds_cpu_optimizer": (
        True,
        "DeepSpeed's own Adam is compiled at first use, behind a lock that a killed build leaves for ever",
    ),
}


def derive_deepspeed_config(
    engine: EngineConfig, optimizer: OptimizerConfig, world_size: int, micro_batches: int, *, on_gpus: bool
) -> dict[str, Any]:
    """Return what `deepspeed.initialize` is given for a step of `micro_batches` micro-batches on each rank.

    DeepSpeed's own sample counts are nominal: shares of a global batch that the world size does not divide
    differ by one, and the loss carries the weights.

    Raises:
        ConfigError: a line for each setting of `engine.deepspeed` that is derived from another or would break
            what this project promises.
    """
    largest_share = -(-engine.global_batch // world_size)
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": -(-largest_share // micro_batches),
        "gradient_accumulation_steps": micro_batches,
        # At stage 0 DeepSpeed would clip without telling the norm or looking for NaN: the engine does it there. Left
        # out it means 1.0.
        "gradient_clipping": optimizer.clip_grad_norm if engine.zero_stage else 0.0,
        "zero_optimization": _zero(engine, hidden=on_gpus and world_size > 1),
        # Offloaded too it is torch's AdamW, because DeepSpeed's is compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
    }
    if engine.precision == "bf16":
        derived["bf16"] = {"enabled": True, "check_grad_overflow": True}
        # Sums of many bf16 gradients lose small ones: accumulate and reduce in fp32.
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        derived["communication_data_type"] = "fp32"
    if engine.precision == "fp16":
        derived["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    if engine.precision == "autocast_bf16":
        # No module is safe: left out, DeepSpeed sums the fp32 gradients of linear and convolution layers in bf16.
        derived["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    problems = hatch_problems(engine.deepspeed)
    if problems:
        raise ConfigError(problems)
    return _merge(derived, engine.deepspeed)


def hatch_problems(hatch: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting of `engine.deepspeed` that may not stand there."""
    problems = [
        f"engine.deepspeed.{path}: follows from {source}; set that instead"
        for path, source in DERIVED.items()
        if _lookup(hatch, path) is not None
    ]
    problems += [
        f"engine.deepspeed.{path}: {value!r} is not allowed: {reason}"
        for path, (value, reason) in REFUSED.items()
        if _lookup(hatch, path) == value
    ]
    return problems


def _zero(engine: EngineConfig, *, hidden: bool) -> dict[str, Any]:
    """Return the ZeRO section; `hidden`: a reduction can run behind the backward pass."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage:
        overlaps = hidden if engine.reduction == "auto" else engine.reduction == "during_backward"
        # Only stage 1 without offload can do without the hook on every gradient.
        overlaps |= engine.zero_stage > 1 or engine.offload_optimizer
        zero |= {"overlap_comm": overlaps, "contiguous_gradients": overlaps}
        zero |= {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return zero


def _lookup(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
