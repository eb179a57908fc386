"""The derived DeepSpeed config: what follows from ours, what the escape hatch may say, and what it may not."""

from typing import Any

import pytest

from pipeline.config import EngineConfig, OptimizerConfig
from pipeline.errors import ConfigError
from pipeline.training.deepspeed_config import derive_deepspeed_config


def derive(
    world_size: int = 2, micro_batches: int = 2, on_gpus: bool = True, **engine: Any
) -> dict[str, Any]:
    section = EngineConfig(**({"global_batch": 16, "micro_batch": 4} | engine))
    optimizer = OptimizerConfig(clip_grad_norm=0.5)
    return derive_deepspeed_config(section, optimizer, world_size, micro_batches, on_gpus=on_gpus)


def test_counts_and_clipping_follow_from_the_config() -> None:
    derived = derive()
    assert derived["train_micro_batch_size_per_gpu"] == 4
    assert derived["gradient_accumulation_steps"] == 2
    assert derived["gradient_clipping"] == 0.5
    assert derived["zero_optimization"]["stage"] == 1
    assert "optimizer" not in derived and "scheduler" not in derived


def test_a_batch_that_the_world_does_not_divide_rounds_up() -> None:
    assert derive(world_size=3, micro_batches=2)["train_micro_batch_size_per_gpu"] == 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage(stage: int) -> None:
    derived = derive(zero_stage=stage, precision="fp32")
    assert derived["zero_optimization"]["stage"] == stage
    # 0.0 and not absent: DeepSpeed reads absent as 1.0, and at stage 0 the engine clips.
    assert derived["gradient_clipping"] == (0.5 if stage else 0.0)


@pytest.mark.parametrize(
    ("world_size", "on_gpus", "engine", "overlaps"),
    [
        (8, True, {}, True),
        (1, True, {}, False),
        (8, False, {}, False),
        (8, True, {"reduction": "after_backward"}, False),
        (1, False, {"reduction": "during_backward"}, True),
        (1, False, {"zero_stage": 2, "reduction": "after_backward"}, True),
        (1, False, {"precision": "fp32", "offload_optimizer": True}, True),
    ],
)
def test_gradients_are_reduced_where_something_hides_it(
    world_size: int, on_gpus: bool, engine: dict[str, Any], overlaps: bool
) -> None:
    zero = derive(world_size, 2, on_gpus, **engine)["zero_optimization"]
    assert zero["overlap_comm"] is zero["contiguous_gradients"] is overlaps


def test_precisions() -> None:
    bf16, autocast, fp32 = (derive(precision=name) for name in ("bf16", "autocast_bf16", "fp32"))
    fp16 = derive(precision="fp16")
    assert fp16["fp16"]["enabled"] and fp16["fp16"]["loss_scale"] == 0  # 0: DeepSpeed looks for the scale.
    assert not {"bf16", "torch_autocast", "data_types"} & fp16.keys()
    assert bf16["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert bf16["data_types"] == {"grad_accum_dtype": "fp32"} and bf16["communication_data_type"] == "fp32"
    assert autocast["torch_autocast"]["enabled"] and autocast["torch_autocast"]["dtype"] == "bfloat16"
    # Empty and not absent: absent means that gradients of convolutions and linear layers are summed in bf16.
    assert autocast["torch_autocast"]["lower_precision_safe_modules"] == [] and "bf16" not in autocast
    assert not {"bf16", "torch_autocast", "data_types"} & fp32.keys()


def test_the_hatch_is_merged_last_and_deep() -> None:
    hatch = {"zero_optimization": {"reduce_bucket_size": 7}, "comms_logger": {"enabled": True}}
    derived = derive(deepspeed=hatch)
    assert derived["zero_optimization"]["reduce_bucket_size"] == 7
    assert derived["zero_optimization"]["stage"] == 1 and derived["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_is_to_host_memory_with_torchs_own_adam(stage: int) -> None:
    hatch = {"zero_optimization": {"offload_optimizer": {"pin_memory": False}, "sub_group_size": 9}}
    derived = derive(zero_stage=stage, precision="fp32", offload_optimizer=True, deepspeed=hatch)
    assert derived["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert derived["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in derive(zero_stage=stage)["zero_optimization"]


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"zero_stage": 0, "precision": "bf16"}, "stray Adam step"),
        ({"zero_stage": 0, "precision": "fp16"}, "stray Adam step"),
        ({"zero_stage": 0, "precision": "fp32", "offload_optimizer": True}, "no ZeRO partition"),
        ({"zero_stage": 1, "precision": "bf16", "offload_optimizer": True}, "skips all that follow"),
    ],
)
def test_refused_combinations(engine: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        derive(**engine)
    assert derive(**(engine | {"zero_stage": 2}))


@pytest.mark.parametrize(
    ("hatch", "path"),
    [
        ({"train_batch_size": 8}, "train_batch_size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage"),
        ({"bf16": {"enabled": False}}, "bf16.enabled"),
        ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "zero_optimization.compute_grad_norm"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "zero_optimization.round_robin_gradients"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types"),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "zero_optimization.offload_optimizer.device",
        ),
    ],
)
def test_the_hatch_may_not_set_what_is_derived_or_breaks_a_promise(hatch: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.deepspeed\.{path}: ") as raised:
        derive(deepspeed=hatch)
    assert raised.value.exit_code == 2 and len(raised.value.problems) == 1


def test_all_problems_of_the_hatch_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        derive(deepspeed={"optimizer": {}, "scheduler": {}, "bf16": {"check_grad_overflow": False}})
    assert len(raised.value.problems) == 3
