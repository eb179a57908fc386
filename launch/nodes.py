"""From the environment to this process's place in the world: a table with a row for each launcher.

Order matters. torchrun and whoever sets RANK by hand know best, also inside a Slurm step. Open MPI comes before
Slurm because `mpirun` starts its daemons through `srun`, so that its ranks inherit a step that counts nodes.
Slurm counts only inside a step: a batch script has SLURM_PROCID=0 and SLURM_NTASKS=n too.

Several nodes never fall back to localhost, where every node would train a world of its own.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError, ToolError

# Outside of Linux's ephemeral range (32768-60999), where any outgoing connection may sit on the port already.
FIRST_PORT = 15000
PORTS = 10000
# Coprime to PORTS: jobs of one node differ in the port unless their ids are 10,000 apart.
PORT_STRIDE = 31
# Slurm numbers the interactive, batch and extern steps from 2^32 - 6 on: their tasks are not our ranks.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
LOOPBACK = re.compile(r"localhost(\..*)?|127(\.\d+){3}|::1", re.IGNORECASE)
NUMBER = re.compile(r"\d{1,9}", re.ASCII)
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%\w+)?")


@dataclass(frozen=True)
class Placement:
    """Where this process stands: global and local rank, sizes, and the address and port where the world meets."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    source: str


@dataclass(frozen=True)
class Launcher:
    """A row of the table: the variables by which one launcher tells a process its place."""

    name: str
    marks: tuple[str, ...]
    numbers: tuple[str, str, str, str]
    advice: str
    job: str = ""

    @property
    def rank(self) -> str:
        """The variable with the rank in the world."""
        return self.numbers[0]

    @property
    def world_size(self) -> str:
        """The variable with the number of ranks."""
        return self.numbers[1]

    @property
    def local_rank(self) -> str:
        """The variable with the rank on this node: the device's index."""
        return self.numbers[2]

    @property
    def local_world_size(self) -> str:
        """The variable with the number of ranks on this node."""
        return self.numbers[3]


COMMON = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCHRUN = Launcher("torchrun", ("TORCHELASTIC_RUN_ID",), COMMON, "torchrun sets it; start again")
EXPLICIT = Launcher(
    "explicit",
    ("RANK", "WORLD_SIZE"),
    COMMON,
    f"set all of {', '.join(COMMON)}, MASTER_ADDR, MASTER_PORT, or none",
)
OPENMPI = Launcher(
    "openmpi",
    ("OMPI_COMM_WORLD_RANK",),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "start with `mpirun -x MASTER_ADDR=HOST_OF_RANK_0 -x MASTER_PORT=15000`",
    job="PMIX_NAMESPACE",
)
SLURM = Launcher(
    "slurm",
    ("SLURM_STEP_ID",),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "use `ldm submit`, or before srun: export MASTER_ADDR=$(scontrol show hostnames | head -n 1)",
    job="SLURM_JOB_ID",
)
LAUNCHERS = (TORCHRUN, EXPLICIT, OPENMPI, SLURM)
SINGLE = Launcher("single", (), COMMON, "unset MASTER_ADDR and MASTER_PORT")


def place(environment: Mapping[str, str], *, meets: bool = True) -> Placement:
    """Return this process's place in the world, as the first launcher of the table that left its mark tells it.

    Without a mark it is a world of one process. Processes that never talk to each other, as those of `encode`, do
    not meet (`meets=False`): their address is empty, their port 0, and neither has to be known.

    Raises:
        ConfigError: with a line for each variable that is missing, no number or out of range.
    """
    launcher = next((row for row in LAUNCHERS if _started_by(row, environment)), SINGLE)
    texts = _texts(launcher, environment)
    problems = [
        f"environment: {name} is missing, but {launcher.name} started this process: {launcher.advice}"
        if text is None
        else f"environment: {name}={text!r} is not a whole number from 0: {launcher.advice}"
        for name, text in texts.items()
        if text is None or not NUMBER.fullmatch(text)
    ]
    if problems:
        raise ConfigError(problems)
    rank, world_size, local_rank, local_world_size = (int(text or 0) for text in texts.values())
    problems += _range_problems(launcher, rank, world_size, local_rank, local_world_size)
    if not meets:
        if problems:
            raise ConfigError(problems)
        return Placement(rank, world_size, local_rank, local_world_size, "", 0, launcher.name)
    several_nodes = local_world_size < world_size
    address, address_problems = _master_address(launcher, environment, several_nodes)
    port, port_problems = _master_port(launcher, environment, world_size)
    problems += address_problems + port_problems
    if problems:
        raise ConfigError(problems)
    return Placement(rank, world_size, local_rank, local_world_size, address, port, launcher.name)


