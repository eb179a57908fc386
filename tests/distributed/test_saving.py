"""Saving beside training and resuming anywhere: any world size and stage, slow writers, other eyes, two attempts at once."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.tracking import read_records
from pipeline.training.saving.checkpoint import newest_checkpoint
from pipeline.training.saving.manifest import committed, read_manifest
from tests.distributed.cases import paths_of
from tests.distributed.cases_saving import WIDE
from tests.distributed.dataset import build_dataset
from tests.distributed.starter import Orders, start
from tests.distributed.test_training import whole_state
from tests.faults.ranks import run_ranks

pytestmark = pytest.mark.distributed
ENV = {"LDM_QUIET": "1"}
TWO_STEPS = {"steps": 2, "checkpoint_every": 2}
STEP_2 = "step-00000002"
# (saved with, at stage, loaded with, at stage)
MOVES = [(2, 1, 3, 3), (2, 3, 3, 0), (2, 0, 3, 2), (3, 1, 2, 3), (3, 3, 2, 0), (3, 2, 2, 1), (3, 0, 2, 0)]


def start_cases(root: Path, world_size: int, orders: Orders) -> dict[str, list[Any]]:
    """Run the cases of saving with so many processes; return what each rank said of each."""
    return start("tests.distributed.cases_saving", root, world_size, orders)


def source_of(world_size: int, stage: int) -> str:
    return f"from-{world_size}-at-{stage}"


def target_of(move: tuple[int, int, int, int]) -> str:
    return "moved-" + "-".join(map(str, move))


def arrivals(saved_by: int) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        target_of(move): (
            "reshard",
            {"name": source_of(*move[:2]), "to": target_of(move), "engine": {"zero_stage": move[3]}},
        )
        for move in MOVES
        if move[0] == saved_by
    }


def departures(world_size: int) -> dict[str, tuple[str, dict[str, Any]]]:
    stages = sorted({move[1] for move in MOVES if move[0] == world_size})
    return {
        source_of(world_size, stage): (
            "run",
            {"name": source_of(world_size, stage), "engine": {"zero_stage": stage}, "train": TWO_STEPS},
        )
        for stage in stages
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    build_dataset(folder / "latents", 30)
    return folder


@pytest.fixture(scope="module")
def answers(root: Path) -> dict[str, list[Any]]:
    """Two processes, then three, then two again."""
    by_clock = {"checkpoint_every": 1000, "checkpoint_every_seconds": 1e-9, "keep_every": 4, "keep_last": 2}
    found = start_cases(
        root,
        2,
        departures(2)
        | {
            "straight": ("run", {"name": "straight"}),
            "exported": ("export_universal", {"name": source_of(2, 1)}),
            **{
                f"universal-{stage}": ("load_universal", {"name": source_of(2, 1), "stage": stage})
                for stage in (1, 3)
            },
            "wandering-begun": ("run", {"name": "wandering", "train": {"steps": 2}}),
            "by-clock": ("run_with_other_eyes", {"name": "by-clock", "train": by_clock}),
            "other-eyes-begun": ("run", {"name": "other-eyes", "train": {"steps": 3}}),
            "other-eyes": ("run_with_other_eyes", {"name": "other-eyes", "attempt": "a2"}),
        },
    )
    found |= start_cases(
        root,
        3,
        arrivals(2)
        | departures(3)
        | {"wandering-on": ("run", {"name": "wandering", "attempt": "a2", "train": {"steps": 4}})},
    )
    return found | start_cases(
        root, 2, arrivals(3) | {"wandering": ("run", {"name": "wandering", "attempt": "a3"})}
    )


@pytest.mark.covers("F31", "F32")
@pytest.mark.parametrize("move", MOVES, ids=lambda move: "{}@{}->{}@{}".format(*move))
def test_state_arrives_bit_for_bit_at_any_world_size_and_stage(
    root: Path, answers: dict[str, list[Any]], move: tuple[int, int, int, int]
) -> None:
    assert answers[target_of(move)] == [{"step": 2, "updates": 2}] * move[2]
    before = whole_state(paths_of(root, source_of(*move[:2])).checkpoints / STEP_2)
    after = whole_state(paths_of(root, target_of(move)).checkpoints / STEP_2)
    assert before.keys() == after.keys() and len(before) > 4 * 20
    assert all(torch.equal(before[key], after[key]) for key in before)
    manifest = read_manifest(paths_of(root, target_of(move)).checkpoints / STEP_2)
    assert len(manifest["files"]) == move[2] and manifest["zero_stage"] == move[3]


@pytest.mark.covers("F31")
def test_two_then_three_then_two_processes_lose_what_two_do(
    root: Path, answers: dict[str, list[Any]]
) -> None:
    """Steps 1-2 with two, 3-4 with three, 5-6 with two: the losses of two throughout, to 1e-6."""
    assert [answer["step"] for answer in answers["wandering"]] == [6, 6]
    records = [read_records(paths_of(root, name).metrics, "train") for name in ("wandering", "straight")]
    wandering, straight = ([record["loss"] for record in found] for found in records)
    assert len(wandering) == 6
    torch.testing.assert_close(torch.tensor(wandering), torch.tensor(straight), rtol=1e-6, atol=1e-6)


@pytest.mark.covers("F36")
def test_rank_0_alone_decides_where_a_resume_begins_and_when_a_save_is_due(
    root: Path, answers: dict[str, list[Any]]
) -> None:
    """Rank 1 sees no checkpoint at all and a clock of its own, and does what rank 0 says."""
    assert [answer["step"] for answer in answers["other-eyes"]] == [6, 6]
    lines = paths_of(root, "other-eyes").metrics.read_text().splitlines()
    assert {json.loads(line).get("resumed_step") for line in lines} == {None, 3}
    ends = [newest_checkpoint(paths_of(root, name).checkpoints) for name in ("other-eyes", "straight")]
    assert read_manifest(ends[0])["files"] == read_manifest(ends[1])["files"]


def test_a_save_is_due_by_the_clock_on_all_ranks_alike_and_some_are_kept_for_good(
    root: Path, answers: dict[str, list[Any]]
) -> None:
    assert [answer["step"] for answer in answers["by-clock"]] == [6, 6]
    steps = [int(path.name[5:]) for path in committed(paths_of(root, "by-clock").checkpoints)]
    assert steps[-1] == 6 and 2 <= len(steps) <= 3 and set(steps[:-2]) <= {4}


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_itself_loads_the_export(root: Path, answers: dict[str, list[Any]], stage: int) -> None:
    """Masters and moments bit for bit, Adam's count, the learning rate and the counters, into other weights."""
    assert answers["exported"] == ["deepspeed"] * 2
    for answer in answers[f"universal-{stage}"]:
        expected = {"wrong": [], "steps": [2.0], "rates": [2e-3 * 2 / 4], "global_steps": 2, "samples": 16}
        assert answer == expected
    files = [path for path in paths_of(root, source_of(2, 1)).deepspeed.rglob("*.pt")]
    assert len(files) > 4 * 20
    for path in files:
        torch.load(path, weights_only=True)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.covers("F29", "F30")
