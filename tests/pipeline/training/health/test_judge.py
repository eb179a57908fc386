"""Skipped steps and spikes: the samples that did it, the budgets, and the window that survives a checkpoint."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import HealthConfig
from pipeline.training.health.judge import Health, name_some, suspects
from pipeline.training.world import World

BATCH = 4


def batch(*indices: int) -> Any:
    return SimpleNamespace(indices=torch.tensor(indices))


def health(**fields: Any) -> Health:
    return Health(HealthConfig(**fields), World(), BATCH)


def see(patient: Health, losses: list[float], norm: float = 1.0) -> None:
    """Let it see steps 1, 2, ... of one rank whose mean losses are given."""
    for step, loss in enumerate(losses, start=1):
        patient.applied(step, (step - 1) * BATCH, torch.tensor(loss * BATCH), torch.tensor(norm))


def test_the_samples_with_a_loss_that_is_not_finite_are_named() -> None:
    losses = [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 2.0])]
    assert suspects(World(), [batch(7, 5), batch(3, 9)], losses) == [3, 5]


def test_without_any_all_samples_of_the_step_are() -> None:
    """The loss was finite and the gradient was not: nobody knows which."""
    assert suspects(World(), [batch(7, 5), batch(3, 5)], [torch.ones(2), torch.ones(2)]) == [3, 5, 7]


def test_many_keys_are_shortened_for_a_line() -> None:
    assert name_some(["a", "b"]) == "a, b"
    assert name_some([str(number) for number in range(40)]).endswith("14, 15 and 24 more")


def test_a_skip_within_the_budget_is_no_trouble_and_the_last_in_a_row_is() -> None:
    patient = health(max_skipped_in_a_row=3)
    lines = [patient.skipped(step, step * BATCH - BATCH, step - 11, "k1, k2") for step in (12, 13)]
    assert patient.trouble is None
    assert lines[1] == (
        "step 13: gradients not finite, step skipped (2 of at most 3 in a row, 2 of at most 10 in 1000 steps); "
        "samples k1, k2 of the train split"
    )
    patient.skipped(14, 13 * BATCH, 3, "k3")
    assert patient.trouble is not None
    assert (patient.trouble.first_step, patient.trouble.first_position) == (12, 11 * BATCH)


def test_one_percent_of_the_last_thousand_steps() -> None:
    patient = health()
    for step in range(1, 1100, 110):  # ten, over more than a thousand steps
        patient.skipped(step, 0, 1, "k")
    assert patient.trouble is None
    patient.skipped(1001, 0, 1, "k")  # the first has left the window
    assert patient.trouble is None
    patient.skipped(1002, 0, 1, "k")
    assert patient.trouble is not None and "11 of at most 10 in 1000 steps" in patient.trouble.line


def test_a_spike_is_far_above_the_median_in_robust_deviations() -> None:
    patient = health(spike_deviations=10.0)
    usual = [1.0, 1.1, 0.9, 1.2, 0.8] * 5  # median 1.0, MAD 0.1: a deviation of 0.148
    see(patient, [*usual, 2.4, 2.6, 1.0])
    (spike,) = patient.judge()
    assert (spike.step, spike.position, spike.kind) == (27, 26 * BATCH, "loss")
    assert spike.value == pytest.approx(2.6) and spike.median == pytest.approx(1.0)
    assert spike.deviations == pytest.approx(1.6 / 0.14826, rel=0.05)
    assert "step 27: loss 2.6" in str(spike) and patient.confirmed is None


def test_nothing_is_judged_by_a_window_that_is_too_short_or_that_hardly_moves() -> None:
    patient = health()
    see(patient, [1.0] * 10 + [500.0] + [1.0] * 15 + [1.19])
    assert patient.judge() == []  # 19 % above a constant: 9.5 of the least deviations


def test_half_of_the_window_may_be_spikes() -> None:
    patient = health(spike_window=20)
    see(patient, [1.0] * 20 + [100.0] * 9)
    assert len(patient.judge()) == 9


def test_a_norm_can_be_a_spike_alone_and_confirms_nothing() -> None:
    patient = health(rollback=True, confirmed_spikes=1)
    see(patient, [1.0] * 25)
    see(patient, [1.0], norm=1e3)
    assert [spike.kind for spike in patient.judge()] == ["gradient norm"]
    assert patient.confirmed is None


@pytest.mark.parametrize(("rollback", "expected"), [(True, (26, 25 * BATCH)), (False, None)])
def test_spikes_in_a_row_are_confirmed_from_the_first_on(
    rollback: bool, expected: tuple[int, int] | None
) -> None:
    patient = health(rollback=rollback, confirmed_spikes=3)
    see(patient, [1.0] * 23 + [50.0, 1.0] + [50.0] * 3)
    patient.judge()
    found = patient.confirmed
    assert (found and (found.first_step, found.first_position)) == expected


def test_it_does_not_matter_when_steps_are_judged_nor_that_a_checkpoint_lies_between() -> None:
    losses = [1.0, 1.3, 0.7] * 10 + [60.0, 50.0, 40.0]
    whole = health(rollback=True, confirmed_spikes=3)
    see(whole, losses)
    expected = whole.judge()
    found, patient = [], health(rollback=True, confirmed_spikes=3)
    for step, loss in enumerate(losses, start=1):
        patient.applied(step, (step - 1) * BATCH, torch.tensor(loss * BATCH), torch.tensor(1.0))
        if step % 4 == 0:
            found += patient.judge()
            saved = json.loads(json.dumps(patient.to_json(), allow_nan=False))
            patient = health(rollback=True, confirmed_spikes=3)
            patient.load_json(saved)
    found += patient.judge()
    assert found == expected and len(found) == 3
    assert patient.confirmed == whole.confirmed and patient.confirmed is not None
    assert patient.to_json() == whole.to_json()


def test_a_value_that_is_not_finite_is_a_spike_and_stays_out_of_the_window() -> None:
    patient = health()
    see(patient, [1.0] * 25 + [float("inf"), float("nan")])
    assert [spike.step for spike in patient.judge()] == [26, 27]
    json.dumps(patient.to_json(), allow_nan=False)
