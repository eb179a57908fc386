"""Slurm's commands, called without a shell: the answer, or one line about why there is none."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from pipeline.errors import ToolError

SBATCH_TIMEOUT_SECONDS = 120.0
# Variables by which sbatch reads an option, where the name is not SBATCH_ and the option.
SBATCH_NAMES = {"SBATCH_TIMELIMIT": "time", "SBATCH_NO_REQUEUE": "requeue", "SBATCH_ARRAY_INX": "array"}
SBATCH_NAMES |= {f"SBATCH_MEM_PER_{unit}": "mem" for unit in ("NODE", "CPU", "GPU")}
NOBODY_ANSWERS = ("contact slurm controller", "configuration source")
PREFIX = re.compile(r"^[a-z]+: (?:error: |fatal: )?")


def call(
    command: Sequence[str],
    *,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
    text: str = "",
) -> subprocess.CompletedProcess[str]:
    """Return what one of Slurm's commands answered to `text` on its standard input, whatever its exit code.

    Raises:
        ToolError: when it is not installed or does not answer in time.
    """
    name = command[0]
    try:
        return subprocess.run(
            list(command),
            env=None if environment is None else dict(environment),
            input=text,
            capture_output=True,
            timeout=timeout_seconds,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise ToolError(
            f"{name}: not found on this machine; submit from a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise ToolError(
            f"{name}: no answer within {timeout_seconds:g} s; look at `squeue --me` before you submit again"
        ) from None


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command said on standard error, as one line without its own name in front."""
    said = [PREFIX.sub("", line) for line in done.stderr.splitlines() if line]
    return "; ".join(dict.fromkeys(said)) or "no reason"


def submission_environment(environment: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for sbatch, without what would overrule the script or belongs to an enclosing job.

    sbatch's SBATCH_* variables win over `#SBATCH` lines, so those of options that the script sets go; a site's
    others (SBATCH_RESERVATION, or SBATCH_ACCOUNT where the config names none) stay.
    """
    decided = {*options, *(["requeue"] if "no-requeue" in options else [])}
    kept = {}
    for name, value in environment.items():
        option = SBATCH_NAMES.get(name) or name.removeprefix("SBATCH_").lower().replace("_", "-")
        enclosing = name.startswith(("SLURM_", "SRUN_")) and name != "SLURM_CONF"
        if not enclosing and not (name.startswith("SBATCH_") and option in decided):
            kept[name] = value
    return kept


def run_sbatch(sbatch: Sequence[str], options: Mapping[str, str]) -> tuple[str, str | None]:
    """Hand a script to Slurm; return the job's id and its cluster's name, None where there is only one.

    Raises:
        ToolError: if sbatch is missing, refuses the job or does not answer.
    """
    done = _run(sbatch, options)
    if done.returncode:
        raise ToolError(f"sbatch refused {sbatch[-1]} (exit code {done.returncode}): {complaint(done)}")
    answer = (done.stdout.strip().splitlines()[-1:] or [""])[0]
    if not re.fullmatch(r"\d+(;\S+)?", answer):
        raise ToolError(f"sbatch: answered {done.stdout!r} where a job id was due; look at `squeue --me`")
    job_id, _, cluster = answer.partition(";")
    return job_id, cluster or None


def refusal_of(script: str, options: Mapping[str, str]) -> str | None:
    """Return why Slurm would never run `script`, None if it would; nothing is submitted or written.

    Without this question a job that no set of nodes can hold waits for ever.

    Raises:
        ToolError: if sbatch is missing, or nobody answers it.
    """
    environment = submission_environment(os.environ, options)
    words = ("sbatch", "--test-only")
    done = call(words, timeout_seconds=SBATCH_TIMEOUT_SECONDS, environment=environment, text=script)
    if done.returncode and any(words in done.stderr for words in NOBODY_ANSWERS):
        raise ToolError(
            f"sbatch: {complaint(done)}; is slurmctld up, and this machine a login node of its cluster?"
        )
    return complaint(done) if done.returncode else None


def _run(sbatch: Sequence[str], options: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    environment = submission_environment(os.environ, options)
    return call(sbatch, timeout_seconds=SBATCH_TIMEOUT_SECONDS, environment=environment)
