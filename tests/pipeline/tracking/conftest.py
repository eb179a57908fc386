"""Where the runs lie, and that nothing of MLflow is left behind."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.tracking.builders import wait_until


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, with a space in its name, so that the sqlite store is made once."""
    return tmp_path_factory.mktemp("tracking") / "my runs"


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    wait_until(lambda: all(thread.name != "mlflow" for thread in threading.enumerate()), 40.0)
    assert not (tmp_path / "mlruns").exists(), "MLflow made its folder in the current one"
