"""Records and configs under the names and in the lengths that MLflow takes; pure."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.tracking.journal import record_values
from pipeline.tracking.redaction import flat, redact

LONGEST_VALUE = 500
LONGEST_NAME = 250
LONGEST_DIGEST = 36
JOINS = {"evaluate": "train", "sample": "train", "export": "train"}
"""Work after a training is told in the training's own run."""


def run_of(kind: str) -> str:
    """Return the kind of work in whose MLflow run `kind` is told."""
    return JOINS.get(kind, kind)


def metrics_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a record's finite values and its sample count under names that MLflow takes.

    What joins another kind's run has its own names there: `evaluate/val_loss_ema`.
    """
    values = record_values(record)
    joins = record["kind"] in JOINS
    if record.get("samples") is not None and not joins:
        values["samples"] = record["samples"]
    above = f"{record['kind']}/" if joins else ""
    return {allowed_name(above + name): float(value) for name, value in values.items()}


def params_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the config as flat `section.key` -> text without secrets, each text at most 500 characters."""
    return {
        allowed_name(name): shortened(
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
        for name, value in flat(redact(config)).items()
    }


def start_tags(starts: list[dict[str, Any]]) -> dict[str, str]:
    """Return what the last start says of its code, machine and origin, and the way through all of them, as tags."""
    if not starts:
        return {}
    last = starts[-1]
    told = {"host": last.get("host"), "attempt": last.get("attempt"), "starts": len(starts)}
    told |= {f"env.{name}": value for name, value in (last.get("environment") or {}).items()}
    told |= {f"version.{name}": value for name, value in (last.get("versions") or {}).items()}
    hosts = last.get("hosts") or []
    told |= {"hosts": " ".join(hosts) or None, "processes": last.get("processes")}
    code = last.get("code") or {}
    told |= {"code.commit": code.get("commit"), "code.diff_lines": code.get("diff_lines")}
    told |= {"code.changed_files": len(code.get("changed", []))}
    told |= {"mlflow.source.git.commit": code.get("commit")}
    told |= {"lineage.resumed_from": last.get("resumed_from")}
    lineage = [start["resumed_from"] for start in starts if start.get("resumed_from")]
    told |= {"lineage.resumes": lineage or None, "lineage.forked_from": last.get("forked_from")}
    return {
        name: shortened(value if isinstance(value, str) else json.dumps(value))
        for name, value in told.items()
        if value is not None
    }


def shortened(text: str) -> str:
    """Return the text, at most 500 characters of it."""
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def allowed_name(name: str) -> str:
    """Return `name` with what MLflow refuses in names replaced by `_`: other signs, `..`, a slash at an end."""
    signs = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name).replace("..", "__").replace("//", "__")
    return signs.strip("/").strip()[:LONGEST_NAME] or "_"
