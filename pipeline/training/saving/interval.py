"""What happened since the last record: losses stay on the device and are summed over ranks only when written."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.training.world import World


def due(step: int, every: int | None) -> bool:
    """Return whether what happens every `every` steps (None: never) happens after `step` finished steps."""
    return every is not None and step % every == 0


class Interval:
    """Sums since the last record. Steps that were skipped have no loss and count as time only."""

    def __init__(
        self,
        device: torch.device,
        *,
        loss_sum: float = 0.0,
        applied: float = 0.0,
        binned: Sequence[float] = (),
        timesteps: int = 1000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin now; `loss_sum`, `applied` and `binned` come from a checkpoint taken within an interval."""
        self._clock, self._timesteps = clock, timesteps
        self._binned = torch.tensor(binned, dtype=torch.float64, device=device) if binned else None
        self._loss_sum = torch.tensor(loss_sum, dtype=torch.float64, device=device)
        self._applied = int(applied)
        self._began_seconds = clock()
        self._waited_seconds = self._paused_seconds = 0.0
        self._samples = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for data."""
        began_seconds = self._clock()
        yield
        self._waited_seconds += self._clock() - began_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of the speed: a save is not a step."""
        began_seconds = self._clock()
        yield
        self._paused_seconds += self._clock() - began_seconds

    def add(self, loss: Tensor | None, samples: int, by_timestep_2K: Tensor | None = None) -> None:
        """Count one step over `samples` samples of all ranks; `loss` is this rank's sum, None for a skipped step.

        `by_timestep_2K` has the losses and the weights of this rank's samples in K equal stretches of the timesteps.
        """
        self._samples += samples
        if loss is None:
            return
        self._loss_sum += loss.double()
        self._applied += 1
        if by_timestep_2K is not None:
            flat = by_timestep_2K.flatten().double()
            self._binned = flat if self._binned is None else self._binned + flat

    def to_json(self) -> list[float]:
        """Return this rank's [sum of losses, applied steps, losses and weights by timestep] for a checkpoint.

        Waits for the device.
        """
        return [float(self._loss_sum.item()), float(self._applied), *self._bins()]

    def close(
        self, world: World, global_batch: int, parts: Mapping[str, float | None] | None = None
    ) -> dict[str, float]:
        """Return the record of the interval, the same on all ranks, and begin the next; waits for device and ranks.

        `loss` is the mean over samples of the applied steps, NaN without any; `data_wait_fraction` is the mean
        over ranks of the time spent waiting for data, and `NAME_fraction` that of the seconds of each of `parts`
        that is not None; `loss_by_timestep/tFFFF_LLLL` is the mean over the samples of timesteps FFFF to LLLL.
        """
        now_seconds = self._clock()
        elapsed_seconds = max(now_seconds - self._began_seconds - self._paused_seconds, 1e-9)
        seconds = {"data_wait": self._waited_seconds}
        seconds |= {name: part for name, part in (parts or {}).items() if part is not None}
        shares = [part / elapsed_seconds for part in seconds.values()]
        loss_sum, *sums = world.sum([float(self._loss_sum.item()), *shares, *self._bins()])
        record = {
            "loss": loss_sum / (self._applied * global_batch) if self._applied else float("nan"),
            "samples_per_second": self._samples / elapsed_seconds,
        }
        record |= {
            f"{name}_fraction": total / world.world_size
            for name, total in zip(seconds, sums[: len(seconds)], strict=True)
        }
        record |= binned_losses(sums[len(seconds) :], self._timesteps)
        self._loss_sum.zero_()
        self._binned = None if self._binned is None else torch.zeros_like(self._binned)
        self._applied = self._samples = 0
        self._began_seconds = now_seconds
        self._waited_seconds = self._paused_seconds = 0.0
        return record

    def _bins(self) -> list[float]:
        return [] if self._binned is None else self._binned.tolist()


def binned_losses(sums_2K: Sequence[float], timesteps: int) -> dict[str, float]:
    """Return the mean loss of each stretch of the timesteps that had a sample, by name; K sums, then K weights."""
    bins = len(sums_2K) // 2
    found = {}
    for number, (loss, weight) in enumerate(zip(sums_2K[:bins], sums_2K[bins:], strict=True)):
        first, stop = number * timesteps // bins, (number + 1) * timesteps // bins
        if weight > 0:
            found[f"loss_by_timestep/t{first:04d}_{stop - 1:04d}"] = loss / weight
    return found
