"""The checks of the nodes before the first step: what is right passes in a moment, what is wrong is named."""

import dataclasses
import json
import shutil
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from launch import preflight as room
from launch.preflight import Finding, preflight
from launch.supervisor.exits import open_records, preflight_problems
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.paths import RunPaths
from pipeline.training.world import World
from tests.builders import TinyRun, tiny_run

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return tiny_run(tmp_path, optimizer={"warmup_steps": 1})


def test_a_healthy_node_passes_in_seconds(run: TinyRun) -> None:
    began = time.monotonic()
    said = preflight(run.config, run.paths, World(), "a1")
    assert time.monotonic() - began < 20
    assert said.startswith("preflight: 1 ranks in ")


def test_a_wrong_product_is_found(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of 176,400 is off by one."""
    right = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(left, other)
        if product.dtype == torch.float32:
            product[7, 9] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-07")
    records = open_records(run.paths, "a1")
    with pytest.raises(
        PipelineError, match="rank 0 on gpu-07: cpu: 1 of 176400 elements of a matrix product are wrong"
    ):
        preflight(run.config, run.paths, World(), "a1")
    assert preflight_problems(records) == {
        "gpu-07": "cpu: 1 of 176400 elements of a matrix product are wrong"
    }


def test_full_disks_and_small_shared_memory_are_named(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"/dev/shm": 2**20, str(run.paths.root): 2**20}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 0, free.get(str(folder), 2**39)))
    with pytest.raises(PipelineError) as caught:
        preflight(run.config, run.paths, World(), "a1")
    assert f"run folder {run.paths.root}: 1 MiB free, 256 are needed" in str(caught.value)
    assert "shared memory /dev/shm: 1 MiB free, 32 are needed" in str(caught.value)


def test_a_config_that_check_refuses_and_a_missing_data_set_stop_it_first(run: TinyRun) -> None:
    data = run.config.data.model_copy(update={"dataset": str(run.paths.root / "nowhere")})
    with pytest.raises((ConfigError, DataError), match="nowhere"):
        preflight(run.config.model_copy(update={"data": data}), run.paths, World(), "a1")


def test_the_node_with_another_clock_or_version_stands_out() -> None:
    usual = Finding("n", [], {"torch": "2.13.0"}, 1000.0, 10.0)
    others = [dataclasses.replace(usual, node=f"n{rank}") for rank in range(3)]
    late = dataclasses.replace(usual, node="n3", time=1090.0, versions={"torch": "2.12.0"})
    findings = [*others, late]
    assert [room._odd(found, findings) for found in others] == [[], [], []]
    assert room._odd(late, findings) == [
        "clock: +90 s off the others'",
        "torch 2.12.0, the others have 2.13.0",
    ]


def test_a_note_is_one_nodes_problems(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    folder = open_records(run, "7.0.0")
    (folder / "preflight-1.json").write_text(json.dumps({"node": "n1", "problems": ["a", "b"]}))
    (folder / "rank-1.json").write_text("{}")
    assert preflight_problems(folder) == {"n1": "a; b"}
