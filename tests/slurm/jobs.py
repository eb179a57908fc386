"""Jobs of small ranks for the tests of this folder: submission, what was written down, and the price of a fault."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.slurm import submit_job
from launch.supervisor.history import Attempt, read_history
from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import Beat, read_heartbeats
from tests.builders import tiny_config
from tests.slurm.cluster import Cluster
from tests.slurm.machine import until

ROOT = Path(__file__).parents[2]


def job_config(runs: Path, **sections: Any) -> RunConfig:
    """Return a run on two nodes whose hangs are found after seconds."""
    cluster = {
        "nodes": 2,
        "time": "0:30:00",
        "signal_lead_seconds": 60,
        "setup": (f"export PYTHONPATH='{ROOT}'",),
    }
    cluster |= sections.pop("cluster", {})
    health = {"hang_seconds": 4.0, "start_seconds": 60.0} | sections.pop("health", {})
    return tiny_config(runs, cluster=cluster, health=health, **sections)


@dataclass(frozen=True)
class SmallJob:
    """A submitted job of `rank_program`."""

    cluster: Cluster
    job_id: str
    run: RunPaths

    @classmethod
    def submit(
        cls,
        cluster: Cluster,
        folder: Path,
        *,
        steps: int = 60,
        plan: dict[str, list[Any]] | None = None,
        site: dict[str, Any] | None = None,
        **sections: Any,
    ) -> "SmallJob":
        """Submit it; `plan` says which fault befalls which rank before which step of which start."""
        config = job_config(folder, cluster=site or {}, **sections)
        run = RunPaths(folder / "run")
        program = [sys.executable, "-m", "tests.slurm.rank_program"]
        words = [*program, str(run.root), str(steps), json.dumps(plan or {})]
        job_id = submit_job(config, run, words).job_id
        assert job_id is not None
        return cls(cluster, job_id, run)

    @property
    def log(self) -> str:
        """Everything that supervisors and ranks have written."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.run.log.glob("*.txt")))

    @property
    def history(self) -> list[Attempt]:
        """The attempts so far."""
        return read_history(self.run)

    def end(self, *states: str, job_id: str | None = None, seconds: float = 90.0) -> dict[str, str]:
        """Return the job's fields when it has ended in one of `states`."""
        try:
            return self.cluster.wait_for_state(
                job_id or self.job_id, *(states or ("COMPLETED",)), seconds=seconds
            )
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.cluster.show(job_id or self.job_id)}\n{self.log}") from None

    def steps(self) -> list[dict[str, Any]]:
        """Return every step that was done, with its attempt and time."""
        file = self.run.root / "steps.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def reach(self, step: int, attempt: int = 0, seconds: float = 60.0) -> None:
        """Wait until start number `attempt` has done `step` steps."""

        def reached() -> bool:
            starts = list(dict.fromkeys(row["attempt"] for row in self.steps()))
            return len(starts) > attempt and any(
                row["attempt"] == starts[attempt] and row["step"] >= step for row in self.steps()
            )

        try:
            until(reached, seconds, f"step {step} of start {attempt}")
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.cluster.show(self.job_id)}\n{self.log}") from None

    def beat(self, rank: int) -> Beat:
        """Return a rank's last sign of life."""
        return next(beat for beat in read_heartbeats(self.run) if beat.rank == rank)

    def price(self, name: str, fault_time: float) -> tuple[int, float]:
        """Return and print steps lost and seconds from the fault to the next step of another attempt.

        Steps that the struck attempt still did after the fault, before the other's first, count as done by it.
        """
        rows = self.steps()
        struck = [row["attempt"] for row in rows if row["time"] <= fault_time][-1]
        after = [row for row in rows if row["time"] > fault_time and row["attempt"] != struck]
        done = [row for row in rows if row["attempt"] == struck and row["time"] < after[0]["time"]]
        lost = max(row["step"] for row in done) - (after[0]["step"] - 1)
        seconds = after[0]["time"] - fault_time
        print(f"PRICE {name}: {lost} steps lost, {seconds:.1f} s from the fault to the next step")
        return lost, seconds
