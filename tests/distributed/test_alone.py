"""One process at stage 0: gradients are not flattened, summed over one rank and copied back, and nothing changes by it."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases_alone import STEPS
from tests.distributed.starter import Orders, start

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    orders: Orders = {
        f"{precision}-{reduced}": ("train", {"reduced": reduced, "zero_stage": 0, "precision": precision})
        for precision in ("fp32", "autocast_bf16")
        for reduced in (False, True)
    }
    root: Path = tmp_path_factory.mktemp("alone")
    return {case: said[0] for case, said in start("tests.distributed.cases_alone", root, 1, orders).items()}


@pytest.mark.parametrize("precision", ["fp32", "autocast_bf16"])
def test_nothing_is_reduced_over_one_rank_and_every_bit_is_the_same(
    answers: dict[str, Any], precision: str
) -> None:
    ours, stock = answers[f"{precision}-False"], answers[f"{precision}-True"]
    assert ours["reductions"] == 0 and stock["reductions"] >= STEPS
    assert ours["losses"] == stock["losses"] and ours["losses"][0] != ours["losses"][-1]
    assert ours["weights"] == stock["weights"]
