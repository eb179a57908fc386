"""Records of an interval: means over samples of applied steps, speed without saves, the same after a resume."""

import math

import pytest
import torch

from pipeline.training.saving.interval import Interval
from pipeline.training.step import by_timestep
from pipeline.training.world import World


class Clock:
    def __init__(self) -> None:
        self.now_seconds = 0.0

    def __call__(self) -> float:
        return self.now_seconds


def test_the_record_of_an_interval() -> None:
    clock = Clock()
    interval = Interval(torch.device("cpu"), clock=clock)
    interval.add(torch.tensor(8.0), 4)
    interval.add(None, 4)
    interval.add(torch.tensor(4.0), 4)
    with interval.waiting():
        clock.now_seconds += 1.0
    with interval.paused():
        clock.now_seconds += 50.0
    clock.now_seconds += 3.0
    record = interval.close(World(), 4)
    assert record == pytest.approx({"loss": 1.5, "samples_per_second": 3.0, "data_wait_fraction": 0.25})
    clock.now_seconds += 2.0
    interval.add(torch.tensor(2.0), 4)
    assert interval.close(World(), 4) == pytest.approx(
        {"loss": 0.5, "samples_per_second": 2.0, "data_wait_fraction": 0.0}
    )


def test_only_skipped_steps_have_no_loss() -> None:
    interval = Interval(torch.device("cpu"))
    interval.add(None, 4)
    assert math.isnan(interval.close(World(), 4)["loss"])


def test_a_resumed_interval_gives_the_same_bits() -> None:
    losses = torch.rand(7, generator=torch.Generator().manual_seed(3))
    whole, first = Interval(torch.device("cpu")), Interval(torch.device("cpu"))
    for loss in losses:
        whole.add(loss, 1)
    for loss in losses[:3]:
        first.add(loss, 1)
    loss_sum, applied = first.to_json()
    second = Interval(torch.device("cpu"), loss_sum=loss_sum, applied=applied)
    for loss in losses[3:]:
        second.add(loss, 1)
    assert second.close(World(), 1)["loss"] == whole.close(World(), 1)["loss"]


def test_losses_by_timestep_are_means_over_the_samples_of_each_stretch() -> None:
    """Against a loop in plain Python; a filler (weight 0) counts nowhere, and a resume within changes no bit."""
    draw = torch.Generator().manual_seed(5)
    batches = [(torch.rand(6, generator=draw), torch.randint(0, 700, (6,), generator=draw)) for _ in range(3)]
    weight_B = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    expected: dict[int, list[float]] = {}
    intervals = [Interval(torch.device("cpu")) for _ in range(2)]
    for number, (loss_B, timesteps_B) in enumerate(batches):
        for loss, timestep in zip(loss_B[:5].tolist(), timesteps_B[:5].tolist(), strict=True):
            expected.setdefault(timestep // 100, []).append(loss)
        if number == 2:
            loss_sum, applied, *binned = intervals[1].to_json()
            intervals[1] = Interval(torch.device("cpu"), loss_sum=loss_sum, applied=applied, binned=binned)
        for interval in intervals:
            interval.add(loss_B[:5].sum(), 6, by_timestep(loss_B, weight_B, timesteps_B, 1000))
    whole, resumed = (interval.close(World(), 6) for interval in intervals)
    means = {name: value for name, value in whole.items() if name.startswith("loss_by_timestep/")}
    assert means == pytest.approx(
        {
            f"loss_by_timestep/t{100 * k:04d}_{100 * k + 99:04d}": sum(values) / len(values)
            for k, values in expected.items()
        }
    )
    assert 1 < len(means) <= 7  # None of the stretches without a sample.
    assert means == {name: resumed[name] for name in means}
