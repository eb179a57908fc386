"""Constants of one's own machine, taken from the records of finished or running trainings."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.data.shares import micro_batches_per_step
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths
from pipeline.plan.devices import host_floor
from pipeline.plan.workload import Workload, workload_of

LEAST_RECORDS = 2


@dataclass(frozen=True)
class Observed:
    """One run: its step's seconds, and what a rank did in one."""

    run: str
    step_seconds: float
    rank_samples: float
    micro_batches: int
    sample_flops: int
    floor_seconds: float
    records: int


@dataclass(frozen=True)
class Calibration:
    """seconds per step = `base_seconds` + samples of a rank x FLOP of a sample x `flop_seconds`."""

    base_seconds: float
    flop_seconds: float
    runs: tuple[Observed, ...]

    def step_seconds(self, workload: Workload, ranks: int) -> float:
        """Return a step's seconds on `ranks` such ranks; that more ranks have to wait for each other is not in it."""
        samples = workload.config.engine.global_batch / ranks
        return self.base_seconds + samples * workload.sample_flops * self.flop_seconds


def calibrate(runs: Sequence[Path]) -> Calibration:
    """Return the constants that the runs' metrics.jsonl give.

    Runs with different samples a rank set both constants by least squares; from runs that are all alike the base is
    taken as the measured host floor, and only the speed of the arithmetic is theirs.

    Raises:
        ConfigError: a folder is no run, or has under two records of speed.
    """
    observed = [observe(run) for run in runs]
    work = [one.rank_samples * one.sample_flops for one in observed]
    if max(work) - min(work) < 1e-6 * max(work):
        base = min(one.floor_seconds for one in observed)
        base = min(base, 0.5 * min(one.step_seconds for one in observed))
        slope = statistics.median(
            (one.step_seconds - base) / flops for one, flops in zip(observed, work, strict=True)
        )
        return Calibration(base, slope, tuple(observed))
    middle, seconds = statistics.fmean(work), [one.step_seconds for one in observed]
    spread = sum((flops - middle) ** 2 for flops in work)
    slope = sum((f - middle) * s for f, s in zip(work, seconds, strict=True)) / spread
    base = statistics.fmean(seconds) - slope * middle
    if base < 0 or slope <= 0:
        raise ConfigError(
            f"plan --calibrate: {', '.join(map(str, runs))}: seconds per step do not grow with the samples of a rank; give "
            "runs that ran alone on the machine, or one run"
        )
    return Calibration(base, slope, tuple(observed))


def observe(run: Path) -> Observed:
    """Return what the run folder's records say about its speed: the median, without each attempt's first record.

    Raises:
        ConfigError: see `calibrate`.
    """
    paths = RunPaths(run)
    if not paths.config.is_file() or not paths.metrics.is_file():
        raise ConfigError(f"plan --calibrate: {run} is no run folder with config.yaml and metrics.jsonl")
    config = load_config(paths.config)
    speeds = list(_speeds(paths.metrics.read_text().splitlines()))
    if len(speeds) < LEAST_RECORDS:
        raise ConfigError(
            f"plan --calibrate: {paths.metrics} has {len(speeds)} records of speed after the first; needs "
            f"{LEAST_RECORDS}: train on, or lower train.log_every"
        )
    ranks = ranks_of(config)
    workload = workload_of(config, paths)
    engine = config.engine
    micro_batches = micro_batches_per_step(engine.global_batch, engine.micro_batch, ranks)
    floor = host_floor().seconds(micro_batches, engine.zero_stage, engine.precision, workload.network.tensors)
    return Observed(
        run=str(run),
        step_seconds=engine.global_batch / statistics.median(speeds),
        rank_samples=engine.global_batch / ranks,
        micro_batches=micro_batches,
        sample_flops=workload.sample_flops,
        floor_seconds=floor,
        records=len(speeds),
    )


def ranks_of(config: RunConfig) -> int:
    """Return the ranks that the config starts: those of its job, or its processes."""
    return max(config.engine.processes, config.cluster.nodes * config.cluster.tasks_per_node)


def _speeds(lines: Iterable[str]) -> Iterable[float]:
    """Yield samples a second of training records, without the first of each attempt, which holds the warming up."""
    seen: set[str] = set()
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # The last line of a run that was killed.
        if record.get("kind") != "train" or "samples_per_second" not in record:
            continue
        if record["attempt"] in seen and record["samples_per_second"]:
            yield record["samples_per_second"]
        seen.add(record["attempt"])