def test_steps_go_on_while_a_slow_writer_works_and_are_the_same_bits(tmp_path: Path) -> None:
    """More than 300 MB a rank at 50 MB/s: the steps after the save are done before it is, and as without it."""
    build_dataset(tmp_path / "latents", 30)
    never, once = {"checkpoint_every": 1000}, {"checkpoint_every": 2, "steps": 3}
    orders = {
        "without": ("run", {"name": "without", "model": WIDE, "train": never | {"steps": 3}}),
        "with": ("run_slowly_written", {"name": "with", "model": WIDE, "train": once}),
    }
    ended = start_cases(tmp_path, 2, orders)
    assert [answer["saves"] for answer in ended["with"]] == [2, 2]
    files = read_manifest(paths_of(tmp_path, "with").checkpoints / "step-00000002")["files"]
    assert len(files) == 2 and all(record["bytes"] > 300e6 for record in files.values())
    straight, beside = (
        read_manifest(paths_of(tmp_path, name).checkpoints / "step-00000003") for name in ("without", "with")
    )
    assert straight["files"] == beside["files"]
    records = read_records(paths_of(tmp_path, "with").metrics, "train")
    published = (paths_of(tmp_path, "with").checkpoints / "step-00000002").stat().st_ctime
    assert records[2]["step"] == 3 and records[2]["time"] < published
    losses = [record["loss"] for record in read_records(paths_of(tmp_path, "without").metrics, "train")]
    assert losses == [record["loss"] for record in records]


@pytest.mark.faults
@pytest.mark.covers("F35")
def test_of_two_attempts_alive_at_once_only_the_newer_publishes(tmp_path: Path) -> None:
    """The older one is stopped by SIGSTOP, the newer one goes on from its checkpoint, and then the older one wakes up."""
    build_dataset(tmp_path / "latents", 30)
    checkpoints = paths_of(tmp_path, "shared").checkpoints
    target = "tests.distributed.cases_saving:run_as"
    endless = {"steps": 100_000, "checkpoint_every": 2, "keep_last": 3}
    old = {"root": str(tmp_path), "name": "shared", "attempt": "old", "train": endless}
    with ThreadPoolExecutor(1) as pool:
        older = pool.submit(run_ranks, target, 1, old, 200, ENV)
        deadline = time.monotonic() + 120
        while not committed(checkpoints) and not older.done():
            assert time.monotonic() < deadline, "no checkpoint of the older attempt"
            time.sleep(0.02)
        pid = int((tmp_path / "old-pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        try:
            begun = int(newest_checkpoint(checkpoints).name[5:])
            ends = {**endless, "steps": begun + 6}
            (newer,) = run_ranks(target, 1, old | {"attempt": "new", "train": ends}, 200, ENV)
            published = [path.name for path in committed(checkpoints)]
        finally:
            os.kill(pid, signal.SIGCONT)
        (stale,) = older.result()
    assert newer["step"] == begun + 6 and published[-1] == f"step-{begun + 6:08d}"
    assert (stale["error"], stale["code"]) == ("CheckpointError", 4)
    assert "attempt new has taken over this run; this one, old, publishes nothing and ends" in stale["said"]
    assert [path.name for path in committed(checkpoints)] == published
    assert {read_manifest(checkpoints / name)["attempt"] for name in published[-2:]} == {"new"}
    assert [path.name for path in checkpoints.iterdir() if path.name.startswith(".")] == []
