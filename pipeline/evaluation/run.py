"""`ldm evaluate`: the newest checkpoint measured, on one process or on many, and written down with all settings."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from pipeline import publish
from pipeline.config import RunConfig
from pipeline.data.changes import data_digest
from pipeline.data.held_out import HeldOut, open_held_out
from pipeline.errors import DataError, DivergedError
from pipeline.evaluation.losses import (
    Evaluator,
    evaluation_timesteps,
    loss_values,
    summary,
    validation_text_encoder,
)
from pipeline.evaluation.pictures import PictureMetrics, picture_values
from pipeline.evaluation.together import agreed, from_first
from pipeline.generate import Generator, default_device, refuse_differences
from pipeline.paths import RunPaths
from pipeline.progress import Progress, progress_bar
from pipeline.tracking import open_records
from pipeline.trained_network import TrainedNetwork, Weights
from pipeline.training.world import World

KINDS: tuple[Weights, ...] = ("raw", "ema")


def evaluate_run(
    paths: RunPaths, config: RunConfig, kinds: Sequence[Weights] = KINDS, world: World | None = None
) -> dict[str, Any]:
    """Return what the newest checkpoint is worth, and write it to `paths.evaluation`; all ranks of `world` together.

    The validation loss under each of `kinds`; the metrics of pictures that `evaluate.metrics` names under `sample.weights`
    if that is among them, else under the first. `config` decides what is measured; the model, the objective and the data
    are the checkpoint's.

    Raises:
        CheckpointError: when there is no valid checkpoint.
        ConfigError: when a metric lacks what it needs.
        DivergedError: when a loss is not finite.
        DataError: when the validation split is empty or the data is not what the checkpoint was trained on.
    """
    world = World(device=default_device()) if world is None else world
    networks = TrainedNetwork.each(paths, kinds, world.device)
    trained = agreed(world, lambda: next(networks))
    dataset = agreed(world, lambda: _validation_split(trained, paths))
    words = agreed(world, lambda: validation_text_encoder(trained.config, dataset, paths, world.device))
    most = HeldOut(dataset.sets, config.evaluate.max_samples)
    timesteps = evaluation_timesteps(config.evaluate.timesteps, trained.config.objective.timesteps)
    metrics = PictureMetrics(config, paths, world) if config.evaluate.metrics else None
    painting = config.sample.weights if config.sample.weights in kinds else kinds[0]
    result = described(trained, len(most), timesteps, kinds, config)
    for network in itertools.chain((trained,), _agreed_each(networks, len(kinds) - 1, world)):
        with _progress(world, len(most) * len(timesteps), f"evaluate {network.weights}", "loss") as progress:
            evaluator = Evaluator.of(network, most, words)
            losses_NT = evaluator.losses(len(most), timesteps, config.evaluate.batch, progress, world=world)
        _refuse_non_finite(losses_NT, network)
        result[network.weights] = summary(losses_NT)
        if metrics is not None and network.weights == painting:
            generator = agreed(world, lambda network=network: Generator.of_run(network, paths, world.device))  # type: ignore[misc]
            count = min(config.evaluate.pictures, len(dataset))
            with _progress(world, count, f"paint {network.weights}", "picture") as progress:
                result["pictures"] = metrics.measure(generator, dataset, progress)
    dataset.close()
    from_first(world, lambda: _publish(result, paths, config))
    return result


def described(
    trained: TrainedNetwork, samples: int, timesteps: list[int], kinds: Sequence[Weights], config: RunConfig
) -> dict[str, Any]:
    """Return what every result begins with: which state was measured, on what, with which settings."""
    return {
        "step": trained.step,
        "samples": trained.samples,
        "checkpoint": trained.checkpoint.name,
        "data_digest": trained.data_digest,
        "validation_samples": samples,
        "prediction": trained.config.objective.prediction,
        "timesteps": timesteps,
        "kinds": list(kinds),
        "settings": json.loads(config.evaluate.model_dump_json()),
    }


def result_values(result: Mapping[str, Any]) -> dict[str, float]:
    """Return what a tracker records of a result: losses, and the metrics of pictures, as flat names."""
    values: dict[str, float] = {}
    for kind in result["kinds"]:
        values |= loss_values(kind, result["timesteps"], result[kind])
    return values | (picture_values(result["pictures"]) if "pictures" in result else {})


def _agreed_each(networks: Iterator[TrainedNetwork], count: int, world: World) -> Iterator[TrainedNetwork]:
    for _ in range(count):
        yield agreed(world, lambda: next(networks))


def _progress(world: World, total: int, label: str, unit: str) -> AbstractContextManager[Progress]:
    return progress_bar(total, label, unit=unit) if world.is_first else nullcontext(Progress(total))


def _validation_split(trained: TrainedNetwork, paths: RunPaths) -> HeldOut:
    """Return what no step saw of the data that the network was trained on: one data set or a mixture, anywhere."""
    dataset = open_held_out(trained.config.data, paths.latents)
    found = data_digest(dataset.sets, trained.config.data)
    refuse_differences(dataset.where, {"digest": (found, trained.data_digest)})
    if len(dataset) == 0:
        raise DataError(
            f"{dataset.where}: the validation split is empty; set encode.validation_samples and encode again"
        )
    return dataset


def _refuse_non_finite(losses_NT: np.ndarray, trained: TrainedNetwork) -> None:
    wrong = int((~np.isfinite(losses_NT)).sum())
    if wrong:
        raise DivergedError(
            f"{trained.checkpoint}: {wrong} of {losses_NT.size} validation losses of the {trained.weights} weights "
            "are not finite; go back to an earlier checkpoint"
        )


def _publish(result: dict[str, Any], paths: RunPaths, config: RunConfig) -> None:
    publish.write_json(paths.evaluation, result)
    with open_records(paths, config, kind="evaluate", attempt="evaluate") as records:
        records.log(result["step"], result_values(result), samples=result["samples"])
