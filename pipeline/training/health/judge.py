"""Bad steps: skip them, name their samples, and end or turn the run before the time is lost.

DeepSpeed skips steps whose gradients are not finite for ever and says nothing of the data. Here a few in a row, or
too many among the last ones, end the run with exit code 5 or send it back. Losses and gradient norms stay on the
device as scalars; they are summed over ranks and judged when a record is written (and before a checkpoint, whose
manifest holds the window), never in between: no step waits for them.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.config import HealthConfig
from pipeline.data.loader import LatentBatch
from pipeline.training.world import World

NAMED_SAMPLES = 16
LEAST_VALUES = 20
"""Values a window needs before it can say what is usual."""
MAD_TO_DEVIATION = 1.4826
"""The standard deviation of a normal variable over the median of its absolute deviations."""
LEAST_DEVIATION = 0.02
"""Of the median: a window that hardly moves must not make a spike of every ripple."""


@dataclass(frozen=True)
class Trouble:
    """Why a run cannot just go on, the same on all ranks."""

    line: str
    first_step: int | None
    """The step (counted from 1) with which it began; None if the data have no part in it."""
    first_position: int | None = None
    """Position of the run at which that step's samples begin."""


@dataclass(frozen=True)
class Spike:
    """A step far above what was usual."""

    step: int
    position: int
    kind: str
    value: float
    median: float
    deviations: float

    def __str__(self) -> str:
        """Return the words for a person."""
        return (
            f"step {self.step}: {self.kind} {self.value:.4g} is {self.deviations:.1f} robust standard deviations "
            f"above the median {self.median:.4g} of the steps before"
        )


@dataclass(frozen=True)
class _Seen:
    """One applied step that is not judged yet: this rank's sum of losses and the global norm, on the device."""

    step: int
    position: int
    loss: Tensor
    grad_norm: Tensor


