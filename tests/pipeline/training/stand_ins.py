"""A state without DeepSpeed: what `Checkpoints` and `Ema` see of an engine, for one process of a larger world."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.config import EmaConfig
from pipeline.training.averages.ema import Ema
from pipeline.training.fragments import Fragment
from pipeline.training.saving.plan import Plan
from pipeline.training.saving.retention import Retention
from pipeline.training.saving.save import Checkpoints
from pipeline.training.saving.state import RunState
from pipeline.training.world import World

SHAPES = {"layer.weight": (4, 3), "layer.bias": (5,)}


@dataclass
class StandInFragments:
    """Whole tensors of two parameters as live fragments, filled from a seed."""

    seed: int = 0
    updates: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(SHAPES))

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        self.total = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        self.owned = tuple(
            Fragment(
                name, shape, 0, *(torch.randn(torch.Size(shape).numel(), generator=draw) for _ in range(3))
            )
            for name, shape in self.shapes.items()
        )
        self.resident = self.owned

    def loaded(self, updates: int) -> None:
        """Note the count that a load sets."""
        self.updates = updates

    def step(self) -> None:
        """Change every element, as an optimizer would."""
        for fragment in self.owned:
            for tensor in (fragment.master, fragment.exp_avg, fragment.exp_avg_sq):
                tensor.mul_(0.5).add_(1.0)
        self.updates += 1


def stand_in_checkpoints(
    folder: Path,
    fragments: StandInFragments,
    *,
    attempt: str = "a1",
    keep_last: int = 3,
    keep_every: int | None = None,
    every_seconds: float | None = None,
) -> tuple[Checkpoints, Ema]:
    """Return the checkpoints in `folder` of a state in one process, and its average."""
    ema = Ema(fragments, EmaConfig(decay=0.9))  # type: ignore[arg-type]
    facts = {"attempt": attempt, "config": {}, "data_digest": "d", "zero_stage": 1, "versions": {}}
    facts |= {"scheduler": {"schedule": "constant"}, "data": {}}
    checkpoints = Checkpoints(
        folder,
        world=World(),
        fragments=fragments,  # type: ignore[arg-type]
        ema=ema,
        facts=facts,
        plan=Plan(Retention(keep_last, keep_every), every_seconds),
        tracker_run_id=lambda: "run-7",
    )
    return checkpoints, ema


def state_after(step: int) -> RunState:
    """Return the state of a run after `step` steps of 8 samples."""
    return RunState(step=step, samples=8 * step, interval=[0.1 * step, float(step)])
