"""Validation loss and pictures while training goes on: at any ZeRO stage, of raw and averaged weights.

The work is cut into the same pieces at every world size and dealt to the ranks, with fillers, so that all make
equally many forward passes. It draws nothing from torch's generators and leaves every weight as it was: training
is bit for bit the one that never looked.
"""

import base64
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.changes import data_digest
from pipeline.data.held_out import HeldOut, open_held_out
from pipeline.data.sets import open_datasets
from pipeline.errors import ConfigError
from pipeline.evaluation.losses import Evaluator, evaluation_timesteps, summary, validation_text_encoder
from pipeline.evaluation.pictures import PictureMetrics
from pipeline.evaluation.run import KINDS, described, result_values
from pipeline.evaluation.together import agreed
from pipeline.generate import Generator
from pipeline.models.text_pair import TextEncoder
from pipeline.models.unet import UNet
from pipeline.paths import RunPaths
from pipeline.progress import Progress
from pipeline.publish import write_json
from pipeline.sample import chosen_prompts, grid_record, publish_grid
from pipeline.tracking import Records
from pipeline.trained_network import TrainedNetwork
from pipeline.training.averages.ema import Ema
from pipeline.training.averages.swap import RAW, weights_of
from pipeline.training.averages.turns import Share
from pipeline.training.engine import Engine
from pipeline.training.fragments import Fragments
from pipeline.training.saving.checkpoint import on_first_rank
from pipeline.training.saving.interval import due
from pipeline.training.saving.state import RunState
from pipeline.training.world import World

logger = logging.getLogger(__name__)

PICTURES_AT_ONCE = 4
"""Pictures a piece of work: small, so that many ranks have some, and fixed, so that none differs between world sizes."""


