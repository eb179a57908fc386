"""Tracked runs in a temporary folder, and what MLflow says of them."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from tests.builders import tiny_config

CANARY = "c4n4ry-in-the-coal-mine"


def local(tmp_path: Path, name: str = "run") -> tuple[RunPaths, RunConfig]:
    return RunPaths(tmp_path / name), tiny_config(tmp_path, name=name)


def tracked(runs: Path, name: str, **sections: object) -> tuple[RunPaths, RunConfig]:
    return RunPaths(runs / name), tiny_config(runs, name=name, **{"tracking": {"mlflow": "auto"}, **sections})


def mlflow_client(runs: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")


def run_id(paths: RunPaths, kind: str = "train") -> str:
    return str(json.loads(paths.mlflow_run.read_text())[kind]["run_id"])


def confirmed(paths: RunPaths) -> bool:
    """Return whether MLflow has told the id of the run."""
    return paths.mlflow_run.exists() and "run_id" in json.loads(paths.mlflow_run.read_text())["train"]


def history(runs: Path, paths: RunPaths, name: str) -> list[tuple[int, float]]:
    points: list[Metric] = mlflow_client(runs).get_metric_history(run_id(paths), name)
    return [(point.step, point.value) for point in points]


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def everything_below(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return "".join(file.read_bytes().decode("latin-1") for file in files)
