"""Carries the records of `metrics.jsonl` to MLflow in a background thread: the only home of `mlflow`.

The thread reads the file from its start and sends, of each metric, the steps above the last one that MLflow
already has. So a resumed run does not double the steps it replays (under promise P3 they are the same
numbers), and what an outage or a killed process left unsent follows by itself. One MLflow run stands for one
(run folder, kind) across all resumes; its id is kept in the run folder.
"""

import json
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import publish
from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from pipeline.tracking import Status, parse_record, record_values, redact, redact_text, say

# MLflow reads these on import. Its own 7 tries of up to 120 s block a call for four minutes.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow.entities import Metric, Param, Run, RunTag  # noqa: E402  (after the settings above)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

for _logger in ("mlflow", "alembic"):
    logging.getLogger(_logger).setLevel(logging.ERROR)

ENDINGS: dict[Status, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
LONGEST_VALUE = 500
LONGEST_NAME = 250
LINES_A_BATCH = 200
PARAMS_A_BATCH = 100
FILES_WAITING = 64
SECONDS_BETWEEN_BATCHES = 1.0
LONGEST_PAUSE_SECONDS = 60.0
# Where MLflow's sqlite store puts artifacts of experiments that name no place; else it makes ./mlruns.
ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"


class MlflowSender:
    """Feeds one MLflow run from `metrics.jsonl`; every failure of MLflow ends in one warning and another try.

    A sender that is not `live` catches up for work that is over: it leaves the status of a known run alone.
    """

    def __init__(
        self, paths: RunPaths, config: RunConfig, kind: str, *, uri: str, artifacts: Path, live: bool = True
    ) -> None:
        self._paths, self._config, self._kind = paths, config, kind
        self._uri, self._artifacts, self._ends_run = uri, artifacts, live
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._last_steps: dict[str, int] = {}
        self._offset_bytes = 0
        self._files: deque[tuple[Path, str]] = deque()
        self._status: Status = "finished"
        self._wake, self._closing = threading.Event(), threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._wake.set()

    def wake(self) -> None:
        """Say that `metrics.jsonl` has grown; returns at once."""
        self._wake.set()

    def file(self, path: Path, folder: str) -> None:
        """Queue a file for the artifact folder `folder`; of more than 64 waiting ones the oldest is given up."""
        if len(self._files) >= FILES_WAITING:
            lost, _ = self._files.popleft()
            say(f"MLflow takes no files: {lost} is not kept there; it stays in the run folder")
        self._files.append((path, folder))
        self._wake.set()

    def close(self, status: Status, wait_seconds: float) -> int:
        """Send what is left for at most `wait_seconds` and end the MLflow run; return the records not sent."""
        self._status = status
        self._closing.set()
        self._wake.set()
        self._thread.join(wait_seconds)
        unsent = sum(1 for _ in self._unsent_records())
        if unsent or self._files or self._thread.is_alive():
            say(
                f"MLflow lacks up to {unsent} records and {len(self._files)} files of {self._paths.root}; "
                "metrics.jsonl has all records, and the next start or `ldm sync RUN` sends them"
            )
        return unsent

    def _work(self) -> None:
        pause_seconds = SECONDS_BETWEEN_BATCHES
        while True:
            self._wake.wait()
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._send()
                if closing:
                    self._end()
                pause_seconds = SECONDS_BETWEEN_BATCHES
            except Exception as error:  # whatever breaks in a tracking server must not reach the training
                self._warn(error)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
                self._wake.set()
            if closing:
                return
            self._closing.wait(pause_seconds)

    def _send(self) -> None:
        if self._client is None:
            self._client = self._connect()
        while self._send_batch(self._client):
            pass
        while self._files:
            path, folder = self._files[0]
            self._client.log_artifact(self._run_id, str(path), folder)
            self._files.popleft()

    def _end(self) -> None:
        if self._client is not None and self._ends_run:
            self._client.set_terminated(self._run_id, ENDINGS[self._status])

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            said = redact_text(" ".join(str(error).split()))[:300]
            say(
                f"MLflow fails ({type(error).__name__}: {said}); the run goes on, metrics.jsonl has every record"
            )

    def _send_batch(self, client: MlflowClient) -> bool:
        """Send up to 200 records; return whether there was anything to read. The place moves only on success."""
        metrics: list[Metric] = []
        steps: dict[str, int] = {}
        offset_bytes, lines = self._offset_bytes, 0
        for end_bytes, record in self._unsent_records():
            for name, value in metrics_of(record).items():
                if record["step"] > max(steps.get(name, -1), self._last_steps.get(name, -1)):
                    metrics.append(Metric(name, value, int(record["time"] * 1000), record["step"]))
                    steps[name] = record["step"]
            offset_bytes, lines = end_bytes, lines + 1
            if lines == LINES_A_BATCH:
                break
        if metrics:
            client.log_batch(self._run_id, metrics=metrics)
        self._last_steps |= steps
        self._offset_bytes = offset_bytes
        return lines > 0

    def _unsent_records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each whole record of this kind behind the sent ones, with the byte offset behind it.

        A line of which only a part is there yet is no record, and is read again from its start next time.
        """
        if not self._paths.metrics.is_file():
            return
        with self._paths.metrics.open("rb") as stream:
            end_bytes = stream.seek(self._offset_bytes)
            for line in stream:
                end_bytes += len(line)
                record = parse_record(line)
                if record is not None and record["kind"] == self._kind:
                    yield end_bytes, record

    def _connect(self) -> MlflowClient:
        """Return a client whose run exists, is running and carries this config's parameters and tags."""
        if self._uri.startswith("sqlite:"):
            self._artifacts.parent.mkdir(parents=True, exist_ok=True)
            os.environ[ARTIFACT_ROOT] = str(self._artifacts)
        client = MlflowClient(tracking_uri=self._uri)
        run = self._known_run(client) or self._new_run(client)
        self._run_id = run.info.run_id
        # `to_proto` is where MLflow's public interface tells the step of each metric's latest value.
        self._last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._describe(client, run)
        if self._ends_run and run.info.status != "RUNNING":
            client.update_run(self._run_id, status="RUNNING")
        return client

    def _known_run(self, client: MlflowClient) -> Run | None:
        kept = read_kept(self._paths.mlflow_run).get(self._kind, {})
        if kept.get("tracking") != redact_text(self._config.tracking.mlflow):
            return None
        try:
            run = client.get_run(kept["run_id"])
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _new_run(self, client: MlflowClient) -> Run:
        name = self._config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        place = self._artifacts.as_uri() if self._uri.startswith("sqlite:") else None
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, place)
        run_name = self._config.name if self._kind == "train" else f"{self._config.name} {self._kind}"
        run = client.create_run(experiment_id, run_name=run_name)
        self._ends_run = True
        entry = {"run_id": run.info.run_id, "tracking": redact_text(self._config.tracking.mlflow)}
        publish.write_json(self._paths.mlflow_run, read_kept(self._paths.mlflow_run) | {self._kind: entry})
        return run

    def _describe(self, client: MlflowClient, run: Run) -> None:
        """Send the parameters that are new, and tags; MLflow refuses to change a parameter, so a tag says it."""
        params = params_of(self._config.model_dump(mode="json"))
        tags = {"kind": self._kind, "run_folder": str(self._paths.root.resolve())}
        tags |= {f"changed.{key}": value for key, value in params.items() if changed(run, key, value)}
        tags |= {f"version.{name}": value for name, value in versions_of(self._paths).items()}
        digest = manifest_digest(Path(self._config.data.dataset or self._paths.latents))
        tags |= {"data.digest": digest} if digest else {}
        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        for first in range(0, len(new), PARAMS_A_BATCH):
            client.log_batch(run.info.run_id, params=new[first : first + PARAMS_A_BATCH])
        wanted = [RunTag(allowed_name(key), value) for key, value in tags.items()]
        for first in range(0, len(wanted), PARAMS_A_BATCH):
            client.log_batch(run.info.run_id, tags=wanted[first : first + PARAMS_A_BATCH])


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record's finite values and its sample count under names that MLflow takes."""
    values = record_values(record)
    if record.get("samples") is not None:
        values["samples"] = record["samples"]
    return {allowed_name(name): float(value) for name, value in values.items()}


