"""What a run says of each of its starts: code, versions, machine, and what it went on from; one JSON line each.

Written beside the records, so that whoever sends them later, from another machine, tells of this one.
"""

import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pipeline
from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from pipeline.tracking.redaction import redact

LIBRARIES = ("torch", "deepspeed", "diffusers", "transformers", "safetensors", "numpy", "ldm")
PACKAGES = ("pipeline", "preprocessing", "launch")
GIT_TIMEOUT_SECONDS = 20.0
ALLOWED_ENVIRONMENT = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "SLURM_ARRAY_TASK_ID",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "DS_ACCELERATOR",
)
"""All of the environment that is ever written down."""


def start_facts(
    paths: RunPaths,
    config: RunConfig,
    kind: str,
    attempt: str,
    resumed_step: int,
    hosts: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what is told of one start, without secrets."""
    facts: dict[str, Any] = {
        "time": time.time(),
        "kind": kind,
        "attempt": attempt,
        "host": socket.gethostname(),
    }
    if hosts:
        facts |= {"hosts": sorted(set(hosts)), "processes": len(hosts)}
    facts |= {"resumed_step": resumed_step, "versions": versions(), "code": commit_of(code_root())}
    facts["environment"] = {name: os.environ[name] for name in ALLOWED_ENVIRONMENT if name in os.environ}
    if kind == "train":
        if resumed_step:
            checkpoint = paths.checkpoints / f"step-{resumed_step:08d}"
            facts["resumed_from"] = checkpoint.relative_to(paths.root).as_posix()
        if config.warm_start is not None:
            facts["forked_from"] = _origin(config)
    told: dict[str, Any] = redact(facts)
    return told


def versions() -> dict[str, str]:
    """Return the versions of Python, the libraries that shape a training, and this code."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_root() -> Path:
    """Return the folder that this code is imported from: a clone, or the copy that a job was submitted with."""
    return Path(pipeline.__file__).resolve().parents[1]


def commit_of(root: Path) -> dict[str, Any]:
    """Return the commit of the clone at `root`, this project's files changed since, and lines added and removed.

    In a job's copy of the code, what `commit.json` says; None without git.
    """
    copied = root / "commit.json"
    if copied.is_file():
        kept = read_object(copied)
        return {
            "commit": kept.get("commit"),
            "changed": kept.get("changed", []),
            "diff_lines": kept.get("diff_lines"),
        }
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return {"commit": None, "changed": [], "diff_lines": None}
    changed = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *PACKAGES) or ""
    lines = (_git(root, "diff", "--numstat", "HEAD", "--", *PACKAGES) or "").split("\n")
    counts = [word for line in lines for word in line.split("\t")[:2] if word.isdigit()]
    return {
        "commit": commit.strip(),
        "changed": [line[3:] for line in changed.splitlines()],
        "diff_lines": sum(map(int, counts)),
    }


def read_starts(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return what was told of the starts of `kind`, oldest first; a torn line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and told.get("kind") == kind:
            found.append(told)
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file, or an empty one where the file is absent or says something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def tracked_run(folder: Path, kind: str) -> str | None:
    """Return the MLflow run that stands for `kind` of work in the run folder; None where it has none."""
    kept = read_object(folder / "mlflow_run.json").get(kind)
    run_id = kept.get("run_id") if isinstance(kept, Mapping) else None
    return run_id if isinstance(run_id, str) else None


def _origin(config: RunConfig) -> dict[str, Any]:
    assert config.warm_start is not None
    begun = config.warm_start.model_dump(mode="json")
    source = Path(begun["source"])
    folders = (source, source.parent.parent)  # A run, or a checkpoint in its folder of checkpoints.
    known = next((run for folder in folders if (run := tracked_run(folder, "train"))), None)
    return begun | ({"mlflow_run": known} if known else {})


def _git(root: Path, *words: str) -> str | None:
    command = ("git", "-C", str(root), "--no-optional-locks", *words)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
