"""Records: metrics.jsonl as the truth, MLflow behind it, and no secret anywhere."""

import json
import math
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline.config import RunConfig
from pipeline.errors import StoppedError
from pipeline.paths import RunPaths
from pipeline.tracking import (
    NoRecords,
    journal,
    mlflow_door,
    mlflow_sender,
    open_records,
    read_records,
    redact,
    redact_text,
    say,
    sync_records,
    tracking_uri,
)
from pipeline.tracking.names import allowed_name, params_of
from tests.builders import tiny_config

CANARY = "c4n4ry-in-the-coal-mine"


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


# metrics.jsonl


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


# MLflow


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


# MLflow that fails


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


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# Secrets


def test_no_byte_written_holds_a_secret(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    secrets = {
        "api_key": CANARY, "hubToken": CANARY, "nested": {"deep": [{"Password": CANARY}]},
        "secret_number": 5, "url": f"s3://user:{CANARY}@host/path", "auth": {"user": CANARY},
        "link": f"https://host/a?x=1&X-Amz-Signature={CANARY}&y=2", "note": f"hf_{CANARY}",
    }  # fmt: skip
    paths, config = tracked(
        runs, "secrets", engine={"deepspeed": secrets}, data={"dataset": f"https://me:{CANARY}@host/d"}
    )
    with open_records(paths, config, kind="train", attempt="a1") as records:
        records.log(1, {"loss": 1.0})
    assert f"hf_{CANARY}" in config.model_dump_json()
    params = mlflow_client(runs).get_run(run_id(paths)).data.params
    assert params["engine.deepspeed.api_key"] == "[redacted]"
    assert params["engine.deepspeed.secret_number"] == "[redacted]"
    assert params["engine.deepspeed.link"] == "https://host/a?x=1&X-Amz-Signature=[redacted]&y=2"
    assert params["data.dataset"] == "https://[redacted]@host/d"
    assert CANARY not in everything_below(runs)
    assert CANARY not in "".join(capsys.readouterr())


def test_a_tracking_uri_with_a_password_is_used_but_not_kept(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def server(tracking_uri: str) -> MlflowClient:
        seen.append(tracking_uri)
        return mlflow_client(runs)

    monkeypatch.setattr(mlflow_door, "MlflowClient", server)
    uri = f"https://me:{CANARY}@host/mlflow"
    paths, config = tracked(runs, "password", tracking={"mlflow": uri})
    for attempt in ("a1", "a2"):
        with open_records(paths, config, kind="train", attempt=attempt) as records:
            records.log(1, {"loss": 1.0})
    assert seen == [uri, uri]
    kept = json.loads(paths.mlflow_run.read_text())["train"]
    assert kept["tracking"] == "https://[redacted]@host/mlflow"
    assert mlflow_client(runs).get_run(kept["run_id"]).data.params["tracking.mlflow"] == kept["tracking"]
    assert CANARY not in everything_below(runs)


def everything_below(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return "".join(file.read_bytes().decode("latin-1") for file in files)


def test_settings_that_only_sound_secret_stay() -> None:
    plain = {"max_tokens": 77, "text": "tokens", "key": 3, "token": None}
    assert redact(plain) == plain


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("postgresql://u:p/w@host/db", "postgresql://[redacted]@host/db"),
        # A slash inside a password is malformed and still hidden; that costs the path of the rare URL below.
        ("https://host:8080/a@2x.png", "https://[redacted]@2x.png"),
        ("https://host/a@2x.png", "https://host/a@2x.png"),
        ("mail me@host", "mail me@host"),
        ("AKIAABCDEFGHIJKLMNOP", "[redacted]"),
    ],
)
def test_redacted_text(text: str, left: str) -> None:
    assert redact_text(text) == left


def test_what_is_said_is_one_line_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"no answer from\nhttp://me:{CANARY}@host")
    assert capsys.readouterr().err == "tracking: no answer from http://[redacted]@host\n"


def test_names_that_mlflow_takes() -> None:
    assert allowed_name("loss/t=0;<x>") == "loss/t_0__x_"
    assert allowed_name("../up") == "__/up"
    assert len(allowed_name("a" * 1000)) == 250
    assert params_of({"a": {"b": {}}, "c": None, "d": True}) == {"a.b": "{}", "c": "null", "d": "true"}


def test_the_senders_settings_are_small() -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 2