def params_of(config: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return the config as flat `section.key` -> text without secrets, each text at most 500 characters."""
    flat: dict[str, str] = {}
    for name, value in redact(config).items():
        dotted = f"{above}.{name}" if above else name
        if isinstance(value, dict) and value:
            flat |= params_of(value, dotted)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[allowed_name(dotted)] = (
                text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
            )
    return flat


def allowed_name(name: str) -> str:
    """Return `name` with what MLflow refuses in names replaced by `_`: other signs, `..`, a slash at an end."""
    signs = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name).replace("..", "__").replace("//", "__")
    return signs.strip("/").strip()[:LONGEST_NAME] or "_"


def changed(run: Run, key: str, value: str) -> bool:
    """Return whether an earlier attempt of the run recorded another value of the parameter, or tag, `key`."""
    if key not in run.data.params:
        return False
    return bool(run.data.tags.get(f"changed.{key}", run.data.params[key]) != value)


def versions_of(paths: RunPaths) -> dict[str, str]:
    """Return the run folder's versions by name, flat; nothing if they are not written yet."""
    return params_of(_read_object(paths.versions))


def manifest_digest(dataset: Path) -> str | None:
    """Return the digest in the data set's manifest, or None where there is no manifest yet."""
    digest = _read_object(dataset / "manifest.json").get("digest")
    return digest if isinstance(digest, str) else None


def read_kept(path: Path) -> dict[str, Any]:
    """Return the MLflow run of each kind as kept in the run folder: {kind: {run_id, tracking}}."""
    return {kind: entry for kind, entry in _read_object(path).items() if isinstance(entry, dict)}


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file, or an empty one where the file is absent or says something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
