"""The speed model on the published runs: errors only where a run set no constant, all constants pinned to their runs."""

import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeline.errors import ConfigError
from pipeline.plan import predict, published
from pipeline.plan.devices import device_named
from pipeline.plan.published import (
    Generation,
    Point,
    constants,
    excluded,
    memory_fit,
    points,
    published_peak_gib,
)

MLPERF = [point for point in points() if point.generation != "composer"]
UNCHECKED = {("B200", "v5.0")}
WITHIN_A_POINT = 1e-3


def error(point: Point) -> float:
    told = predict(point.device, point.generation, point.accelerators, point.global_batch, point.micro_batch)
    return told / point.step_seconds - 1


def sets(point: Point) -> bool:
    one = constants().get((point.device, point.generation))
    return one is not None and point.submission in one.set_by


def test_errors_on_the_runs_that_set_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    checked = [
        point for point in MLPERF if (point.device, point.generation) in constants() and not sets(point)
    ]
    errors = {point: error(point) for point in checked}
    with capsys.disabled():
        print()
        for point, found in errors.items():
            print(
                f"  {point.device} {point.generation} {point.submission} x{point.accelerators}: {found:+.1%}"
            )
        print(
            f"  median {statistics.median(map(abs, errors.values())):.1%}, worst {max(map(abs, errors.values())):.1%}"
        )
    assert len(checked) == 13
    assert statistics.median(map(abs, errors.values())) <= 0.03
    assert max(map(abs, errors.values())) <= 0.12


def test_every_point_sets_checks_or_is_excluded_by_name() -> None:
    assert len(MLPERF) == 31
    of = {
        key: [p for p in MLPERF if (p.device, p.generation) == key]
        for key in {(p.device, p.generation) for p in MLPERF}
    }
    assert set(excluded()) == {key for key, runs in of.items() if len(runs) == 1}
    assert {key for key, runs in of.items() if len(runs) > 1} == set(constants()) - {("A100", "composer")}
    assert UNCHECKED == {key for key, runs in of.items() if len(runs) > 1 and all(map(sets, runs))}


def test_the_rule_names_the_runs() -> None:
    """Of NVIDIA's own submissions where there are two, else of all: fewest and most accelerators."""
    for key, one in constants().items():
        if key == ("A100", "composer"):
            assert one.set_by == ("mosaicml-8",)
            continue
        runs = [point for point in MLPERF if (point.device, point.generation) == key]
        own = [point for point in runs if point.submission.startswith("NVIDIA")]
        ordered = sorted(own if len(own) > 1 else runs, key=lambda point: point.accelerators)
        assert one.set_by == (ordered[0].submission, ordered[-1].submission)


def test_constants_meet_the_runs_that_set_them() -> None:
    for point in filter(sets, points()):
        assert abs(error(point)) < WITHIN_A_POINT, point


@pytest.mark.parametrize("name", ["sample_seconds", "base_seconds"])
@pytest.mark.parametrize("key", [key for key in constants() if key[0] != "A100"])
def test_a_constant_off_by_a_tenth_is_noticed(
    monkeypatch: pytest.MonkeyPatch, key: tuple[str, str], name: str
) -> None:
    one = constants()[key]
    for factor in (0.9, 1.1):
        moved: dict[tuple[str, str], Generation] = {
            **constants(),
            key: replace(one, **{name: factor * getattr(one, name)}),
        }
        with monkeypatch.context() as patched:
            patched.setattr(published, "constants", lambda moved=moved: moved)
            found = [error(point) for point in MLPERF if point.submission in one.set_by]
        assert max(map(abs, found)) > WITHIN_A_POINT


def test_the_a100_runs_that_set_nothing() -> None:
    found = [error(point) for point in points() if point.generation == "composer" and not sets(point)]
    assert len(found) == 3 and max(map(abs, found)) < 0.02


def peaks(peak: Callable[[float, int], float]) -> dict[Point, float]:
    """Return the model's error in GiB on every published peak."""
    found = {}
    for point in MLPERF:
        if point.peak_gib is not None:
            ranks = min(point.accelerators, device_named(point.device).domain)
            found[point] = peak(point.micro_batch, ranks) - point.peak_gib
    return found


def test_memory_within_a_gib_of_every_published_peak(capsys: pytest.CaptureFixture[str]) -> None:
    found = peaks(published_peak_gib)
    with capsys.disabled():
        print(
            f"\n  peaks: worst {max(map(abs, found.values())):.3f} GiB on {len(found)}, two of which set the constants"
        )
    assert len(found) == 8 and max(map(abs, found.values())) < 1.0
    by_setting = [gib for point, gib in found.items() if point.submission in memory_fit().set_by]
    assert len(by_setting) == 2 and max(map(abs, by_setting)) < WITHIN_A_POINT


@pytest.mark.parametrize("name", ["base_gib", "sample_gib"])
def test_a_memory_constant_off_by_a_tenth_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fit = memory_fit()
    for factor in (0.9, 1.1):
        moved = replace(fit, **{name: factor * getattr(fit, name)})
        monkeypatch.setattr(published, "memory_fit", lambda moved=moved: moved)
        found = peaks(published_peak_gib)
        assert max(abs(gib) for point, gib in found.items() if point.submission in fit.set_by) > 0.1


def test_an_unknown_generation_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no constants for L40S v4\.0; there are .*H100 v4\.1"):
        predict("L40S", "v4.0", 8, 512, 64)


def test_more_micro_batches_pay_the_base_once() -> None:
    once, twice = predict("H100", "v4.1", 8, 256, 32), predict("H100", "v4.1", 8, 512, 32)
    assert twice - once == pytest.approx(32 * constants()["H100", "v4.1"].sample_seconds)
