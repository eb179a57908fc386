"""The picture of a comparison: both distributions, and the ratio of every round with its interval."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.comparison import Comparison
from pipeline.publish import whole_file

COLOUR_A, COLOUR_B, COLOUR_RATIO = "#1f77b4", "#d95f02", "#444444"


def draw(comparison: Comparison, path: Path) -> None:
    """Write a PNG of about 1000 x 430 pixels; no window, no global state of matplotlib."""
    figure = Figure(figsize=(10, 4.3), dpi=100, layout="constrained")
    times, ratios = figure.subplots(1, 2, width_ratios=[1, 1.15])
    _draw_times(times, comparison)
    _draw_ratios(ratios, comparison)
    conditions = comparison.conditions
    subtitle = (
        f"{conditions['cpu']}, {conditions['cores']} cores, {conditions['date']}, {conditions['commit'][:12]}"
    )
    figure.suptitle(f"{comparison.name}\n{subtitle}", fontsize=10)
    with whole_file(path) as beside:
        figure.savefig(beside, format="png")


def _draw_times(axes: Axes, comparison: Comparison) -> None:
    scale, unit = _unit(comparison.median_a_seconds)
    sides = (("a", comparison.side_a, COLOUR_A), ("b", comparison.side_b, COLOUR_B))
    for place, (side, _, colour) in enumerate(sides, start=1):
        seconds = [value * scale for value in comparison.wall_seconds(side)]
        # Spread in the order of the rounds, so that a drift shows as a slope.
        spread = [place - 0.2 + 0.4 * number / len(seconds) for number in range(len(seconds))]
        axes.scatter(spread, seconds, s=14, color=colour, alpha=0.6, linewidths=0)
        axes.boxplot(
            [seconds], positions=[place], widths=0.55, showfliers=False, medianprops={"color": colour}
        )
    axes.set_xticks([1, 2], [f"A: {comparison.side_a}", f"B: {comparison.side_b}"])
    axes.set_xlim(0.4, 2.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"wall time of one call, {unit}")
    axes.grid(axis="y", alpha=0.3)


def _draw_ratios(axes: Axes, comparison: Comparison) -> None:
    pairs = zip(comparison.wall_seconds("a"), comparison.wall_seconds("b"), strict=True)
    axes.scatter(
        range(comparison.rounds), [b / a for a, b in pairs], s=16, color=COLOUR_RATIO, label="one round"
    )
    label = f"{comparison.wall} at 95 %"
    axes.axhspan(comparison.low, comparison.high, color=COLOUR_B, alpha=0.25, linewidth=0)
    axes.axhline(comparison.ratio, color=COLOUR_B, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="equal")
    axes.set_xlabel("round")
    axes.set_ylabel("B / A, wall time")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)


def _unit(seconds: float) -> tuple[float, str]:
    """Return the factor and name of the unit in which so many seconds read well."""
    if seconds >= 1:
        return 1.0, "s"
    return (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
