"""The paired-benchmark harness, on a synthetic clock where figures must be exact, on real processes elsewhere."""

import csv
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.harness import (
    MARKDOWN_HEADER,
    CheckError,
    CommandError,
    Comparison,
    Rounds,
    Sample,
    Side,
    compare,
    gate,
    markdown_row,
    paired_ratio,
    read_csv,
)

SPIN = "import time\nend = time.process_time() + 0.15\nwhile time.process_time() < end: pass"


@dataclass
class SyntheticClock:
    """Seconds that pass only where work says so; `calls` is the order in which work ran."""

    wall: float = 0.0
    cpu: float = 0.0
    calls: list[str] = field(default_factory=list)

    def wall_seconds(self) -> float:
        return self.wall

    def cpu_seconds(self) -> float:
        return self.cpu

    def work(self, name: str, seconds: Callable[[], float]) -> Callable[[], str]:
        def run() -> str:
            self.calls.append(name)
            passed = seconds()
            self.wall += passed
            self.cpu += passed / 4
            return name

        return run


def synthetic(
    a: Callable[[], float],
    b: Callable[[], float],
    rounds: int = 8,
    out_dir: Path | None = None,
    calls: int = 1,
) -> tuple[Comparison, SyntheticClock]:
    clock = SyntheticClock()
    comparison = compare(
        Side("ours", clock.work("a", a), calls=calls),
        Side("peer", clock.work("b", b), calls=calls),
        name="synthetic",
        out_dir=out_dir,
        rounds=Rounds(measured=rounds, warmup=2, clock=clock),
    )
    return comparison, clock


def test_known_ratio_is_recovered_exactly() -> None:
    comparison, _ = synthetic(lambda: 0.25, lambda: 0.75)
    assert comparison.ratio == pytest.approx(3.0, abs=1e-12)
    assert (comparison.low, comparison.high) == pytest.approx((3.0, 3.0), abs=1e-12)
    assert comparison.median_a_seconds == pytest.approx(0.25)
    assert comparison.median_b_seconds == pytest.approx(0.75)
    assert comparison.rounds == 8
    assert comparison.cpu is not None
    assert comparison.cpu.value == pytest.approx(3.0)
    assert comparison.cpu_seconds("a") == pytest.approx([0.0625] * 8)


def test_order_is_a_b_b_a_with_the_warm_up_before() -> None:
    comparison, clock = synthetic(lambda: 1.0, lambda: 1.0, rounds=6)
    assert "".join(clock.calls) == "abba" + "abbaabbaabba"
    assert [(sample.side, sample.round) for sample in comparison.samples[:6]] == [
        ("a", 0),
        ("b", 0),
        ("b", 1),
        ("a", 1),
        ("a", 2),
        ("b", 2),
    ]
    assert {sample.round for sample in comparison.samples} == set(range(6))


def test_slow_drift_of_the_machine_leaves_the_ratio() -> None:
    """Every run is 5 % slower than the one before: the medians move, the A B B A ratio stays at 2."""
    slow = iter(1.05**step for step in range(10_000))
    comparison, _ = synthetic(lambda: next(slow), lambda: 2 * next(slow), rounds=20)
    assert comparison.low <= 2.0 <= comparison.high
    assert comparison.ratio == pytest.approx(2.0, rel=1e-9)


def test_calls_are_divided_out() -> None:
    comparison, clock = synthetic(lambda: 0.5, lambda: 1.0, rounds=6, calls=10)
    assert comparison.median_a_seconds == pytest.approx(0.5)
    assert comparison.cpu_seconds("b") == pytest.approx([0.25] * 6)
    assert clock.calls[:20] == ["a"] * 10 + ["b"] * 10


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    """200 experiments of 20 rounds, ratio 1.3, noise shared within a round and 8 % of its own, tail upwards."""
    random = np.random.Generator(np.random.Philox(7))
    covered = 0
    for experiment in range(200):
        shared = np.exp(np.abs(random.normal(0, 0.5, 20)))
        own = np.exp(random.laplace(0, 0.08, (2, 20)))
        ratio = paired_ratio(
            list(shared * own[0]), list(1.3 * shared * own[1]), seed=experiment, resamples=1000
        )
        assert ratio.low <= ratio.value <= ratio.high
        covered += ratio.low <= 1.3 <= ratio.high
    assert 0.90 <= covered / 200 <= 0.99


def test_interval_is_the_same_for_the_same_seed_only() -> None:
    random = np.random.Generator(np.random.Philox(3))
    a, b = np.exp(random.normal(0, 0.3, (2, 15))).tolist()
    assert paired_ratio(a, b, seed=1) == paired_ratio(a, b, seed=1)
    assert paired_ratio(a, b, seed=1, resamples=50) != paired_ratio(a, b, seed=2, resamples=50)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0] * 5, [1.0] * 5),
        ([1.0] * 7, [1.0] * 6),
        ([1.0] * 6, [1.0] * 5 + [0.0]),
        ([1.0] * 6, [math.nan] * 6),
    ],
    ids=["too_few", "unpaired", "zero", "nan"],
)
def test_series_without_a_ratio_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="paired_ratio"):
        paired_ratio(a, b, seed=0)


@pytest.mark.parametrize("verdict", ["raises", "false"])
def test_failing_check_refuses_to_time(verdict: str, tmp_path: Path) -> None:
    clock = SyntheticClock()

    def differs(a: str, b: str) -> bool:
        assert (a, b) == ("a", "b")
        if verdict == "raises":
            np.testing.assert_allclose([1.0], [1.1])
        return False

    with pytest.raises(CheckError, match="ours and peer differ, nothing was timed"):
        compare(
            Side("ours", clock.work("a", lambda: 1.0)),
            Side("peer", clock.work("b", lambda: 1.0)),
            name="refused",
            out_dir=tmp_path,
            check=differs,
            rounds=Rounds(measured=6, clock=clock),
        )
    assert clock.calls == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


