"""What no machine here can show, by simulation: order and memory at 10^9 samples on 4,096 ranks, goodput under failures.

    python -m benchmarks.scale

Order: tables of 10^5 shards, sparse tars where rank 4,095 looks; its first batch from the middle of an epoch, and the
shares of all ranks together. Goodput: a job of 8 to 4,096 nodes loses a node at random, goes back to its last
safe checkpoint and starts again; simulated step by step and compared with the formula that `ldm plan` uses. Seconds to recover
are those that benchmarks/calibration.py measured here, and the published starts of large jobs beside them.
"""

import argparse
import csv
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from pipeline.config import DataConfig
from pipeline.data.mixture import Mixture
from pipeline.latents.reader import LatentDataset
from pipeline.plan.goodput import (
    Saving,
    best_interval_seconds,
    goodput,
    mttf_seconds,
    restart_seconds,
)
from pipeline.publish import whole_file
from tests.pipeline.data.test_scale import BATCH, MIDDLE, OPEN_AND_DRAW, RANK, ROWS, WORLD, write_sparse

REPOSITORY = Path(__file__).resolve().parents[1]
NODES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GPUS_PER_NODE = 8
FAILURES = 0.005
STATE_BYTES = 16 * 859_520_964
COPY_BYTES_PER_SECOND, WRITE_BYTES_PER_SECOND = 20e9, 2e9
LEAST_INTERVAL_SECONDS = 30.0
"""With stalls of milliseconds the formula asks for a save every few seconds, which no file system would thank us for."""
DETECT_SECONDS = 10.0
"""From a death to the end of the job's other ranks: the launcher sees it within seconds (docs/reliability.md)."""


@dataclass(frozen=True)
class Published:
    """A large job's published share of useful time."""

    name: str
    nodes: int
    share: str
    mttf_hours: float | None
    source: str


PUBLISHED = (
    Published(
        "Llama 3, 16,384 H100", 2048, "> 0.90", 54 * 24 / 419, "arXiv 2407.21783: 419 failures in 54 days"
    ),
    Published("ByteRobust, 9,600 GPUs", 1200, "0.97", None, "arXiv 2509.16293"),
    Published("HLAT, 4,096 Trainium", 256, "0.9881", None, "glennklockwood.com/garden/job-reliability"),
)


@dataclass(frozen=True)
class Simulated:
    """Goodput at one number of nodes, with one way to recover."""

    nodes: int
    restart: str
    restart_seconds: float
    mttf_hours: float
    interval_seconds: float
    formula: float
    simulated: float
    spread: float
    failures: int


def simulate(
    saving: Saving, interval: float, mttf: float, restart: float, draw: np.random.Generator
) -> tuple[float, int]:
    """Return the share of time that counted in a job of 2,000 mean times between failures, and its failures.

    Failures come at random, also during a restart. A save begins `interval` after the last began to train, stalls, and
    is safe `write_seconds` later; a failure throws away what is beyond the last safe one.
    """
    left, elapsed, kept, failures = 2000, 0.0, 0.0, 0
    period = interval + saving.stall_seconds
    while left:
        left, failures = left - 1, failures + 1
        lived = draw.exponential(mttf)
        elapsed += lived
        trained = lived - restart
        if trained <= 0:
            continue  # It failed again before it had come back.
        # Save number n is safe at n x period + write; the work in it is n x interval.
        kept += max(0, math.floor((trained - saving.write_seconds) / period)) * interval
    return kept / elapsed, failures


def goodputs(recovery_seconds: float, source: str) -> list[Simulated]:
    """Return formula and simulation for every number of nodes: with a recovery from `source`, and the published starts."""
    rows = []
    for nodes in NODES:
        mttf = mttf_seconds(nodes, FAILURES)
        gpus = nodes * GPUS_PER_NODE
        saving = Saving(
            STATE_BYTES,
            STATE_BYTES / gpus / COPY_BYTES_PER_SECOND,
            STATE_BYTES / nodes / WRITE_BYTES_PER_SECOND,
        )
        interval = max(best_interval_seconds(saving, mttf), LEAST_INTERVAL_SECONDS)
        for name, restart in (
            (source, recovery_seconds + DETECT_SECONDS),
            ("published starts", restart_seconds(gpus)),
        ):
            runs = [
                simulate(saving, interval, mttf, restart, np.random.default_rng(seed)) for seed in range(5)
            ]
            shares = [share for share, _ in runs]
            rows.append(
                Simulated(
                    nodes,
                    name,
                    restart,
                    mttf / 3600,
                    interval,
                    goodput(saving, interval, mttf, restart),
                    float(np.mean(shares)),
                    float(np.std(shares)),
                    sum(failures for _, failures in runs),
                )
            )
    return rows


