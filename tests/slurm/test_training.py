"""Real trainings on a real cluster: gloo and DeepSpeed on two nodes, interrupted, and still the same bits."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import submit_job
from launch.supervisor.history import read_history
from launch.supervisor.nodes import bad_nodes
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from pipeline.training.health.heartbeat import Beat, read_heartbeats
from pipeline.training.saving.manifest import committed, read_manifest
from tests.distributed.cases import make_config, paths_of
from tests.distributed.dataset import build_dataset
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT
from tests.slurm.machine import until

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(280)]
STEPS, CHECKPOINT_EVERY = 60, 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a data set."""
    build_dataset(tmp_path / "latents", 30)
    return tmp_path


def train(cluster: Cluster, folder: Path, name: str, steps: int = STEPS, **site: Any) -> tuple[str, RunPaths]:
    """Submit a training of two nodes; return its job and run."""
    interface = "eth0" if cluster.mode == "netns" else "lo"
    setup = (f"export PYTHONPATH='{ROOT}' DS_ACCELERATOR=cpu LDM_QUIET=1 GLOO_SOCKET_IFNAME={interface}",)
    section = {"nodes": 2, "time": "0:30:00", "signal_lead_seconds": 60, "setup": setup} | site
    plan = {"steps": steps, "checkpoint_every": CHECKPOINT_EVERY, "log_every": 1}
    config, run = make_config(folder, name, cluster=section, train=plan), paths_of(folder, name)
    job = submit_job(config, run).job_id
    assert job is not None
    return job, run


def log_of(run: RunPaths) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(run.log.glob("*.txt")))


def wait_for_steps(run: RunPaths, steps: int) -> None:
    """Wait until the metrics hold `steps` records of steps, over all attempts."""

    def reached() -> bool:
        return run.metrics.exists() and len(read_records(run.metrics, "train")) >= steps

    try:
        until(reached, 120, f"{steps} recorded steps")
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{log_of(run)}") from None


def beat_of(run: RunPaths, rank: int) -> Beat:
    return next(beat for beat in read_heartbeats(run) if beat.rank == rank)


def digests(run: RunPaths) -> dict[str, Any]:
    """Return what the last checkpoint's manifest says of each of its files."""
    manifest = read_manifest(committed(run.checkpoints)[-1])
    assert manifest["step"] == STEPS
    files: dict[str, Any] = manifest["files"]
    return files


@pytest.mark.covers("F1", "F8")
def test_warned_requeued_killed_and_started_again_it_ends_with_the_same_bits(
    cluster: Cluster, folder: Path
) -> None:
    """One run is warned (requeue), then loses rank 1 to a kill (new start in the job); another goes straight on.

    A step takes milliseconds, so the faults catch the run with rank 1 stopped: its world waits for it.
    """
    job, run = train(cluster, folder, "broken")
    wait_for_steps(run, 3)
    paused = beat_of(run, 1).pid
    os.kill(paused, signal.SIGSTOP)
    cluster.run("scancel", "--batch", "--signal=USR2", job)  # What --signal=B:USR2@60 sends.
    warned = time.time()
    time.sleep(1.0)  # The supervisor looks four times a second, and hands the signal on to the ranks.
    os.kill(paused, signal.SIGCONT)
    until(lambda: len(read_history(run)) == 1, 60, "the stop")
    straight_job, straight = train(cluster, folder, "straight")
    stopped = read_history(run)[0]
    assert (stopped.outcome, stopped.lost_steps) == ("stopped", 0), log_of(run)
    assert 3 <= stopped.last_checkpoint < STEPS - 20

    wait_for_steps(run, stopped.last_checkpoint + 2)
    print(f"PRICE real training, warned: 0 steps lost, {time.time() - warned:.1f} s to the next step")
    os.kill(beat_of(run, 1).pid, signal.SIGKILL)
    killed = time.time()
    until(lambda: len(read_history(run)) == 2, 60, "the crash")
    crashed = read_history(run)[1]
    assert crashed.outcome == "crashed", log_of(run)
    assert f"rank 1 on {crashed.nodes[1]}: killed by SIGKILL" in crashed.reason
    recorded = len(read_records(run.metrics, "train"))
    wait_for_steps(run, recorded + 1)
    lost, seconds = crashed.lost_steps, time.time() - killed
    print(f"PRICE real training, rank killed: {lost} steps lost, {seconds:.1f} s to the next step")

    shown = cluster.wait_for_state(job, seconds=120)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert [attempt.outcome for attempt in read_history(run)] == ["stopped", "crashed", "done"]
    preflights = re.findall(r"preflight: 2 ranks in ([\d.]+) s, .* all-reduce", log_of(run))
    assert len(preflights) == 3 and max(map(float, preflights)) < 20
    cluster.wait_for_state(straight_job, seconds=120)
    assert [attempt.outcome for attempt in read_history(straight)] == ["done"], log_of(straight)
    assert digests(run) == digests(straight)


def test_a_node_without_shared_memory_fails_the_preflight_and_a_spare_takes_its_place(
    network: Cluster, folder: Path
) -> None:
    bad = network.nodes[1]
    network.enter_mounts(bad, "mount", "-t", "tmpfs", "-o", "size=1m", "none", "/dev/shm")
    try:
        job, run = train(network, folder, "spared", steps=4, spares=1)
        shown = network.wait_for_state(job, seconds=120)
    finally:
        network.enter_mounts(bad, "umount", "/dev/shm")
    assert shown["JobState"] == "COMPLETED", log_of(run)
    reason = "shared memory /dev/shm: 1 MiB free, 32 are needed"
    assert f"node {bad} has failed the preflight: {reason}" in log_of(run)
    assert bad_nodes(run) == [bad]
    first, second = read_history(run)
    assert (first.outcome, first.reached_step, second.outcome) == ("crashed", -1, "done")
    assert bad in first.nodes and second.nodes == (network.nodes[0], network.nodes[2])
