"""Which share of a run's time went into steps that count."""

import statistics
from collections.abc import Sequence
from typing import Any


def goodput(records: Sequence[dict[str, Any]], global_batch: int, began: float | None = None) -> float | None:
    """Return the share of the time since `began` that made steps which count, at the run's median speed.

    `records` are those of the run's truth: steps that a restart computed again count once, while the time of both
    passes. `began` is in seconds since 1970, None for the first step's begin; None is returned for fewer than two
    records.

    Source: effective training time ratio as in arXiv 2410.21680, section 2; the time in the queue counts as lost.
    """
    timed = [record for record in records if record.get("samples_per_second")]
    if len(timed) < 2:
        return None
    rate = statistics.median(record["samples_per_second"] for record in timed)
    first, last = timed[0], timed[-1]
    if began is None:
        began = first["time"] - first["step"] * global_batch / first["samples_per_second"]
    seconds = last["time"] - began
    return min(1.0, last["step"] * global_batch / rate / seconds) if seconds > 0 else None
