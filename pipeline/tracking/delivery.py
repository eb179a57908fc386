"""Who carries records from a run folder to MLflow, and where to; MLflow itself is reached lazily."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths
from pipeline.tracking.journal import Lines, Records, Sender, readable_records
from pipeline.tracking.names import run_of
from pipeline.tracking.redaction import REDACTED, say
from pipeline.tracking.starts import start_facts

WATCHED = ("train", "autoencoder", "clip", "features")
"""Work that is long enough to look at the machine meanwhile, and to tell each of its starts."""


def open_records(
    paths: RunPaths,
    config: RunConfig,
    *,
    kind: str,
    attempt: str,
    resumed_step: int = 0,
    hosts: Sequence[str] = (),
) -> Records:
    """Return the open records of one attempt at `kind` of work: "train", "autoencoder", "clip", "encode", ...

    `resumed_step` is the step of the checkpoint that the attempt starts from: later readers then know which
    records of earlier attempts it replaces. `hosts` names the host of each process that works on it.
    """
    if run_of(kind) == kind:
        starts = Lines(paths.starts)
        starts.add(start_facts(paths, config, kind, attempt, resumed_step, hosts))
        starts.close()
    return Records(
        paths.metrics,
        kind=kind,
        attempt=attempt,
        resumed_step=resumed_step,
        sender=_open_sender(paths, config, kind),
        watched=kind in WATCHED,
        global_batch=config.engine.global_batch if kind == "train" else None,
    )


def sync_records(paths: RunPaths, config: RunConfig, *, wait_seconds: float = 600.0) -> int:
    """Send what MLflow lacks of the run's records and artifacts; return how many could not be sent.

    Raises:
        ConfigError: the config names no place to send them to.
    """
    if tracking_uri(config.tracking.mlflow, Path(config.runs), os.environ) is None:
        raise ConfigError(
            f"tracking.mlflow: {config.tracking.mlflow} means nowhere here ({paths.root}); say where to send the "
            "records: ldm sync RUN tracking.mlflow=http://mlflow.example:5000"
        )
    kinds: dict[str, int] = {}
    for path in (paths.metrics, paths.system, paths.artifacts):
        for record in readable_records(path):
            kind = str(record["kind"])
            kinds[kind] = kinds.get(kind, 0) + 1
    left = 0
    # A training names the runs that made its data: those come first.
    for kind in sorted(kinds, key=lambda kind: (run_of(kind) == "train", kind != "train", kind)):
        sender = _open_sender(paths, config, kind, live=False)
        left += kinds[kind] if sender is None else sender.close("finished", wait_seconds)
    return left


def tracking_uri(setting: str, runs: Path, environment: Mapping[str, str]) -> str | None:
    """Return where MLflow keeps records: a URI, or None for nowhere, after `tracking.mlflow` = `setting`.

    "auto" is a sqlite file in the folder of the runs, but nothing inside a Slurm job: sqlite on a shared file
    system is not safe with several writers. In a URI from a run folder the password is hidden: then the
    environment's MLFLOW_TRACKING_URI stands for it, or MLflow's own MLFLOW_TRACKING_USERNAME and _PASSWORD.
    """
    if setting == "off" or (setting == "auto" and "SLURM_JOB_ID" in environment):
        return None
    if REDACTED in setting:
        return environment.get("MLFLOW_TRACKING_URI") or setting.replace(f"{REDACTED}@", "")
    return f"sqlite:///{runs.resolve() / 'mlflow.db'}" if setting == "auto" else setting


def _open_sender(paths: RunPaths, config: RunConfig, kind: str, *, live: bool = True) -> Sender | None:
    runs = Path(config.runs)
    uri = tracking_uri(config.tracking.mlflow, runs, os.environ)
    if uri is None:
        if config.tracking.mlflow == "auto":
            say(
                "inside a Slurm job records go to metrics.jsonl only; "
                "`ldm sync RUN` sends them to MLflow later, or set tracking.mlflow to a server's URI"
            )
        return None
    try:
        from pipeline.tracking.mlflow_sender import MlflowSender
    except ImportError as error:
        say(
            f"MLflow does not import ({error}); records go to metrics.jsonl only, `ldm sync RUN` sends them later"
        )
        return None
    return MlflowSender(paths, config, kind, uri=uri, artifacts=runs.resolve() / "mlartifacts", live=live)
