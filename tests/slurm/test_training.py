"""Real trainings on a real cluster: gloo and DeepSpeed on two nodes, interrupted, and still the same bits."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import submit_job
from launch.supervisor.history import read_history
from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import read_heartbeats
from pipeline.training.saving.manifest import committed, read_manifest
from tests.distributed.cases import make_config, paths_of
from tests.distributed.dataset import build_dataset
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(280)]
STEPS = 300


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a data set."""
    build_dataset(tmp_path / "latents", 30)
    return tmp_path


def config_of(folder: Path, name: str, **cluster: Any) -> RunConfig:
    setup = (
        f"export PYTHONPATH='{ROOT}' DS_ACCELERATOR=cpu LDM_QUIET=1",
        "export GLOO_SOCKET_IFNAME=eth0" if cluster.pop("netns") else "export GLOO_SOCKET_IFNAME=lo",
    )
    section = {"nodes": 2, "time": "0:30:00", "signal_lead_seconds": 60, "setup": setup} | cluster
    train = {"steps": STEPS, "checkpoint_every": 50, "log_every": 50}
    return make_config(folder, name, cluster=section, train=train)


@pytest.fixture
def train(cluster: Cluster, folder: Path) -> Callable[..., tuple[str, RunPaths]]:
    """Return a function that submits a training and returns its job and run."""

    def submit(name: str) -> tuple[str, RunPaths]:
        config, run = config_of(folder, name, netns=cluster.mode == "netns"), paths_of(folder, name)
        job_id = submit_job(config, run).job_id
        assert job_id is not None
        return job_id, run

    return submit


def log_of(run: RunPaths) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(run.log.glob("*.txt")))


def wait_for_step(run: RunPaths, step: int) -> None:
    def reached() -> bool:
        beats = read_heartbeats(run)
        return bool(beats) and max(beat.step for beat in beats if beat.phase != "stop" or beat.step) >= step

    try:
        until(reached, 120, f"step {step}")
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{log_of(run)}") from None


@pytest.mark.covers("F1", "F8")
def test_warned_requeued_killed_and_started_again_it_ends_with_the_same_bits(
    cluster: Cluster, train: Callable[..., tuple[str, RunPaths]]
) -> None:
    """One run goes straight on; the other is warned (requeue), then loses rank 1 to a kill (new start in the job)."""
    straight_job, straight = train("straight")
    cluster.wait_for_state(straight_job, seconds=150)
    assert read_history(straight)[-1].outcome == "done", log_of(straight)
    job, run = train("broken")
    wait_for_step(run, 50)
    warned = time.time()
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    until(lambda: len(read_history(run)) == 1, 60, "the stop")
    stopped = read_history(run)[0]
    assert (stopped.outcome, stopped.lost_steps) == ("stopped", 0), log_of(run)
    wait_for_step(run, stopped.last_checkpoint + 50)
    print(f"PRICE real training, warned: 0 steps lost, {time.time() - warned:.1f} s to 50 steps beyond")
    victim = next(beat for beat in read_heartbeats(run) if beat.rank == 1)
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.time()
    until(lambda: len(read_history(run)) == 2, 60, "the crash")
    crashed = read_history(run)[1]
    assert crashed.outcome == "crashed", log_of(run)
    assert f"rank 1 on {crashed.nodes[1]}: killed by SIGKILL" in crashed.reason
    shown = cluster.wait_for_state(job, seconds=120)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    done = read_history(run)[2]
    print(
        f"PRICE real training, rank killed: {crashed.lost_steps} steps lost, {done.started - killed:.1f} s to the start"
    )
    assert done.outcome == "done"
    assert "preflight: 2 ranks in" in log_of(run)
    last = [committed(where.checkpoints)[-1] for where in (straight, run)]
    manifests = [read_manifest(path) for path in last]
    assert [manifest["step"] for manifest in manifests] == [STEPS, STEPS]
    assert manifests[0]["files"] == manifests[1]["files"]