def test_passed_check_is_recorded_and_runs_before_the_warm_up() -> None:
    clock = SyntheticClock()
    seen: list[int] = []
    comparison = compare(
        Side("ours", clock.work("a", lambda: 1.0)),
        Side("peer", clock.work("b", lambda: 1.0)),
        name="checked",
        out_dir=None,
        check=lambda a, b: seen.append(len(clock.calls)),
        rounds=Rounds(measured=6, warmup=1, clock=clock),
    )
    assert seen == [2]
    assert comparison.conditions["check"] == "passed"
    assert synthetic(lambda: 1.0, lambda: 1.0)[0].conditions["check"] == "none"


def test_csv_round_trips_and_holds_one_row_per_round_and_side(tmp_path: Path) -> None:
    random = np.random.Generator(np.random.Philox(5))
    comparison, _ = synthetic(random.random, random.random, rounds=7, out_dir=tmp_path)
    path = tmp_path / "synthetic.csv"
    assert read_csv(path) == comparison
    lines = path.read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    assert list(rows[0]) == ["side", "round", "wall_seconds", "cpu_seconds"]
    assert [float(row["wall_seconds"]) for row in rows if row["side"] == "b"] == comparison.wall_seconds("b")
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    assert {"commit", "date", "cpu", "cores", "python", "torch", "numpy", "seed"} <= set(header)
    assert header["side_b"] == "peer"
    assert header["ratio_b_over_a"] == str(comparison.wall)


def test_csv_round_trips_without_cpu_seconds(tmp_path: Path) -> None:
    clock = SyntheticClock()
    sides = [Side(name, clock.work(name, lambda: 1.0)) for name in "ab"]
    rounds = Rounds(measured=6, cpu=False, clock=clock)
    comparison = compare(*sides, name="wall_only", out_dir=tmp_path, rounds=rounds)
    assert comparison.cpu is None
    assert comparison.samples[0] == Sample("a", 0, 1.0, None)
    assert read_csv(tmp_path / "wall_only.csv") == comparison


def test_picture_shows_both_sides(tmp_path: Path) -> None:
    synthetic(lambda: 0.25, lambda: 0.75, out_dir=tmp_path)
    with Image.open(tmp_path / "synthetic.png") as picture:
        assert picture.size == (1000, 430)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert len(colours) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["synthetic.csv", "synthetic.png"]


def test_markdown_row_has_the_columns_of_its_header() -> None:
    comparison, _ = synthetic(lambda: 0.25, lambda: 0.75)
    row = markdown_row(comparison)
    assert row.count("|") == MARKDOWN_HEADER.splitlines()[0].count("|")
    assert "| ours | 0.25 | peer | 0.75 | 3 [3, 3] | 3 [3, 3] | 8 |" in row


def test_gate_asks_the_whole_interval(capsys: pytest.CaptureFixture[str]) -> None:
    noise = iter([0.9, 1.0, 1.1] * 100)
    comparison, _ = synthetic(lambda: 1.0, lambda: 2.0 * next(noise), rounds=9)
    assert comparison.low < comparison.ratio < comparison.high
    gate(comparison, at_least=comparison.low, at_most=comparison.high)
    for bounds in ({"at_least": comparison.ratio}, {"at_most": comparison.ratio}):
        with pytest.raises(SystemExit) as stopped:
            gate(comparison, **bounds)
        assert stopped.value.code == 1
        assert "benchmark synthetic: peer / ours = 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no bound"):
        gate(comparison)


@pytest.mark.parametrize("name", ["a/b", "", "x\ny", "a b"])
def test_name_that_names_no_file_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="benchmark name"):
        compare(Side("a", int), Side("b", int), name=name, out_dir=None)


def test_command_reports_the_cpu_seconds_of_its_own_children() -> None:
    """B does nothing itself: its child burns 0.15 s, which a count of B's process alone would miss."""
    burns = [
        sys.executable,
        "-c",
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SPIN!r}])",
    ]
    comparison = compare(
        Side("bare", [sys.executable, "-c", "pass"]),
        Side("burns", burns),
        name="command",
        out_dir=None,
        rounds=Rounds(measured=6, warmup=0),
    )
    assert min(comparison.cpu_seconds("b")) >= 0.15
    assert min(comparison.wall_seconds("b")) >= 0.15
    assert max(comparison.cpu_seconds("a")) < 0.15
    assert comparison.low > 1.5


def test_check_of_commands_sees_their_output() -> None:
    def said(a: bytes, b: bytes) -> None:
        assert (a, b) == (b"1\n", b"2\n")
        raise AssertionError("1 is not 2")

    sides = [Side(text, [sys.executable, "-c", f"print({text})"]) for text in "12"]
    with pytest.raises(CheckError, match="1 is not 2"):
        compare(*sides, name="outputs", out_dir=None, check=said)


def test_failing_command_is_not_timed() -> None:
    fails = Side("broken", [sys.executable, "-c", "raise SystemExit('no such shard')"])
    with pytest.raises(CommandError, match=r"'broken': exit code 1(?s:.)*no such shard"):
        compare(Side("bare", [sys.executable, "-c", "pass"]), fails, name="fails", out_dir=None)


def test_command_past_its_limit_is_ended() -> None:
    hangs = Side("hangs", [sys.executable, "-c", "import time; time.sleep(60)"], timeout_seconds=0.2)
    with pytest.raises(CommandError, match=r"still running after 0\.2 s"):
        compare(hangs, hangs, name="hangs", out_dir=None)
