"""What is looked at on the login node before anything is queued: every problem at once, and what follows from it."""

import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.check import combination_problems, file_problems
from launch.slurm.jobs import read_jobs
from launch.slurm.queue import live_jobs
from launch.slurm.render import job_options
from launch.slurm.sbatch import call, refusal_of
from launch.submit.chain import Job
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, ToolError
from pipeline.paths import RunPaths, autoencoder_folder, dataset_folder, dataset_places, text_encoder_folder
from pipeline.plan.estimate import checkpoint_bytes
from pipeline.plan.memory import GIB, device_memory
from pipeline.plan.workload import Workload, workload_of
from pipeline.publish import temporary_beside
from pipeline.storage import is_remote

PROBE_BYTES = 64 << 20
# Between Slurm's warning and the end: one save may have just begun for a checkpoint that was due.
SAVES_IN_LEAD = 2
SLURM_TIMEOUT_SECONDS = 30.0


@dataclass
class Findings:
    """What a look has found: problems stop the submission, facts are told."""

    problems: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def preflight(
    config: RunConfig, run: RunPaths, jobs: Sequence[Job], where: str, *, awaits_data: bool = False
) -> list[str]:
    """Return lines about what was found, with the folders of the run made; where a problem is found nothing is.

    `awaits_data`: another job makes the data set before these begin.

    Raises:
        ConfigError: with a line for each problem of the config, its files, its size, the disk and Slurm's answer.
        ToolError: when Slurm does not answer and nothing else is wrong.
    """
    found, stages = Findings(), {job.stage for job in jobs}
    found.problems += [
        f"{where}: {line}" for line in [*combination_problems(config), *file_problems(config, run)]
    ]
    if not awaits_data:
        found.problems += input_problems(config, run, trains_only="encode" not in stages)
    outputs = _outputs(config, run, jobs)
    unwritable = [line for place in outputs if (line := write_problem(place))]
    found.problems += unwritable
    save_seconds = 0.0
    if "train" in stages:
        workload = workload_of(config, run)
        look_at_memory(workload, found)
        if not unwritable:
            save_seconds = look_at_disk(workload, nearest_folder(run.root), found)
    silent = ""
    if config.cluster.scheduler == "slurm":
        try:
            ask_slurm(run, jobs, found)
            if save_seconds:
                look_at_grace(config, save_seconds, found)
        except ToolError as error:
            silent = str(error)
    if found.problems:
        raise ConfigError(found.problems)
    if silent:
        raise ToolError(silent)
    for place in outputs:
        place.mkdir(parents=True, exist_ok=True)
    return found.facts


def input_problems(config: RunConfig, run: RunPaths, *, trains_only: bool) -> list[str]:
    """Return a line for each input that only a stage before could have made: data set, or encoders."""
    if trains_only:
        return [
            f"{place}: no finished data set (manifest.json); `--stage all` makes it first"
            for place in dataset_places(config, run)
            if not is_remote(place) and not (Path(place) / "manifest.json").is_file()
        ]
    if config.first_stage is None:
        return []
    folders = {"autoencoder": autoencoder_folder(config, run), "clip": text_encoder_folder(config, run)}
    return [
        f"{folder}: not trained yet; `ldm train-{name} CONFIG` comes before the data is encoded"
        for name, folder in folders.items()
        if not folder.is_dir()
    ]


def nearest_folder(folder: Path) -> Path:
    """Return `folder`, or the first above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def write_problem(folder: Path) -> str:
    """Try to write where `folder` is or would be made; return why that does not work, empty if it does."""
    try:
        probe = temporary_beside(nearest_folder(folder) / "probe")
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return f"{folder}: cannot be written ({error.strerror}); the job would fail there: choose another with `runs`"
    return ""


def look_at_memory(workload: Workload, found: Findings) -> None:
    """Compare what a rank takes with the GPU's memory, where the site says how much that is."""
    cluster, engine = workload.config.cluster, workload.config.engine
    if not cluster.gpus_per_node or not cluster.gpu_memory_gib:
        return
    memory = device_memory(workload, cluster.nodes * cluster.tasks_per_node, engine.micro_batch)
    line = f"about {memory.gib:.0f} GiB a rank of {cluster.gpu_memory_gib} GiB on a GPU"
    if memory.gib <= cluster.gpu_memory_gib:
        found.facts.append(f"memory       {line}")
        return
    found.problems.append(
        f"engine.micro_batch: {engine.micro_batch} takes {line}; lower it (the global batch and the result stay),"
        " raise engine.zero_stage, or set engine.activation_checkpointing"
    )


