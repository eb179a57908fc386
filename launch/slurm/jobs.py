"""RUN/jobs.json: every job that was ever submitted for a run, in order."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import publish
from pipeline.errors import ConfigError


def read_jobs(path: Path) -> list[dict[str, Any]]:
    """Return the jobs of a run, the oldest first; none where the file is not there.

    Raises:
        ConfigError: when the file is something else.
    """
    if not path.exists():
        return []
    try:
        jobs = json.loads(path.read_text(encoding="utf-8"))["jobs"]
        if isinstance(jobs, list) and all(isinstance(job["job_id"], str) for job in jobs):
            return jobs
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        f"{path}: not a record of jobs; move it away, Slurm itself still knows them (`squeue --me`)"
    )


def add_job(path: Path, job: Mapping[str, Any]) -> None:
    """Write `job`, which has at least its `job_id`, behind those that the file holds; the file is never half written.

    Raises:
        ConfigError: see `read_jobs`.
    """
    publish.write_json(path, {"jobs": [*read_jobs(path), dict(job)]})
