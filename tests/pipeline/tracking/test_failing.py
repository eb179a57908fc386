"""MLflow that is down, hangs or breaks costs neither time nor records."""

import socket
import sqlite3
import time
from pathlib import Path

import pytest

from pipeline.tracking import (
    journal,
    mlflow_sender,
    open_records,
    read_records,
)
from tests.pipeline.tracking.builders import CANARY, confirmed, everything_below, history, tracked, wait_until


def test_a_server_that_is_down_costs_one_warning_and_no_time(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    paths, config = tracked(
        runs, "down", tracking={"mlflow": f"http://user:{CANARY}@127.0.0.1:{port}/?token={CANARY}"}
    )
    with open_records(paths, config, kind="train", attempt="a1") as records:
        began = time.perf_counter()
        for step in range(1, 101):
            records.log(step, {"loss": float(step)})
        assert time.perf_counter() - began < 1.0
    said = capsys.readouterr().err
    assert (
        said.count("MLflow fails") == 1 and "MLflow lacks up to 101 records" in said
    )  # One is of the machine
    assert CANARY not in said and CANARY not in everything_below(paths.root)
    assert len(read_records(paths.metrics, "train")) == 100
    # The next start with a store that works brings everything.
    _, working = tracked(runs, "down")
    with open_records(paths, working, kind="train", attempt="a2", resumed_step=100) as records:
        records.log(101, {"loss": 101.0})
    assert history(runs, paths, "loss") == [(step, float(step)) for step in range(1, 102)]


def test_a_server_that_hangs_delays_neither_records_nor_the_end(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "CLOSE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        paths, config = tracked(
            runs, "hung", tracking={"mlflow": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        )
        began = time.perf_counter()
        with open_records(paths, config, kind="train", attempt="a1") as records:
            records.log(1, {"loss": 1.0})
        assert time.perf_counter() - began < 5.0
    assert "MLflow lacks up to 2 records" in capsys.readouterr().err


def test_a_store_that_breaks_midway_loses_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlflow_sender, "SECONDS_BETWEEN_BATCHES", 0.05)
    paths, config = tracked(runs, "midway")
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": 1.0})
        wait_until(lambda: confirmed(paths) and history(runs, paths, "loss") == [(1, 1.0)])
        lock = sqlite3.connect(runs / "mlflow.db", isolation_level=None)
        lock.execute("ALTER TABLE metrics RENAME TO hidden")
        records.log(2, {"loss": 2.0})
        wait_until(lambda: "MLflow fails" in capsys.readouterr().err)
        lock.execute("ALTER TABLE hidden RENAME TO metrics")
        lock.close()
        # It is tried again without a further record.
        wait_until(lambda: history(runs, paths, "loss") == [(1, 1.0), (2, 2.0)])
        records.log(3, {"loss": 3.0})
    assert history(runs, paths, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
