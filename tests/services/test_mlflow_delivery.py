"""Records on their way to a real MLflow server that is killed, hangs, answers 500, goes deaf or has a full disk."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from pipeline.tracking import journal, mlflow_sender, open_records, sync_records
from tests.builders import tiny_config
from tests.services.mlflow_server import Misbehaving, MlflowServer, mlflow_server

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("delivery") / "server") as running:
        yield running


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again soon and give up on a silent server soon: what is shown does not depend on how long."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(mlflow_sender, "SECONDS_BETWEEN_BATCHES", 0.05)
    monkeypatch.setattr(mlflow_sender, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(journal, "CLOSE_SECONDS", 30.0)


def a_run(folder: Path, name: str, uri: str) -> tuple[RunPaths, RunConfig]:
    return RunPaths(folder / name), tiny_config(
        folder, name=name, tracking={"mlflow": uri, "experiment": name}
    )


def history(server: MlflowServer, paths: RunPaths, name: str = "loss") -> list[tuple[int, float]]:
    run_id = json.loads(paths.mlflow_run.read_text())["train"]["run_id"]
    points = MlflowClient(tracking_uri=server.uri).get_metric_history(run_id, name)
    return [(point.step, point.value) for point in points]


def only_run(server: MlflowServer, name: str) -> str:
    """Return the id of the one run there is in the experiment."""
    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return str(run.info.run_id)


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.covers("F46")
def test_killed_and_restarted_every_record_arrives_exactly_once(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server dies, the training dies while it is away and resumes 40 steps back; then the server returns."""
    paths, config = a_run(tmp_path, "killed", server.uri)
    records = open_records(paths, config, kind="train", attempt="a1")
    for step in range(1, 51):
        records.log(step, {"loss": step / 8})
    wait_until(lambda: paths.mlflow_run.exists() and "run_id" in paths.mlflow_run.read_text())
    wait_until(lambda: len(history(server, paths)) == 50)
    server.kill()
    for step in range(51, 121):
        records.log(step, {"loss": step / 8})
    monkeypatch.setattr(journal, "CLOSE_SECONDS", 1.0)
    records.close("failed")
    monkeypatch.setattr(journal, "CLOSE_SECONDS", 30.0)
    with open_records(paths, config, kind="train", attempt="a2", resumed_step=80) as resumed:
        for step in range(81, 131):
            resumed.log(step, {"loss": step / 8})
        server.start()
        wait_until(lambda: len(history(server, paths)) == 130)
        for step in range(131, 151):
            resumed.log(step, {"loss": step / 8})
    expected = [(step, step / 8) for step in range(1, 151)]
    assert history(server, paths) == expected
    assert sync_records(paths, config) == 0
    assert history(server, paths) == expected
    assert only_run(server, "killed") == json.loads(paths.mlflow_run.read_text())["train"]["run_id"]
    said = capsys.readouterr().err
    assert said.count("MLflow fails") == 2 and "answers again" in said


@pytest.mark.covers("F46")
@pytest.mark.parametrize("mode", ["500", "hang", "deaf"])
@pytest.mark.parametrize("when", ["from the start", "midway"])
def test_whatever_the_server_does_records_and_pictures_arrive_once(
    server: MlflowServer, tmp_path: Path, mode: str, when: str
) -> None:
    """Deaf, it does all that it is asked and nobody hears of it: neither a second run nor a second point comes of it."""
    name = f"{mode} {when}".replace(" ", "-")
    proxy = Misbehaving(server.port)
    paths, config = a_run(tmp_path, name, proxy.uri)
    picture = tmp_path / "grid.png"
    Image.new("RGB", (40, 30), (9, 99, 199)).save(picture)
    proxy.mode = mode if when == "from the start" else "pass"
    try:
        with open_records(paths, config, kind="train", attempt="a1") as records:
            records.log(1, {"loss": 1.0})
            if when == "midway":
                wait_until(
                    lambda: "run_id" in paths.mlflow_run.read_text() if paths.mlflow_run.exists() else False
                )
                wait_until(lambda: history(server, paths) == [(1, 1.0)])
                proxy.mode = mode
            asked = proxy.requests
            for step in range(2, 60):
                records.log(step, {"loss": float(step)})
            records.image(picture, 59, "grid")
            wait_until(lambda: proxy.requests > asked + 2)
            assert records.blocked_seconds < 0.5
            proxy.mode = "pass"
    finally:
        proxy.close()
    assert history(server, paths) == [(step, float(step)) for step in range(1, 60)]
    run_id = only_run(server, name)
    kept = MlflowClient(tracking_uri=server.uri).list_artifacts(run_id, "images")
    assert sorted(Path(entry.path).suffix for entry in kept) == [".png", ".webp"]


@pytest.mark.covers("F46")
def test_a_full_disk_there_costs_nothing_here(
    server: MlflowServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, config = a_run(tmp_path, "full", server.uri)
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": 1.0})
        wait_until(lambda: "run_id" in paths.mlflow_run.read_text() if paths.mlflow_run.exists() else False)
        wait_until(lambda: history(server, paths) == [(1, 1.0)])
        with server.full_disk():
            for step in range(2, 2000):
                records.log(step, {"loss": float(step)})
            wait_until(lambda: "MLflow fails" in capsys.readouterr().err)
    assert history(server, paths) == [(step, float(step)) for step in range(1, 2000)]
