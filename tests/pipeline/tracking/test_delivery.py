"""MLflow gets the records of a run whole, in one run however often it was started."""

import math
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.errors import StoppedError
from pipeline.tracking import (
    mlflow_sender,
    open_records,
    sync_records,
    tracking_uri,
)
from tests.builders import tiny_config
from tests.pipeline.tracking.builders import confirmed, history, mlflow_client, run_id, tracked, wait_until


def test_where_mlflow_writes() -> None:
    runs = Path("/data/runs")
    assert tracking_uri("auto", runs, {}) == "sqlite:////data/runs/mlflow.db"
    assert tracking_uri("auto", runs, {"SLURM_JOB_ID": "1"}) is None
    assert tracking_uri("off", runs, {}) is None
    assert tracking_uri("http://host:5000", runs, {"SLURM_JOB_ID": "1"}) == "http://host:5000"


def test_a_slurm_job_says_once_that_mlflow_comes_later(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    paths, config = tracked(runs, "slurm")
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": 1.0})
        records.log(2, {"loss": 2.0})
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ldm sync" in said
    assert not paths.mlflow_run.exists()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert sync_records(paths, config) == 0
    assert history(runs, paths, "loss") == [(1, 1.0), (2, 2.0)]
    assert mlflow_client(runs).get_run(run_id(paths)).info.status == "FINISHED"
    assert sync_records(paths, config) == 0
    assert history(runs, paths, "loss") == [(1, 1.0), (2, 2.0)]


def test_mlflow_gets_the_run_whole(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths, config = tracked(runs, "whole", sample={"prompts": ["a" * 900]}, data={"dataset": str(tmp_path)})
    (tmp_path / "manifest.json").write_text('{"digest": "d1g3st"}')
    picture = tmp_path / "step-00000002.png"
    Image.new("RGB", (300, 200), (200, 30, 30)).save(picture)
    paths.root.mkdir(parents=True)
    paths.versions.write_text('{"torch": "2.13.0", "libraries": {"numpy": "2.4.6"}}')
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": math.nan, "rate": 1e-4}, samples=4)
        records.log(2, {"loss": 0.5, "rate": 2e-4, "time; <ms>": 3.0}, samples=8)
        records.image(picture, 2, "sample")
        records.artifact(paths.versions, "run")
    client = mlflow_client(runs)
    run = client.get_run(run_id(paths))
    assert run.info.status == "FINISHED" and run.info.run_name == "whole"
    assert history(runs, paths, "loss") == [(2, 0.5)]
    assert history(runs, paths, "samples") == [(1, 4.0), (2, 8.0)]
    assert history(runs, paths, "time_ _ms_") == [(2, 3.0)]
    assert run.data.params["engine.global_batch"] == "4"
    assert run.data.params["model.block_out_channels"] == "[32, 64]"
    assert len(run.data.params["sample.prompts"]) == 500 and run.data.params["sample.prompts"].endswith("...")
    assert run.data.tags["data.digest"] == "d1g3st" and run.data.tags["kind"] == "train"
    assert run.data.tags["version.torch"] == "2.13.0" and run.data.tags["version.libraries.numpy"] == "2.4.6"
    kept = runs / "mlartifacts" / run.info.run_id / "artifacts"
    pictures = sorted(path.name for path in (kept / "images").iterdir())
    assert [name.partition("+timestamp")[0] for name in pictures] == ["sample+step+2"] * 2
    (png,) = (kept / "images").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(png)), np.asarray(Image.open(picture)))
    assert {path.name for path in (kept / "run").iterdir()} == {
        "config.yaml",
        "starts.jsonl",
        "versions.json",
    }
    elsewhere = [
        found for found in client.search_experiments() if str(runs) not in unquote(found.artifact_location)
    ]
    assert elsewhere == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "manifest.json",
        picture.name,
    ]  # no ./mlruns
    assert capsys.readouterr().err == ""


