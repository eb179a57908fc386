"""From a config to a Slurm job: the text of the batch script as a pure function, and its submission.

Values of the config reach the script in two ways only: `#SBATCH` lines, whose values must match a narrow pattern,
and quoted assignments at its top. The rest, `launch.batch.BODY`, is the same for every job.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.batch import BODY
from launch.nodes import FIRST_PORT, PORT_STRIDE, PORTS
from pipeline import publish
from pipeline.config import ClusterConfig, RunConfig
from pipeline.config_file import dump_config
from pipeline.errors import ConfigError, StoppedError, ToolError
from pipeline.paths import RunPaths

SBATCH_TIMEOUT_SECONDS = 120
# sbatch splits `#SBATCH` values at spaces and expands %; a value outside of these patterns could add an option.
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_@.,+-]*")
HOSTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*(\[[0-9,-]+\][A-Za-z0-9_.,-]*)*")
PATH = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_@.,+=:/~-]*")
TIME = re.compile(r"(?:(\d{1,4})-)?(\d{1,2}):([0-5]\d):([0-5]\d)", re.ASCII)
# Variables by which sbatch reads an option, where the name is not SBATCH_ and the option.
SBATCH_NAMES = {"SBATCH_TIMELIMIT": "time", "SBATCH_NO_REQUEUE": "requeue"}
SBATCH_NAMES |= {f"SBATCH_MEM_PER_{unit}": "mem" for unit in ("NODE", "CPU", "GPU")}


@dataclass(frozen=True)
class SubmittedJob:
    """A batch script, the command that hands it to Slurm, and the job's id (None after a dry run)."""

    script: str
    sbatch: tuple[str, ...]
    job_id: str | None


def render_job(config: RunConfig, *, run: RunPaths, command: Sequence[str]) -> str:
    """Return the batch script that runs `command` once for each device of the config's cluster section.

    Raises:
        ConfigError: with a line for each value that Slurm could misread or that cannot work.
    """
    options = job_options(config, run)
    problems = _problems(config, options, command)
    if problems:
        raise ConfigError(problems)
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in options.items()]
    lines += [
        "",
        f"ldm_log={quoted(str(run.log))}",
        f"ldm_threads={config.engine.threads} ldm_stopped_code={StoppedError.exit_code}",
        f"ldm_first_port={FIRST_PORT} ldm_port_stride={PORT_STRIDE} ldm_ports={PORTS}",
        f"ldm_setup=({' '.join(quoted(line) for line in config.cluster.setup)})",
        f"ldm_command=({' '.join(quoted(argument) for argument in command)})",
        "",
    ]
    return "\n".join(lines) + "\n" + BODY


def job_options(config: RunConfig, run: RunPaths) -> dict[str, str]:
    """Return sbatch's options for this run, in the order of the script; an empty value is a bare flag."""
    cluster = config.cluster
    options = {
        "job-name": config.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.tasks_per_node),
        "gpus-per-node": str(cluster.gpus_per_node) if cluster.gpus_per_node else None,
        "cpus-per-task": str(cluster.cpus_per_task),
        "mem": f"{cluster.memory_gib_per_node}G" if cluster.memory_gib_per_node else "0",
        "time": cluster.time,
        "exclude": ",".join(cluster.exclude) or None,
        "requeue": "",
        "open-mode": "append",
        "signal": f"B:USR2@{cluster.signal_lead_seconds}",
        "export": "ALL",
        "output": f"{run.log}/job-%j.txt",
    }
    return {name: value for name, value in options.items() if value is not None}


def quoted(text: str) -> str:
    """Return `text` as one word of bash on one line: control characters as escapes, else as `shlex.quote` does."""
    if text.isprintable():
        return shlex.quote(text)
    special = {"\\": "\\\\", "'": "\\'"}
    return (
        "$'"
        + "".join(special.get(sign) or (sign if sign.isprintable() else _escape(sign)) for sign in text)
        + "'"
    )


