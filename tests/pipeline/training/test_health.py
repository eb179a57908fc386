"""Skipped steps: the samples that did it, and the budget that ends a run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import DivergedError
from pipeline.training.health import refuse_divergence, suspects
from pipeline.training.world import World


def batch(*indices: int) -> Any:
    return SimpleNamespace(indices=torch.tensor(indices))


def test_the_samples_with_a_loss_that_is_not_finite_are_named() -> None:
    losses = [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 2.0])]
    assert suspects(World(), [batch(7, 5), batch(3, 9)], losses) == [3, 5]


def test_without_any_all_samples_of_the_step_are() -> None:
    """The loss was finite and the gradient was not: nobody knows which."""
    assert suspects(World(), [batch(7, 5), batch(3, 5)], [torch.ones(2), torch.ones(2)]) == [3, 5, 7]


def test_a_skip_within_the_budget_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    refuse_divergence(12, 2, 3, [4, 8])
    assert (
        "step 12: gradients not finite, step skipped (2 of at most 3 in a row); samples 4, 8 of"
        in caplog.text
    )


def test_the_last_of_the_budget_ends_the_run_with_exit_code_5() -> None:
    with pytest.raises(DivergedError, match=r"step 13: .*3 of at most 3") as raised:
        refuse_divergence(13, 3, 3, list(range(40)))
    assert raised.value.exit_code == 5 and "14, 15 and 24 more of the train split" in str(raised.value)
