"""Interrupted is uninterrupted, bit for bit: ZeRO 1, 2, 3 in fp32 and bf16, three interruptions, all samples told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.tracking import read_records
from pipeline.training.saving.fragment_file import read_whole
from pipeline.training.saving.manifest import committed, read_manifest
from tests.distributed.cases import paths_of
from tests.distributed.dataset import build_dataset
from tests.distributed.starter import start

pytestmark = pytest.mark.distributed

STEPS = 8
MATRIX = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
RARE = {"steps": STEPS, "log_every": 3, "checkpoint_every": 2}
# A stop noted in step index 1 takes effect one step late; the accident in 5 goes back to 4; then a stop again.
INTERRUPTIONS: list[dict[str, int]] = [{"stop_in": 1}, {"accident_in": 5}, {"stop_in": 5}, {}]
LONG_STEPS, FIRST, SECOND = 20, 7, 14
WAYS = {"fp32": (1, 1e-6), "bf16": (2, 5e-4)}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
Orders = dict[str, tuple[str, dict[str, Any]]]


def name_of(stage: int, precision: str) -> str:
    return f"zero{stage}-{precision}"


def matrix() -> Orders:
    orders: Orders = {}
    for stage, precision in MATRIX:
        name = name_of(stage, precision)
        settings = {"engine": {"zero_stage": stage, "precision": precision}, "model": {"dropout": 0.1}}
        orders[f"{name}-straight"] = ("run_seen", {"name": f"{name}-straight", "train": RARE, **settings})
        for number, interruption in enumerate(INTERRUPTIONS):
            attempt = {"name": f"{name}-cut", "attempt": f"a{number}", "train": RARE}
            orders[f"{name}-cut-{number}"] = ("run_seen", {**attempt, **interruption, **settings})
    return orders


def way(precision: str, steps: int, name: str) -> dict[str, Any]:
    # The learning rate depends on the whole length: each part is ended by a stop, none is a shorter run.
    train = {"steps": LONG_STEPS, "log_every": 1, "checkpoint_every": 100}
    stage = WAYS[precision][0]
    engine = {"engine": {"zero_stage": stage, "precision": precision}}
    return {"name": name, "attempt": f"until-{steps}", "train": train, **engine}


def first_pair() -> Orders:
    orders = matrix()
    for precision in WAYS:
        orders[f"{precision}-straight"] = ("run", way(precision, LONG_STEPS, f"{precision}-straight"))
        begun = way(precision, FIRST, f"{precision}-way")
        orders[f"{precision}-way-1"] = ("run_seen", {**begun, "stop_in": FIRST - 2})
    return orders


def alone() -> Orders:
    orders: Orders = {}
    for precision in WAYS:
        there = way(precision, SECOND, f"{precision}-way")
        settings = {"engine": there["engine"], "train": there["train"]}
        moved = {"name": f"{precision}-way", "to": f"{precision}-at-1", **settings}
        orders[f"{precision}-at-1"] = ("reshard", moved)
        orders[f"{precision}-way-2"] = ("run_stopped_after", {**there, "steps": SECOND})
    return orders


def second_pair() -> Orders:
    orders: Orders = {}
    for precision in WAYS:
        there = way(precision, LONG_STEPS, f"{precision}-way")
        settings = {"engine": there["engine"], "train": there["train"]}
        moved = {"name": f"{precision}-way", "to": f"{precision}-at-2", **settings}
        orders[f"{precision}-at-2"] = ("reshard", moved)
        orders[f"{precision}-way-3"] = ("run", there)
    return orders


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    build_dataset(root / "latents", 30)
    return root


@pytest.fixture(scope="module")
def answers(root: Path) -> Iterator[dict[str, list[Any]]]:
    """What each case returned, by rank: three starts, of two processes, one, and two."""
    found: dict[str, list[Any]] = {}
    for world_size, orders in [(2, first_pair()), (1, alone()), (2, second_pair())]:
        found |= start("tests.distributed.cases_resume", root, world_size, orders)
    yield found


def records(root: Path, name: str) -> list[dict[str, Any]]:
    clocked = ("time", "attempt", "resumed_step", "samples_per_second")
    found = read_records(paths_of(root, name).metrics, "train")
    return [
        {
            key: value
            for key, value in record.items()
            if key not in clocked and not key.endswith(("_fraction", "_seconds"))
        }
        for record in found
    ]


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(checkpoint)
    files = [checkpoint / name for name in sorted(manifest["files"])]
    return {
        f"{kind}/{name}": tensor
        for kind in KINDS
        for name, tensor in read_whole(files, kind, manifest["parameters"]).items()
    }


@pytest.mark.covers("F3", "F6")
@pytest.mark.parametrize(("stage", "precision"), MATRIX)
def test_three_interruptions_leave_no_bit_changed(
    answers: dict[str, list[Any]], root: Path, stage: int, precision: str
) -> None:
    """Masters, moments and EMA by the files' digests; every record; and the samples of every step on each rank.

    A TERM at one rank inside an accumulation, an accident on both inside another, and a TERM again; with dropout.
    """
    name = name_of(stage, precision)
    cuts = [answers[f"{name}-cut-{number}"] for number in range(len(INTERRUPTIONS))]
    assert [[answer.get("step") for answer in cut] for cut in cuts] == [[3, 3], [None, None], [7, 7], [8, 8]]
    assert [cut[0].get("reason") for cut in cuts] == ["signal", None, "signal", ""]
    cut, straight = (paths_of(root, f"{name}-{kind}").checkpoints for kind in ("cut", "straight"))
    last = f"step-{STEPS:08d}"
    assert read_manifest(cut / last)["files"] == read_manifest(straight / last)["files"]
    assert records(root, f"{name}-cut") == records(root, f"{name}-straight")
    assert [record["step"] for record in records(root, f"{name}-cut")] == [3, 6, 8]
    for rank in (0, 1):
        seen: dict[str, Any] = {}
        for cut_answers in cuts:
            seen |= cut_answers[rank]["seen"]
        assert seen == answers[f"{name}-straight"][rank]["seen"]
        assert sorted(map(int, seen)) == list(range(STEPS))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_sample_once_an_epoch(answers: dict[str, list[Any]], precision: str) -> None:
    """64 samples of 30 over both ranks: two whole epochs and four of the third."""
    seen = [answers[f"zero1-{precision}-straight"][rank]["seen"] for rank in (0, 1)]
    flat = [
        index for step in range(STEPS) for rank in (0, 1) for part in seen[rank][str(step)] for index in part
    ]
    assert len(flat) == STEPS * 8
    counts = sorted(flat.count(index) for index in range(30))
    assert counts == [2] * 26 + [3] * 4


@pytest.mark.covers("F31")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_one_two_processes_lose_what_two_do(
    answers: dict[str, list[Any]], root: Path, precision: str
) -> None:
    """Stopped at step 7 and 14 of 20; the state arrives bit for bit at each new world size."""
    for number, step in enumerate((FIRST, SECOND, LONG_STEPS), start=1):
        assert {answer["step"] for answer in answers[f"{precision}-way-{number}"]} == {step}
    checkpoints = paths_of(root, f"{precision}-way").checkpoints
    for at, step in (("at-1", FIRST), ("at-2", SECOND)):
        before = state(checkpoints / f"step-{step:08d}")
        (arrived,) = committed(paths_of(root, f"{precision}-{at}").checkpoints)
        after = state(arrived)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    found, expected = (
        torch.tensor([record["loss"] for record in records(root, f"{precision}-{kind}")])
        for kind in ("way", "straight")
    )
    assert len(found) == LONG_STEPS
    tolerance = WAYS[precision][1]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
