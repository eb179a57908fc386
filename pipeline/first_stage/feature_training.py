"""A small feature network trained on the pictures themselves: it learns to know a picture again among others.

Two views of each picture (crop, flip, brightness of each colour, noise) must find each other in the batch: the loss of
SimCLR (Chen et al. 2020) with the symmetric form of `contrastive.py`. No captions, no foreign weights; what it learns to
tell apart, edges and colours and their arrangement, is what its distance then weighs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import PerceptualConfig, RunConfig
from pipeline.first_stage.contrastive import gathered_loss
from pipeline.first_stage.features import Conv, FeatureNetwork, FeatureSpec, Layer, Relu, Tap
from pipeline.first_stage.loop import train_once
from pipeline.first_stage.pairs import VIEWS, EpochOrder, PairTable, draws, share
from pipeline.first_stage.stage import Learner, Parts, Recipe, Stage, open_stage
from pipeline.models.pixels import images_from_pixels
from pipeline.paths import RunPaths
from pipeline.publish import whole_folder, write_json

KIND = "features"
REPORT = "features.json"
LEVELS = 3
EMBEDDING = 64
SCALE = 10.0
"""1 / temperature of the contrastive softmax."""
CROP_PART, GAIN, NOISE_STD = 0.75, 0.4, 0.05
LEARNING_RATE, WARMUP_STEPS = 2e-3, 20


def train_features(config: RunConfig, table: PairTable, paths: RunPaths) -> Path:
    """Return the folder of the trained network, in the layout of `features.py`, with `features.json` beside it."""
    assert config.first_stage is not None
    section = config.first_stage.autoencoder.perceptual
    folder = paths.root / KIND
    pace = config.first_stage.autoencoder
    recipe = Recipe(
        kind=KIND,
        batch=section.batch,
        steps=section.steps,
        warmup_steps=min(WARMUP_STEPS, section.steps),
        learning_rate=LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        clip_grad_norm=1.0,
        checkpoint_every=pace.checkpoint_every,
        log_every=pace.log_every,
    )
    settings = section.model_dump(mode="json", exclude={"weight", "network"})
    stage = open_stage(config, paths, recipe, {**settings, "pairs": table.digest})
    train_once(
        stage,
        [folder],
        REPORT,
        lambda: FeatureTrainee(stage, section, table),
        lambda trained, noted: _publish(stage, trained, folder, noted),
    )
    return folder


def build_features(width: int) -> FeatureNetwork:
    """Return an untrained network of three halvings, a tap behind each, drawn from torch's generator."""
    layers: list[Layer] = []
    tensors: dict[str, Tensor] = {}
    channels = 3
    for level in range(LEVELS):
        name, wider = f"convs.{level}", width * 2**level
        kernel = torch.empty(wider, channels, 4, 4)
        tensors[f"{name}.weight"] = nn.init.kaiming_normal_(kernel, nonlinearity="relu")
        tensors[f"{name}.bias"] = torch.zeros(wider)
        layers += [Conv(name=name, stride=2, padding=1), Relu(), Tap()]
        channels = wider
    return FeatureNetwork(FeatureSpec(layers=tuple(layers)), tensors)


class Embedding(nn.Module):
    """Images to unit vectors: means of all taps, one linear map. Every tap is in it, so every level is trained."""

    def __init__(self, network: FeatureNetwork, width: int) -> None:
        super().__init__()
        self.network = network
        self.project = nn.Linear(width * (2**LEVELS - 1), EMBEDDING)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return [B, 64], of unit length."""
        means = [tap.mean(dim=(2, 3)) for tap in self.network(images_BCHW)]
        return functional.normalize(self.project(torch.cat(means, dim=1)), dim=1)


class FeatureTrainee:
    """The network under AdamW, two views of each picture a step."""

    def __init__(self, stage: Stage, section: PerceptualConfig, table: PairTable) -> None:
        """Draw the network from torch's generator."""
        self._stage, self._table = stage, table
        self.network = build_features(section.width)
        self._learner = Learner(stage, Embedding(self.network, section.width))
        self._order = EpochOrder(table.train, batch=section.batch, seed=stage.config.seed)

    def step(self, step: int, *, measured: bool) -> dict[str, Tensor]:
        """Take step `step`; there is nothing more to measure at a record."""
        accelerator = self._stage.accelerator
        places = self._order.batch(step)
        mine = share(places, accelerator.process_index, accelerator.num_processes)
        images_BCHW = images_from_pixels(self._table.pixels(places[mine]))
        drawn = draws(self._stage.config.seed, VIEWS, step)
        views = [random_views(images_BCHW, drawn, len(places), mine) for _ in range(2)]
        one_BD, other_BD = self._learner.wrapped(torch.cat(views).to(accelerator.device)).chunk(2)
        scale = torch.tensor(SCALE, device=accelerator.device)
        ids_G = torch.from_numpy(places).to(accelerator.device)
        loss = gathered_loss(accelerator, one_BD, other_BD, scale, ids_G)
        grad_norm = self._learner.learn(loss * accelerator.num_processes, step)
        return {"loss": loss.detach(), "grad_norm": grad_norm}

    def parts(self) -> Parts:
        """Return weights and AdamW state."""
        return self._learner.parts()

    def restore(self, parts: Parts) -> None:
        """Lay them in."""
        self._learner.restore(parts)

    def picture(self) -> None:
        """Return nothing: there is nothing to look at."""

    def collapse(self, shown: dict[str, float]) -> str | None:
        """Return None: the loss says it."""
        return None


def random_views(images_BCHW: Tensor, drawn: np.random.Generator, total: int, mine: slice) -> Tensor:
    """Return one random view [B, 3, c, c] of each image, c = 3/4 of the side; draws are those of all `total` slots."""
    side = images_BCHW.shape[-1]
    cut = max(8, int(side * CROP_PART) // 8 * 8)
    corners = drawn.integers(0, side - cut, (total, 2), endpoint=True)[mine]
    flips = (drawn.random(total) < 0.5)[mine]
    gains = (1.0 + GAIN * (2.0 * drawn.random((total, 3, 1, 1), dtype=np.float32) - 1.0))[mine]
    noise = drawn.standard_normal((total, 3, cut, cut), dtype=np.float32)[mine]
    cuts = [
        image[:, y : y + cut, x : x + cut]
        for image, (y, x) in zip(images_BCHW, corners.tolist(), strict=True)
    ]
    views = torch.stack([cut.flip(2) if flip else cut for cut, flip in zip(cuts, flips, strict=True)])
    return views * torch.from_numpy(gains) + NOISE_STD * torch.from_numpy(noise)


def _publish(stage: Stage, trained: FeatureTrainee, folder: Path, noted: dict[str, float]) -> None:
    report: dict[str, Any] = {
        "kind": KIND,
        "settings": stage.settings,
        "steps": stage.recipe.steps,
        **noted,
    }
    with whole_folder(folder) as beside:
        trained.network.save(beside)
        write_json(beside / REPORT, report)