class Midway:
    """What is measured and painted between the steps of one run; every method is called by all ranks together."""

    def __init__(
        self, config: RunConfig, paths: RunPaths, world: World, engine: Engine, fragments: Fragments, ema: Ema
    ) -> None:
        """Open what `evaluate.every` and `sample.every` need, so that what is missing is said before the first step.

        The frozen encoders are loaded here, once, and stay on the device: loading them takes seconds of every rank,
        their memory is a few percent of what training takes.

        Raises:
            ConfigError: no validation split, no prompts, or averages that training does not keep.
            DataError: the encoders are not those that made the data set.
        """
        self._config, self._paths, self._world = config, paths, world
        self._engine, self._fragments, self._ema = engine, fragments, ema
        self._share = Share(world.rank, world.world_size)
        self._prompts: list[str] = []
        self._generator: Generator | None = None
        self._words: TextEncoder | None = None
        self._metrics: PictureMetrics | None = None
        measured = config.evaluate.every is not None and bool(config.evaluate.metrics)
        if config.sample.every is not None:
            self._require_weights(config.sample.weights)
            self._prompts = chosen_prompts(config, paths, config)
        if config.sample.every is not None or measured:
            self._require_weights(config.sample.weights)
            self._generator = self._open_generator()
        if config.evaluate.every is not None:
            self._words = self._open_validation()
        if measured:
            self._metrics = PictureMetrics(config, paths, world)

    def look(self, state: RunState, records: Records) -> None:
        """Measure and paint what is due after `state.step` steps."""
        if due(state.step, self._config.evaluate.every):
            self.evaluate(state, records)
        if due(state.step, self._config.sample.every):
            self.paint(state, records)

    def evaluate(self, state: RunState, records: Records) -> None:
        """Record the validation loss under raw and EMA weights: `val_loss_raw`, `val_loss_ema`, and by timestep.

        And the metrics of pictures that `evaluate.metrics` names, under `sample.weights`. All of it with its settings in
        `evaluation.json`. A sample that one rank cannot read ends all with its message.
        """
        settings, device = self._config.evaluate, self._world.device
        whole = agreed(self._world, lambda: open_held_out(self._config.data, self._paths.latents))
        dataset = HeldOut(whole.sets, settings.max_samples)
        evaluator = Evaluator(self._engine, self._config, device, dataset, self._words)
        timesteps = evaluation_timesteps(settings.timesteps, self._config.objective.timesteps)
        samples = len(dataset)
        trained = replace(self._trained(), step=state.step, samples=state.samples)
        result = described(trained, samples, timesteps, KINDS, self._config) | {"checkpoint": None}
        for kind in KINDS:
            with self._under(kind):
                losses_NT = evaluator.losses(
                    samples, timesteps, settings.batch, Progress(0), world=self._world
                )
            result[kind] = summary(losses_NT)
        if self._metrics is not None and self._generator is not None:
            self._generator.trained = replace(self._generator.trained, step=state.step, samples=state.samples)
            with self._under(self._config.sample.weights):
                result["pictures"] = self._metrics.measure(self._generator, whole, Progress(0))
        whole.close()
        on_first_rank(self._world, lambda: write_json(self._paths.evaluation, result))
        records.log(state.step, result_values(result), samples=state.samples)

    def paint(self, state: RunState, records: Records) -> None:
        """Paint the grid `samples/step-XXXXXXXX.png` with the weights `sample.weights`, as `ldm sample` would."""
        sample = self._config.sample
        generator = self._generator
        assert generator is not None, "sample.every is set"
        generator.trained = replace(generator.trained, step=state.step, samples=state.samples)
        starts = range(0, len(self._prompts), PICTURES_AT_ONCE)
        painted: dict[str, list[str]] = {}
        with self._under(sample.weights):
            for piece, filler in self._share.of(len(starts)):
                part = self._prompts[starts[piece] : starts[piece] + PICTURES_AT_ONCE]
                pictures = generator.paint(part, seed=sample.seed, sample=sample, first_picture=starts[piece])
                if not filler:
                    painted[str(piece)] = [_to_text(picture) for picture in pictures]
        gathered: dict[str, list[str]] = {}
        for part_of_rank in self._world.gather(painted):
            gathered |= part_of_rank
        record = grid_record(generator, self._config, self._prompts) | {"checkpoint": None}
        on_first_rank(self._world, lambda: str(self._publish(state, gathered, record, records)))

    def _publish(
        self, state: RunState, gathered: dict[str, list[str]], record: dict[str, object], records: Records
    ) -> Path:
        texts = [text for piece in range(len(gathered)) for text in gathered[str(piece)]]
        grid = publish_grid(self._paths, state.step, np.stack([_from_text(text) for text in texts]), record)
        records.image(grid, state.step, "grid")
        return grid

    @contextmanager
    def _under(self, kind: str) -> Iterator[None]:
        """Let the engine compute under the weights `kind`, without dropout and gradients."""
        with weights_of(self._fragments, self._ema, kind), torch.no_grad():
            self._engine.network.eval()
            try:
                yield
            finally:
                self._engine.network.train()

    def _open_generator(self) -> Generator:
        """Return the generator of the network in training; its step is set when it paints."""
        return Generator.of_run(self._trained(), self._paths, self._world.device)

    def _trained(self) -> TrainedNetwork:
        """Return the network in training as evaluation and sampling see it, at no step."""
        datasets = open_datasets(self._config.data, self._paths.latents)
        digest = data_digest(datasets, self._config.data)
        for dataset in datasets:
            dataset.close()
        return TrainedNetwork(
            cast(UNet, _InTraining(self._engine)),  # Sampling asks for predictions and the device only.
            self._config,
            self._config.sample.weights,
            self._paths.checkpoints,
            0,
            0,
            digest,
        )

    def _open_validation(self) -> TextEncoder | None:
        """Return the text encoder that the validation split needs: painting's, if that is open, or none."""
        dataset = open_held_out(self._config.data, self._paths.latents)
        dataset.close()
        if len(dataset) == 0:
            raise ConfigError(
                f"evaluate.every: the validation split of {dataset.where} is empty; set encode.validation_samples and "
                "encode again, or evaluate.every=null"
            )
        if dataset.spec.text == "tokens" and self._generator is not None:
            return self._generator.text_encoder
        return validation_text_encoder(self._config, dataset, self._paths, self._world.device)

    def _require_weights(self, kind: str) -> None:
        kept = (RAW, *self._ema.kinds)
        if kind not in kept:
            raise ConfigError(
                f"sample.weights {kind!r}: training keeps {', '.join(kept)}; choose one of them for sample.every"
            )


class _InTraining(nn.Module):
    """The engine's network as sampling sees it; the weights stay the engine's."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.network, self._predict = engine.network, engine

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, *conditions: Tensor) -> Tensor:
        return self._predict(latents_BCHW, timesteps_B, *conditions)


def _to_text(picture_HWC: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture_HWC).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _from_text(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
