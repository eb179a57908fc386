"""Averages over gloo processes at ZeRO 0 to 3: against gathered masters, swapped in and out, looked at while training."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models.unet import UNet
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from pipeline.training.averages.ema import profiles_of
from pipeline.training.averages.snapshots import usable_snapshots
from pipeline.training.saving.checkpoint import committed, load_weights, read_manifest
from pipeline.training.saving.fragment_file import read_whole
from tests.builders import tiny_run
from tests.distributed.cases_ema import ALL_PARTITIONED, LOOKING, MODEL, STEPS, make_config
from tests.distributed.starter import Orders, start

pytestmark = pytest.mark.distributed

BF16 = {"engine": {"precision": "bf16"}}
PARTITIONED = {"engine": {"deepspeed": ALL_PARTITIONED}}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0-fp32": (0, {}),
    "zero1-bf16": (1, BF16),
    "zero2-autocast": (2, {"engine": {"precision": "autocast_bf16"}}),
    "zero3-fp32": (3, PARTITIONED),
}
PLACES: dict[tuple[int, int], dict[str, Any]] = {
    (1, 0): {},
    (1, 1): BF16,
    (1, 3): {},
    (2, 0): {},
    (2, 1): {},
    (2, 2): BF16,
    (2, 3): BF16,
    (3, 0): {},
    (3, 1): BF16,
    (3, 2): {},
    (3, 3): PARTITIONED,
}
"""(world size, ZeRO stage) at which one checkpoint is looked at; with what beside fp32."""
KINDS = ["ema", "ema-0.5", "ema-posthoc-0.05", "ema-posthoc-0.1"]
SCALARS_BYTES = 256


@dataclass(frozen=True)
class Results:
    """The folder of all runs and what each case returned, by rank."""

    root: Path
    by_case: dict[str, list[Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    root = tmp_path_factory.mktemp("averages")
    tiny_run(root, model=MODEL)
    by_case: dict[str, list[Any]] = {}
    for world_size, orders in [(2, pair()), (1, elsewhere(1)), (3, elsewhere(3))]:
        by_case |= start("tests.distributed.cases_ema", root, world_size, orders)
    yield Results(root, by_case)


def pair() -> Orders:
    """Two processes: every run with and without looking, what `elsewhere` does, and changed settings."""
    orders: Orders = {}
    for name, (stage, sections) in RUNS.items():
        orders[name] = ("run", {"name": name, "stage": stage, **sections, **LOOKING})
        orders[f"{name}-blind"] = ("run", {"name": f"{name}-blind", "stage": stage, **sections})
    orders |= elsewhere(2)
    going = {"name": "zero0-fp32-blind", "stage": 0}
    orders["goes-on"] = ("run", {**going, "attempt": "a2", "train": {"steps": STEPS + 2}})
    without = {"attempt": "a3", "ema": {"posthoc": None}, "train": {"steps": STEPS + 3}}
    orders["without"] = ("run", {**going, **without})
    orders["late"] = ("run", {**going, "attempt": "a4", "train": {"steps": STEPS + 4}})
    return orders


def elsewhere(world_size: int) -> Orders:
    """What is found in one checkpoint, of two ranks at stage 3, at this world size and several stages."""
    orders: Orders = {}
    for (size, stage), sections in PLACES.items():
        if size == world_size:
            place = f"look-{size}-{stage}"
            orders[place] = ("look", {"name": place, "origin": "zero3-fp32", "stage": stage, **sections})
    return orders


def looked(results: Results, place: tuple[int, int]) -> list[Any]:
    return results.by_case[f"look-{place[0]}-{place[1]}"]


def paths_of(results: Results, name: str) -> RunPaths:
    return RunPaths(results.root / name)


@pytest.mark.parametrize("name", RUNS)
def test_every_average_is_that_of_the_gathered_masters(results: Results, name: str) -> None:
    """Difference 0, for the main average, a further one and both power functions, at every step."""
    stage, sections = RUNS[name]
    config = make_config(results.root, name, stage, **sections)
    profiles = profiles_of(config.ema)
    assert list(profiles) == KINDS
    torch.manual_seed(config.seed)
    start = UNet(config.model).state_dict()
    averages = {kind: {key: value.clone() for key, value in start.items()} for kind in profiles}
    checkpoints = committed(paths_of(results, name).checkpoints)
    assert len(checkpoints) == STEPS
    for updates, checkpoint in enumerate(checkpoints, start=1):
        masters = load_weights(checkpoint, "raw", verified=True)
        for kind, profile in profiles.items():
            saved = load_weights(checkpoint, kind, verified=True)
            for key, average in averages[kind].items():
                average.lerp_(masters[key], 1.0 - profile.kept(updates, 1))
                assert torch.equal(saved[key], average), (checkpoint, kind, key)
            # A power function keeps next to nothing of the first steps.
            assert updates < STEPS or not torch.equal(saved["conv_in.weight"], masters["conv_in.weight"])


@pytest.mark.parametrize("name", RUNS)
def test_looking_leaves_the_training_as_it_was_bit_for_bit(results: Results, name: str) -> None:
    """Masters, moments, all averages and every record, dropout on, losses and pictures taken at two of four steps."""
    looking, blind = (paths_of(results, f"{name}{end}") for end in ("", "-blind"))
    for number in range(1, STEPS + 1):
        step = f"step-{number:08d}"
        files = [read_manifest(paths.checkpoints / step)["files"] for paths in (looking, blind)]
        assert files[0] == files[1]
    records = [
        [record["loss"] for record in read_records(paths.metrics, "train") if "loss" in record][:STEPS]
        for paths in (looking, blind)
    ]
    assert records[0] == records[1] and len(records[0]) == STEPS
    assert [path.name for path in sorted(looking.samples.glob("*.png"))] == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    values = [record for record in read_records(looking.metrics, "train") if "val_loss_ema" in record]
    assert [record["step"] for record in values] == [2, 4]
    assert {"val_loss_raw", "val_loss_raw/t0250", "val_loss_ema/t0750"} <= values[0].keys()
    assert values[1]["val_loss_raw"] != values[1]["val_loss_ema"]


@pytest.mark.parametrize("place", PLACES)
def test_the_average_is_in_the_weights_and_all_is_restored(results: Results, place: tuple[int, int]) -> None:
    for rank in looked(results, place):
        assert rank["swapped"]["weights_are_the_average"] and rank["unmoved"], rank


def test_no_rank_has_a_full_fp32_copy_during_a_swap(results: Results) -> None:
    """At stage 3 with every weight cut up, in and out take one fragment at a time, not the model."""
    for rank in looked(results, (3, 3)):
        took = rank["swapped"]
        one_fragment = took["largest_fragment_bytes"] + SCALARS_BYTES
        assert 0 < took["peak_bytes"] <= one_fragment < took["full_bytes"] / 10, took


@pytest.mark.parametrize("place", PLACES)
def test_losses_and_pictures_are_the_same_bits_everywhere(results: Results, place: tuple[int, int]) -> None:
    """5 validation samples in batches of 2 and 5 prompts in pieces of 4: uneven at every world size above 1.

    In bf16 to rounding: equal weights that lie elsewhere in memory go through other kernels.
    """
    (alone,) = looked(results, (1, 1) if PLACES[place] is BF16 else (1, 0))
    found = looked(results, place)
    assert len(found) == place[0] and len({rank["calls"] for rank in found}) == 1 and found[0]["calls"] > 0
    assert len(alone["losses"]) == 6 and found[0]["pictures"] == 5
    if PLACES[place] is BF16:
        assert found[0]["losses"] == pytest.approx(alone["losses"], rel=2e-3)
    else:
        assert found[0]["losses"] == alone["losses"] and found[0]["grid"] == alone["grid"]


@pytest.mark.covers("F31", "F32")
@pytest.mark.parametrize("place", PLACES)
def test_every_average_survives_resharding(results: Results, place: tuple[int, int]) -> None:
    """From two ranks at stage 3 to anywhere, bit for bit."""
    assert all(rank["arrived"] == dict.fromkeys(KINDS, True) for rank in looked(results, place))


@pytest.mark.parametrize("place", PLACES)
def test_an_accident_under_the_average_is_no_deadlock(results: Results, place: tuple[int, int]) -> None:
    assert all(rank["accident"] == ["an accident", True] for rank in looked(results, place))


@pytest.mark.parametrize("name", RUNS)
def test_snapshots_are_the_averages_of_their_step(results: Results, name: str) -> None:
    paths = paths_of(results, name)
    snapshots = usable_snapshots(paths.averages, STEPS)
    assert [manifest["step"] for _, manifest in snapshots] == [2, 4]
    for folder, manifest in snapshots:
        files = [folder / file for file in sorted(manifest["files"])]
        assert len(files) == 2 and manifest["averaged"] == manifest["step"]
        for kind in manifest["kinds"]:
            there = read_whole(files, kind, manifest["parameters"])
            saved = load_weights(paths.checkpoints / folder.name, kind, verified=True)
            assert there.keys() == saved.keys() and all(torch.equal(there[key], saved[key]) for key in saved)


def test_a_resumed_run_adds_snapshots_and_doubles_none(results: Results) -> None:
    assert results.by_case["goes-on"] == [STEPS + 2] * 2
    steps = [path.name for path in committed(paths_of(results, "zero0-fp32-blind").averages)]
    assert steps == ["step-00000002", "step-00000004", "step-00000006"]  # None since, without ema.posthoc.


@pytest.mark.covers("F38")
def test_a_power_function_average_cannot_begin_late(results: Results) -> None:
    """Dropped from the config it is no longer saved; asked for again it is refused, for it would be wrong."""
    assert results.by_case["without"] == [STEPS + 3] * 2
    for rank in results.by_case["late"]:
        assert (
            rank["error"] == "ConfigError" and "ema-posthoc-0.05, ema-posthoc-0.1 would begin" in rank["said"]
        )
