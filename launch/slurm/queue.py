"""What became of jobs: asked of squeue, then scontrol, then sacct where the site keeps accounts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launch.slurm.sbatch import call, complaint
from pipeline.errors import ToolError

TIMEOUT_SECONDS = 20.0
SQUEUE_FORMAT = "%i|%T|%r|%N|%L"
SACCT_FIELDS = "JobID,State,ExitCode,NodeList"
UNKNOWN = ("Invalid job id", "not found")


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job, or of elements of an array."""

    job_id: str
    """`7`, `7_3` for an element, `7_[4-9]` for those that have not begun."""
    state: str
    reason: str = ""
    nodes: str = ""
    time_left: str = ""
    restarts: int = 0
    exit_code: str = ""
    source: str = "squeue"

    @property
    def base(self) -> str:
        """The id that sbatch answered, without the element."""
        return self.job_id.partition("_")[0]

    def __str__(self) -> str:
        """Return state, place and reason on one line."""
        words = [self.state]
        words += [f"on {self.nodes}"] if self.nodes and self.state not in ("PENDING",) else []
        words += [f"({self.reason})"] if self.reason not in ("", "None") else []
        words += [f"{self.time_left} left"] if self.time_left and self.state == "RUNNING" else []
        words += [f"restarted {self.restarts} times"] if self.restarts else []
        ended = self.source != "squeue" and self.exit_code not in ("", "0:0")
        return ", ".join([*words, *([f"exit code {self.exit_code}"] if ended else [])])


def live_jobs(job_ids: Sequence[str]) -> list[JobState]:
    """Return those of the jobs that wait, run or are being ended; an element of an array counts by itself.

    Raises:
        ToolError: when squeue is missing, or the controller does not answer.
    """
    if not job_ids:
        return []
    command = ("squeue", "--noheader", f"--format={SQUEUE_FORMAT}", f"--jobs={','.join(job_ids)}")
    done = call(command, timeout_seconds=TIMEOUT_SECONDS)
    if done.returncode:
        if any(words in done.stderr for words in UNKNOWN):
            return []
        raise ToolError(f"squeue: {complaint(done)}")
    rows = (line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4)
    return [JobState(row[0], row[1], row[2], row[3], row[4]) for row in rows]


def job_states(job_ids: Sequence[str]) -> list[JobState]:
    """Return what is known of each job, whichever command knows it; one that nobody remembers is left out.

    Raises:
        ToolError: when Slurm is missing or does not answer.
    """
    live = live_jobs(job_ids)
    found: list[JobState] = []
    forgotten: list[str] = []
    for job_id in job_ids:
        told = _from_controller(job_id)
        queued = {state.job_id: state for state in live if state.base == job_id}
        if told:
            found += [_merged(state, queued.get(state.job_id)) for state in told]
        elif queued:
            found += queued.values()
        else:
            forgotten.append(job_id)
    return found + _from_accounts(forgotten)


def _merged(told: JobState, queued: JobState | None) -> JobState:
    if queued is None:
        return told
    return JobState(
        told.job_id,
        queued.state,
        queued.reason,
        queued.nodes,
        queued.time_left,
        told.restarts,
        told.exit_code,
    )


def _from_controller(job_id: str) -> list[JobState]:
    done = call(("scontrol", "--oneliner", "show", "job", job_id), timeout_seconds=TIMEOUT_SECONDS)
    if done.returncode:
        return []
    states = []
    for line in done.stdout.splitlines():
        fields = dict(re.findall(r"(\w[\w:]*)=(\S*)", line))
        if "JobState" not in fields:
            continue
        element = fields.get("ArrayTaskId")
        # A range of elements that have not begun is 0-3 here and [0-3] for squeue.
        element = f"[{element}]" if element and not element.isdecimal() else element
        nodes = fields.get("NodeList", "")
        states.append(
            JobState(
                f"{fields.get('ArrayJobId', job_id)}_{element}" if element else job_id,
                fields["JobState"],
                fields.get("Reason", ""),
                "" if nodes == "(null)" else nodes,
                restarts=int(fields.get("Restarts", "0") or 0),
                exit_code=fields.get("ExitCode", ""),
                source="scontrol",
            )
        )
    return states


def _from_accounts(job_ids: Sequence[str]) -> list[JobState]:
    """Return what sacct says; nothing where the site keeps no accounts."""
    if not job_ids:
        return []
    command = ("sacct", "--allocations", "--noheader", "--parsable2", f"--format={SACCT_FIELDS}")
    try:
        done = call((*command, f"--jobs={','.join(job_ids)}"), timeout_seconds=TIMEOUT_SECONDS)
    except ToolError:
        return []
    if done.returncode:
        return []
    rows = (line.split("|") for line in done.stdout.splitlines() if line.count("|") == 3)
    return [
        JobState(row[0], row[1].partition(" ")[0], nodes=row[3], exit_code=row[2], source="sacct")
        for row in rows
    ]
