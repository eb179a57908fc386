"""The config of a run that begins with somebody's weights: of a diffusers folder, or of another run.

The shape of the U-Net and, where the config names none, the frozen encoders come from the source; everything else
is the config's. What differs from how the source was trained is said, and no weight is copied: training reads each
rank's share from the source.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pipeline.config import RunConfig, UNetConfig, WarmStartConfig
from pipeline.config_file import dump_config
from pipeline.errors import ConfigError
from pipeline.models.model_folder import read_json
from pipeline.models.unet import UNet, parameter_count
from pipeline.models.unet_folder import open_unet_folder
from pipeline.paths import RunPaths, autoencoder_folder, dataset_folder, text_encoder_folder
from pipeline.publish import write_bytes
from pipeline.tracking import config_for_later
from pipeline.training.frozen import frozen_names
from pipeline.training.saving.manifest import aside, committed, read_manifest
from pipeline.training.warm_start import RunSource, Source, open_source
from pipeline.training.world import World

# What the weights do not decide: the size that is painted by default, and a drop that training may want otherwise.
FREE = ("sample_size", "dropout")
PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "x0",
    "flow_prediction": "flow",
}


def import_run(wanted: WarmStartConfig, config: RunConfig, paths: RunPaths) -> list[str]:
    """Write `paths.config`, the config of a run that begins with `wanted`; return what it says, a line each.

    Raises:
        ConfigError: the run has begun already, a pattern of `train.freeze` names nothing, or the source is unfit.
        CheckpointError, DataError: the source is damaged.
    """
    if committed(paths.checkpoints) or aside(paths.checkpoints):
        raise ConfigError(f"{paths.root}: has checkpoints of its own; take another name=... for the new run")
    origin = _origin(Path(wanted.source), wanted)
    model = origin["model"].model_copy(update={name: getattr(config.model, name) for name in FREE})
    encode = {
        name: folder for name, folder in origin["encoders"].items() if getattr(config.encode, name) is None
    }
    if "text_encoder" in encode and origin["text_layer"] != config.encode.text_layer:
        encode["text_layer"] = origin["text_layer"]  # The one that its U-Net learned to read.
    if config.first_stage is not None and not wanted.optimizer:
        encode = {}  # The run trains its own.
    tree = json.loads(config.model_dump_json()) | {"warm_start": json.loads(wanted.model_dump_json())}
    tree["model"] = json.loads(model.model_dump_json())
    tree["encode"] |= encode
    if wanted.optimizer:
        # A fork goes on with the encoders and the data that its place in the data belongs to.
        tree["first_stage"] = None
        tree["data"]["dataset"] = tree["data"]["dataset"] or origin["dataset"]
    begun = _validated(tree, wanted.source)
    source = open_source(wanted, begun.model, World())
    frozen = frozen_names([name for name, _ in _parameters(begun.model)], begun.train.freeze)
    write_bytes(paths.config, dump_config(config_for_later(begun)).encode())
    return [*_facts(source, begun, frozen), *_differences(origin["objective"], begun), *_encoders(encode)]


def _origin(path: Path, wanted: WarmStartConfig) -> dict[str, Any]:
    """Return the source's `model`, `encoders`, `text_layer` and `dataset`, and what is known of its `objective`."""
    checkpoint = path if (path / "checkpoint.json").is_file() else None
    run = RunPaths(path.parent.parent if checkpoint else path)
    if checkpoint is None and committed(run.checkpoints):
        checkpoint = committed(run.checkpoints)[-1]
    if checkpoint is None:
        return _of_folder(path)
    trained = RunConfig.model_validate_json(json.dumps(read_manifest(checkpoint)["config"]))
    encoders = {
        "autoencoder": str(autoencoder_folder(trained, run)),
        "text_encoder": str(text_encoder_folder(trained, run)),
        "text_encoder_2": trained.encode.text_encoder_2,
    }
    objective = json.loads(trained.objective.model_dump_json())
    dataset = str(dataset_folder(trained, run))
    return {
        "model": trained.model,
        "encoders": encoders,
        "text_layer": trained.encode.text_layer,
        "objective": objective,
        "dataset": dataset,
    }


def _of_folder(path: Path) -> dict[str, Any]:
    found = open_unet_folder(path)
    places = {"autoencoder": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    whole = found.folder != path
    there = {name: path / place for name, place in places.items() if whole and (path / place).is_dir()}
    scheduler = path / "scheduler" / "scheduler_config.json"
    objective = _objective(read_json(scheduler)) if whole and scheduler.is_file() else {}
    encoders = {name: str(folder) for name, folder in there.items()}
    return {
        "model": found.config,
        "encoders": encoders,
        # StableDiffusionXLPipeline reads the penultimate layer of both, StableDiffusionPipeline the last.
        "text_layer": "penultimate" if "text_encoder_2" in encoders else "last",
        "objective": objective,
        "dataset": None,
    }


def _objective(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a diffusers scheduler's config says in our own words; its defaults are DDPM's."""
    said = {
        "prediction": PREDICTIONS.get(
            scheduler.get("prediction_type", "epsilon"), scheduler.get("prediction_type")
        ),
        "schedule": scheduler.get("beta_schedule", "linear").replace("squaredcos_cap_v2", "cosine"),
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        "beta_start": scheduler.get("beta_start", 0.0001),
        "beta_end": scheduler.get("beta_end", 0.02),
        "zero_terminal_snr": bool(scheduler.get("rescale_betas_zero_snr", False)),
    }
    return {"prediction": "flow"} if said["prediction"] == "flow" else said


def _validated(tree: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(
            [
                f"{where}: with this config: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
                for problem in error.errors(include_url=False)
            ]
        ) from None


def _parameters(model: UNetConfig) -> list[tuple[str, Any]]:
    with torch.device("meta"):
        return list(UNet(model).named_parameters())


def _facts(source: Source, config: RunConfig, frozen: list[str]) -> Iterator[str]:
    assert config.warm_start is not None
    kind = f"{config.warm_start.weights} weights" if isinstance(source, RunSource) else "weights"
    yield f"begins with the {kind} of {source.where}: {parameter_count(config.model):,} parameters"
    if config.warm_start.optimizer and isinstance(source, RunSource):
        yield f"goes on at step {source.manifest['step']} with its optimizer, averages and place in the data"
    if frozen:
        elements = {name: parameter.numel() for name, parameter in _parameters(config.model)}
        yield f"{len(frozen)} weights stay as they are, {sum(elements[name] for name in frozen):,} parameters"


def _differences(trained: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """Yield a line for each setting of the objective that the weights were trained with otherwise."""
    now = json.loads(config.objective.model_dump_json())
    for name, value in trained.items():
        if now[name] != value:
            yield f"objective.{name}: {now[name]!r}, but the weights were trained with {value!r}: they have to learn it anew"


def _encoders(taken: Mapping[str, str | None]) -> Iterator[str]:
    for name, folder in taken.items():
        if folder is not None:
            yield f"encode.{name}: {folder}"
