"""The page of `ldm compare`: settings that differ, curves, evaluation, grids and how they came about."""

import html
from collections.abc import Iterator, Sequence

from launch.compare.runs import ComparedRun
from pipeline.page import curves, legend, picture, render_page, sections, table

MOST_POINTS = 1000
"""Of a curve: more would be bytes that nobody sees."""
MOST_STAGES = 6
"""Grids of a run, first and last among them, that show it learning."""
GRID_WIDTH, STAGE_WIDTH = 420, 200
CURVES = {"evaluate": "val_loss_", "train": None}
"""Kinds of records, and what the names of their numbers begin with; None = all of them."""
NO_CURVES = {"time", "step", "samples", "resumed_step", "skipped"}
ACROSS = ("step", "samples")
ABSENT = "\N{EM DASH}"


def render(runs: Sequence[ComparedRun]) -> str:
    """Return the page as HTML.

    Raises:
        ConfigError: when a run's config or evaluation cannot be read.
    """
    names = [run.name for run in runs]
    parts = [
        ("Settings that differ", _settings(runs)),
        ("Curves", _curves(runs)),
        ("Evaluation", _evaluation(runs)),
        ("Newest grids", _newest(runs)),
        ("How they came about", _stages(runs)),
    ]
    return render_page(" and ".join(names), sections(parts), about="compared", lead=legend(names))


def _settings(runs: Sequence[ComparedRun]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    lines = []
    for name in names:
        values = [run.settings.get(name, ABSENT) for run in runs]
        if any(value != values[0] for value in values):
            lines.append((name, *map(_said, values)))
    head = ("setting", *(run.name for run in runs))
    return table(head, lines) if lines else "<p>None: the runs have the same settings.</p>"


def _said(value: object) -> str:
    return "null" if value is None else str(value)


def _curves(runs: Sequence[ComparedRun]) -> str:
    drawn = ""
    for kind, prefix in CURVES.items():
        records = {run.name: run.records(kind) for run in runs}
        numbers = dict.fromkeys(
            name
            for of_run in records.values()
            for record in of_run
            for name, value in record.items()
            if _is_drawn(name, value, prefix)
        )
        for name in numbers:
            for across in ACROSS:
                lines = {
                    run: _points([record for record in of_run if _has(record, name, across)], across, name)
                    for run, of_run in records.items()
                }
                drawn += curves(lines, f"{kind}: {name} by {across}", across)
    return drawn or "<p>No run has a record yet.</p>"


def _is_drawn(name: str, value: object, prefix: str | None) -> bool:
    """Return whether a number of a record gets curves: those of single timesteps and bins are too many."""
    wanted = name not in NO_CURVES if prefix is None else name.startswith(prefix)
    return wanted and "/" not in name and isinstance(value, int | float) and not isinstance(value, bool)


def _has(record: dict[str, object], *names: str) -> bool:
    return all(isinstance(record.get(name), int | float) for name in names)


def _points(records: Sequence[dict[str, float]], across: str, name: str) -> tuple[list[float], list[float]]:
    every = -(-len(records) // MOST_POINTS) or 1
    kept = [record for place, record in enumerate(records) if place % every == 0 or place == len(records) - 1]
    return [float(record[across]) for record in kept], [float(record[name]) for record in kept]


def _evaluation(runs: Sequence[ComparedRun]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.evaluation))
    if not names:
        return "<p>No run has been measured: <code>ldm evaluate RUN</code>.</p>"
    lines = [
        (name, *(f"{run.evaluation[name]:.6g}" if name in run.evaluation else ABSENT for run in runs))
        for name in names
    ]
    return table(("", *(run.name for run in runs)), lines)


def _newest(runs: Sequence[ComparedRun]) -> str:
    figures = "".join(_grid(run, max(run.grids), GRID_WIDTH, captions=True) for run in runs if run.grids)
    return figures or "<p>No run has painted yet: <code>ldm sample RUN</code>.</p>"


def _stages(runs: Sequence[ComparedRun]) -> str:
    return "".join(_strip(run) for run in runs)


def _strip(run: ComparedRun) -> str:
    steps = list(_spread(list(run.grids)))
    if len(steps) < 2:
        return ""
    figures = "".join(_grid(run, step, STAGE_WIDTH, captions=False) for step in steps)
    return f"<h3>{html.escape(run.name)}</h3><div>{figures}</div>"


def _spread(steps: Sequence[int]) -> Iterator[int]:
    """Yield at most MOST_STAGES of the steps, first and last among them, evenly spaced."""
    count = min(len(steps), MOST_STAGES)
    for place in range(count):
        yield steps[place * (len(steps) - 1) // max(1, count - 1)]


def _grid(run: ComparedRun, step: int, width: int, *, captions: bool) -> str:
    shown = picture(run.grids[step].read_bytes(), f"{run.name}, step {step}", f"width='{width}'")
    said = f"<b>{html.escape(run.name)}</b>, step {step:,}"
    if captions and (prompts := run.prompts(step)):
        said += "<br>" + html.escape("; ".join(prompts))
    return f"<figure style='max-width: {width}px'>{shown}<figcaption>{said}</figcaption></figure>"
