"""How a job comes back: requeued under its own id, or followed by a new one; never twice."""

import json
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.jobs import add_job, read_jobs
from launch.slurm.render import Stage, job_options
from launch.slurm.sbatch import call, complaint, run_sbatch
from pipeline import publish
from pipeline.config import RunConfig
from pipeline.errors import PipelineError, ToolError
from pipeline.paths import RunPaths

SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """This job as its own environment names it."""

    job_id: str
    name: str
    """What scontrol takes: the id, or ARRAY_ELEMENT."""
    restart: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Job":
        """Return the job of a batch script's environment."""
        job_id = environment["SLURM_JOB_ID"]
        array = environment.get("SLURM_ARRAY_JOB_ID")
        name = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else job_id
        return cls(job_id, name, int(environment.get("SLURM_RESTART_COUNT") or 0))


def state_of(job: Job) -> dict[str, str]:
    """Return the fields of `scontrol show job`, none when it does not answer."""
    try:
        done = call(("scontrol", "--oneliner", "show", "job", job.name), timeout_seconds=SECONDS)
    except ToolError:
        return {}
    return dict(re.findall(r"(\w[\w:]*)=(\S*)", done.stdout))


def is_cancelled(job: Job, run: RunPaths, state: Mapping[str, str]) -> bool:
    """Return whether the user has ended this job: `scancel` sends the same TERM as a preemption does.

    Told by USR2, or in the grace before a preemption, a job is still RUNNING.
    """
    if run.cancelled.exists():
        return True
    return bool(state) and state.get("JobState") != "RUNNING" and state.get("Reason") != "TimeLimit"


def requeue(job: Job) -> str:
    """Put the job back into the queue; return why Slurm refused, or nothing. Slurm then ends this process."""
    # Slurm sends TERM to all of this job as soon as it has taken the request: to scontrol too, before it has answered.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        done = call(("scontrol", "requeue", job.name), timeout_seconds=SECONDS)
    except ToolError as error:
        return str(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    return complaint(done) if done.returncode else ""


def follow(
    job: Job, config: RunConfig, run: RunPaths, stage: Stage, exclude: Sequence[str], *, at_once: bool
) -> str:
    """Submit the same script as a new job and return its id.

    `at_once`: it may start while this job ends. A job with a dead node ends only when Slurm has given the node up,
    minutes later; otherwise the new one waits for the end of this one.

    Raises:
        ToolError: when Slurm refuses, or this job has a follower already.
    """
    followers = read_followers(run)
    if job.job_id in followers:
        raise ToolError(f"job {job.job_id} is already followed by job {followers[job.job_id]}")
    # Or Slurm itself would requeue this job once it has given the node up: a second copy.
    done = call(("scontrol", "update", f"JobId={job.job_id}", "Requeue=0"), timeout_seconds=SECONDS)
    if done.returncode:
        raise ToolError(f"scontrol refused Requeue=0: {complaint(done)}")
    script = run.sbatch if stage == "train" else run.sbatch.with_stem(f"{run.sbatch.stem}-{stage}")
    excluded = sorted({*config.cluster.exclude, *exclude})
    options = ["--parsable"]
    options += [f"--exclude={','.join(excluded)}"] if excluded else []
    options += [] if at_once else [f"--dependency=afterany:{job.job_id}"]
    new, cluster = run_sbatch(("sbatch", *options, str(script)), job_options(config, run, stage))
    publish.write_json(_followers(run), {**followers, job.job_id: new})
    try:
        before = [entry for entry in read_jobs(run.jobs) if entry["job_id"] == job.job_id]
        same = {**(before[-1] if before else {"stage": stage}), "job_id": new, "cluster": cluster}
        same |= {"submitted_unix_seconds": int(time.time()), "follows": job.job_id, "options": options[1:]}
        add_job(run.jobs, same)
    except (PipelineError, OSError) as error:
        print(f"ldm: job {new} is not in {run.jobs}: {error}", file=sys.stderr)
    return new


def read_followers(run: RunPaths) -> dict[str, str]:
    """Return which job each superseded job of this run was followed by."""
    try:
        followers: dict[str, str] = json.loads(_followers(run).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return followers


def _followers(run: RunPaths) -> Path:
    return run.supervisor / "followers.json"
