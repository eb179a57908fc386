"""What the ranks do in the tests of the data: train on a mixture, and write down every sample as they see it."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.data.batch import LatentBatch
from pipeline.training import train as train_module
from pipeline.training.saving.checkpoint import newest_checkpoint
from pipeline.training.saving.manifest import read_manifest
from pipeline.training.world import World
from tests.distributed import cases


def mixed_config(root: Path, name: str, sets: Sequence[Sequence[Any]], **sections: Any) -> RunConfig:
    """Return the tiny run of `cases` over the data sets [(folder in ROOT, weight), ...], every sample checked."""
    mix = [{"dataset": str(root / folder), "weight": weight} for folder, weight in sets]
    data = {"mix": mix, "threads": 1, "verify": "all"} | sections.pop("data", {})
    tree = json.loads(cases.make_config(root, name, **sections).model_dump_json())
    return RunConfig.model_validate_json(json.dumps(tree | {"data": data}))


def run_told(
    world: World,
    root: Path,
    name: str,
    sets: Sequence[Sequence[Any]],
    *,
    attempt: str = "a1",
    stop_after: int | None = None,
    accept: bool = False,
    **sections: Any,
) -> dict[str, Any]:
    """Train, perhaps until a TERM at rank 0, and write [position, sample, height, width] to ROOT/ids/NAME-ATTEMPT-RANK.

    A line is written when the step trains on it. Returns how it ended and what the newest checkpoint says of the data.
    """
    config = mixed_config(root, name, sets, **sections)
    seen = root / "ids" / f"{name}-{attempt}-{world.rank}"
    seen.parent.mkdir(exist_ok=True)
    plain = train_module.TrainStep.accumulate

    def accumulate(self: Any, micro_batches: Sequence[LatentBatch], step: int) -> Any:
        with seen.open("a") as stream:
            for batch in micro_batches:
                stream.writelines(f"{json.dumps(line)}\n" for line in _lines(batch))
        # It takes effect one step late.
        if stop_after is not None and step == stop_after - 2 and world.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, micro_batches, step)

    paths = cases.paths_of(root, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TrainStep, "accumulate", accumulate)
        ended = train_module.train(config, paths, world, attempt=attempt, accept_data_change=accept)
    manifest = read_manifest(newest_checkpoint(paths.checkpoints))
    kept = {key: manifest[key] for key in ("data_origin", "substituted", "samples", "data_digest")}
    return kept | {"step": ended.step, "reason": ended.reason}


def _lines(batch: LatentBatch) -> list[list[int]]:
    """Return [position, sample, height, width] of each sample that counts."""
    counts = zip(batch.positions.tolist(), batch.indices.tolist(), (batch.weight > 0).tolist(), strict=True)
    return [[k, index, *batch.moments.shape[2:]] for k, index, real in counts if real]
