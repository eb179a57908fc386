"""The shipped configs: they load, are complete, say why, fit together, and name the published models' shapes."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from launch.check import combination_problems
from launch.slurm import render_job
from pipeline.config import RunConfig
from pipeline.config_file import dump_config, load_config
from pipeline.data.shares import micro_batches_per_step
from pipeline.paths import RunPaths

FOLDER = Path(__file__).parents[1] / "configs"
ALL = sorted(FOLDER.glob("*.yaml"))
PUBLISHED = [FOLDER / f"{name}.yaml" for name in ("sd15-256", "sd15-512", "sd2-512", "sdxl-1024")]

# From the published unet/config.json of each model; attention_head_dim is the number of heads.
SD1: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
}
SD2 = SD1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 768 + 1280,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


def by_name(path: Path) -> str:
    return path.stem


def test_every_shipped_config_is_here() -> None:
    assert {path.stem for path in ALL} == {
        "demo",
        "long",
        "small",
        "sd15-256",
        "sd15-512",
        "sd2-512",
        "sdxl-1024",
    }


@pytest.mark.parametrize("path", ALL, ids=by_name)
def test_a_config_survives_the_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("path", ALL, ids=by_name)
def test_its_settings_go_together_and_make_a_job(path: Path) -> None:
    config = load_config(path)
    assert combination_problems(config) == []
    assert f"--job-name={path.stem}\n" in render_job(config, run=RunPaths(Path("/runs/x")), command=["ldm"])


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_every_setting_stands_in_the_file(path: Path) -> None:
    """A reader sees the whole run, and a changed default does not change a published recipe."""
    config = load_config(path)
    assert unset(config, "") == []


def unset(section: BaseModel, at: str) -> list[str]:
    missing = [f"{at}{name}" for name in type(section).model_fields if name not in section.model_fields_set]
    for name in section.model_fields_set:
        inner = getattr(section, name)
        if isinstance(inner, BaseModel):
            missing += unset(inner, f"{at}{name}.")
    return missing


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_every_value_has_its_reason(path: Path) -> None:
    lines = path.read_text().splitlines()
    bare = []
    for number, line in enumerate(lines):
        is_setting = re.match(r"\s*[a-z0-9_]+: *[^ #]", line)
        explained = " # " in line or (number > 0 and lines[number - 1].lstrip().startswith("# "))
        if is_setting and not explained:
            bare.append(line)
    assert bare == []
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("name", "shape", "image_size"),
    [("sd15-256", SD1, 256), ("sd15-512", SD1, 512), ("sd2-512", SD2, 512), ("sdxl-1024", SDXL, 1024)],
)
def test_the_unet_is_the_published_one(name: str, shape: dict[str, Any], image_size: int) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    assert {key: getattr(config.model, key) for key in shape} == shape
    assert config.encode.image_size == image_size == config.encode.min_side
    assert config.model.sample_size * 8 == image_size
    objective = config.objective
    assert (objective.prediction, objective.schedule, objective.timesteps) == (
        "epsilon",
        "scaled_linear",
        1000,
    )
    assert (objective.beta_start, objective.beta_end, objective.caption_dropout) == (0.00085, 0.012, 0.1)


# Model cards: 2,048 samples a step, 1e-4 after 10,000 steps of warm-up. Steps of v1-1 at 256 px; of v1-1, v1-2 and
# v1-5 at 512 px; of 2-base at 512 px.
STEPS = {"sd15-256": 237_000, "sd15-512": 194_000 + 515_000 + 595_000, "sd2-512": 850_000}


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_the_recipe_is_the_published_one(path: Path) -> None:
    config = load_config(path)
    assert config.engine.global_batch == 2048
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.warmup_steps) == (1e-4, "constant", 10_000)
    assert config.ema.decay == 0.9999
    if path.stem in STEPS:
        assert config.train.steps == STEPS[path.stem]


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_the_nodes_hold_the_global_batch_in_one_micro_batch(path: Path) -> None:
    config = load_config(path)
    engine, cluster = config.engine, config.cluster
    assert cluster.tasks_per_node == cluster.gpus_per_node == engine.processes == 8
    ranks = cluster.nodes * cluster.tasks_per_node
    assert ranks * engine.micro_batch == engine.global_batch
    assert micro_batches_per_step(engine.global_batch, engine.micro_batch, ranks) == 1


# GiB without recomputing: what an H100 of 80 GB holds, less what CUDA, NCCL and fragmentation take.
USABLE_GIB = 70
PARAMETERS = {
    "sd15-256": 859_520_964,
    "sd15-512": 859_520_964,
    "sd2-512": 865_910_724,
    "sdxl-1024": 2_567_463_684,
}


@pytest.mark.parametrize("path", PUBLISHED, ids=by_name)
def test_a_rank_fits_into_a_gpu(path: Path) -> None:
    """bf16 weights, fp32 gradient sums, and sharded masters, Adam and EMA; activations fitted to MLPerf's peaks."""
    config: RunConfig = load_config(path)
    ranks = config.cluster.nodes * config.cluster.tasks_per_node
    states = PARAMETERS[path.stem] * (2 + 4 + 16 / ranks) / 2**30
    a_sample = 0.749 * (config.encode.image_size / 512) ** 2
    if config.engine.activation_checkpointing:
        a_sample /= 4
    assert states + 1.5 + a_sample * config.engine.micro_batch < USABLE_GIB
