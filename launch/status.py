"""`ldm status`: how far a run or a data set is, told from its files alone."""

import json
import time
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.latents.manifest import Manifest
from pipeline.latents.shard import Counts, ShardRecord
from pipeline.paths import RunPaths
from pipeline.tracking import read_records


def describe(path: Path) -> str:
    """Return a page about what `path` is: a run folder or a latent data set.

    Raises:
        ConfigError: when it is neither.
    """
    run = RunPaths(path)
    if any(mark.exists() for mark in (run.config, run.jobs, run.metrics, run.autoencoder, run.clip)):
        return describe_run(run)
    if (path / "manifest.json").is_file() or any(path.glob("[0-9a-f][0-9a-f]/*.json")):
        return describe_dataset(path)
    raise ConfigError(
        f"{path}: neither a run folder (config.yaml) nor a data set (manifest.json, shard markers)"
    )


def describe_run(paths: RunPaths) -> str:
    """Return step, loss, speed and checkpoints of a run."""
    records = read_records(paths.metrics, "train") if paths.metrics.is_file() else []
    checkpoints = sorted(folder.name for folder in paths.checkpoints.glob("step-*") if folder.is_dir())
    lines = [f"{paths.root}: " + (f"step {records[-1]['step']}" if records else "not trained yet")]
    if records:
        age_seconds = time.time() - records[-1]["time"]
        shown = {key: records[-1].get(key) for key in ("samples", "loss", "grad_norm", "samples_per_second")}
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None))
        lines.append(f"  last record {age_seconds:.0f} s ago")
    lines.append(f"  checkpoints: {', '.join(checkpoints) or 'none'}")
    if paths.jobs.is_file():
        jobs = json.loads(paths.jobs.read_text())["jobs"]
        lines.append(f"  slurm jobs: {', '.join(job['job_id'] for job in jobs)}")
    return "\n".join(lines)


def describe_dataset(dataset: Path) -> str:
    """Return counts and rejects of a data set, finished or not."""
    if (dataset / "manifest.json").is_file():
        manifest = Manifest.load(dataset)
        state, counts = f"finished, {manifest.splits}, digest {manifest.digest[:16]}", manifest.counts
    else:
        markers = sorted(dataset.glob("[0-9a-f][0-9a-f]/*.json"))
        counts = Counts()
        for marker in markers:
            counts = counts.plus(ShardRecord.load(marker).counts)
        state = f"{len(markers)} shards encoded, no manifest yet: `ldm finalize` comes next"
    lines = [f"{dataset}: {state}", f"  read {counts.read}, written {counts.written}"]
    lines += [f"  rejected({reason}) {number}" for reason, number in counts.rejected.items()]
    lines += [f"  failed({reason}) {number}" for reason, number in counts.failed.items()]
    return "\n".join(lines)
