"""The jobs of a submission and what each waits for: encode -> finalize -> rehearse -> train."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.nodes import Placement
from launch.slurm.render import Stage, render_job
from launch.slurm.sbatch import call
from launch.slurm.submission import JobText, SubmittedJob, resolved_config, script_path, submit_script
from launch.submit.variants import rehearsal
from pipeline import publish
from pipeline.config import RunConfig
from pipeline.config_file import dump_config
from pipeline.errors import PipelineError, ToolError
from pipeline.paths import RunPaths
from pipeline.tracking import config_for_later

Wish = Literal["encode", "train", "all"]
VERBS = {"encode": "encode", "finalize": "finalize", "rehearse": "train", "train": "train"}
# How a job waits for the one before: finalize looks for itself whether the workers have left anything undone.
AFTER = {"finalize": "afterany", "rehearse": "afterok", "train": "afterok"}


@dataclass(frozen=True)
class Job:
    """One job of the chain: its text, the config that it reads and the run whose folder it writes to."""

    text: JobText
    config: RunConfig
    run: RunPaths

    @property
    def stage(self) -> Stage:
        """The stage's name."""
        return self.text.stage


@dataclass(frozen=True)
class Surroundings:
    """What a job takes along from where it was submitted: that folder, the code of its own, the user's consent."""

    folder: Path
    code: Path | None = None
    accept_data_change: bool = False


def stages_of(wish: Wish, *, rehearse: bool) -> tuple[Stage, ...]:
    """Return the stages of a wish in order."""
    made: tuple[Stage, ...] = ("encode", "finalize") if wish != "train" else ()
    trained: tuple[Stage, ...] = ("rehearse", "train") if rehearse else ("train",)
    return made + (trained if wish != "encode" else ())


def plan_jobs(config: RunConfig, run: RunPaths, stages: Sequence[Stage], around: Surroundings) -> list[Job]:
    """Return the jobs of `stages`, rendered; writes nothing.

    Raises:
        ConfigError: where `render_job` refuses a value.
    """
    jobs = []
    for stage in stages:
        own, place = config, run
        if stage == "rehearse":
            earlier = run.root.glob(f"rehearsal-*/{resolved_config(run).name}")
            own = rehearsal(config, run, len(list(earlier)) + 1)
            place = RunPaths(run.root / own.name)
        python = sys.executable if config.cluster.container.kind == "none" else "python"
        command: tuple[str, ...] = (python, "-m", "launch.cli", VERBS[stage], str(resolved_config(place)))
        if stage == "train" and around.accept_data_change:
            command += ("--accept-data-change",)
        script = render_job(
            own, run=place, command=command, stage=stage, code=around.code, folder=around.folder
        )
        jobs.append(Job(JobText(stage, command, script), own, place))
    return jobs


def describe_jobs(jobs: Sequence[Job]) -> str:
    """Return every script, under the command that would hand it to Slurm and what it would wait for."""
    pages = []
    for number, job in enumerate(jobs):
        before = jobs[number - 1].stage.upper() if number else None
        words = ("sbatch", "--parsable", *_waiting(job.stage, f"${before}" if before else None))
        pages.append(f"# {job.stage}: {' '.join(words)} {script_path(job.run, job.stage)}\n{job.text.script}")
    return "\n".join(pages)


def write_configs(jobs: Sequence[Job]) -> None:
    """Write the resolved config that each job reads, so that no later edit reaches a job in the queue."""
    for job in jobs:
        publish.write_bytes(resolved_config(job.run), dump_config(config_for_later(job.config)).encode())


def submit_jobs(jobs: Sequence[Job], record: Path, *, after: str | None = None) -> list[SubmittedJob]:
    """Hand the jobs to Slurm, each waiting for the one before (the first for job `after`), all of them or none.

    Raises:
        ToolError: when Slurm refuses one; those before it are cancelled.
    """
    submitted: list[SubmittedJob] = []
    for job in jobs:
        options = _waiting(job.stage, after)
        try:
            done = submit_script(job.config, job.run, job.text, record=record, options=options)
        except PipelineError:
            ids = [earlier.job_id for earlier in submitted if earlier.job_id]
            if ids:
                call(("scancel", *ids), timeout_seconds=60.0)
            raise
        submitted.append(done)
        after = done.job_id
    return submitted


def run_here(jobs: Sequence[Job]) -> None:
    """Run the jobs on this machine, one after the other, their output on the terminal.

    Raises:
        SystemExit: with the exit code of the first that failed.
        ToolError: when a program cannot be started.
    """
    for job in jobs:
        try:
            code = subprocess.run(job.text.command, stdin=subprocess.DEVNULL, check=False).returncode
        except OSError as error:
            raise ToolError(f"{job.text.command[0]}: cannot be started ({error.strerror})") from None
        if code:
            raise SystemExit(code if code > 0 else 128 - code)


def worker_of(placement: Placement, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the number of this encode worker among those of the whole job array, and how many those are.

    It decides which shards a worker begins with: elements that all began with the first would get in each other's way.
    """
    element, elements = (environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT"))
    if placement.source != "slurm" or not (element.isdecimal() and elements.isdecimal()):
        return placement.rank, placement.world_size
    number = int(element) % int(elements)  # An array that was submitted by hand may begin elsewhere.
    return number * placement.world_size + placement.rank, int(elements) * placement.world_size


def _waiting(stage: Stage, after: str | None) -> tuple[str, ...]:
    """Return sbatch's options that make a job wait; without the second it would wait for a failed one for ever."""
    if after is None:
        return ()
    return (f"--dependency={AFTER.get(stage, 'afterok')}:{after}", "--kill-on-invalid-dep=yes")
