"""The table of launchers: each one's own variables, the precedence between them, and refusals that name values."""

import socket

import pytest

from launch.nodes import FIRST_PORT, PORTS, Placement, free_port, job_port, place
from pipeline.errors import ConfigError, ToolError

EXPLICIT = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu-01",
    "MASTER_PORT": "15123",
}
# As Slurm 22.05 sets them in a step of 3 + 2 tasks; the master comes from the batch script.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "MASTER_ADDR": "gpu-01",
    "MASTER_PORT": "15500",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "15001",
}
TORCHRUN = EXPLICIT | {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (EXPLICIT, Placement(5, 8, 1, 4, "gpu-01", 15123, "explicit")),
        (TORCHRUN, Placement(5, 8, 1, 4, "gpu-01", 15123, "torchrun")),
        (SLURM, Placement(4, 5, 1, 2, "gpu-01", 15500, "slurm")),
        (OPENMPI, Placement(3, 4, 1, 2, "10.0.0.1", 15001, "openmpi")),
        (
            EXPLICIT | {"MASTER_ADDR": "fe80::1%eth0"},
            Placement(5, 8, 1, 4, "fe80::1%eth0", 15123, "explicit"),
        ),
    ],
    ids=["explicit", "torchrun", "slurm", "openmpi", "ipv6"],
)
def test_each_launcher_is_read_by_its_own_variables(environment: dict[str, str], expected: Placement) -> None:
    assert place(environment) == expected


@pytest.mark.parametrize("node", range(4))
def test_slurm_counts_the_ranks_of_its_own_node(node: int) -> None:
    layout, counts = "3(x2),1,2", [3, 3, 1, 2]
    environment = SLURM | {
        "SLURM_STEP_NUM_TASKS": "9",
        "SLURM_STEP_TASKS_PER_NODE": layout,
        "SLURM_NODEID": str(node),
        "SLURM_PROCID": str(sum(counts[:node])),
        "SLURM_LOCALID": "0",
    }
    assert place(environment).local_world_size == counts[node]


def test_the_batch_script_itself_is_no_rank() -> None:
    # What Slurm 22.05 exports there: a rank and a task count, but no step.
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert (place(batch).source, place(batch).world_size) == ("single", 1)


@pytest.mark.parametrize("step", ["4294967290", "4294967291", "4294967292"])
def test_interactive_batch_and_extern_steps_are_no_ranks(step: str) -> None:
    assert place(SLURM | {"SLURM_STEP_ID": step}).source == "single"


@pytest.mark.parametrize(
    ("inner", "outer", "source"),
    [(TORCHRUN, SLURM, "torchrun"), (EXPLICIT, SLURM, "explicit"), (OPENMPI, SLURM, "openmpi")],
)
def test_the_innermost_launcher_wins(inner: dict[str, str], outer: dict[str, str], source: str) -> None:
    placement = place(outer | inner)
    assert placement == place(inner)
    assert placement.source == source


def test_without_a_launcher_it_is_a_world_of_one() -> None:
    placement = place({"HOME": "/root", "RANK": ""})
    assert (placement.rank, placement.world_size, placement.local_rank, placement.local_world_size) == (
        0,
        1,
        0,
        1,
    )
    assert (placement.master_address, placement.source) == ("127.0.0.1", "single")
    assert FIRST_PORT <= placement.master_port < FIRST_PORT + PORTS


