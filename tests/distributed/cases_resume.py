"""What the ranks do in the matrix of resumes: interruptions inside an accumulation, and the samples that were seen."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pipeline.training import train as train_module
from pipeline.training.world import World
from tests.distributed.cases import reshard, run

MICRO_BATCHES = 2
__all__ = ["reshard", "run"]


class AccidentError(Exception):
    """What ends a run on all ranks at once, without a save."""


def run_seen(
    world: World, root: Path, name: str, *, stop_in: int = -1, accident_in: int = -1, **sections: Any
) -> dict[str, Any]:
    """Train; in the second micro-batch of a step rank 1 may get a TERM, or all ranks an accident.

    Returns how it ended and what this rank saw: {step: samples of the split, in order, micro-batch by micro-batch}.
    """
    plain, plain_accumulate = train_module.TrainStep._losses, train_module.TrainStep.accumulate
    seen: dict[int, list[list[int]]] = {}
    present = {"step": -1}

    def accumulate(self: Any, micro_batches: Any, step: int) -> Any:
        assert len(micro_batches) == MICRO_BATCHES
        present["step"] = step
        seen[step] = []
        return plain_accumulate(self, micro_batches, step)

    def losses(self: Any, batch: Any) -> tuple[Tensor, Tensor]:
        step = present["step"]
        if len(seen[step]) == MICRO_BATCHES - 1:
            if step == accident_in:
                raise AccidentError
            if step == stop_in and world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        seen[step].append([int(index) for index in batch.indices])
        return plain(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TrainStep, "_losses", losses)
        patch.setattr(train_module.TrainStep, "accumulate", accumulate)
        try:
            ended = run(world, root, name, **sections)
        except AccidentError:
            ended = {"killed": True}
    return ended | {"seen": {str(step): samples for step, samples in seen.items()}}


def run_stopped_after(world: World, root: Path, name: str, steps: int, **sections: Any) -> dict[str, Any]:
    """Train until a TERM that is noted in the step before the `steps`-th: it takes effect one step late."""
    plain = train_module.TrainStep.accumulate

    def accumulate(self: Any, micro_batches: Any, step: int) -> Any:
        if step == steps - 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, micro_batches, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TrainStep, "accumulate", accumulate)
        return run(world, root, name, **sections)
