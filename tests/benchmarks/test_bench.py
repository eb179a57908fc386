"""The gates and the record: what passes, what fails, and that the pages say what the files say."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bench
from benchmarks.bench import BEGIN, END, PAGE, RECORD, REPOSITORY, Gate, benchmarks, page_tables
from benchmarks.harness import Comparison, Ratio, read_csv, write_csv
from benchmarks.harness.comparison import comparison_of
from benchmarks.harness.measure import Sample

CONDITIONS = {"seed": "0", "load_before": "0.1", "date": "2026-01-02T00:00:00Z", "commit": "0123456789abcdef"}
FIGURE = re.compile(r"\d[\d.]* \[[\d.]+, [\d.]+\]")


def comparison(ratio: float, spread: float = 0.0, name: str = "one") -> Comparison:
    samples = []
    for number in range(12):
        b_seconds = ratio * (1 + spread * (1 if number % 2 else -1))
        samples += [Sample("a", number, 1.0, 1.0), Sample("b", number, b_seconds, b_seconds)]
    return comparison_of((name, "ours", "peer"), tuple(samples), CONDITIONS)


@pytest.mark.parametrize(
    ("bound", "ratio", "spread", "passes"),
    [
        ("at_least", 5.0, 0.0, True),
        ("at_least", 4.9, 0.0, False),
        ("at_least", 4.9, 0.05, True),
        ("at_least", 3.0, 0.05, False),
        ("at_most", 5.0, 0.0, True),
        ("at_most", 5.1, 0.0, False),
        ("at_most", 5.1, 0.05, True),
        ("at_most", 8.0, 0.05, False),
    ],
)
def test_a_run_may_be_worse_by_its_own_interval_and_no_more(
    bound: str, ratio: float, spread: float, passes: bool
) -> None:
    gate = Gate("one", bound)  # type: ignore[arg-type]
    problem = gate.problem(comparison(ratio, spread), comparison(5.0))
    assert (problem is None) == passes
    assert passes or (problem is not None and "recorded 5 [5, 5]" in problem)


def test_the_clock_of_the_gate_counts() -> None:
    slow = replace(comparison(5.0), cpu=Ratio(1.0, 1.0, 1.0))
    assert Gate("one", "at_least").problem(slow, comparison(5.0)) is None
    assert Gate("one", "at_least", clock="cpu").problem(slow, comparison(5.0)) is not None


def test_what_is_wanted_and_missed_is_said() -> None:
    assert Gate("one", "at_least", 4.0).met(comparison(3.5)) == "no"
    assert Gate("one", "at_most", 4.0).met(comparison(3.5)) == "yes"
    assert Gate("one", "at_most").met(comparison(3.5)) == "-"


def test_a_module_that_fails_or_gets_worse_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RECORD", tmp_path / "record")
    write_csv(comparison(5.0), tmp_path / "record" / "one.csv")
    write_csv(comparison(2.0), tmp_path / "out" / "one.csv")
    one = bench.Benchmark("benchmarks.no_such_module", (), (Gate("one", "at_least"),), False)
    assert bench.run(one, tmp_path / "out") == ["benchmarks.no_such_module: exit code 1"]
    done = type("Done", (), {"returncode": 0})()
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: done)
    assert len(bench.run(one, tmp_path / "out")) == 1


def test_every_gate_has_a_module_and_a_name_of_its_own() -> None:
    names = [gate.name for one in benchmarks() for gate in one.gates]
    assert len(names) == len(set(names))
    for one in benchmarks():
        assert (REPOSITORY / one.module.replace(".", "/")).with_suffix(".py").is_file()


def test_the_page_holds_the_table_of_the_files() -> None:
    text = PAGE.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == page_tables().strip()


def test_figures_of_the_pages_come_from_recorded_files() -> None:
    """Every ratio with an interval in README and docs is one that a CSV in docs/benchmarks holds."""
    recorded = [
        read_csv(RECORD / f"{g.name}.csv")
        for one in benchmarks()
        for g in one.gates
        if (RECORD / f"{g.name}.csv").is_file()
    ]
    known = {_rounded(str(ratio)) for one in recorded for ratio in (one.wall, one.cpu) if ratio}
    lines = (line for line in (RECORD / "loader.csv").read_text().splitlines() if not line.startswith("#"))
    known |= {
        _rounded(f"{row['cpu_ratio']} [{row['cpu_ratio_low']}, {row['cpu_ratio_high']}]")
        for row in csv.DictReader(lines)
    }
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    found = [(page.name, figure) for page in pages for figure in FIGURE.findall(page.read_text())]
    assert found
    assert not [(name, figure) for name, figure in found if _rounded(figure) not in known]


def _rounded(figure: str) -> tuple[str, ...]:
    """Return the numbers to two places: pages may leave out the third."""
    return tuple(f"{float(number):.2f}" for number in re.findall(r"[\d.]+", figure))
