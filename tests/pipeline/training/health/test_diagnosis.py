"""The bundle and the lines of a run that is ill: whole, strict JSON, and never in the way of the error they are about."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.paths import RunPaths
from pipeline.training.health.diagnosis import append_event, plain_json, stacks, weight_norms, write_diagnosis
from pipeline.training.world import World


def fragments() -> Any:
    halves = [
        SimpleNamespace(
            name="w", master=torch.full((2,), value), exp_avg=torch.zeros(2), exp_avg_sq=torch.ones(2)
        )
        for value in (3.0, 4.0)
    ]
    return SimpleNamespace(shapes={"w": (4,)}, owned=halves)


def test_norms_are_of_whole_parameters() -> None:
    (norms,) = weight_norms(fragments(), World()).values()
    assert norms == {"master": pytest.approx(50**0.5), "exp_avg": 0.0, "exp_avg_sq": 2.0}


def test_the_bundle_is_strict_json_with_the_last_records(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics.write_text("".join(f"{number}\n" for number in range(500)))
    paths.config.write_text("name: run\n")
    folder = write_diagnosis(paths, 7, World(), fragments(), {"said": "why", "losses": [1.0, float("nan")]})
    assert folder == tmp_path / "diagnosis" / "step-00000007"

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert (report["said"], report["step"], report["losses"]) == ("why", 7, [[1.0, "nan"]])
    assert (folder / "records.jsonl").read_text().split() == [str(number) for number in range(300, 500)]
    assert (folder / "config.yaml").read_text() == "name: run\n"
    assert "most recent call first" in (folder / "stacks-rank-00000.txt").read_text()


def test_what_cannot_be_written_is_said_and_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = RunPaths(tmp_path / "file")
    paths.root.write_text("in the way")
    folder = write_diagnosis(paths, 7, World(), fragments(), {"losses": []})
    append_event(paths, {"kind": "skip", "keys": ["k1"]})
    assert not folder.exists()
    assert f"{folder}: not written" in caplog.text
    assert 'lost: {"kind": "skip", "keys": ["k1"]}' in caplog.text


def test_events_are_lines(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for step in (1, 2):
        append_event(paths, {"step": step, "loss": float("inf")})
    lines = [json.loads(line) for line in paths.health.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": "inf"}, {"step": 2, "loss": "inf"}]


def test_plain_json_leaves_all_else_as_it_is() -> None:
    value = {"a": (1, 2.5, None, True), "b": [float("-inf"), {"c": "nan"}]}
    assert plain_json(value) == {"a": [1, 2.5, None, True], "b": ["-inf", {"c": "nan"}]}


def test_stacks_are_of_this_process() -> None:
    assert "test_stacks_are_of_this_process" in stacks()
