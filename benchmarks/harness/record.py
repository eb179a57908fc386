"""A comparison on disk: a CSV that gives it back whole, and a row of a Markdown table."""

import csv
import io
from pathlib import Path

from benchmarks.harness.comparison import Comparison, comparison_of
from benchmarks.harness.measure import Sample
from pipeline.publish import whole_file

COLUMNS = ("side", "round", "wall_seconds", "cpu_seconds")
NAMES = ("name", "side_a", "side_b")
RESULTS = ("ratio_b_over_a", "cpu_ratio_b_over_a")

MARKDOWN_HEADER = (
    "| benchmark | A | A, median s | B | B, median s | B / A [95 %] | B / A, CPU | rounds |\n"
    "|---|---|---|---|---|---|---|---|"
)


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write one row per round and side in the order of running, under `# key: value` lines.

    The lines say what was compared and under which conditions; numbers are written in full, so that reading
    gives the same comparison back.
    """
    names = dict(zip(NAMES, (comparison.name, comparison.side_a, comparison.side_b), strict=True))
    results = dict(zip(RESULTS, (str(comparison.wall), str(comparison.cpu or "not measured")), strict=True))
    header = names | dict(comparison.conditions) | results
    text = io.StringIO(newline="")
    for key, value in header.items():
        if "\n" in value or "\r" in value:
            raise ValueError(f"{path}: the header value {key} holds a line break: {value!r}")
        text.write(f"# {key}: {value}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sample in comparison.samples:
        cpu = "" if sample.cpu_seconds is None else repr(sample.cpu_seconds)
        writer.writerow((sample.side, sample.round, repr(sample.wall_seconds), cpu))
    with whole_file(path) as beside:
        beside.write_text(text.getvalue())


def read_csv(path: Path) -> Comparison:
    """Return the comparison that `write_csv` wrote; its ratios are worked out anew from the samples."""
    lines = path.read_text().splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    rows = csv.DictReader(line for line in lines if not line.startswith("# "))
    samples = tuple(
        Sample(
            side=row["side"],
            round=int(row["round"]),
            wall_seconds=float(row["wall_seconds"]),
            cpu_seconds=float(row["cpu_seconds"]) if row["cpu_seconds"] else None,
        )
        for row in rows
    )
    conditions = {key: value for key, value in header.items() if key not in NAMES + RESULTS}
    return comparison_of((header["name"], header["side_a"], header["side_b"]), samples, conditions)


def markdown_row(comparison: Comparison) -> str:
    """Return one row under `MARKDOWN_HEADER`: both medians in seconds, both ratios with their intervals."""
    cells = (
        comparison.name,
        comparison.side_a,
        f"{comparison.median_a_seconds:.4g}",
        comparison.side_b,
        f"{comparison.median_b_seconds:.4g}",
        str(comparison.wall),
        str(comparison.cpu or "-"),
        str(comparison.rounds),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
