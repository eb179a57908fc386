"""Every engine that the config allows against plain torch, two gloo processes for all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.distributed.cases_engine import (
    OPTIMIZER,
    STEPS,
    WATCHED_STEPS,
    Settings,
    matrix,
    plain_torch,
)
from tests.distributed.dataset import build_dataset
from tests.faults.ranks import run_ranks
from tests.requirements import require_tool

pytestmark = pytest.mark.distributed
WORLD_SIZE = 2
PLAIN = matrix()
# Shards in several pieces, and no weight that stays whole at stage 3.
PIECES = {"zero_optimization": {"sub_group_size": 100, "stage3_param_persistence_threshold": 0}}
MATRIX = PLAIN + [
    settings | {"deepspeed": PIECES}
    for settings in PLAIN
    if settings["zero_stage"] == 3 and settings["micro_batches"] == 2 and settings["activation_checkpointing"]
]
# As several GPUs do it: on CPUs `auto` is after the backward pass.
MATRIX += [
    settings | {"reduction": "during_backward"}
    for settings in PLAIN
    if settings["zero_stage"] == 1 and not settings["offload_optimizer"]
]
# Relative, of losses and of gradient norms. A bf16 sum in another order may round once to the other side, and
# Adam's first steps, of the full rate whatever the gradient, carry that on.
TOLERANCE = {"fp32": (1e-6, 2e-6), "bf16": (6e-4, 3e-3), "autocast_bf16": (6e-4, 3e-3)}
WATCHED = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
MEASURED = [
    (0, "fp32"),
    (1, "fp32"),
    (1, "bf16"),
    (1, "autocast_bf16"),
    (2, "bf16"),
    (3, "fp32"),
    (3, "bf16"),
]
SKIPPING: dict[str, Settings] = {
    f"zero{stage}-{precision}-{'offload' if offload else 'device'}": {
        "zero_stage": stage,
        "precision": precision,
        "offload_optimizer": offload,
        "micro_batches": 2,
    }
    for stage, precision, offload in [
        *((0, "fp32", False), (0, "autocast_bf16", False), (1, "fp32", False), (1, "bf16", False)),
        *((2, "fp32", True), (2, "bf16", False), (3, "fp32", False), (3, "bf16", True)),
    ]
}
# Elements that DeepSpeed's alignment may add to a shard: a few for each of two groups or, at stage 3, each weight.
PADDING = 16


def name_of(settings: Settings) -> str:
    flags = {"activation_checkpointing": "recompute", "offload_optimizer": "offload"}
    parts = [f"zero{settings['zero_stage']}", settings["precision"], f"x{settings['micro_batches']}"]
    parts += [short for name, short in flags.items() if settings[name]]
    parts += [
        short for name, short in {"deepspeed": "pieces", "reduction": "hooks"}.items() if name in settings
    ]
    return "-".join(parts)


@dataclass(frozen=True)
class Answers:
    """What each rank said: to the matrix by name, of its waits and bytes by stage and precision, and of the rest."""

    engines: dict[str, list[dict[str, Any]]]
    waits: dict[tuple[int, str], list[dict[str, Any]]]
    bytes: dict[tuple[int, str], list[dict[str, int]]]
    locked: list[list[str]]
    skips: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answers]:
    """Return the answers of two processes that meet once, where a killed build has left its locks."""
    root = tmp_path_factory.mktemp("engines")
    build_dataset(root / "latents", 30)
    extensions = root / "extensions"
    for name in ("deepspeed_shm_comm", "cpu_adam", "fused_adam"):
        (extensions / name).mkdir(parents=True)
        (extensions / name / "lock").touch()
    orders: list[Any] = [["start_beside_locks", {}], ["train_matrix", {"several": MATRIX}]]
    orders += [["count_waits", {"root": str(root), "stage": s, "precision": p}] for s, p in WATCHED]
    orders += [["skip_nan", {"settings": SKIPPING[name]}] for name in SKIPPING]
    orders += [["held_bytes", {"settings": {"zero_stage": s, "precision": p}}] for s, p in MEASURED]
    environment = {"LDM_QUIET": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
    found = run_ranks(
        "tests.distributed.cases_engine:run_cases", WORLD_SIZE, {"orders": orders}, 250, environment
    )
    locked, engines, *rest = zip(*found, strict=True)
    by_name = {
        name_of(settings): [rank[number] for rank in engines] for number, settings in enumerate(MATRIX)
    }
    waits, skips = rest[: len(WATCHED)], rest[len(WATCHED) : len(WATCHED) + len(SKIPPING)]
    held = rest[len(WATCHED) + len(SKIPPING) :]
    yield Answers(
        by_name,
        {key: list(answer) for key, answer in zip(WATCHED, waits, strict=True)},
        {key: list(answer) for key, answer in zip(MEASURED, held, strict=True)},
        list(locked),
        {name: list(answer) for name, answer in zip(SKIPPING, skips, strict=True)},
    )


@pytest.fixture(scope="module")
def oracles() -> dict[tuple[str, int], dict[str, list[float]]]:
    return {
        (precision, count): plain_torch(precision, count, WORLD_SIZE)
        for precision in TOLERANCE
        for count in (1, 2)
    }


def test_the_matrix_is_what_the_config_does_not_refuse() -> None:
    # Stage 0 without bf16 and offload; stages 1 to 3 without bf16 offloaded at stage 1.
    assert len(PLAIN) == 2 * 2 * 2 + 3 * 3 * 2 * 2 * 2 - 2 * 2


@pytest.mark.parametrize("settings", MATRIX, ids=name_of)
def test_losses_and_norms_are_those_of_plain_torch(
    answers: Answers, oracles: dict[Any, Any], settings: Settings
) -> None:
    """20 steps with dropout, clipping at some steps, warm-up and cosine, two groups of weights."""
    found = answers.engines[name_of(settings)]
    expected = oracles[settings["precision"], settings["micro_batches"]]
    assert found[0]["losses"] == found[1]["losses"] and found[0]["norms"] == found[1]["norms"]
    assert [rank["updates"] for rank in found] == [STEPS, STEPS]
    for kind, tolerance in zip(("losses", "norms"), TOLERANCE[settings["precision"]], strict=True):
        torch.testing.assert_close(
            torch.tensor(found[0][kind]), torch.tensor(expected[kind]), rtol=tolerance, atol=0.0
        )


def test_the_oracle_clips_some_steps_and_learns(oracles: dict[Any, Any]) -> None:
    for oracle in oracles.values():
        clipped = [norm > OPTIMIZER.clip_grad_norm for norm in oracle["norms"]]
        assert 3 <= sum(clipped) <= STEPS - 3
    assert (
        oracles["fp32", 1]["losses"] != oracles["fp32", 2]["losses"]
    )  # The masks of each micro-batch differ.


@pytest.mark.parametrize("settings", MATRIX, ids=name_of)
def test_masters_begin_as_the_fp32_weights_bit_for_bit(answers: Answers, settings: Settings) -> None:
    assert [rank["unlike"] for rank in answers.engines[name_of(settings)]] == [[], []]


@pytest.mark.parametrize("key", WATCHED, ids=str)
def test_no_wait_of_ours_in_a_step(answers: Answers, key: tuple[int, str]) -> None:
    """Of the whole loop of `train` between records; DeepSpeed's own waits are counted beside it."""
    read_of_the_last_flag = "pipeline/training/world.py:wait item"
    price_of_stage_0 = {"pipeline/training/engine.py:_replicated_step item": WATCHED_STEPS}
    for rank in answers.waits[key]:
        found = {call: count for call, count in rank["waits"].items() if not call.startswith("deepspeed/")}
        # On the CPU, of a flag sent a step before.
        assert found.pop(read_of_the_last_flag) == WATCHED_STEPS
        assert rank["ages"] == [1] * WATCHED_STEPS
        assert found == (price_of_stage_0 if key[0] == 0 else {})
        assert any(call.startswith("deepspeed/") for call in rank["waits"])  # The counters do count.


