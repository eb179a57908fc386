"""Paired benchmarks: two sides run in turn, a ratio with its 95 % interval, a CSV, a picture, a table row.

comparison = compare(Side("ours", ours), Side("peer", peer), name="ema_update", out_dir=RESULTS, check=same)
gate(comparison, at_least=5.0)   # exits non-zero unless the peer takes 5 times our time, interval included
"""

from benchmarks.harness.compare import CheckError, Rounds, compare, gate
from benchmarks.harness.comparison import Comparison
from benchmarks.harness.measure import HOST_CLOCK, Clock, CommandError, Sample, Side
from benchmarks.harness.ratio import Ratio, paired_ratio
from benchmarks.harness.record import MARKDOWN_HEADER, markdown_row, read_csv, write_csv

__all__ = [
    "HOST_CLOCK",
    "MARKDOWN_HEADER",
    "CheckError",
    "Clock",
    "CommandError",
    "Comparison",
    "Ratio",
    "Rounds",
    "Sample",
    "Side",
    "compare",
    "gate",
    "markdown_row",
    "paired_ratio",
    "read_csv",
    "write_csv",
]
