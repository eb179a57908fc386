"""The picture of a plan: throughput and cost over the number of devices."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.plan.estimate import Estimate
from pipeline.publish import whole_file


def draw(plans: Sequence[Estimate], title: str, path: Path) -> None:
    """Write a PNG of about 1000 x 430 pixels: samples a second beside the published bound, and device-hours or dollars."""
    figure = Figure(figsize=(10, 4.3), dpi=100, layout="constrained")
    speed, cost = figure.subplots(1, 2)
    known = [plan for plan in plans if plan.samples_per_second is not None]
    ranks = [plan.ranks for plan in known]
    speed.plot(ranks, [plan.samples_per_second for plan in known], "o-", label="this engine (planned)")
    bounded = [plan for plan in known if plan.bound_seconds]
    if bounded:
        rates = [plan.samples_per_second * plan.step_seconds / plan.bound_seconds for plan in bounded]  # type: ignore[operator]
        speed.plot(
            [plan.ranks for plan in bounded], rates, "s:", color="gray", label="published stack (a bound)"
        )
    speed.set_ylabel("samples / s")
    priced = all(plan.dollars is not None for plan in known)
    hours = [plan.ranks * (plan.training_seconds or 0) / 3600 for plan in known]
    cost.plot(ranks, [plan.dollars for plan in known] if priced else hours, "o-", color="#d95f02")
    cost.set_ylabel("dollars for the training" if priced else "device-hours for the training")
    cost.set_ylim(bottom=0)
    for axes in (speed, cost):
        axes.set_xlabel("devices")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.grid(alpha=0.3)
    speed.set_yscale("log", base=2)
    speed.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    with whole_file(path) as beside:
        figure.savefig(beside, format="png")
