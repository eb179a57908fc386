"""`ldm cancel`: a run ends with a checkpoint and does not come back by itself."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from launch.slurm.jobs import read_jobs
from launch.slurm.queue import JobState, live_jobs
from launch.slurm.sbatch import call, complaint
from launch.submit.variants import SWEEP_NAME
from pipeline.errors import ConfigError, ToolError
from pipeline.paths import RunPaths
from pipeline.publish import write_bytes
from pipeline.training.saving.manifest import committed, step_of

TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 1.0
TRAINS = ("train", "rehearse")


def cancel(
    root: Path,
    *,
    wait_seconds: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """End a run, or every run of a sweep, and return a line about each. Raises what `cancel_run` raises."""
    parent = RunPaths(root)
    if not (root / SWEEP_NAME).is_file():
        return cancel_run(parent, wait_seconds=wait_seconds, say=say, clock=clock)
    children = json.loads((root / SWEEP_NAME).read_text(encoding="utf-8"))["runs"]
    runs = [*([parent] if parent.jobs.is_file() else []), *(RunPaths(root / name) for name in children)]
    return "\n".join(cancel_run(run, wait_seconds=wait_seconds, say=say, clock=clock) for run in runs)


def cancel_run(
    run: RunPaths,
    *,
    wait_seconds: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """End every job of the run and return what it ends with; running training saves before it goes.

    First the mark that nothing may go on, then jobs that wait, then those that run: a job that starts meanwhile
    finds the mark. Where the training is still there after `wait_seconds`, it is left to Slurm, which kills it.

    Raises:
        ConfigError: when the run has no job.
        ToolError: when Slurm does not answer or refuses.
    """
    jobs = read_jobs(run.jobs)
    if not jobs:
        raise ConfigError(f"{run.root}: no job was submitted for this run (no jobs.json); nothing to cancel")
    stages = {str(job["job_id"]): str(job.get("stage", "train")) for job in jobs}
    live = live_jobs(list(stages))
    if not live:
        return f"{run.root}: no job is left; {_saved(run)}"
    for place in {Path(str(job.get("run", run.root))) for job in jobs}:
        write_bytes(RunPaths(place).cancelled, b"")
    stopping = [state for state in live if state.state == "RUNNING" and stages[state.base] in TRAINS]
    ended = [state.job_id for state in live if state not in stopping]
    if ended:
        _scancel(*ended)
    for state in stopping:
        _ask_to_stop(state, say)
    deadline = clock() + wait_seconds
    while left := live_jobs(list(stages)):
        if clock() > deadline:
            _scancel(*(state.job_id for state in left))
            raise ToolError(
                f"{run.root}: {', '.join(state.job_id for state in left)} did not stop within {wait_seconds:g} s and is"
                f" left to Slurm's kill; {_saved(run)}"
            )
        # One that was about to begin when it was told to stop, or has come back from a requeue in between.
        waiting = [state.job_id for state in left if state.state == "PENDING"]
        if waiting:
            _scancel(*waiting)
        time.sleep(POLL_SECONDS)
    return f"{run.root}: cancelled; {_saved(run)}"


def _ask_to_stop(state: JobState, say: Callable[[str], None]) -> None:
    """Tell the batch script to let the ranks save, after it can no longer be requeued."""
    said = call(("scontrol", "update", f"JobId={state.job_id}", "Requeue=0"), timeout_seconds=TIMEOUT_SECONDS)
    if said.returncode:
        say(
            f"job {state.job_id}: Slurm keeps its permission to requeue ({complaint(said)}); the mark in the run stands"
        )
    say(f"job {state.job_id}: told to save and stop")
    _scancel("--batch", "--signal=USR2", state.job_id)


def _scancel(*words: str) -> None:
    done = call(("scancel", *words), timeout_seconds=TIMEOUT_SECONDS)
    over = "Invalid job id" in done.stderr or "already" in done.stderr
    if done.returncode and not over:
        raise ToolError(f"scancel: {complaint(done)}")


def _saved(run: RunPaths) -> str:
    found = committed(run.checkpoints)
    if not found:
        return "it has no checkpoint"
    return f"the last checkpoint is of step {step_of(found[-1])}; `ldm submit` goes on from there"
