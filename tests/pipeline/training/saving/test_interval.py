"""Records of an interval: means over samples of applied steps, speed without saves, the same after a resume."""

import math

import pytest
import torch

from pipeline.training.saving.interval import Interval
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
