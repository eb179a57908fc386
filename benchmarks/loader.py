"""What a sample costs: our loader against webdataset, litdata and Megatron-Energon on the same samples, in turn.

    python -m benchmarks.loader --folder build/loaders --litdata build/litdata/bin/python --energon build/energon/bin/python

Every reader has a process, and an environment, of its own. A round is an epoch: batches of 64, arrays stacked, ids
counted. Our side reads in a random order over everything, the others in file order, which is kinder to them. Ratios
are of CPU seconds, children included: they hardly move with what else the machine does. Files are in the page cache:
this measures the reader, not the disk.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.harness import HOST_CLOCK, Comparison, Rounds, Side, compare
from benchmarks.harness.conditions import conditions_now
from benchmarks.loaders.samples import build
from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.loader import LatentLoader
from pipeline.latents.reader import LatentDataset
from pipeline.publish import whole_file

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "benchmarks"
SAMPLES = {"8KB": 16384, "126KB": 6144}
"""An epoch long enough that opening the data and touching fresh memory, which every epoch here does, weigh little."""
LEAST = {"8KB": 12.0, "126KB": 8.0}
PEERS = ("webdataset-decode", "webdataset-raw", "litdata", "energon", "ours-with-draws")
MOST_BLOCKED, MOST_RESUME_SECONDS = 0.01, 0.050


class Reader:
    """A reader in a process of its own, waiting; its CPU seconds are those of the epochs alone."""

    def __init__(self, python: str, name: str, dataset: Path) -> None:
        command = [python, "-m", "benchmarks.loaders.side", name, str(dataset)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True
        )
        self.cpu_seconds = 0.0

    def epoch(self) -> dict[str, Any]:
        """Read an epoch and return what was seen."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args}: ended with {self._process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        self.cpu_seconds += answer["cpu_seconds"]
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class ReadersClock:
    """Wall seconds of the host, CPU seconds as the readers report them."""

    def __init__(self, *readers: Reader) -> None:
        self._readers = readers

    def wall_seconds(self) -> float:
        return HOST_CLOCK.wall_seconds()

    def cpu_seconds(self) -> float:
        return sum(reader.cpu_seconds for reader in self._readers)


def whole_epochs(samples: int, ours: object, peer: object) -> None:
    """Raise AssertionError unless both sides gave every sample once, and as many bytes."""
    for seen in (ours, peer):
        assert isinstance(seen, dict)
        assert seen["samples"] == seen["distinct"] == samples, seen


@contextmanager
def reader(python: str, name: str, dataset: Path) -> Iterator[Reader]:
    """Yield a running reader."""
    running = Reader(python, name, dataset)
    try:
        yield running
    finally:
        running.close()


def against_peers(size: str, folder: Path, pythons: dict[str, str], rounds: int) -> list[Comparison]:
    """Return the comparison of our loader with each peer that has an interpreter."""
    dataset, found = build(folder, size, SAMPLES[size]), []
    for name in PEERS:
        if name not in pythons:
            print(f"{name}: left out, no interpreter was given", file=sys.stderr)
            continue
        with ExitStack() as stack:
            ours = stack.enter_context(reader(sys.executable, "ours", dataset))
            peer = stack.enter_context(reader(pythons[name], name, dataset))
            found.append(
                compare(
                    Side("ours", ours.epoch),
                    Side(name, peer.epoch),
                    name=f"loader_{size}_{name}",
                    out_dir=None,
                    check=lambda a, b: whole_epochs(SAMPLES[size], a, b),
                    rounds=Rounds(measured=rounds, warmup=1, clock=ReadersClock(ours, peer)),
                )
            )
        print(f"{size} {name}: CPU {found[-1].cpu}, wall {found[-1].wall}", flush=True)
    return found


def open_loader(dataset: Path, global_batch: int) -> LatentLoader:
    """Return the loader of a single rank."""
    data = DataConfig(order="global", verify="off")
    engine = EngineConfig(global_batch=global_batch, micro_batch=global_batch)
    return LatentLoader(
        LatentDataset(dataset),
        seed=0,
        engine=engine,
        objective=ObjectiveConfig(),
        data=data,
        rank=0,
        world_size=1,
    )


def blocked_share(dataset: Path, steps: int = 200) -> float:
    """Return the share of the time of `steps` steps that passes in `next()`, beside a step like the demo's.

    Batches of 16; a step is convolutions of about 100 ms of one CPU thread, as long as the demo's own.
    """
    torch.set_num_threads(1)
    weight, blocked = torch.randn(64, 64, 3, 3), 0.0
    with closing(open_loader(dataset, 16).steps(0)) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            next(batches)
            blocked += time.perf_counter() - asked
            picture = torch.randn(4, 64, 32, 32)
            until = time.perf_counter() + 0.1
            while time.perf_counter() < until:
                picture = torch.nn.functional.conv2d(picture, weight, padding=1) / 24
        return blocked / (time.perf_counter() - began)


