"""All benchmarks that `benchmarks/gates.toml` names, one after the other, held to what was recorded before.

    python -m benchmarks.bench                    # what `make bench` runs, at most ten minutes
    python -m benchmarks.bench --full --record    # also the long ones; the results become the record in docs/benchmarks

A benchmark asserts that both sides compute the same before it times them. Every figure in README and docs comes from the
files that are written here; docs/benchmarks.md holds their table.
"""

import argparse
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import Comparison, Ratio, read_csv
from pipeline.publish import whole_file

REPOSITORY = Path(__file__).resolve().parents[1]
GATES = REPOSITORY / "benchmarks" / "gates.toml"
RECORD = REPOSITORY / "docs" / "benchmarks"
PAGE = REPOSITORY / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table: written by benchmarks/bench.py -->", "<!-- end of table -->"
HEADER = (
    "| benchmark | A | B | B / A [95 %] | B / A, CPU | wanted | met | machine's load before | date, commit |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Gate:
    """What one comparison is held to."""

    name: str
    bound: Literal["at_least", "at_most"]
    wanted: float | None = None
    clock: Literal["wall", "cpu"] = "wall"

    def ratio(self, comparison: Comparison) -> Ratio:
        """Return the ratio that counts."""
        if self.clock == "wall":
            return comparison.wall
        assert comparison.cpu is not None, f"{self.name}: no CPU seconds"
        return comparison.cpu

    def problem(self, run: Comparison, recorded: Comparison | None) -> str | None:
        """Return what is wrong with a run, None where it is as good as the record less the run's own interval."""
        if recorded is None:
            return None
        now, before = self.ratio(run), self.ratio(recorded)
        width = now.high - now.low
        limit = before.value - width if self.bound == "at_least" else before.value + width
        good = now.value >= limit if self.bound == "at_least" else now.value <= limit
        words = self.bound.replace("_", " ")
        return None if good else f"{self.name}: {now}, must be {words} {limit:.3g} (recorded {before})"

    def met(self, comparison: Comparison) -> str:
        """Return "yes", "no" or "-" for what is wanted."""
        if self.wanted is None:
            return "-"
        value = self.ratio(comparison).value
        good = value >= self.wanted if self.bound == "at_least" else value <= self.wanted
        return "yes" if good else "no"


@dataclass(frozen=True)
class Benchmark:
    """A module, how it is called, and its comparisons."""

    module: str
    arguments: tuple[str, ...]
    gates: tuple[Gate, ...]
    full_only: bool


def benchmarks() -> tuple[Benchmark, ...]:
    """Return what `gates.toml` lists."""
    table: dict[str, Any] = tomllib.loads(GATES.read_text())
    return tuple(
        Benchmark(
            row["module"],
            tuple(row["arguments"]),
            tuple(Gate(**gate) for gate in row["comparisons"]),
            row.get("full_only", False),
        )
        for row in table["benchmark"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks, write `table.md`, print it and what is wrong; return 1 where something is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the long ones too")
    parser.add_argument(
        "--record", action="store_true", help="make the results the record in docs/benchmarks"
    )
    parser.add_argument("--only", nargs="+", help="modules, e.g. step ema")
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "build" / "benchmarks")
    options = parser.parse_args(argv)
    out_dir = options.out_dir.resolve()
    chosen = [
        one
        for one in benchmarks()
        if (options.full or not one.full_only or options.only)
        and (options.only is None or one.module.rpartition(".")[2] in options.only)
    ]
    problems = []
    for one in chosen:
        problems += run(one, out_dir)
    gates = [gate for one in chosen for gate in one.gates]
    print(table(out_dir, gates))
    if options.record:
        record(out_dir)
    for problem in problems:
        print(f"bench: {problem}", file=sys.stderr)
    return 1 if problems else 0


def run(benchmark: Benchmark, out_dir: Path) -> list[str]:
    """Run one module in a process of its own and return what is wrong with its results."""
    began = time.monotonic()
    command = [sys.executable, "-m", benchmark.module, *benchmark.arguments, "--out-dir", str(out_dir)]
    code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    print(f"bench: {benchmark.module} took {time.monotonic() - began:.0f} s", flush=True)
    if code:
        return [f"{benchmark.module}: exit code {code}"]
    found = []
    for gate in benchmark.gates:
        before = RECORD / f"{gate.name}.csv"
        recorded = read_csv(before) if before.is_file() else None
        if problem := gate.problem(read_csv(out_dir / f"{gate.name}.csv"), recorded):
            found.append(problem)
    return found


def table(folder: Path, gates: Iterable[Gate]) -> str:
    """Return the Markdown table of the comparisons whose CSV lies in `folder`."""
    rows = [HEADER]
    for gate in gates:
        path = folder / f"{gate.name}.csv"
        if path.is_file():
            one = read_csv(path)
            conditions = one.conditions
            cells = (
                one.name,
                one.side_a,
                one.side_b,
                str(one.wall),
                str(one.cpu or "-"),
                "-" if gate.wanted is None else f"{gate.bound.replace('_', ' ')} {gate.wanted:g}",
                gate.met(one),
                conditions["load_before"],
                f"{conditions['date'][:10]}, {conditions['commit'][:9]}",
            )
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def record(out_dir: Path) -> None:
    """Copy results to docs/benchmarks and write their table into docs/benchmarks.md."""
    RECORD.mkdir(parents=True, exist_ok=True)
    for path in sorted(out_dir.iterdir()):
        if path.suffix in (".csv", ".png", ".json") or path.name == "scale.md":
            shutil.copyfile(path, RECORD / path.name)
    write_page()


def write_page() -> None:
    """Put the table of the record between the marks of docs/benchmarks.md."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    with whole_file(PAGE) as beside:
        beside.write_text(f"{before}{BEGIN}\n{page_tables()}\n{END}{after}")


def page_tables() -> str:
    """Return what stands between the marks: the table of all comparisons, then the simulation's."""
    gates = [gate for one in benchmarks() for gate in one.gates]
    parts = [table(RECORD, gates)]
    scale = RECORD / "scale.md"
    if scale.is_file():
        parts.append(scale.read_text().strip())
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
