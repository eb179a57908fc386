"""How far a run is: Slurm's view of its jobs, then what its folder says. Each part does without the other."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.slurm.jobs import read_jobs
from launch.slurm.queue import JobState, job_states
from launch.supervisor.history import Attempt, read_history
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, ToolError
from pipeline.paths import RunPaths
from pipeline.tracking import goodput, parse_record, read_records
from pipeline.training.saving.manifest import committed, step_of

SHOWN_REASONS = 5


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment; None is what nobody knows yet."""

    root: str
    step: int | None = None
    steps: int | None = None
    samples: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    record_age_seconds: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None
    checkpoints: int = 0
    attempts: int = 0
    goodput: float | None = None
    """Share of the time since the first step that went into steps that count, at the run's median speed."""
    reasons: list[str] = field(default_factory=list)
    """How its last attempts have ended, the oldest first."""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    slurm: str = ""
    """Why Slurm said nothing, empty if it did."""


def is_run(paths: RunPaths) -> bool:
    """Return whether anything of a run lies in the folder."""
    marks = (paths.config, paths.sbatch, paths.jobs, paths.metrics, paths.autoencoder, paths.clip)
    return any(mark.exists() for mark in marks)


def run_status(paths: RunPaths, *, now: float | None = None) -> RunStatus:
    """Return what is known of the run at `now`, seconds since 1970 (None: this moment).

    Raises:
        ConfigError: when the folder is no run's.
    """
    if not is_run(paths):
        raise ConfigError(f"{paths.root}: not a run folder (no config.yaml, no jobs.json)")
    now = time.time() if now is None else now
    history = attempts_of(paths)
    values = _progress(paths, history, now) | _checkpoints(paths, now)
    jobs, slurm = _jobs(paths)
    ends = [f"attempt {end.attempt} {end.outcome}: {end.reason}" for end in history[-SHOWN_REASONS:]]
    return RunStatus(root=str(paths.root), jobs=jobs, slurm=slurm, reasons=ends, **values)


def attempts_of(paths: RunPaths) -> list[Attempt]:
    """Return the starts of the training under a supervisor, oldest first; the workers of encode are none."""
    trains = {str(job["job_id"]) for job in read_jobs(paths.jobs) if job.get("stage", "train") == "train"}
    return [attempt for attempt in read_history(paths) if attempt.job in trains]


def lines_of(status: RunStatus) -> list[str]:
    """Return the page of a run, line by line."""
    if status.step is None:
        head = "not trained yet"
    else:
        head = f"step {status.step}" + (f" of {status.steps}" if status.steps else "")
    lines = [f"{status.root}: {head}"]
    if status.step is not None:
        shown = {"samples": status.samples, "loss": status.loss, "grad_norm": status.grad_norm}
        shown["images/s"] = status.samples_per_second
        lines.append(
            "  " + ", ".join(f"{name} {_number(value)}" for name, value in shown.items() if value is not None)
        )
        left = f", about {_duration(status.seconds_left)} left" if status.seconds_left else ""
        lines.append(f"  last record {_duration(status.record_age_seconds)} ago{left}")
    if status.checkpoint_step is None:
        lines.append("  checkpoints: none")
    else:
        age = _duration(status.checkpoint_age_seconds)
        lines.append(
            f"  checkpoints: {status.checkpoints}, the last at step {status.checkpoint_step}, {age} ago"
        )
    if status.attempts:
        share = "" if status.goodput is None else f", goodput {100 * status.goodput:.1f} %"
        lines.append(f"  restarts: {status.attempts - 1}{share}")
    lines += [f"  {reason}" for reason in status.reasons]
    for job in status.jobs:
        lines.append(f"  {job['stage']} {job['job_id']}: {job['state']}")
    if status.slurm:
        lines.append(f"  slurm: {status.slurm}")
    return lines


def _progress(paths: RunPaths, history: Sequence[Attempt], now: float) -> dict[str, Any]:
    if not paths.metrics.is_file():
        return {}
    records = read_records(paths.metrics, "train")
    if not records:
        return {}
    last, steps, batch = records[-1], None, None
    try:
        config = load_config(paths.config)
        steps, batch = config.train.steps, config.engine.global_batch
    except ConfigError:
        pass  # Of an older version, or not written yet: the records stand for themselves.
    rate = last.get("samples_per_second")
    left = (steps - last["step"]) * batch / rate if steps and batch and rate else None
    return {
        "step": last["step"],
        "steps": steps,
        "samples": last.get("samples"),
        "loss": last.get("loss"),
        "grad_norm": last.get("grad_norm"),
        "samples_per_second": rate,
        "seconds_left": left,
        "record_age_seconds": now - last["time"],
        "attempts": max(len(history), _attempts(paths.metrics)),
        "goodput": goodput(records, batch, history[0].started if history else None) if batch else None,
    }


def _attempts(metrics: Path) -> int:
    """Return how many starts have written a record."""
    with metrics.open("rb") as stream:
        parsed = (parse_record(line) for line in stream)
        return len({record["attempt"] for record in parsed if record and record["kind"] == "train"})


def _checkpoints(paths: RunPaths, now: float) -> dict[str, Any]:
    found = committed(paths.checkpoints)
    if not found:
        return {}
    return {
        "checkpoints": len(found),
        "checkpoint_step": step_of(found[-1]),
        "checkpoint_age_seconds": now - found[-1].stat().st_mtime,
    }


def _jobs(paths: RunPaths) -> tuple[list[dict[str, Any]], str]:
    jobs = read_jobs(paths.jobs)
    if not jobs:
        return [], ""
    stages = {str(job["job_id"]): str(job.get("stage", "train")) for job in jobs}
    try:
        states = job_states(list(stages))
    except ToolError as error:
        unknown = [{"job_id": job_id, "stage": stage, "state": "unknown"} for job_id, stage in stages.items()]
        return unknown, str(error)
    known = {state.base for state in states}
    found = [_told(state, stages[state.base]) for state in states]
    found += [
        {"job_id": job_id, "stage": stage, "state": "over, Slurm no longer knows it"}
        for job_id, stage in stages.items()
        if job_id not in known
    ]
    return sorted(found, key=lambda job: (int(job["job_id"].partition("_")[0]), job["job_id"])), ""


def _told(state: JobState, stage: str) -> dict[str, Any]:
    return {
        "job_id": state.job_id,
        "stage": stage,
        "state": str(state),
        "slurm_state": state.state,
        "restarts": state.restarts,
        "source": state.source,
    }


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.0f} s" if seconds < 120 else str(timedelta(seconds=round(seconds)))


def json_of(status: RunStatus) -> str:
    """Return the status as one JSON object on one line."""
    return json.dumps(status.__dict__, sort_keys=True)
