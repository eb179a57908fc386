"""Two sides in turn, A B B A A B B A ...: a drift of the machine weighs on both alike."""

import gc
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.comparison import Comparison, comparison_of
from benchmarks.harness.conditions import conditions_now
from benchmarks.harness.measure import HOST_CLOCK, Clock, Sample, Side, run_once, time_once
from benchmarks.harness.plot import draw
from benchmarks.harness.ratio import LEAST_PAIRS
from benchmarks.harness.record import write_csv

Check = Callable[[Any, Any], object]


class CheckError(AssertionError):
    """The two sides do not compute the same thing, so nothing was timed."""


@dataclass(frozen=True)
class Rounds:
    """How often both sides are run: `warmup` untimed rounds, then `measured` ones; with CPU seconds or not.

    `seed` is the bootstrap's; `clock` stands here for the tests.
    """

    measured: int = 20
    warmup: int = 2
    cpu: bool = True
    seed: int = 0
    clock: Clock = field(default=HOST_CLOCK, repr=False)

    def __post_init__(self) -> None:
        if self.measured < LEAST_PAIRS or self.warmup < 0:
            raise ValueError(
                f"rounds: measured {self.measured}, warmup {self.warmup}; allowed: measured >= {LEAST_PAIRS}, "
                "warmup >= 0"
            )


DEFAULT_ROUNDS = Rounds()


def compare(
    a: Side,
    b: Side,
    *,
    name: str,
    out_dir: Path | None,
    check: Check | None = None,
    rounds: Rounds = DEFAULT_ROUNDS,
) -> Comparison:
    """Return the comparison of B against A, and write `NAME.csv` and `NAME.png` into `out_dir` (None: nothing).

    `check(result_a, result_b)` runs first, on one untimed run of each side (a callable's value, a command's
    standard output); it raises AssertionError, or returns False, where the two differ. Speed of wrong numbers
    is no speed.

    Raises: CheckError before anything is timed; CommandError where a command fails.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"benchmark name {name!r}: allowed are letters, digits, '_', '-' and '.': it names files"
        )
    if check is not None:
        _check(a, b, name, check)
    conditions = conditions_now() | {
        "check": "passed" if check else "none",
        "rounds": f"{rounds.measured} after {rounds.warmup} of warm-up",
        "seed": str(rounds.seed),
    }
    comparison = comparison_of((name, a.name, b.name), tuple(_samples(a, b, rounds)), conditions)
    if out_dir is not None:
        write_csv(comparison, out_dir / f"{name}.csv")
        draw(comparison, out_dir / f"{name}.png")
    return comparison


def gate(comparison: Comparison, *, at_least: float | None = None, at_most: float | None = None) -> None:
    """Exit with code 1 unless the whole 95 % interval of B / A is >= `at_least` and <= `at_most`.

    The interval and not its middle: what passes by luck today fails tomorrow.
    """
    if at_least is None and at_most is None:
        raise ValueError("gate: no bound; give at_least, at_most or both")
    below = at_least is not None and comparison.low < at_least
    above = at_most is not None and comparison.high > at_most
    if below or above:
        wanted = f">= {at_least}" if below else f"<= {at_most}"
        print(
            f"benchmark {comparison.name}: {comparison.side_b} / {comparison.side_a} = {comparison.wall}, "
            f"the whole interval must be {wanted}",
            file=sys.stderr,
        )
        raise SystemExit(1)


def _check(a: Side, b: Side, name: str, check: Check) -> None:
    try:
        verdict = check(run_once(a), run_once(b))
    except AssertionError as error:
        raise CheckError(
            f"benchmark {name}: {a.name} and {b.name} differ, nothing was timed: {error}"
        ) from error
    if verdict is False:
        raise CheckError(
            f"benchmark {name}: {a.name} and {b.name} differ, nothing was timed: the check said False"
        )


def _samples(a: Side, b: Side, rounds: Rounds) -> Iterator[Sample]:
    """Yield the measured samples in the order of running; warm-up rounds have numbers below zero.

    What exists before the first run is frozen out of garbage collection: the collection before every run
    then costs microseconds, however much is loaded.
    """
    sides = {"a": a, "b": b}
    gc.collect()
    gc.freeze()
    try:
        for number in range(-rounds.warmup, rounds.measured):
            for key in "ab" if number % 2 == 0 else "ba":
                wall, cpu = time_once(sides[key], rounds.clock)
                if number >= 0:
                    yield Sample(key, number, wall, cpu if rounds.cpu else None)
    finally:
        gc.unfreeze()
