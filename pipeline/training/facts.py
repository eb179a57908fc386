"""What a run says of itself: in every checkpoint, in its folder, and when it is resumed with other settings."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import RunConfig
from pipeline.latents.reader import LatentDataset
from pipeline.paths import RunPaths
from pipeline.tracking import redact, versions


def run_facts(config: RunConfig, dataset: LatentDataset, attempt: str) -> dict[str, Any]:
    """Return what every checkpoint of this attempt says of the run beside its numbers."""
    return {
        "attempt": attempt,
        "config": redact(config.model_dump(mode="json")),
        "data_digest": dataset.manifest.digest,
        "scheduler": {
            "schedule": config.optimizer.schedule,
            "warmup_steps": config.optimizer.warmup_steps,
            "learning_rate": config.optimizer.learning_rate,
            "total_steps": config.train.steps,
        },
        "zero_stage": config.engine.zero_stage,
        "versions": versions(),
    }


def tracker_run_id(paths: RunPaths) -> str | None:
    """Return the run's id at the tracker, None while there is none or it cannot be read: it is a convenience."""
    try:
        run_id = json.loads(paths.mlflow_run.read_text(encoding="utf-8"))["train"]["run_id"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return run_id if isinstance(run_id, str) else None


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Yield `dotted.key: old -> new` for each setting that differs between two configs as JSON data."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed_settings(old, new, f"{at}{key}.")
        elif old != new:
            yield f"{at}{key}: {old!r} -> {new!r}"