def test_on_one_node_local_numbers_follow_from_the_global_ones() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "15002"}
    assert place(environment) == Placement(1, 2, 1, 2, "127.0.0.1", 15002, "explicit")
    alone = place({"RANK": "0", "WORLD_SIZE": "1"})
    assert (alone.local_world_size, alone.master_address) == (1, "127.0.0.1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]),
        ({"WORLD_SIZE": "8.0"}, ["WORLD_SIZE='8.0'"]),
        ({"RANK": "-1"}, ["RANK='-1'"]),
        ({"RANK": "²"}, ["RANK='²'"]),
        ({"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"]),
        (
            {"RANK": "99", "LOCAL_RANK": "4"},
            ["RANK=99", "WORLD_SIZE=8", "LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"],
        ),
        ({"WORLD_SIZE": "0", "RANK": "0"}, ["RANK=0", "WORLD_SIZE=0"]),
        ({"LOCAL_WORLD_SIZE": "16"}, ["LOCAL_WORLD_SIZE=16", "WORLD_SIZE=8"]),
        ({"WORLD_SIZE": None}, ["WORLD_SIZE is missing"]),
        ({"RANK": None, "LOCAL_RANK": None}, ["RANK is missing", "LOCAL_RANK is missing"]),
        ({"MASTER_ADDR": None}, ["MASTER_ADDR is missing", "several nodes"]),
        ({"MASTER_ADDR": "a b;c"}, ["MASTER_ADDR='a b;c'"]),
        ({"MASTER_ADDR": "-oProxy"}, ["MASTER_ADDR='-oProxy'"]),
        ({"MASTER_PORT": None}, ["MASTER_PORT is missing"]),
        ({"MASTER_PORT": "0"}, ["MASTER_PORT='0'"]),
        ({"MASTER_PORT": "65536"}, ["MASTER_PORT='65536'"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_value(change: dict[str, str | None], said: list[str]) -> None:
    environment = {name: value for name, value in (EXPLICIT | change).items() if value is not None}
    with pytest.raises(ConfigError) as refusal:
        place(environment)
    for words in said:
        assert words in str(refusal.value)
    assert all(line.startswith("environment: ") for line in refusal.value.problems)


@pytest.mark.parametrize(
    "address", ["localhost", "LOCALHOST", "localhost.localdomain", "127.0.0.1", "127.1.2.3", "::1"]
)
@pytest.mark.parametrize("base", [EXPLICIT, SLURM, OPENMPI], ids=["explicit", "slurm", "openmpi"])
def test_several_nodes_never_meet_at_localhost(base: dict[str, str], address: str) -> None:
    with pytest.raises(ConfigError, match="a world of its own"):
        place(base | {"MASTER_ADDR": address})


@pytest.mark.parametrize("base", [SLURM, OPENMPI], ids=["slurm", "openmpi"])
def test_several_nodes_without_a_master_are_refused(base: dict[str, str]) -> None:
    without = {name: value for name, value in base.items() if name != "MASTER_ADDR"}
    with pytest.raises(ConfigError, match="MASTER_ADDR is missing with ranks on several nodes"):
        place(without)


def test_a_slurm_step_on_one_node_needs_no_batch_script() -> None:
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "5", "SLURM_NODEID": "0", "SLURM_LOCALID": "4"}
    del environment["MASTER_ADDR"], environment["MASTER_PORT"]
    placement = place(environment | {"SLURM_RESTART_COUNT": "2"})
    assert (placement.master_address, placement.master_port) == ("127.0.0.1", job_port(4711, 2))


def test_a_slurm_step_without_layout_is_refused() -> None:
    for broken in ({"SLURM_STEP_TASKS_PER_NODE": "x"}, {"SLURM_NODEID": "7"}, {"SLURM_NODEID": ""}):
        with pytest.raises(ConfigError, match="SLURM_STEP_TASKS_PER_NODE"):
            place(SLURM | broken)


def test_openmpi_on_one_node_takes_the_port_from_its_job() -> None:
    environment = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    del environment["MASTER_ADDR"], environment["MASTER_PORT"]
    ports = {
        place(environment | {"PMIX_NAMESPACE": job}).master_port for job in ("prterun-a@1", "prterun-b@1")
    }
    assert len(ports) == 2
    assert all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)
    with pytest.raises(ConfigError, match="MASTER_PORT is missing with 4 ranks"):
        place(environment)


def test_ports_stay_below_the_ephemeral_range_and_differ_between_jobs_and_attempts() -> None:
    ports = {job_port(job) for job in range(1_000_000, 1_000_000 + PORTS)}
    assert len(ports) == PORTS
    assert min(ports) == FIRST_PORT
    assert max(ports) < 32768
    near = {job_port(job, attempt) for job in range(50) for attempt in range(10)}
    assert len(near) == 500


@pytest.mark.covers("F18")
@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_a_port_in_use_is_not_given_out(address: str) -> None:
    first = free_port(4321, address)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        assert free_port(first - FIRST_PORT, address) != first
        assert free_port(first, address) != first


def test_no_free_port_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise OSError("in use")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ToolError, match="set MASTER_PORT"):
        free_port(0)