def job_port(job: int, attempt: int = 0) -> int:
    """Return the port for this attempt of a job, the same on every node and another one for the next attempt."""
    return FIRST_PORT + (PORT_STRIDE * job + attempt) % PORTS


def free_port(start: int, address: str = "127.0.0.1") -> int:
    """Return a port of this machine that nobody listens on now, looking from the `start`-th of the range.

    `start` may be a port of the range as well; `address` "" asks about all addresses of the machine.
    """
    start -= FIRST_PORT if start >= FIRST_PORT else 0
    for offset in range(PORTS):
        port = FIRST_PORT + (start + offset) % PORTS
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise ToolError(
        f"no free port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} on this machine; set MASTER_PORT"
    )


def _started_by(launcher: Launcher, environment: Mapping[str, str]) -> bool:
    if not any(environment.get(mark) for mark in launcher.marks):
        return False
    step = environment.get("SLURM_STEP_ID", "")
    return launcher is not SLURM or not (step.isdecimal() and int(step) >= FIRST_SPECIAL_STEP)


def _texts(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str | None]:
    """Return the four numbers of a place as the environment writes them, by the variable's name, in fixed order."""
    if launcher is SINGLE:
        return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    texts = {name: environment.get(name) or None for name in launcher.numbers}
    rank, world_size = texts[launcher.rank], texts[launcher.world_size]
    one_node = world_size == "1" or LOOPBACK.fullmatch(environment.get("MASTER_ADDR", ""))
    if launcher is SLURM:
        layout, node = texts[launcher.local_world_size], environment.get("SLURM_NODEID", "")
        texts[launcher.local_world_size] = _tasks_of_node(layout or "", node)
    elif one_node:
        # On one node the global numbers are the local ones: whoever sets RANK by hand often stops there.
        texts[launcher.local_rank] = texts[launcher.local_rank] or rank
        texts[launcher.local_world_size] = texts[launcher.local_world_size] or world_size
    return texts


def _tasks_of_node(layout: str, node: str) -> str | None:
    """Return the entry of this node in Slurm's run-length list, such as 3 for node 2 of `4(x2),3`."""
    if not NUMBER.fullmatch(node):
        return None
    counts: list[str] = []
    for part in layout.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            return layout or None
        counts += [match[1]] * int(match[2] or 1)
    return counts[int(node)] if int(node) < len(counts) else None


def _range_problems(
    launcher: Launcher, rank: int, world_size: int, local_rank: int, local_world_size: int
) -> list[str]:
    problems = []
    for name, number, size_name, size in (
        (launcher.rank, rank, launcher.world_size, world_size),
        (launcher.local_rank, local_rank, launcher.local_world_size, local_world_size),
    ):
        if number >= size:
            problems.append(
                f"environment: {name}={number} with {size_name}={size}: ranks are 0 to size - 1; {launcher.advice}"
            )
    if local_world_size > world_size:
        problems.append(
            f"environment: {launcher.local_world_size}={local_world_size} is more than"
            f" {launcher.world_size}={world_size}: a node cannot hold more ranks than the world"
        )
    return problems


def _master_address(
    launcher: Launcher, environment: Mapping[str, str], several_nodes: bool
) -> tuple[str, list[str]]:
    address = environment.get("MASTER_ADDR", "")
    if not address and not several_nodes:
        return "127.0.0.1", []
    if not address:
        return "", [f"environment: MASTER_ADDR is missing with ranks on several nodes: {launcher.advice}"]
    if not HOST.fullmatch(address):
        return "", [
            f"environment: MASTER_ADDR={address!r} is neither a host name nor an address: {launcher.advice}"
        ]
    if several_nodes and LOOPBACK.fullmatch(address):
        problem = (
            "with ranks on several nodes every node would be a world of its own; name the host of rank 0"
        )
        return "", [f"environment: MASTER_ADDR={address!r}: {problem}"]
    return address, []


def _master_port(
    launcher: Launcher, environment: Mapping[str, str], world_size: int
) -> tuple[int, list[str]]:
    text = environment.get("MASTER_PORT", "")
    if text and NUMBER.fullmatch(text) and 1 <= int(text) <= 65535:
        return int(text), []
    if text:
        return 0, [f"environment: MASTER_PORT={text!r} is not a port: give a whole number from 1 to 65535"]
    job = environment.get(launcher.job, "")
    if job:
        number = int(job) if NUMBER.fullmatch(job) else zlib.crc32(job.encode())
        restarts = environment.get("SLURM_RESTART_COUNT", "") if launcher is SLURM else ""
        return job_port(number, int(restarts) if NUMBER.fullmatch(restarts) else 0), []
    if world_size == 1:
        return free_port(os.getpid()), []
    return 0, [f"environment: MASTER_PORT is missing with {world_size} ranks: {launcher.advice}"]
