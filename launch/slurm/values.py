"""What may stand in a job: every value that Slurm or bash could misread is refused, all of them at once."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import ClusterConfig, RunConfig

# sbatch splits `#SBATCH` values at spaces and expands %; a value outside of these patterns could add an option.
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_@.,+-]*")
FEATURES = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,&|*:()\[\]-]*")
HOSTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,-]*(\[[0-9,-]+\][A-Za-z0-9_.,-]*)*")
PATH = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_@.,+=:/~-]*")
# Both runtimes split mounts at commas and colons.
MOUNT = re.compile(r"/[A-Za-z0-9_@.+=/~-]*(:/[A-Za-z0-9_@.+=/~-]*(:r[ow])?)?")
TIME = re.compile(r"(?:(\d{1,4})-)?(\d{1,2}):([0-5]\d):([0-5]\d)", re.ASCII)
PATTERNS = {
    "job-name": WORD,
    "partition": WORD,
    "account": WORD,
    "qos": WORD,
    "constraint": FEATURES,
    "output": PATH,
}
LOG_NAMES = ("/job-%j.txt", "/job-%A_%a.txt")


def job_problems(config: RunConfig, options: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """Return a line for each value that cannot be handed to Slurm or to bash, or that cannot work."""
    cluster = config.cluster
    problems = [
        f"cluster: --{name}={options[name]!r} would be misread by sbatch; allowed: {pattern.pattern}"
        for name, pattern in PATTERNS.items()
        if name in options and not pattern.fullmatch(_without_log_name(options[name]))
    ]
    problems += [
        f"cluster.exclude: {host!r} is no host list such as node[1-3,7]"
        for host in cluster.exclude
        if not HOSTS.fullmatch(host)
    ]
    problems += _time_problems(cluster)
    problems += _size_problems(config)
    if not command:
        problems.append("the job's command is empty")
    texts = (*cluster.setup, *command, *cluster.nccl.values(), cluster.container.image or "")
    problems += [
        f"{text!r}: bash cannot hold this text (NUL or a lone surrogate); remove that character"
        for text in texts
        if not _is_passable(text)
    ]
    return problems


def mount_problems(config: RunConfig, shown: Sequence[Path]) -> list[str]:
    """Return a line for each folder that a container cannot be shown; `shown` are those it always is."""
    container = config.cluster.container
    if container.kind == "none":
        return []
    problems = [
        f"cluster.container.mounts: {mount!r} is not FOLDER or FOLDER:INSIDE[:ro] with absolute folders"
        for mount in container.mounts
        if not MOUNT.fullmatch(mount)
    ]
    problems += [
        f"cluster.container: {str(folder)!r} cannot be shown to {container.kind}, which splits names at commas, colons"
        " and spaces; use another folder"
        for folder in shown
        if ":" in str(folder) or not MOUNT.fullmatch(str(folder))
    ]
    return problems


def limit_seconds(cluster: ClusterConfig) -> int | None:
    """Return the job's time limit in seconds, None where `cluster.time` is none."""
    match = TIME.fullmatch(cluster.time)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _without_log_name(value: str) -> str:
    for name in LOG_NAMES:
        value = value.removesuffix(name)
    return value


def _size_problems(config: RunConfig) -> list[str]:
    cluster, engine = config.cluster, config.engine
    ranks = cluster.nodes * cluster.tasks_per_node
    problems = []
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
    return problems


def _time_problems(cluster: ClusterConfig) -> list[str]:
    seconds = limit_seconds(cluster)
    if seconds is None:
        return [
            f"cluster.time: {cluster.time!r} is not [days-]hours:minutes:seconds with minutes and seconds below 60"
        ]
    if seconds <= cluster.signal_lead_seconds:
        return [
            f"cluster.time: {cluster.time} is {seconds} s, not longer than signal_lead_seconds"
            f" {cluster.signal_lead_seconds}: the job would be told to stop before it starts"
        ]
    return []


def _is_passable(text: str) -> bool:
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
