"""metrics.jsonl: every record is in the file at once, exact, and counts once."""

import json
import math
import time
from pathlib import Path

import pytest

from pipeline.tracking import (
    NoRecords,
    open_records,
    read_records,
)
from tests.pipeline.tracking.builders import (
    local,
)


def test_a_record_is_one_json_line_with_exact_values(tmp_path: Path) -> None:
    paths, config = local(tmp_path)
    before = time.time()
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(10, {"loss": 0.1, "rate": 1e-4, "skipped": 2}, samples=40)
    record = json.loads(paths.metrics.read_text())
    assert before <= record.pop("time") <= time.time()
    assert record == {
        "kind": "train", "attempt": "a1", "step": 10, "samples": 40, "loss": 0.1, "rate": 1e-4, "skipped": 2
    }  # fmt: skip


def test_a_record_is_in_the_file_before_the_next_line_of_code(tmp_path: Path) -> None:
    paths, config = local(tmp_path)
    with open_records(paths, config, kind="train", attempt="a1") as records:
        for step in range(3):
            records.log(step, {"loss": 1.0})
            assert len(paths.metrics.read_text().splitlines()) == step + 1


def test_non_finite_values_are_null_and_named(tmp_path: Path) -> None:
    paths, config = local(tmp_path)
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": math.nan, "norm": math.inf, "rate": 0.5})
    (record,) = read_records(paths.metrics, "train")
    assert record["loss"] is None and record["norm"] is None and record["rate"] == 0.5
    assert record["nonfinite"] == ["loss", "norm"]


def test_a_later_attempt_replaces_the_steps_it_replays(tmp_path: Path) -> None:
    paths, config = local(tmp_path)
    for attempt, resumed_step, steps in (("a1", 0, range(1, 8)), ("a2", 5, range(6, 9))):
        with open_records(paths, config, kind="train", attempt=attempt, resumed_step=resumed_step) as records:
            for step in steps:
                records.log(step, {"loss": float(step)})
    with open_records(paths, config, kind="evaluate", attempt="a3") as records:
        records.log(8, {"loss": 99.0})
    found = [(record["step"], record["attempt"]) for record in read_records(paths.metrics, "train")]
    assert found == [(step, "a1") for step in range(1, 6)] + [(step, "a2") for step in range(6, 9)]


def test_what_a_stale_process_still_writes_is_left_out(tmp_path: Path) -> None:
    paths, config = local(tmp_path)
    stale = open_records(paths, config, kind="train", attempt="a1")
    stale.log(1, {"loss": 1.0})
    with open_records(paths, config, kind="train", attempt="a2", resumed_step=1) as records:
        records.log(2, {"loss": 2.0})
        stale.log(2, {"loss": -1.0})
        records.log(3, {"loss": 3.0})
    stale.close("failed")
    assert [record["loss"] for record in read_records(paths.metrics, "train")] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("cut_bytes", range(1, 40, 7))
def test_a_torn_last_line_is_ignored_and_does_not_swallow_the_next(
    tmp_path: Path, cut_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, config = local(tmp_path)
    with open_records(paths, config, kind="train", attempt="a1") as records:
        for step in (1, 2):
            records.log(step, {"loss": float(step)})
    whole = paths.metrics.read_bytes()
    paths.metrics.write_bytes(whole[:-cut_bytes])
    assert [record["step"] for record in read_records(paths.metrics, "train")] == [1]
    assert capsys.readouterr().err == ""
    with open_records(paths, config, kind="train", attempt="a2", resumed_step=1) as records:
        records.log(2, {"loss": 2.5})
    assert [record["loss"] for record in read_records(paths.metrics, "train")] == [1.0, 2.5]
    said = capsys.readouterr().err
    assert "1 of 3 lines are not whole" in said or cut_bytes == 1  # without its newline a line is still whole


def test_no_file_means_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "metrics.jsonl", "train") == []


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with NoRecords() as records:
        records.log(1, {"loss": 1.0})
        records.image(tmp_path / "no.png", 1, "sample")
    assert list(tmp_path.iterdir()) == []