def resume_seconds(dataset: Path, consumed: int = 1_000_000) -> float:
    """Return the seconds from an open loader to the first batch at `consumed` samples: the best of five."""
    loader, best = open_loader(dataset, 64), float("inf")
    for _ in range(5):
        began = time.perf_counter()
        with closing(loader.steps(consumed)) as steps:
            next(steps)
            best = min(best, time.perf_counter() - began)
    return best


def rows_of(size: str, comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """Return a row for each reader: samples a second and a CPU second, and how many times ours it costs."""
    rows, count = [], SAMPLES[size]
    for comparison in comparisons:
        cpu = sorted(comparison.cpu_seconds("b"))
        assert comparison.cpu is not None
        ours = sorted(comparison.cpu_seconds("a"))
        rows.append(
            {
                "size": size,
                "reader": comparison.side_b,
                "samples_per_second": round(count / comparison.median_b_seconds),
                "samples_per_cpu_second": round(count / cpu[len(cpu) // 2]),
                "ours_samples_per_second": round(count / comparison.median_a_seconds),
                "ours_samples_per_cpu_second": round(count / ours[len(ours) // 2]),
                "cpu_ratio": f"{comparison.cpu.value:.4g}",
                "cpu_ratio_low": f"{comparison.cpu.low:.4g}",
                "cpu_ratio_high": f"{comparison.cpu.high:.4g}",
                "rounds": comparison.rounds,
            }
        )
    return rows


def write_results(rows: list[dict[str, object]], facts: dict[str, str], out_dir: Path) -> None:
    """Write loader.csv and loader.png."""
    text = io.StringIO(newline="")
    for key, value in (conditions_now() | facts).items():
        text.write(f"# {key}: {value}\n")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(out_dir / "loader.csv") as beside:
        beside.write_text(text.getvalue())
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, size in zip(figure.subplots(1, 2), SAMPLES, strict=True):
        of_size = [row for row in rows if row["size"] == size]
        names = ["ours", *(str(row["reader"]) for row in of_size)]
        first = sorted(int(str(row["ours_samples_per_cpu_second"])) for row in of_size)[len(of_size) // 2]
        values = [first, *(int(str(row["samples_per_cpu_second"])) for row in of_size)]
        bars = axes.barh(names[::-1], values[::-1], color=["#8899aa"] * len(of_size) + ["#cc4433"])
        axes.bar_label(bars, [f"{value:,}" for value in values[::-1]], padding=3, fontsize=8)
        axes.set(xscale="log", title=f"{size} a sample", xlabel="samples per CPU second", xlim=(500, 1e6))
    with whole_file(out_dir / "loader.png") as beside:
        figure.savefig(beside, format="png", dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, write the results, and return 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ldm-loader-benchmark")
    parser.add_argument("--litdata", help="Python of an environment with litdata; without it left out")
    parser.add_argument(
        "--energon", help="Python of an environment with megatron-energon; without it left out"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    given = {"litdata": options.litdata, "energon": options.energon}
    pythons = {name: given.get(name, sys.executable) for name in PEERS if given.get(name, sys.executable)}
    rows, failed = [], []
    for size in SAMPLES:
        rows += rows_of(size, against_peers(size, options.folder, pythons, options.rounds))
    for row in rows:
        # Many times webdataset's stock decoder, and ahead of all others with certainty.
        stock = row["reader"] == "webdataset-decode"
        bound, held = (LEAST[str(row["size"])], "cpu_ratio") if stock else (1.0, "cpu_ratio_low")
        if row["reader"] != "ours-with-draws" and float(str(row[held])) < bound:
            failed.append(f"{row['size']} {row['reader']}: {held} {row[held]}, wanted at least {bound}")
    dataset = build(options.folder, "8KB", SAMPLES["8KB"])
    share, seconds = blocked_share(dataset), resume_seconds(dataset)
    if share > MOST_BLOCKED:
        failed.append(f"{share:.2%} of the steps' time is spent in next(), wanted at most {MOST_BLOCKED:.0%}")
    if seconds > MOST_RESUME_SECONDS:
        failed.append(
            f"resume took {seconds * 1e3:.0f} ms, wanted at most {MOST_RESUME_SECONDS * 1e3:.0f} ms"
        )
    facts = {"blocked_share_of_200_steps": f"{share:.5f}", "resume_at_1000000_seconds": f"{seconds:.5f}"}
    write_results(rows, facts, options.out_dir)
    print(*(f"{key}: {value}" for key, value in facts.items()), *rows, *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