def look_at_disk(workload: Workload, folder: Path, found: Findings) -> float:
    """Compare the checkpoints with the free disk and a save with the warning; return seconds of a save."""
    each_bytes, count = checkpoint_bytes(workload), kept_checkpoints(workload.config)
    free_bytes = shutil.disk_usage(folder).free
    line = f"{count} checkpoints of {each_bytes / GIB:.1f} GiB in {folder}, {free_bytes / GIB:.0f} GiB free"
    if count * each_bytes > free_bytes:
        found.problems.append(
            f"train.keep_last: {line}; free some, or lower train.keep_last or raise train.keep_every"
        )
        return 0.0
    found.facts.append(f"disk         {line}")
    try:
        rate = write_rate(folder)
    except OSError as error:
        found.problems.append(f"{folder}: writing {PROBE_BYTES >> 20} MiB failed ({error.strerror})")
        return 0.0
    seconds, lead = each_bytes / rate, workload.config.cluster.signal_lead_seconds
    line = f"a save takes at most {seconds:.0f} s at the {rate / 1e6:.0f} MB/s written from here"
    if SAVES_IN_LEAD * seconds > lead:
        found.problems.append(
            f"cluster.signal_lead_seconds: {lead}, but {line}: the warning must leave time for {SAVES_IN_LEAD} saves;"
            f" at least {SAVES_IN_LEAD * seconds:.0f}"
        )
    found.facts.append(f"saving       {line}; the warning comes {lead} s before the time limit")
    return seconds


def kept_checkpoints(config: RunConfig) -> int:
    """Return how many checkpoints lie on the disk at most: those kept, those kept for good, one being written."""
    for_good = config.train.steps // config.train.keep_every if config.train.keep_every else 0
    return config.train.keep_last + for_good + 1


def write_rate(folder: Path) -> float:
    """Return how many bytes a second this machine writes to `folder`, forced to the disk; nothing stays."""
    probe, payload = temporary_beside(folder / "rate"), os.urandom(1 << 20)
    began_seconds = time.monotonic()
    try:
        with probe.open("wb") as stream:
            for _ in range(PROBE_BYTES >> 20):
                stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        return PROBE_BYTES / (time.monotonic() - began_seconds)
    finally:
        probe.unlink(missing_ok=True)


def ask_slurm(run: RunPaths, jobs: Sequence[Job], found: Findings) -> None:
    """Refuse a second copy of a run that is in the queue, and ask sbatch whether each job could ever run.

    Raises:
        ToolError: when Slurm is missing or does not answer.
    """
    known = [str(job["job_id"]) for job in read_jobs(run.jobs)]
    for state in live_jobs(known):
        found.problems.append(
            f"{run.root}: job {state.job_id} of this run is {state.state}; `ldm cancel {run.root}` ends it with a"
            " checkpoint, or wait for it"
        )
    for job in jobs:
        refusal = refusal_of(job.text.script, job_options(job.config, job.run, job.stage))
        if refusal:
            found.problems.append(f"{job.stage}: Slurm would never run this job: {refusal}")


def look_at_grace(config: RunConfig, save_seconds: float, found: Findings) -> None:
    """Say what an end without a warning costs: `scancel` and preemption leave KillWait, and the partition's grace."""
    said = call(("scontrol", "show", "config"), timeout_seconds=SLURM_TIMEOUT_SECONDS).stdout
    match = re.search(r"^KillWait\s*=\s*(\d+)", said, re.MULTILINE)
    if match is None:
        return
    partition = (config.cluster.partition,) if config.cluster.partition else ()
    said = call(
        ("scontrol", "--oneliner", "show", "partition", *partition), timeout_seconds=SLURM_TIMEOUT_SECONDS
    ).stdout
    grace = max((int(seconds) for seconds in re.findall(r"GraceTime=(\d+)", said)), default=0)
    seconds = int(match[1]) + grace
    if save_seconds > seconds:
        found.facts.append(
            f"warning      a preemption or scancel leaves {seconds} s (KillWait {match[1]}, GraceTime {grace}), less than a"
            " save: it costs the steps since the last checkpoint"
        )
    else:
        found.facts.append(f"grace        a preemption or scancel leaves {seconds} s, enough for a save")


def _outputs(config: RunConfig, run: RunPaths, jobs: Sequence[Job]) -> list[Path]:
    """Return the folders that the jobs write to."""
    folders = {job.run.root: None for job in jobs} | {run.log: None}
    if any(job.stage == "encode" for job in jobs):
        folders[dataset_folder(config, run)] = None
    return list(folders)