def order_at_scale(folder: Path, order: Literal["global", "lanes"]) -> dict[str, float]:
    """Return what rank 4,095 of 4,096 pays to begin in the middle of 10^9 samples; all shares are checked first.

    Raises: AssertionError where a position is read twice or a rank reads what is not its share.
    """
    write_sparse(folder, {})
    dataset = LatentDataset(folder, rank=RANK, world_size=WORLD)
    plan = Mixture([dataset], seed=0, global_batch=BATCH, data=DataConfig(order=order))
    everything = plan.samples(plan.by_lane(np.arange(MIDDLE, MIDDLE + BATCH)))
    assert len(np.unique(everything)) == BATCH and everything.max() < len(dataset) == 10**9
    spread = plan.samples(np.sort(np.random.default_rng(0).choice(10**9, 200_000, replace=False)))
    assert len(np.unique(spread)) == len(spread)
    ahead = [plan.by_lane(np.arange(MIDDLE + s * BATCH, MIDDLE + (s + 1) * BATCH)) for s in range(8)]
    mine = [plan.samples(step[RANK * BATCH // WORLD :]) for step in ahead]
    written: dict[int, list[int]] = {}
    for index in np.concatenate(mine).tolist():
        written.setdefault(index // ROWS, []).append(index % ROWS)
    write_sparse(folder, written)
    command = [sys.executable, "-c", OPEN_AND_DRAW, str(folder), order]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["indices"] == mine[0].tolist()
    return {
        "seconds": found["seconds"],
        "grown_mib": found["grown"] / 2**20,
        "opens": found["opens"],
        "bytes_read": found["read"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run both parts; write `scale.csv`, `scale.png` and `scale.md`, print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument(
        "--recovery-seconds", type=float, help="default: what calibration.json of --out-dir says"
    )
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args(argv)
    recovery, source = options.recovery_seconds, "given"
    if recovery is None:
        source = "measured here"
        recovery = json.loads((options.out_dir / "calibration.json").read_text())["recovery_seconds"]
    orders: dict[str, dict[str, float]] = {}
    both: tuple[Literal["global", "lanes"], ...] = ("global", "lanes")
    for order in both:
        with tempfile.TemporaryDirectory() as folder:
            orders[order] = order_at_scale(Path(folder), order)
    rows = goodputs(recovery, source)
    write(rows, options.out_dir)
    text = tables(orders, rows)
    with whole_file(options.out_dir / "scale.md") as beside:
        beside.write_text(text + "\n")
    print(text)
    return 0


def tables(orders: dict[str, dict[str, float]], rows: Sequence[Simulated]) -> str:
    """Return the Markdown of both parts."""
    lines = [
        "| 10^9 samples, rank 4,095 of 4,096 | first batch, s | memory grown, MiB | files opened | bytes read |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {one['seconds']:.2f} | {one['grown_mib']:.0f} | {one['opens']:.0f} | {one['bytes_read']:.0f} |"
            for name, one in orders.items()
        ),
        "",
        "| nodes | MTTF, h | restart, s | from | checkpoint every, s | goodput, formula | simulated |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row.nodes} | {row.mttf_hours:.2f} | {row.restart_seconds:.0f} | {row.restart} | {row.interval_seconds:.0f} | "
            f"{row.formula:.4f} | {row.simulated:.4f} ± {row.spread:.4f} |"
            for row in rows
        ),
        "",
        "| published | nodes | useful share | MTTF, h | source |",
        "|---|---|---|---|---|",
        *(
            f"| {one.name} | {one.nodes} | {one.share} | {'not told' if one.mttf_hours is None else f'{one.mttf_hours:.2f}'} | "
            f"{one.source} |"
            for one in PUBLISHED
        ),
    ]
    return "\n".join(lines)


def write(rows: Sequence[Simulated], out_dir: Path) -> None:
    """Write the CSV and the picture."""
    text = io.StringIO(newline="")
    columns = list(Simulated.__dataclass_fields__)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[getattr(row, name) for name in columns] for row in rows])
    with whole_file(out_dir / "scale.csv") as beside:
        beside.write_text(text.getvalue())
    figure = Figure(figsize=(8, 4.3), dpi=100, layout="constrained")
    axes = figure.subplots()
    names = sorted({row.restart for row in rows})
    for name, colour in zip(names, ("#1f77b4", "#d95f02"), strict=True):
        chosen = [row for row in rows if row.restart == name]
        nodes = [row.nodes for row in chosen]
        axes.plot(nodes, [row.formula for row in chosen], "-", color=colour, label=f"formula, restart {name}")
        axes.plot(nodes, [row.simulated for row in chosen], "o", color=colour, label="simulated")
    for one, share in zip(PUBLISHED, (0.90, 0.97, 0.9881), strict=True):
        axes.plot([one.nodes], [share], "k^")
        axes.annotate(f"{one.name}: {one.share}", (one.nodes, share), fontsize=7, ha="right", va="top")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("nodes of 8")
    axes.set_ylabel("share of the time that counts")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    with whole_file(out_dir / "scale.png") as beside:
        figure.savefig(beside, format="png")


if __name__ == "__main__":
    sys.exit(main())