def spy_on_batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that fills with the (name, step) of every metric sent."""
    sent: list[tuple[str, int]] = []
    send = MlflowClient.log_batch

    def spy(client: MlflowClient, run: str, metrics: Sequence[Metric] = (), **rest: object) -> None:
        sent.extend((metric.key, metric.step) for metric in metrics)
        send(client, run, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", spy)
    return sent


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_without_doubles(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, config = tracked(runs, "resumed")
    with pytest.raises(StoppedError), open_records(paths, config, kind="train", attempt="a1") as records:
        for step in range(1, 8):
            records.log(step, {"loss": float(step)})
        raise StoppedError("stopped")
    first = run_id(paths)
    assert mlflow_client(runs).get_run(first).info.status == "KILLED"
    changed = tiny_config(
        runs, name="resumed", tracking={"mlflow": "auto"}, train={"steps": 20}, evaluate={"timesteps": 4}
    )
    sent = spy_on_batches(monkeypatch)
    with open_records(paths, changed, kind="train", attempt="a2", resumed_step=5) as records:
        wait_until(lambda: mlflow_client(runs).get_run(first).info.status == "RUNNING")
        for step in range(6, 10):
            records.log(step, {"loss": float(step), "norm": 1.0})
    # Of what MLflow has, nothing is sent again.
    sent = [one for one in sent if "/" not in one[0]]
    assert sorted(sent) == [("loss", 8), ("loss", 9)] + [("norm", step) for step in range(6, 10)]
    with open_records(paths, changed, kind="encode", attempt="a2") as records:
        records.log(1, {"images": 1.0})
    assert run_id(paths) == first != run_id(paths, "encode")
    assert mlflow_client(runs).get_run(run_id(paths, "encode")).data.metrics == {"images": 1.0}
    assert history(runs, paths, "loss") == [(step, float(step)) for step in range(1, 10)]
    assert history(runs, paths, "norm") == [(step, 1.0) for step in range(6, 10)]
    run = mlflow_client(runs).get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "10" and run.data.tags["changed.train.steps"] == "20"


def test_more_records_than_a_batch_all_arrive(runs: Path) -> None:
    paths, config = tracked(runs, "many")
    with open_records(paths, config, kind="train", attempt="a1") as records:
        for step in range(1, 1001):
            records.log(step, {f"value{number}": step + number / 8 for number in range(6)})
    for number in range(6):
        expected = [(step, step + number / 8) for step in range(1, 1001)]
        assert history(runs, paths, f"value{number}") == expected


def test_a_line_that_is_half_there_is_sent_when_it_is_whole(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may show a line in parts."""
    monkeypatch.setattr(mlflow_sender, "SECONDS_BETWEEN_BATCHES", 0.02)
    paths, config = tracked(runs, "halves")
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": 1.0})
        line = paths.metrics.read_bytes().replace(b'"step": 1', b'"step": 2')
        wait_until(lambda: confirmed(paths) and history(runs, paths, "loss") == [(1, 1.0)])
        with paths.metrics.open("ab", buffering=0) as stream:
            stream.write(line[:30])
            records.artifact(paths.mlflow_run, "seen")
            client, run = mlflow_client(runs), run_id(paths)
            wait_until(lambda: len(client.list_artifacts(run, "seen")) == 1)
            stream.write(line[30:])
    assert history(runs, paths, "loss") == [(1, 1.0), (2, 1.0)]


def test_a_failed_run_is_marked_so(runs: Path) -> None:
    paths, config = tracked(runs, "failed")
    with pytest.raises(ZeroDivisionError), open_records(paths, config, kind="train", attempt="a1"):
        raise ZeroDivisionError
    assert mlflow_client(runs).get_run(run_id(paths)).info.status == "FAILED"


def test_a_run_that_mlflow_has_lost_is_sent_again_whole(runs: Path) -> None:
    paths, config = tracked(runs, "lost")
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": 1.0})
    first = run_id(paths)
    mlflow_client(runs).delete_run(first)
    with open_records(paths, config, kind="train", attempt="a2", resumed_step=1) as records:
        records.log(2, {"loss": 2.0})
    assert run_id(paths) != first
    assert history(runs, paths, "loss") == [(1, 1.0), (2, 2.0)]
