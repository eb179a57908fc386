"""Under which commit, on which machine and beside which load a benchmark ran."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ("torch", "numpy", "deepspeed", "diffusers", "transformers")
HERE = Path(__file__).resolve().parent


def conditions_now() -> dict[str, str]:
    """Return commit, date, CPU model, cores, threads, load and versions as text.

    No host name, user or path: the CSV is committed.
    """
    return {
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "load_before": f"{os.getloadavg()[0]:.2f}",
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def commit() -> str:
    """Return the commit of this checkout, with `+uncommitted` where the working tree differs from it."""
    head = _git("rev-parse", "--verify", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}+uncommitted" if _git("status", "--porcelain") else head


def cpu_model() -> str:
    """Return the CPU's name as the kernel gives it."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
