"""What the ranks do in the tests of evaluation: train a little, measure from a checkpoint and midway, and fail alone."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import RunConfig
from pipeline.data.held_out import HeldOut
from pipeline.errors import DataError
from pipeline.evaluation import memorisation
from pipeline.evaluation.memorisation import TrainingLatents, nearest
from pipeline.evaluation.run import KINDS, evaluate_run
from pipeline.latents.reader import LatentDataset
from pipeline.paths import RunPaths
from pipeline.tracking import NoRecords
from pipeline.training import train as train_module
from pipeline.training.world import World
from tests.distributed.cases_ema import _copy_checkpoints, make_config

METRICS = ["kid", "frechet", "precision_recall", "clip", "memorisation"]


def settings(root: Path, name: str, stage: int) -> RunConfig:
    """Return a run over ROOT/tiny with every metric, judged by the CLIP of ROOT/tiny."""
    clip = str(root / "tiny" / "clip")
    evaluate = {"every": 2, "timesteps": 2, "batch": 2, "metrics": METRICS, "features": clip, "clip": clip}
    train = {"steps": 2, "checkpoint_every": 2}
    return make_config(root, name, stage, evaluate=evaluate, sample={"steps": 2}, train=train)


def train(world: World, root: Path, name: str, stage: int) -> Any:
    """Train two steps with an evaluation after them; return what it wrote."""
    paths = RunPaths(root / name)
    train_module.train(settings(root, name, stage), paths, world, attempt="a1")
    return json.loads(paths.evaluation.read_text())


def measure(world: World, root: Path, name: str) -> Any:
    """Return the evaluation of the run's newest checkpoint by all ranks."""
    _small_pieces()
    return evaluate_run(RunPaths(root / name), settings(root, name, 0), KINDS, world)


def look(world: World, root: Path, name: str, origin: str, stage: int) -> Any:
    """Load the checkpoint of `origin` at this world size and stage and return what the evaluation midway wrote."""
    config, paths = settings(root, name, stage), RunPaths(root / name)
    _copy_checkpoints(world, RunPaths(root / origin), paths)
    with ExitStack() as opened:
        part = train_module._assemble(config, paths, world, "a2", opened)
        part.midway.evaluate(part.state, NoRecords())
    return json.loads(paths.evaluation.read_text())


def look_at_damage(world: World, root: Path, name: str, origin: str, stage: int, rank: int) -> Any:
    """Look as `look` does while one rank cannot read its validation samples."""
    plain = HeldOut.read

    def read(self: HeldOut, number: int) -> Any:
        if world.rank == rank:
            raise DataError("shard 00000: row 8 is damaged")
        return plain(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOut, "read", read)
        return look(world, root, name, origin, stage)


def measure_damage(world: World, root: Path, name: str, rank: int) -> Any:
    """Measure while one rank cannot read the training latents that are searched last."""
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == rank:

            def fail(self: TrainingLatents, block: object) -> np.ndarray:
                raise OSError(5, "Input/output error")

            patch.setattr(TrainingLatents, "read", fail)
        return measure(world, root, name)


def plant(world: World, root: Path, name: str) -> Any:
    """Return the places and ratios of a copy of the last training latent and of a latent nobody stored."""
    _small_pieces()
    training = TrainingLatents([LatentDataset(root / name / "latents")], (16, 16), 1000)
    copied = training.read(training.blocks[-1])[-1:]
    new = copied.std() * np.random.default_rng(0).standard_normal(copied.shape)
    found = nearest(np.concatenate([copied, new]), training, world)
    return {"places": found.place_QK.tolist(), "ratios": found.ratios().tolist(), "count": training.count}


def _small_pieces() -> None:
    """Several blocks for several ranks, of which the last is short."""
    memorisation.BLOCK_BYTES = 3 * 8 * 256
