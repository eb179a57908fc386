"""One MLflow run and what is done to it: the only door to `mlflow`, but for the exported model's own modules.

Everything here may raise whatever a tracking server does wrong, and may be done again: what MLflow already has is
found there and not sent twice.
"""

import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline import publish
from pipeline.config import RunConfig
from pipeline.config_file import dump_config
from pipeline.paths import RunPaths
from pipeline.tracking.lineage import Input, inputs_of, manifest_digest
from pipeline.tracking.names import (
    LONGEST_DIGEST,
    allowed_name,
    params_of,
    run_of,
    shortened,
    start_tags,
)
from pipeline.tracking.redaction import redact, redact_text, redacted_config
from pipeline.tracking.starts import read_object, read_starts

# MLflow reads these on import. Its own 7 tries of up to 120 s block a call for four minutes.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    # It would print each run's address with the password in it.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

for _logger in ("mlflow", "alembic"):
    logging.getLogger(_logger).setLevel(logging.ERROR)

PARAMS_A_BATCH = 100
# Where MLflow's sqlite store puts artifacts of experiments that name no place; else it makes ./mlruns.
ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Lets MLflow's pages show what belongs to a training, and not what belongs to a chat."""
TICKET = "ldm.ticket"
"""A tag that names a run before MLflow does: a run whose making was not confirmed is found by it."""


@dataclass(frozen=True)
class Place:
    """Which work of which run is told, and where."""

    paths: RunPaths
    config: RunConfig
    kind: str
    uri: str
    artifacts: Path
    """Folder of the artifacts where `uri` is a local database."""

    @property
    def told_as(self) -> str:
        """The kind of work in whose MLflow run this one is told."""
        return run_of(self.kind)

    @property
    def joins(self) -> bool:
        """Whether the MLflow run is another work's: its status and description are not touched."""
        return self.told_as != self.kind