@pytest.mark.parametrize("key", MEASURED, ids=str)
def test_bytes_of_each_rank_are_the_formulas(answers: Answers, key: tuple[int, str]) -> None:
    """16 bytes a parameter in fp32 replicated; ZeRO's division (Rajbhandari et al. 2020, figure 1) and the EMA by ranks.

    At stage 1 in bf16 DeepSpeed accumulates in a whole fp32 buffer beside the bf16 gradients: 6 bytes where the
    paper has 2.
    """
    stage, precision = key
    low = 2 if precision == "bf16" else 4
    whole, shard = 1.0, 1.0 / WORLD_SIZE
    expected = {
        "weights": low * (shard if stage == 3 else whole),
        "gradients": {(0, 4): 4 * whole, (1, 2): 6 * whole}.get((stage, low), 4 * shard),
        "masters": 0.0 if stage == 0 else 4 * shard,
        "moments": 8 * (whole if stage == 0 else shard),
        "ema": 4 * shard,
    }
    largest = 4 * 360  # What is cut at a shard's end is held whole until the step.
    for rank in answers.bytes[key]:
        for part, bytes_each in expected.items():
            slack = 8 * PADDING + (largest if part == "gradients" and stage in (1, 2) else 0)
            assert 0 <= rank[part] - bytes_each * rank["total"] + 8 * PADDING <= slack + 8 * PADDING, part


@pytest.mark.parametrize("name", SKIPPING)
def test_a_nan_on_one_rank_skips_the_step_on_all(answers: Answers, name: str) -> None:
    """Masters, moments and Adam's count stay to the bit, and the next step is taken."""
    expected = {
        "applied": [False, True],
        "finite": [False, True],
        "same": True,
        "updates": [1, 2],
        "search": False,
    }
    assert answers.skips[name] == [expected, expected]


@pytest.mark.covers("F18")
def test_locks_of_a_killed_build_hold_nothing_up_and_are_named(answers: Answers) -> None:
    for said in answers.locked:
        assert len(said) == 3 and all("lock is" in line and "remove the file" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_compiled_network_learns_the_same(stage: int) -> None:
    """torch.compile through inductor, dropout left out: inductor draws its masks in another way."""
    require_tool("g++")
    orders = [["train_compiled", {"settings": {"zero_stage": stage, "precision": "fp32"}}]]
    ((found,),) = run_ranks("tests.distributed.cases_engine:run_cases", 1, {"orders": orders}, 250)
    assert found["compiled"] and len(found["losses"]["eager"]) == 3
    torch.testing.assert_close(
        torch.tensor(found["losses"]["compiled"]), torch.tensor(found["losses"]["eager"]), rtol=1e-5, atol=0.0
    )
