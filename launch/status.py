"""`ldm status`: how far a run or a data set is, told from its files alone."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launch.follow.run import is_run, lines_of, run_status
from launch.submit.variants import SWEEP_NAME
from pipeline.errors import ConfigError
from pipeline.latents.manifest import Manifest
from pipeline.latents.shard import Counts, ShardRecord
from pipeline.paths import RunPaths
from preprocessing.leases import known_work, leased

SPEED_SHARDS = 200
WATCH_SECONDS = 5.0


def describe(path: Path) -> str:
    """Return a page about what `path` is: a run folder or a latent data set.

    Raises:
        ConfigError: when it is neither.
    """
    run = RunPaths(path)
    if (path / SWEEP_NAME).is_file():
        return describe_sweep(path)
    if is_run(run):
        return describe_run(run)
    if (path / "manifest.json").is_file() or _markers(path) or known_work(path) is not None:
        return describe_dataset(path)
    raise ConfigError(
        f"{path}: neither a run folder (config.yaml) nor a data set (manifest.json, shard markers)"
    )


def describe_run(paths: RunPaths) -> str:
    """Return a page about a run: step, loss, speed, time left, checkpoints, restarts and its jobs."""
    return "\n".join(lines_of(run_status(paths)))


def describe_sweep(folder: Path) -> str:
    """Return the first lines about each run of a sweep."""
    runs = json.loads((folder / SWEEP_NAME).read_text(encoding="utf-8"))["runs"]
    statuses = [run_status(RunPaths(folder / name)) for name in runs]
    return "\n".join("\n".join(lines_of(status)[:2]) for status in statuses)


def describe_dataset(dataset: Path) -> str:
    """Return counts and rejects of a data set, finished or not: shards done, leased and left, speed, time left."""
    if (dataset / "manifest.json").is_file():
        manifest = Manifest.load(dataset)
        lines = [f"{dataset}: finished, {manifest.splits}, digest {manifest.digest[:16]}"]
        counts = manifest.counts
    else:
        markers = _markers(dataset)
        counts = Counts()
        for marker in markers:
            counts = counts.plus(ShardRecord.load(marker).counts)
        lines = _work_lines(dataset, markers)
    lines.append(f"  read {counts.read}, written {counts.written}")
    lines += [f"  rejected({reason}) {number}" for reason, number in counts.rejected.items()]
    lines += [f"  failed({reason}) {number}" for reason, number in counts.failed.items()]
    return "\n".join(lines)


def _markers(dataset: Path) -> list[Path]:
    return sorted(path for path in dataset.glob("*/*.json") if not path.parent.name.startswith("."))


def _work_lines(dataset: Path, markers: Sequence[Path]) -> list[str]:
    """Return how far the workers are; speed is that of the newest markers, by the file server's own clock."""
    holders, total = leased(dataset), known_work(dataset)
    if total is None:
        return [f"{dataset}: {len(markers)} shards encoded, no manifest yet: `ldm finalize` comes next"]
    left = max(0, total - len(markers) - len(holders))
    lines = [f"{dataset}: {len(markers)} of {total} shards done, {len(holders)} leased, {left} left"]
    if len(markers) == total:
        lines.append("  no manifest yet: `ldm finalize` comes next")
        return lines
    newest = sorted(markers, key=lambda path: path.stat().st_mtime)[-SPEED_SHARDS:]
    if len(newest) > 1:
        seconds = newest[-1].stat().st_mtime - newest[0].stat().st_mtime
        read = sum(ShardRecord.load(marker).counts.read for marker in newest[1:])
        if seconds > 0 and read:
            time_left = (total - len(markers)) * seconds / (len(newest) - 1)
            lines.append(f"  {read / seconds:.1f} images/s, about {time_left / 60:.0f} minutes left")
    hosts = Counter(owner.host if owner else "unknown" for owner in holders.values())
    lines += [f"  at work: {host} with {count} shards" for host, count in sorted(hosts.items())]
    return lines