class MlflowRun:
    """The MLflow run of one place, found or made; `was_made` says which."""

    def __init__(self, place: Place, *, running: bool) -> None:
        """Find or make the run and describe it; with `running` it is said to be under way."""
        self._place = place
        if place.uri.startswith("sqlite:"):
            place.artifacts.parent.mkdir(parents=True, exist_ok=True)
            os.environ[ARTIFACT_ROOT] = str(place.artifacts)
        self.client = MlflowClient(tracking_uri=place.uri)
        with _locked(place.paths.root):
            known = self._known_run()
            run = known or self._new_run()
        self.run_id, self.was_made = run.info.run_id, known is None
        # `to_proto` is where MLflow's public interface tells the step of each metric's latest value.
        self._last = {metric.key: (metric.step, metric.timestamp) for metric in run.data.to_proto().metrics}
        self._held: dict[str, set[str]] = {}
        if self.was_made or not place.joins:
            self._describe(run)
        if running and not place.joins and run.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")

    def send(self, values: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Send (step, milliseconds since 1970, values by name) of records in their order, without what is there.

        Of a training each step is told once, however often it was computed. A verb's figures (`evaluate/...`) are
        told again when it was called again.
        """
        last, metrics = dict(self._last), []
        for step, timestamp, named in values:
            for name, value in named.items():
                before = last.get(name, (-1, -1))
                if (step, timestamp) > before if self._place.joins else step > before[0]:
                    metrics.append(Metric(name, value, timestamp, step))
                    last[name] = (step, timestamp)
        if metrics:
            self.client.log_batch(self.run_id, metrics=metrics)
        self._last = last

    def keep_image(self, path: Path, name: str, step: int, timestamp: int) -> None:
        """Keep the picture as image `name` of `step`, where MLflow's page shows images by step."""
        key = allowed_name(name)
        start = f"images/{key.replace('/', '~')}+step+{step}+"
        there = [held for held in self._names("images") if held.startswith(start)]
        if {os.path.splitext(held)[1] for held in there} >= {".png", ".webp"}:
            return
        with Image.open(path) as picture:
            self.client.log_image(
                self.run_id, picture.convert("RGB"), key=key, step=step, timestamp=timestamp, synchronous=True
            )
        self._held.pop("images", None)

    def keep_file(self, path: Path, folder: str) -> None:
        """Keep the file as `folder/NAME` unless there is one."""
        if f"{folder}/{path.name}" not in self._names(folder):
            self.client.log_artifact(self.run_id, str(path), folder)
            self._held.pop(folder, None)

    def register(self, pipeline: Path, name: str, step: int) -> None:
        """Register the exported pipeline as a version of model `name`, unless it is one."""
        from pipeline.tracking.model_version import register_pipeline

        register_pipeline(self.client, self.run_id, pipeline, name, self._place.config.sample, step)

    def end(self, status: str) -> None:
        """Say how the work ended."""
        self.client.set_terminated(self.run_id, status)

    def _names(self, folder: str) -> set[str]:
        if folder not in self._held:
            self._held[folder] = {found.path for found in self.client.list_artifacts(self.run_id, folder)}
        return self._held[folder]

    def _known_run(self) -> Run | None:
        """Return the run that the run folder names, or one that was made without our having been told so."""
        kept = _kept(self._place)
        try:
            if "run_id" in kept:
                run = self.client.get_run(kept["run_id"])
                return run if run.info.lifecycle_stage == "active" else None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        experiment = self.client.get_experiment_by_name(self._place.config.tracking.experiment)
        if "ticket" not in kept or experiment is None:
            return None
        wanted = f"tags.`{TICKET}` = '{kept['ticket']}'"
        found = self.client.search_runs([experiment.experiment_id], wanted, max_results=1)
        if found:
            _keep(self._place, {"ticket": kept["ticket"], "run_id": found[0].info.run_id})
        return found[0] if found else None

    def _new_run(self) -> Run:
        place = self._place
        name, kept = place.config.tracking.experiment, _kept(place)
        ticket = uuid.uuid4().hex if "run_id" in kept or "ticket" not in kept else kept["ticket"]
        _keep(place, {"ticket": ticket})
        experiment = self.client.get_experiment_by_name(name)
        where = place.artifacts.as_uri() if place.uri.startswith("sqlite:") else None
        experiment_id = (
            experiment.experiment_id if experiment else self.client.create_experiment(name, where, KIND)
        )
        run_name = place.config.name if place.told_as == "train" else f"{place.config.name} {place.told_as}"
        run = self.client.create_run(experiment_id, tags={TICKET: ticket}, run_name=run_name)
        _keep(place, {"ticket": ticket, "run_id": run.info.run_id})
        return run

    def _describe(self, run: Run) -> None:
        """Send the parameters that are new, and tags; MLflow refuses to change a parameter, so a tag says it."""
        place = self._place
        paths, config, kind = place.paths, place.config, place.told_as
        params = params_of(config.model_dump(mode="json"))
        tags = {"kind": kind, "run_folder": redact_text(str(paths.root.resolve()))}
        tags |= {f"changed.{key}": value for key, value in params.items() if _changed(run, key, value)}
        tags |= start_tags(read_starts(paths.starts, kind))
        tags |= {f"version.{name}": value for name, value in params_of(read_object(paths.versions)).items()}
        digest = manifest_digest(Path(config.data.dataset or paths.latents))
        tags |= {"data.digest": digest} if digest else {}
        inputs = inputs_of(paths, config, kind)
        tags |= {f"made_by.{entry.role}": entry.made_by for entry in inputs if entry.made_by}
        new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
        wanted = [RunTag(allowed_name(key), value) for key, value in tags.items()]
        for first in range(0, len(new), PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, params=new[first : first + PARAMS_A_BATCH])
        for first in range(0, len(wanted), PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, tags=wanted[first : first + PARAMS_A_BATCH])
        self.client.log_inputs(self.run_id, [_dataset_input(entry) for entry in inputs])
        self.client.log_text(self.run_id, dump_config(redacted_config(config)), "run/config.yaml")
        for file in (paths.versions, paths.starts):
            if file.is_file():
                self.client.log_artifact(self.run_id, str(file), "run")


def _dataset_input(entry: Input) -> DatasetInput:
    """Return the input as MLflow keeps data sets: a digest has 36 characters there, the whole one is a tag."""
    told = {"mlflow.data.context": entry.role, "digest": entry.digest, "made_by": entry.made_by}
    dataset = Dataset(
        name=entry.name,
        digest=entry.digest[:LONGEST_DIGEST] or "unknown",
        source_type="local",
        source=json.dumps({"uri": entry.place}),
        profile=json.dumps(redact(entry.facts)) if entry.facts else None,
    )
    return DatasetInput(dataset, [InputTag(key, shortened(value)) for key, value in told.items() if value])


def _changed(run: Run, key: str, value: str) -> bool:
    """Return whether an earlier attempt of the run recorded another value of the parameter, or tag, `key`."""
    if key not in run.data.params:
        return False
    return bool(run.data.tags.get(f"changed.{key}", run.data.params[key]) != value)


def _kept(place: Place) -> dict[str, Any]:
    """Return what the run folder says of the MLflow run at this tracking URI: its ticket, and its id if confirmed."""
    entry = read_object(place.paths.mlflow_run).get(place.told_as)
    if not isinstance(entry, dict) or entry.get("tracking") != redact_text(place.config.tracking.mlflow):
        return {}
    return entry


def _keep(place: Place, entry: dict[str, Any]) -> None:
    told = entry | {"tracking": redact_text(place.config.tracking.mlflow)}
    kept = read_object(place.paths.mlflow_run) | {place.told_as: told}
    publish.write_json(place.paths.mlflow_run, kept)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Let one process at a time find or make the runs of a folder."""
    with (root / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
