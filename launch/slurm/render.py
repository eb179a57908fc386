"""From a config to the batch script of one stage: a pure function, the same text for the same arguments.

Values of the config reach the script in two ways only: `#SBATCH` lines, whose values must match a narrow pattern,
and quoted assignments at its top. The rest, `launch.batch.BODY`, is the same for every job.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.batch import BODY
from launch.slurm.values import job_problems, mount_problems
from pipeline.config import ClusterConfig, RunConfig
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths

Stage = Literal["encode", "finalize", "rehearse", "train"]


@dataclass(frozen=True)
class Shape:
    """How much of the cluster one stage asks for; `array` > 0 is so many jobs of this shape."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    spares: int = 0
    array: int = 0


def shape_of(stage: Stage, cluster: ClusterConfig) -> Shape:
    """Return what `stage` asks for: encode an array of single nodes, finalize one task, the others all nodes."""
    if stage == "encode":
        return Shape(1, cluster.tasks_per_node, cluster.gpus_per_node, array=cluster.encode_nodes)
    if stage == "finalize":
        return Shape(1, 1, 0)
    return Shape(cluster.nodes, cluster.tasks_per_node, cluster.gpus_per_node, spares=cluster.spares)


def render_job(
    config: RunConfig,
    *,
    run: RunPaths,
    command: Sequence[str],
    stage: Stage = "train",
    code: Path | None = None,
    folder: Path | None = None,
) -> str:
    """Return the batch script that runs `command` once for each device of the stage's nodes.

    `code` is a folder to import this project from, None for what is installed; `folder` is where the job starts,
    which a container has to show as well.

    Raises:
        ConfigError: with a line for each value that Slurm could misread or that cannot work.
    """
    options = job_options(config, run, stage)
    shown = [run.root, *([folder] if folder else [])]
    problems = [*job_problems(config, options, command), *mount_problems(config, shown)]
    if problems:
        raise ConfigError(problems)
    log = quoted(str(run.log)) + ("/encode-$SLURM_ARRAY_TASK_ID" if stage == "encode" else "")
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in options.items()]
    lines += [
        "",
        f"ldm_stage={stage} ldm_run={quoted(str(run.root))}",
        f"ldm_log={log}",
        f"ldm_python={quoted(sys.executable)}",
        f"ldm_threads={config.engine.threads}",
        f"ldm_setup={_array(config.cluster.setup)}",
        f"ldm_srun={_array(_step_options(config, shown, folder))}",
        f"ldm_command={_array([*_container_prefix(config, shown, folder), *command])}",
    ]
    lines += [f"export {name}={quoted(value)}" for name, value in sorted(config.cluster.nccl.items())]
    if code is not None:
        # Safe path: `python -m` must not prefer the folder that the job starts in, often a clone that goes on changing.
        lines.append(f"export PYTHONSAFEPATH=1 PYTHONPATH={quoted(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    return "\n".join([*lines, ""]) + "\n" + BODY


def job_options(config: RunConfig, run: RunPaths, stage: Stage = "train") -> dict[str, str]:
    """Return sbatch's options for this stage, in the order of the script; an empty value is a bare flag."""
    cluster, shape = config.cluster, shape_of(stage, config.cluster)
    options = {
        "job-name": config.name if stage == "train" else f"{config.name}-{stage}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": str(shape.nodes + shape.spares),
        "ntasks-per-node": str(shape.tasks_per_node),
        "gpus-per-node": str(shape.gpus_per_node) if shape.gpus_per_node else None,
        "cpus-per-task": str(cluster.cpus_per_task),
        "mem": f"{cluster.memory_gib_per_node}G" if cluster.memory_gib_per_node else "0",
        "time": cluster.time,
        "exclude": ",".join(cluster.exclude) or None,
        "array": f"0-{shape.array - 1}" if shape.array else None,
        # With a spare the job outlives the loss of a node.
        "no-kill": "" if shape.spares else None,
        "requeue" if cluster.requeue else "no-requeue": "",
        "open-mode": "append",
        "signal": f"B:USR2@{cluster.signal_lead_seconds}",
        "export": "ALL",
        "output": f"{run.log}/job-{'%A_%a' if shape.array else '%j'}.txt",
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


def _array(words: Sequence[str]) -> str:
    return f"({' '.join(quoted(word) for word in words)})"


def _step_options(config: RunConfig, shown: Sequence[Path], folder: Path | None) -> list[str]:
    """Return what srun is told beyond the supervisor's own options."""
    container = config.cluster.container
    if container.kind != "pyxis":
        return []
    mounts = [f"{place}:{place}" for place in shown]
    mounts += [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
    return [*options, *([f"--container-workdir={folder}"] if folder else [])]


def _container_prefix(config: RunConfig, shown: Sequence[Path], folder: Path | None) -> list[str]:
    """Return what stands before a rank's command when apptainer runs it."""
    container = config.cluster.container
    if container.kind != "apptainer":
        return []
    prefix = ["apptainer", "exec", *(["--nv"] if config.cluster.gpus_per_node else [])]
    for mount in (*map(str, shown), *container.mounts):
        prefix += ["--bind", mount]
    return [*prefix, *(["--pwd", str(folder)] if folder else []), str(container.image)]