class Health:
    """What the last steps were like; equal on all ranks but for the scalars that are not judged yet."""

    def __init__(self, config: HealthConfig, world: World, global_batch: int) -> None:
        """Begin with nothing seen."""
        self._config, self._world, self._global_batch = config, world, global_batch
        self._seen: list[_Seen] = []
        self._usual: dict[str, list[float]] = {"loss": [], "gradient norm": []}
        self._skipped_steps: list[int] = []
        self._in_a_row: list[int] = []
        """[first step, its position, steps] of the loss spikes that go on."""
        self.rollbacks = 0
        """Ways back so far."""
        self.trouble: Trouble | None = None
        """What was found by a step itself, to be treated at once."""
        self.confirmed: Trouble | None = None
        """Spikes that go on, to be treated at the next record: so that it does not matter when they were judged."""

    def applied(self, step: int, position: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Take note of an applied step: `loss` is this rank's sum over samples; waits for nothing."""
        self._seen.append(_Seen(step, position, loss.detach(), grad_norm.detach().clone()))

    def skipped(self, step: int, position: int, in_a_row: int, samples: str) -> str:
        """Take note of the skipped step `step`, the `in_a_row`-th in a row, and return the line that says so.

        Sets `trouble` when the budget is used up.
        """
        config = self._config
        window = [earlier for earlier in self._skipped_steps if earlier > step - config.skipped_window]
        self._skipped_steps = [*window, step]
        allowed = int(config.skipped_window * config.max_skipped_percent / 100)
        line = (
            f"step {step}: gradients not finite, step skipped ({in_a_row} of at most {config.max_skipped_in_a_row} "
            f"in a row, {len(self._skipped_steps)} of at most {allowed} in {config.skipped_window} steps); "
            f"samples {samples} of the train split"
        )
        if in_a_row >= config.max_skipped_in_a_row or len(self._skipped_steps) > allowed:
            self.trouble = Trouble(line, step - in_a_row + 1, position - (in_a_row - 1) * self._global_batch)
        return line

    def judge(self) -> list[Spike]:
        """Return the spikes among the steps since the last call, in order; waits for the device and the ranks.

        Sets `confirmed` when loss spikes go on for as many steps as confirm them. All ranks together.
        """
        seen, self._seen = self._seen, []
        if not seen:
            return []
        sums = self._world.sum(torch.stack([one.loss.double() for one in seen]).tolist())
        norms = torch.stack([one.grad_norm.double() for one in seen]).tolist()
        spikes: list[Spike] = []
        for one, loss_sum, norm in zip(seen, sums, norms, strict=True):
            found = [
                Spike(one.step, one.position, kind, value, median, deviations)
                for kind, value in (("loss", loss_sum / self._global_batch), ("gradient norm", norm))
                for median, deviations in self._against_usual(kind, value)
            ]
            self._confirm(one, found)
            spikes += found
        return spikes

    def _against_usual(self, kind: str, value: float) -> Iterator[tuple[float, float]]:
        """Yield (median, deviations) if the value is a spike, and add it to the window in any case.

        Median and MAD bear half of the window being spikes; a new level becomes usual after as long.
        """
        usual = self._usual[kind]
        if len(usual) >= LEAST_VALUES:
            median = statistics.median(usual)
            spread = MAD_TO_DEVIATION * statistics.median(abs(one - median) for one in usual)
            deviations = (value - median) / max(spread, LEAST_DEVIATION * abs(median), 1e-12)
            if not deviations <= self._config.spike_deviations:
                yield median, deviations
        if math.isfinite(value):
            usual.append(value)
        del usual[: -self._config.spike_window]

    def _confirm(self, one: _Seen, found: Sequence[Spike]) -> None:
        spikes = [spike for spike in found if spike.kind == "loss"]
        if not spikes:
            self._in_a_row = []
            return
        first_step, first_position, count = self._in_a_row or [one.step, one.position, 0]
        self._in_a_row = [first_step, first_position, count + 1]
        if count + 1 == self._config.confirmed_spikes and self._config.rollback:
            line = f"{spikes[0]}, {count + 1} such steps in a row"
            self.confirmed = Trouble(line, first_step, first_position)

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; call `judge` first."""
        assert not self._seen, len(self._seen)
        return {
            "usual": self._usual,
            "skipped_steps": self._skipped_steps,
            "in_a_row": self._in_a_row,
            "rollbacks": self.rollbacks,
            "confirmed": astuple(self.confirmed) if self.confirmed else [],
        }

    def load_json(self, saved: Mapping[str, Any]) -> None:
        """Take up what a checkpoint kept; an older one kept nothing."""
        self._seen, self.trouble = [], None
        self._usual = {kind: list(saved.get("usual", {}).get(kind, ())) for kind in self._usual}
        self._skipped_steps, self._in_a_row, confirmed = (
            list(saved.get(name, ())) for name in ("skipped_steps", "in_a_row", "confirmed")
        )
        self.rollbacks = saved.get("rollbacks", 0)
        self.confirmed = Trouble(*confirmed) if confirmed else None


def suspects(world: World, batches: Sequence[LatentBatch], losses: Sequence[Tensor]) -> list[int]:
    """Return the samples of the split whose loss was not finite, over all ranks; all samples of the step if none was.

    `losses` are float [b] for each micro-batch of this rank. Waits for the device and for the other ranks: only
    for a step that was skipped.
    """
    indices = torch.cat([batch.indices.cpu() for batch in batches])
    wrong = ~torch.isfinite(torch.cat([loss.detach().float().cpu() for loss in losses]))
    mine = [[int(index) for index in part] for part in (indices[wrong], indices)]
    parts = world.gather(mine)
    of_wrong = sorted({index for part in parts for index in part[0]})
    return of_wrong or sorted({index for part in parts for index in part[1]})


def name_some(keys: Sequence[str]) -> str:
    """Return at most 16 of the keys for a line of log, and how many more there are."""
    rest = f" and {len(keys) - NAMED_SAMPLES} more" if len(keys) > NAMED_SAMPLES else ""
    return ", ".join(keys[:NAMED_SAMPLES]) + rest
