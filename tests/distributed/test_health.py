"""Stop, budgets, spikes, the way back and replicas over two gloo processes, with real signals and planted faults."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking import read_records
from pipeline.training.health.heartbeat import read_heartbeats
from pipeline.training.saving.checkpoint import newest_checkpoint
from pipeline.training.saving.manifest import committed, read_manifest
from tests.distributed.cases import make_config, paths_of
from tests.distributed.cases_health import events
from tests.distributed.dataset import build_dataset
from tests.distributed.starter import start

pytestmark = pytest.mark.distributed

BATCH = 8
STEPS = 30
# Bad in steps 23 and 24, found at the record of step 24 (NaN: in it), and 20 is the way back, within an open record.
LONG = {"train": {"steps": STEPS, "log_every": 6, "checkpoint_every": 4, "keep_last": 9}}
BAD = list(range(22 * BATCH, 24 * BATCH))
BACK = {"rollback": True, "confirmed_spikes": 2, "rollback_margin_steps": 1, "max_skipped_in_a_row": 2}
LEFT_OUT = [21 * BATCH, 24 * BATCH]
NAN = float("nan")


def orders() -> dict[str, tuple[str, dict[str, Any]]]:
    rare = {"steps": 8, "checkpoint_every": 100}
    window = {"skipped_window": 6, "max_skipped_percent": 34.0}
    every = {"replica_check_every": 1}
    rolled = {"bad": BAD, "health": BACK, **LONG}
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "term": ("run_signalled", {"at": {"2": ["SIGTERM"]}, "again": "SIGTERM", "train": rare}),
        "usr2": ("run_signalled", {"at": {"2": ["SIGUSR2", "SIGTERM", "SIGUSR2"]}, "train": rare}),
        "int": ("run_signalled", {"at": {"2": ["SIGINT"]}, "train": rare}),
        "usr1": ("run_signalled", {"at": {"2": ["SIGUSR1"]}, "train": rare}),
        "window": ("run_with_bad_data", {"bad": [8, 24, 40], "factor": NAN, "health": window}),
        "spike": ("run_with_bad_data", {"bad": BAD[:BATCH], "train": LONG["train"] | {"steps": 24}}),
        "rolled": ("run_with_bad_data", rolled),
        "rolled-cut-begun": ("run_killed_on_bad_data", {**rolled, "at_samples": 26 * BATCH}),
        "rolled-cut": ("run_with_bad_data", {**rolled, "attempt": "a2"}),
        "nan-rolled": ("run_with_bad_data", {**rolled, "factor": NAN}),
        "no-way": ("run_with_bad_data", {**rolled, "factor": NAN, "bad": list(range(BAD[0], 999))}),
        "flip-stage0": ("run_with_flipped_weight", {"engine": {"zero_stage": 0}, "health": every}),
        "flip-stage1": ("run_with_flipped_weight", {"engine": {"zero_stage": 1}, "health": every}),
        "flip-stage2": (
            "run_with_flipped_weight",
            {"engine": {"zero_stage": 2, "precision": "bf16"}, "health": every},
        ),
        "flip-back": ("run_with_flipped_weight", {"health": every | {"rollback": True}}),
        "whole": ("run", {"health": every}),
        "sharded": ("run", {"engine": {"zero_stage": 3}, "health": every}),
    }
    flip = {"at_step": 4, "rank": 1}
    return {
        case: (
            function,
            arguments
            | {"name": case.removesuffix("-begun")}
            | (flip if function == "run_with_flipped_weight" else {}),
        )
        for case, (function, arguments) in found.items()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("health")
    build_dataset(root / "latents", 30)
    return root


@pytest.fixture(scope="module")
def answers(root: Path) -> Iterator[dict[str, list[Any]]]:
    """What each case returned, by rank: all in one start of two processes."""
    yield start("tests.distributed.cases_health", root, 2, orders())


def stream(root: Path, name: str) -> list[tuple[Any, ...]]:
    records = read_records(paths_of(root, name).metrics, "train")
    return [tuple(record[key] for key in ("step", "samples", "loss", "grad_norm")) for record in records]


def files(root: Path, name: str) -> Any:
    return read_manifest(newest_checkpoint(paths_of(root, name).checkpoints))["files"]


@pytest.mark.covers("F6", "F7", "F10")
@pytest.mark.parametrize("name", ["term", "usr2", "int"])
def test_signals_at_one_rank_are_one_agreed_stop_and_one_save(
    answers: dict[str, list[Any]], root: Path, name: str
) -> None:
    """Also when they come again, together, or while rank 1 writes its file."""
    for answer in answers[name]:
        assert (answer["stopped"], answer["reason"], answer["saves"]) == (True, "signal", 1)
        assert answer["step"] == answers[name][0]["step"] < 8
    saved = committed(paths_of(root, name).checkpoints)
    assert [path.name for path in saved] == [f"step-{answers[name][0]['step']:08d}"]
    assert newest_checkpoint(paths_of(root, name).checkpoints) == saved[0]


@pytest.mark.covers("F12")
def test_usr1_adds_the_stacks_to_the_log_and_changes_nothing(
    answers: dict[str, list[Any]], root: Path
) -> None:
    assert [answer["step"] for answer in answers["usr1"]] == [8, 8]
    paths = paths_of(root, "usr1")
    assert "in accumulate" in paths.stacks(1).read_text()
    assert not paths.stacks(0).exists()


def test_every_rank_leaves_its_last_sign_of_life(answers: dict[str, list[Any]], root: Path) -> None:
    beats = read_heartbeats(paths_of(root, "whole"))
    assert [(beat.rank, beat.step, beat.phase) for beat in beats] == [(0, 6, "stop"), (1, 6, "stop")]
    assert beats[0].pid != beats[1].pid


def test_too_many_skips_in_a_window_end_the_run_with_a_bundle(
    answers: dict[str, list[Any]], root: Path
) -> None:
    """Steps 2, 4 and 6 are skipped, never two in a row, where two of six are allowed."""
    for answer in answers["window"]:
        assert (answer["error"], answer["code"]) == ("DivergedError", 5)
        assert (
            "step 6: gradients not finite" in answer["said"] and "3 of at most 2 in 6 steps" in answer["said"]
        )
    folder = paths_of(root, "window").diagnosis / "step-00000006"
    assert str(folder) in answers["window"][0]["said"]
    report = json.loads((folder / "report.json").read_text())
    assert [len(part) for part in report["losses"]] == [4, 4]
    assert [value == "nan" for part in report["losses"] for value in part].count(True) == 1
    assert len(report["keys"]) == 1 and report["keys"][0] in answers["window"][0]["said"]
    assert report["norms"]["conv_in.weight"]["master"] > 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "records.jsonl",
        "report.json",
        "stacks-rank-00000.txt",
        "stacks-rank-00001.txt",
        "versions.json",
    ]
    assert "in write_diagnosis" in (folder / "stacks-rank-00001.txt").read_text()
    kept = events(root, "window")
    assert [(event["kind"], event["step"], len(event["keys"])) for event in kept] == [
        ("skip", step, 1) for step in (2, 4, 6)
    ]


def test_a_spike_is_logged_with_all_its_keys_and_the_run_goes_on(
    answers: dict[str, list[Any]], root: Path
) -> None:
    first, second = answers["spike"]
    assert first["step"] == second["step"] == 24
    assert any("step 23: loss" in line and "robust standard deviations" in line for line in first["said"])
    kept = [event for event in events(root, "spike") if event["kind"] == "spike"]
    assert {event["step"] for event in kept} == {23}
    assert all(len(event["keys"]) == BATCH for event in kept)
    records = {record["step"]: record for record in read_records(paths_of(root, "spike").metrics, "train")}
    assert records[24]["spikes"] == len(kept) and records[18]["spikes"] == 0


@pytest.mark.parametrize("name", ["rolled", "nan-rolled"])
def test_the_way_back_leaves_out_the_recorded_range_and_nothing_else(
    answers: dict[str, list[Any]], root: Path, name: str
) -> None:
    """Twice a spike, or twice NaN: one step before them is left out too, as the margin says."""
    trained = sorted(position for answer in answers[name] for position in answer["trained"])
    in_vain = range(20 * BATCH, 24 * BATCH)
    kept = [*range(21 * BATCH), *range(24 * BATCH, (STEPS + 3) * BATCH)]
    assert trained == sorted([*in_vain, *kept])
    manifest = read_manifest(newest_checkpoint(paths_of(root, name).checkpoints))
    assert manifest["skipped_ranges"] == [LEFT_OUT]
    assert (manifest["step"], manifest["samples"]) == (STEPS, (STEPS + 3) * BATCH)
    assert (manifest["skipped"], manifest["health"]["rollbacks"]) == (0, 1)
    said = next(line for line in answers[name][0]["said"] if "left out" in line)
    assert "back from step 24 to 20, positions [168, 192) are left out" in said
    (event,) = [event for event in events(root, name) if event["kind"] == "rollback"]
    assert event["left_out"] == [LEFT_OUT]
    assert [record[0] for record in stream(root, name)] == [6, 12, 18, 24, 30]


def test_the_way_back_is_a_function_of_config_and_data(answers: dict[str, list[Any]], root: Path) -> None:
    """The same bits when it is killed after going back, before a checkpoint has it on record, and goes back again."""
    assert answers["rolled-cut-begun"] == ["killed", "killed"]
    assert [answer["step"] for answer in answers["rolled-cut"]] == [STEPS, STEPS]
    assert files(root, "rolled-cut") == files(root, "rolled")
    assert stream(root, "rolled-cut") == stream(root, "rolled")
    manifest = read_manifest(newest_checkpoint(paths_of(root, "rolled-cut").checkpoints))
    assert manifest["skipped_ranges"] == [LEFT_OUT]


def test_ways_back_are_bounded_and_then_the_run_ends(answers: dict[str, list[Any]], root: Path) -> None:
    for answer in answers["no-way"]:
        assert (answer["error"], answer["code"]) == ("DivergedError", 5)
    rollbacks = [event for event in events(root, "no-way") if event["kind"] == "rollback"]
    assert len(rollbacks) == 2
    report = next(paths_of(root, "no-way").diagnosis.iterdir()) / "report.json"
    assert json.loads(report.read_text())["rollbacks"] == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "flip-stage0",
            "the weights of one of the ranks, which cannot be told, differs from the other ranks",
        ),
        ("flip-stage1", "the weights of rank 1 differs from the masters"),
        ("flip-stage2", "the weights of rank 1 differs from the masters"),
    ],
)
def test_one_flipped_bit_in_the_weights_of_one_rank_is_found_in_that_step(
    answers: dict[str, list[Any]], name: str, said: str
) -> None:
    for answer in answers[name]:
        assert (answer["error"], answer["code"]) == ("DivergedError", 5)
        assert f"step 4: {said} in 1 tensors (conv_in.weight)" in answer["said"]


def test_after_a_flipped_bit_the_way_back_leaves_no_data_out(
    answers: dict[str, list[Any]], root: Path
) -> None:
    assert [answer["step"] for answer in answers["flip-back"]] == [6, 6]
    manifest = read_manifest(newest_checkpoint(paths_of(root, "flip-back").checkpoints))
    assert manifest["skipped_ranges"] == [] and manifest["health"]["rollbacks"] == 1
    assert files(root, "flip-back") == files(root, "whole")


def test_equal_replicas_and_sharded_ones_are_no_trouble(answers: dict[str, list[Any]]) -> None:
    for name in ("whole", "sharded"):
        assert [answer["step"] for answer in answers[name]] == [6, 6]


def test_defaults_leave_a_young_run_alone(root: Path) -> None:
    config = make_config(root, "plain").health
    assert (config.max_skipped_in_a_row, config.max_skipped_percent, config.skipped_window) == (5, 1.0, 1000)
    assert not config.rollback
