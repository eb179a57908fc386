"""Rendered jobs on a real cluster: places of the ranks, requeue after a stop, and a cancelled job that stays so."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.nodes import job_port
from launch.slurm import submit_job
from pipeline.config import ClusterConfig, EncodeConfig, EngineConfig, RunConfig, TrainConfig, UNetConfig
from pipeline.paths import RunPaths
from tests.slurm.cluster import Cluster
from tests.slurm.machine import until

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
# A rank notes its place and its host as NOTES/RESTART-RANK.json; SECOND says what it does in later attempts.
RANK = """
import dataclasses, json, os, signal, socket, sys, time
from pathlib import Path
from launch.nodes import place

notes, first, second = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
placement = place(os.environ)

def stop(number, frame):
    for other in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(other, signal.SIG_IGN)
    (notes / f"{restart}-{placement.rank}-{signal.Signals(number).name}").touch()
    sys.exit(75)

for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, stop)
note = dataclasses.asdict(placement) | {
    "host": socket.gethostname(), "node": os.environ["SLURMD_NODENAME"], "attempt": os.environ["LDM_ATTEMPT"]
}
beside = notes / f".{restart}-{placement.rank}"
beside.write_text(json.dumps(note))
beside.rename(notes / f"{restart}-{placement.rank}.json")
print("rank", placement.rank, "speaks")
action = second if restart else first
time.sleep(60) if action == "wait" else sys.exit(int(action))
"""


def submit(cluster: Cluster, folder: Path, first: str, second: str) -> tuple[str, RunPaths]:
    """Submit a job of two nodes with one rank each that does `first`, and `second` after a restart."""
    (folder / "notes").mkdir()
    (folder / "rank.py").write_text(RANK)
    config = RunConfig(
        name="tiny",
        encode=EncodeConfig(source="shards", image_size=64),
        model=UNetConfig(),
        engine=EngineConfig(global_batch=8, micro_batch=4),
        train=TrainConfig(steps=1),
        cluster=ClusterConfig(
            nodes=2,
            time="0:30:00",
            memory_gib_per_node=0,
            signal_lead_seconds=60,
            setup=(f"export PYTHONPATH='{ROOT}'",),
        ),
    )
    run = RunPaths(folder / "run")
    job = submit_job(
        config, run, [sys.executable, str(folder / "rank.py"), str(folder / "notes"), first, second]
    )
    assert job.job_id is not None
    return job.job_id, run


def notes(folder: Path, restart: int) -> list[dict[str, Any]]:
    """Return what the two ranks of an attempt wrote, waiting for both."""
    files = [folder / "notes" / f"{restart}-{rank}.json" for rank in range(2)]
    until(lambda: all(file.exists() for file in files), 60, f"the ranks of attempt {restart}")
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(autouse=True)
def no_folders_left(cluster: Cluster) -> Iterator[None]:
    """Remove the node-local folders of the attempts, which a node keeps until its /tmp is cleaned."""
    yield
    for folder in Path("/tmp").glob(f"ldm-{os.getuid()}-*.*"):
        shutil.rmtree(folder, ignore_errors=True)


def test_ranks_find_each_other_and_exit_code_75_starts_them_again(cluster: Cluster, tmp_path: Path) -> None:
    job, run = submit(cluster, tmp_path, first="75", second="0")
    shown = cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED")
    log = (run.log / f"job-{job}.txt").read_text()
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log
    assert shown["Requeue"] == "1"
    for restart in range(2):
        ranks = notes(tmp_path, restart)
        assert [(rank["rank"], rank["local_rank"]) for rank in ranks] == [(0, 0), (1, 0)]
        assert {(rank["world_size"], rank["local_world_size"], rank["source"]) for rank in ranks} == {
            (2, 1, "slurm")
        }
        assert [rank["node"] for rank in ranks] == cluster.nodes[:2]
        assert {rank["master_address"] for rank in ranks} == {ranks[0]["node"]}
        assert {rank["master_port"] for rank in ranks} == {job_port(int(job), 5 * restart)}
        assert {rank["attempt"] for rank in ranks} == {f"{job}.{restart}.0"}
        if cluster.mode == "netns":
            assert [rank["host"] for rank in ranks] == cluster.nodes[:2]
    # Both attempts are in one log a node, each line with its rank.
    for rank in range(2):
        assert (run.log / f"node-{rank}.txt").read_text() == f"{rank}: rank {rank} speaks\n" * 2
    assert "back to the queue" in log


def test_a_warning_stops_and_requeues_but_a_cancelled_job_stays_cancelled(
    cluster: Cluster, tmp_path: Path
) -> None:
    job, run = submit(cluster, tmp_path, first="wait", second="wait")
    notes(tmp_path, 0)
    # What --signal=B:USR2 sends before the time limit.
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    notes(tmp_path, 1)
    for rank in range(2):
        assert (tmp_path / "notes" / f"0-{rank}-SIGUSR2").exists()
    cluster.wait_for_state(job, "RUNNING")
    # The ranks leave with 75 here too: the script must tell this end from a preemption.
    cluster.run("scancel", job)
    until(
        lambda: not cluster.run("squeue", "--noheader", "--jobs", job, check=False), 60, "the end of the job"
    )
    shown = cluster.show(job)
    log = (run.log / f"job-{job}.txt").read_text()
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "1"), log
    assert {file.name for file in (tmp_path / "notes").glob("1-*-SIG*")} == {"1-0-SIGTERM", "1-1-SIGTERM"}
    assert "not requeued: it was cancelled" in log
