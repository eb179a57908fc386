"""What the ranks do in the tests of health, stop and the way back: real signals, planted spikes, flipped bits."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.training import train as train_module
from pipeline.training.health.care import Care
from pipeline.training.saving import save as save_module
from pipeline.training.world import World
from tests.distributed.cases import _before_each_step, paths_of, run


def run_signalled(
    world: World, root: Path, name: str, at: dict[str, list[str]], again: str = "", **sections: Any
) -> dict[str, Any]:
    """Train; rank 1 alone gets the signals `at` "step", and `again` in the middle of writing its file."""

    def before(step: int) -> None:
        for number in at.get(str(step), []):
            if world.rank == 1:
                os.kill(os.getpid(), getattr(signal, number))

    plain = save_module.write_stretches
    saves = {"count": 0}

    def write(*arguments: Any) -> Any:
        saves["count"] += 1
        if again and world.rank == 1:
            os.kill(os.getpid(), getattr(signal, again))
        return plain(*arguments)

    with _before_each_step(before), pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "write_stretches", write)
        return run(world, root, name, **sections) | {"saves": saves["count"]}


def run_with_bad_data(
    world: World, root: Path, name: str, bad: list[int], factor: float = 50.0, **sections: Any
) -> dict[str, Any]:
    """Train on data whose loss is `factor` times as high (NaN: not finite) at some positions of the run.

    The samples themselves do it, whatever the step or the rank; every position that was trained on is told.
    """
    plain = train_module.TrainStep._losses
    guilty, trained = torch.tensor(bad), []

    def losses(self: Any, batch: Any) -> tuple[Tensor, Tensor]:
        loss_B, weight_B = plain(self, batch)
        trained.extend(int(k) for k, w in zip(batch.positions, batch.weight, strict=True) if w)
        wrong = torch.isin(batch.positions, guilty)
        return loss_B * torch.where(wrong, factor, 1.0), weight_B

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TrainStep, "_losses", losses)
        try:
            return run(world, root, name, **sections) | {"trained": trained}
        except PipelineError as error:
            return {"error": type(error).__name__, "code": error.exit_code, "said": str(error)} | {
                "trained": trained
            }


def run_killed_on_bad_data(
    world: World,
    root: Path,
    name: str,
    bad: list[int],
    at_samples: int,
    factor: float = 50.0,
    **sections: Any,
) -> str:
    """The same until an accident on all ranks at once, in the step whose samples begin at `at_samples`."""
    plain = train_module.TrainStep.accumulate

    class AccidentError(Exception):
        pass

    def accumulate(self: Any, micro_batches: Any, step: int) -> Any:
        if any(int(batch.positions.min()) >= at_samples for batch in micro_batches):
            raise AccidentError
        return plain(self, micro_batches, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TrainStep, "accumulate", accumulate)
        try:
            run_with_bad_data(world, root, name, bad, factor, **sections)
        except AccidentError:
            return "killed"
    return "ended"


def run_with_flipped_weight(
    world: World, root: Path, name: str, at_step: int, rank: int, **sections: Any
) -> dict[str, Any]:
    """Train while one bit of one weight of `rank` flips after step `at_step`, just before the comparison."""
    plain = Care.after_step
    flipped: list[str] = []

    def after_step(self: Any, state: Any, *rest: Any) -> None:
        if state.step == at_step and not flipped:
            flipped.append(name)
            if world.rank == rank:
                flip_weight(self._replicas._weights["conv_in.weight"])
        plain(self, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Care, "after_step", after_step)
        return run(world, root, name, **sections)


@torch.no_grad()
def flip_weight(weight: Tensor) -> None:
    """Change the lowest bit of the mantissa of one element."""
    flat = weight.view(-1).view(torch.int32 if weight.element_size() == 4 else torch.int16)
    flat[3] ^= 1


def events(root: Path, name: str) -> list[dict[str, Any]]:
    """Return what the run wrote down about its health."""
    path = paths_of(root, name).health
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
