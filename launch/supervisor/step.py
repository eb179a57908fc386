"""One start of all ranks through `srun`, one task a device: its command, its environment, its end."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.sbatch import call
from launch.supervisor.exits import RANK_PARENT
from pipeline.errors import ToolError

SCANCEL_SECONDS = 20.0
# From KILL of all tasks to the end of srun; one with a dead node would wait for it for minutes.
END_SECONDS = 10.0
LOST_SECONDS = 1.0
# One rank has left: the others follow within this time, or are ended (collective work only).
LEAVE_SECONDS = 60
# Another launcher's words: a rank would believe them more than Slurm's.
FOREIGN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "OMPI_COMM_WORLD_RANK",
)


@dataclass(frozen=True)
class StepPlan:
    """What one attempt starts, and where."""

    attempt: str
    hosts: tuple[str, ...]
    tasks_per_node: int
    cpus_per_task: int
    options: tuple[str, ...]
    """What the site adds for srun: the container."""
    command: tuple[str, ...]
    log: str
    records: Path
    collective: bool
    """Whether the ranks are one world, so that none can go on without the others."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.hosts) * self.tasks_per_node

    def host_of(self, rank: int) -> str:
        """Return the node of a rank: ranks are laid out in blocks."""
        return self.hosts[rank // self.tasks_per_node]

    @property
    def words(self) -> list[str]:
        """The whole command line of srun.

        kill-on-bad-exit=0: the first rank that leaves after saving must not end those that still save. overlap: a
        step whose node is dead holds its resources for minutes, and the next one must not wait for them.
        """
        return [
            "srun",
            f"--job-name=ldm-{self.attempt}",
            "--export=ALL",
            "--overlap",
            "--kill-on-bad-exit=0",
            f"--wait={LEAVE_SECONDS if self.collective else 0}",
            "--distribution=block",
            f"--nodes={len(self.hosts)}",
            f"--ntasks={self.world_size}",
            f"--ntasks-per-node={self.tasks_per_node}",
            f"--nodelist={','.join(self.hosts)}",
            # srun has not taken it from the job since Slurm 22.05.
            f"--cpus-per-task={self.cpus_per_task}",
            "--label",
            "--open-mode=append",
            f"--output={self.log}/node-%n.txt",
            *self.options,
            *("bash", "-c", RANK_PARENT, "rank", str(self.records)),
            *self.command,
        ]


def rank_environment(
    base: Mapping[str, str], plan: StepPlan, *, address: str, port: int, threads: int
) -> dict[str, str]:
    """Return the environment of the ranks: where they meet, who they are, and folders of their own on each node.

    A lock that a killed job left in torch's folder of extensions hangs every later one for ever, so the folder is
    new for each attempt. Lines come at once by PYTHONUNBUFFERED: srun's own option would give ranks a pseudo terminal.
    """
    local = f"/tmp/ldm-{os.getuid()}-{plan.attempt}"
    clean = {name: value for name, value in base.items() if name not in FOREIGN}
    return clean | {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "LDM_ATTEMPT": plan.attempt,
        "LDM_LOCAL": local,
        "TORCH_EXTENSIONS_DIR": f"{local}/torch_extensions",
        "TRITON_CACHE_DIR": f"{local}/triton",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }


class Step:
    """A started srun with all its tasks."""

    def __init__(self, plan: StepPlan, environment: Mapping[str, str]) -> None:
        """Start it.

        Raises:
            ToolError: when srun is not there.
        """
        self.plan = plan
        try:
            self._srun = subprocess.Popen(plan.words, env=dict(environment), stdin=subprocess.DEVNULL)
        except OSError as error:
            raise ToolError(f"srun: cannot be started ({error.strerror})") from None

    def wait(self, seconds: float) -> int | None:
        """Return srun's code if it ends within `seconds`."""
        try:
            return self._srun.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every task; srun hands USR1 and USR2 on."""
        if self._srun.poll() is None:
            self._srun.send_signal(number)

    def kill(self, job_id: str, *, lost: bool = False) -> None:
        """End every task that can be reached, and srun, which waits in vain where a node is `lost`."""
        for step_id in self._ids(job_id):
            with contextlib.suppress(ToolError):
                call(("scancel", "--signal=KILL", step_id), timeout_seconds=SCANCEL_SECONDS)
        if self.wait(LOST_SECONDS if lost else END_SECONDS) is None:
            self._srun.kill()
            self._srun.wait()

    def _ids(self, job_id: str) -> Sequence[str]:
        words = ("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i|%j")
        with contextlib.suppress(ToolError):
            rows = [
                line.strip().split("|")
                for line in call(words, timeout_seconds=SCANCEL_SECONDS).stdout.split()
            ]
            return [row[0] for row in rows if row[-1] == f"ldm-{self.plan.attempt}"]
        return []
