"""The config of a run that begins with a diffusers folder: what it takes over, what it says, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from pipeline.config import RunConfig, WarmStartConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, DataError
from pipeline.import_pipeline import import_run
from pipeline.models.unet import UNet, parameter_count
from pipeline.models.unet_folder import save_unet
from pipeline.paths import RunPaths
from tests.builders import tiny_autoencoder, tiny_clip, tiny_config

MODEL = {"block_out_channels": [32, 96], "sample_size": 4, "dropout": 0.1}


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    """Return a pipeline of another shape than the config's, trained on v."""
    folder = tmp_path / "pipeline"
    tiny_autoencoder(folder / "vae")
    tiny_clip(folder / "text_encoder", tmp_path / "clip")
    torch.manual_seed(0)
    save_unet(UNet(tiny_config(tmp_path, model=MODEL).model), folder / "unet")
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    DDPMScheduler(prediction_type="v_prediction", **settings).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


def imported(folder: Path, config: RunConfig, **wanted: Any) -> tuple[list[str], RunConfig]:
    paths = RunPaths(Path(config.runs) / config.name)
    said = import_run(WarmStartConfig(source=str(folder), **wanted), config, paths)
    return said, load_config(paths.config)


def test_shape_and_encoders_come_from_the_pipeline_and_the_rest_stays(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        tmp_path / "runs", train={"steps": 5, "freeze": ["down_blocks"]}, warm_start={"source": "x"}
    )
    said, run = imported(pipeline_folder, config)
    assert run.model.block_out_channels == (32, 96)
    assert (run.model.sample_size, run.model.dropout) == (8, 0.0), "the config's own resolution and dropout"
    assert run.encode.autoencoder == str(pipeline_folder / "vae")
    assert run.encode.text_encoder == str(pipeline_folder / "text_encoder")
    assert run.warm_start == WarmStartConfig(source=str(pipeline_folder))
    for section in ("engine", "train", "optimizer", "objective", "data"):
        assert getattr(run, section) == getattr(config, section)
    assert (
        said[0]
        == f"begins with the weights of {pipeline_folder}/unet: {parameter_count(run.model):,} parameters"
    )
    frozen = [p for name, p in UNet(run.model).named_parameters() if name.startswith("down_blocks.")]
    assert said[1] == f"{len(frozen)} weights stay as they are, {sum(p.numel() for p in frozen):,} parameters"
    assert said[2] == (
        "objective.prediction: 'epsilon', but the weights were trained with 'v_prediction': they have to learn it anew"
    )
    assert said[3:] == [
        f"encode.autoencoder: {pipeline_folder}/vae",
        f"encode.text_encoder: {pipeline_folder}/text_encoder",
    ]


def test_encoders_that_the_config_names_stay(pipeline_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "runs", encode={"autoencoder": "mine"})
    said, run = imported(pipeline_folder, config)
    assert run.encode.autoencoder == "mine" and not [line for line in said if "encode.autoencoder" in line]


def test_a_unet_folder_alone_is_enough(pipeline_folder: Path, tmp_path: Path) -> None:
    said, run = imported(pipeline_folder / "unet", tiny_config(tmp_path / "runs"))
    assert len(said) == 1 and run.model.block_out_channels == (32, 96) and run.encode.autoencoder is None


@pytest.mark.parametrize(
    "wanted, said",
    [
        ({"step": 3}, r"warm_start\.step: 3: .* weights only"),
        ({"optimizer": True, "weights": "raw"}, "optimizer: true"),
    ],
)
def test_a_folder_has_no_steps_and_no_optimizer(
    pipeline_folder: Path, tmp_path: Path, wanted: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        imported(pipeline_folder, tiny_config(tmp_path / "runs"), **wanted)
    assert not (tmp_path / "runs").exists()


def test_a_source_that_is_not_there_and_one_that_is_damaged(pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="nowhere: no such model folder; give the folder of a diffusers pipeline"
    ):
        imported(tmp_path / "nowhere", tiny_config(tmp_path / "runs"))
    weights = next((pipeline_folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match="the file is cut short"):
        imported(pipeline_folder, tiny_config(tmp_path / "runs"))


def test_a_pattern_that_names_nothing(pipeline_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "runs", train={"steps": 5, "freeze": ["midblock"]}, warm_start={"source": "x"}
    )
    with pytest.raises(ConfigError, match=r"'midblock' names no weight.*did you mean 'mid_block'"):
        imported(pipeline_folder, config)


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"warm_start": {"source": "x", "optimizer": True}}, "optimizer true needs weights raw, not ema"),
        ({"train": {"steps": 5, "freeze": ["conv_in"]}}, "set warm_start.source"),
    ],
)
def test_settings_that_cannot_go_together(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_config(tmp_path, **sections)