def _escape(sign: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", "surrogateescape"))


def _problems(config: RunConfig, options: Mapping[str, str], command: Sequence[str]) -> list[str]:
    cluster, engine = config.cluster, config.engine
    ranks = cluster.nodes * cluster.tasks_per_node
    problems = [
        f"cluster: --{name}={options[name]!r} would be misread by sbatch; allowed: {pattern.pattern}"
        for name, pattern in (("job-name", WORD), ("partition", WORD), ("account", WORD), ("output", PATH))
        if name in options and not pattern.fullmatch(options[name].removesuffix("/job-%j.txt"))
    ]
    problems += [
        f"cluster.exclude: {host!r} is no host list such as node[1-3,7]"
        for host in cluster.exclude
        if not HOSTS.fullmatch(host)
    ]
    problems += _time_problems(cluster)
    if cluster.gpus_per_node and cluster.tasks_per_node != cluster.gpus_per_node:
        problems.append(
            f"cluster.tasks_per_node: {cluster.tasks_per_node} with gpus_per_node {cluster.gpus_per_node}:"
            " a task drives one device, so the two must be equal"
        )
    if engine.global_batch < ranks:
        problems.append(
            f"engine.global_batch: {engine.global_batch} is smaller than {cluster.nodes} nodes x"
            f" {cluster.tasks_per_node} tasks = {ranks} ranks: every rank needs a sample a step"
        )
    if engine.threads > cluster.cpus_per_task:
        problems.append(
            f"engine.threads: {engine.threads} is more than cluster.cpus_per_task {cluster.cpus_per_task}; raise that"
        )
    if not command:
        problems.append("the job's command is empty")
    problems += [
        f"{text!r}: bash cannot hold this text (NUL or a lone surrogate); remove that character"
        for text in (*cluster.setup, *command)
        if not _is_passable(text)
    ]
    return problems


def _is_passable(text: str) -> bool:
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


def _time_problems(cluster: ClusterConfig) -> list[str]:
    match = TIME.fullmatch(cluster.time)
    if match is None:
        return [
            f"cluster.time: {cluster.time!r} is not [days-]hours:minutes:seconds with minutes and seconds below 60"
        ]
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    limit_seconds = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if limit_seconds <= cluster.signal_lead_seconds:
        return [
            f"cluster.time: {cluster.time} is {limit_seconds} s, not longer than signal_lead_seconds"
            f" {cluster.signal_lead_seconds}: the job would be told to stop before it starts"
        ]
    return []


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
    resolved = run.sbatch.with_suffix(".yaml")
    command = list(command or (sys.executable, "-m", "launch.cli", "train", str(resolved)))
    script = render_job(config, run=run, command=command)
    sbatch = ("sbatch", "--parsable", str(run.sbatch))
    if dry_run:
        return SubmittedJob(script, sbatch, None)
    jobs = _read_jobs(run.jobs)
    run.log.mkdir(parents=True, exist_ok=True)
    publish.write_bytes(resolved, dump_config(config).encode())
    publish.write_bytes(run.sbatch, script.encode())
    job_id, _, cluster_name = _run_sbatch(sbatch, job_options(config, run)).partition(";")
    jobs.append(
        {
            "job_id": job_id,
            "cluster": cluster_name or None,
            "submitted_unix_seconds": int(time.time()),
            "command": command,
            "nodes": config.cluster.nodes,
            "tasks_per_node": config.cluster.tasks_per_node,
            "script_sha256": publish.file_digest(run.sbatch),
        }
    )
    publish.write_json(run.jobs, {"jobs": jobs})
    return SubmittedJob(script, sbatch, job_id)


def submission_environment(environment: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for sbatch, without what would overrule the script or belongs to an enclosing job.

    sbatch's SBATCH_* variables win over `#SBATCH` lines, so those of options that the script sets go; a site's
    others (SBATCH_RESERVATION, or SBATCH_ACCOUNT where the config names none) stay.
    """
    kept = {}
    for name, value in environment.items():
        option = SBATCH_NAMES.get(name) or name.removeprefix("SBATCH_").lower().replace("_", "-")
        enclosing = name.startswith(("SLURM_", "SRUN_")) and name != "SLURM_CONF"
        if not enclosing and not (name.startswith("SBATCH_") and option in options):
            kept[name] = value
    return kept


def _run_sbatch(sbatch: Sequence[str], options: Mapping[str, str]) -> str:
    """Run sbatch and return its parsable answer, `JOB` or `JOB;CLUSTER`."""
    try:
        done = subprocess.run(
            list(sbatch),
            env=submission_environment(os.environ, options),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SBATCH_TIMEOUT_SECONDS,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise ToolError(
            "sbatch: not found on this machine; submit from a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise ToolError(
            f"sbatch: no answer within {SBATCH_TIMEOUT_SECONDS} s; look at `squeue --me` before you submit again"
        ) from None
    if done.returncode:
        said = [
            line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines() if line
        ]
        raise ToolError(
            f"sbatch refused {sbatch[-1]} (exit code {done.returncode}): {'; '.join(said) or 'no reason'}"
        )
    answer = done.stdout.strip().splitlines()[-1:] or [""]
    if not re.fullmatch(r"\d+(;\S+)?", answer[0]):
        raise ToolError(f"sbatch: answered {done.stdout!r} where a job id was due; look at `squeue --me`")
    return answer[0]


def _read_jobs(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    try:
        jobs = json.loads(path.read_text(encoding="utf-8"))["jobs"]
        if isinstance(jobs, list):
            return jobs
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"{path}: not a record of jobs; move it away, Slurm itself still knows them (`squeue --me`)"
    )
