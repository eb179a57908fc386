"""One job from its text to its id: the script is written, handed over and noted down."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.jobs import add_job, read_jobs
from launch.slurm.render import Stage, job_options, render_job, shape_of
from launch.slurm.sbatch import run_sbatch
from pipeline import publish
from pipeline.config import RunConfig
from pipeline.config_file import dump_config
from pipeline.paths import RunPaths
from pipeline.tracking import config_for_later


@dataclass(frozen=True)
class SubmittedJob:
    """A batch script, the command that hands it to Slurm, and the job's id (None after a dry run)."""

    script: str
    sbatch: tuple[str, ...]
    job_id: str | None


@dataclass(frozen=True)
class JobText:
    """What one stage runs, and the batch script that does it."""

    stage: Stage
    command: tuple[str, ...]
    script: str


def submit_job(
    config: RunConfig, run: RunPaths, command: Sequence[str] | None = None, *, dry_run: bool = False
) -> SubmittedJob:
    """Hand `command` (None: the training) to Slurm as a job of this run; return what was submitted.

    Writes RUN/submit.sbatch, and RUN/submit.yaml with the resolved config, so that a requeued job does not see later
    edits. Makes RUN/log, without which Slurm would end the job before its first word. Adds the job to RUN/jobs.json.
    A dry run writes nothing and needs no Slurm.

    Raises:
        ConfigError: where `render_job` refuses a value.
        ToolError: if sbatch is missing, refuses the job or does not answer.
    """
    run = RunPaths(run.root.absolute())
    resolved = resolved_config(run)
    command = list(command or (sys.executable, "-m", "launch.cli", "train", str(resolved)))
    script = render_job(config, run=run, command=command)
    if dry_run:
        return SubmittedJob(script, ("sbatch", "--parsable", str(run.sbatch)), None)
    read_jobs(run.jobs)
    publish.write_bytes(resolved, dump_config(config_for_later(config)).encode())
    return submit_script(config, run, JobText("train", tuple(command), script), record=run.jobs)


def resolved_config(run: RunPaths) -> Path:
    """Return where the config of a submission lies, as it was then, every default and override spelt out."""
    return run.sbatch.with_suffix(".yaml")


def script_path(run: RunPaths, stage: Stage) -> Path:
    """Return where the batch script of a stage lies."""
    return run.sbatch if stage == "train" else run.sbatch.with_stem(f"{run.sbatch.stem}-{stage}")


def write_script(config: RunConfig, run: RunPaths, stage: Stage, script: str) -> Path:
    """Write the batch script of a stage and make the folders of its output, without which Slurm starts nothing."""
    run.log.mkdir(parents=True, exist_ok=True)
    for element in range(shape_of(stage, config.cluster).array):
        (run.log / f"encode-{element}").mkdir(exist_ok=True)
    path = script_path(run, stage)
    publish.write_bytes(path, script.encode())
    return path


def submit_script(
    config: RunConfig,
    run: RunPaths,
    job: JobText,
    *,
    record: Path,
    options: Sequence[str] = (),
) -> SubmittedJob:
    """Write the script of `job`, hand it to Slurm with more `options` of sbatch, and note it down in `record`.

    Raises:
        ToolError: if sbatch is missing, refuses the job or does not answer.
        ConfigError: if `record` holds something else than jobs.
    """
    read_jobs(record)  # A broken record stops the submission before it has happened.
    path = write_script(config, run, job.stage, job.script)
    sbatch = ("sbatch", "--parsable", *options, str(path))
    job_id, cluster_name = run_sbatch(sbatch, job_options(config, run, job.stage))
    shape = shape_of(job.stage, config.cluster)
    add_job(
        record,
        {
            "job_id": job_id,
            "cluster": cluster_name,
            "stage": job.stage,
            "submitted_unix_seconds": int(time.time()),
            "command": list(job.command),
            "options": list(options),
            "nodes": shape.nodes,
            "tasks_per_node": shape.tasks_per_node,
            "array": shape.array,
            "run": str(run.root),
            "script_sha256": publish.file_digest(path),
        },
    )
    return SubmittedJob(job.script, sbatch, job_id)
