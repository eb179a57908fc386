"""What a job does about each fault, on a real cluster: it comes back, or says why not, and never runs twice."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.supervisor.nodes import bad_nodes
from pipeline.errors import NoProgressError
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import SmallJob

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def outcomes(job: SmallJob) -> list[str]:
    return [attempt.outcome for attempt in job.history]


@pytest.fixture
def network(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster whose nodes can be killed and cut off; all are back afterwards."""
    if cluster.mode != "netns":
        # A right of the machine that nothing installs: not a failure where it is not given.
        pytest.skip("needs network namespaces: nodes share the host's network here")
    yield cluster
    cluster.heal()


@pytest.mark.covers("F1", "F2")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_the_steps_since_the_checkpoint(
    cluster: Cluster, tmp_path: Path, rank: int
) -> None:
    job = SmallJob.submit(cluster, tmp_path, plan={"0": [rank, 22, "kill"]}, steps=40)
    shown = job.end()
    assert (shown["Restarts"], outcomes(job)) == ("0", ["crashed", "done"]), job.log
    assert f"rank {rank} on {cluster.nodes[rank]}: killed by SIGKILL" in job.history[0].reason
    fault = max(row["time"] for row in job.steps() if row["attempt"] == job.history[0].attempt)
    lost, _ = job.price(f"kill -9 of rank {rank}", fault)
    assert lost == 2
    assert job.steps()[-1]["step"] == 40


@pytest.mark.covers("F11", "F12")
@pytest.mark.parametrize("fault", ["freeze", "hold-lock"])
def test_a_rank_that_hangs_is_named_with_its_node_killed_and_started_again(
    cluster: Cluster, tmp_path: Path, fault: str
) -> None:
    said = tmp_path / "said.txt"
    tell = (
        sys.executable,
        "-S",
        "-c",
        "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')",
        str(said),
    )
    job = SmallJob.submit(cluster, tmp_path, plan={"0": [1, 22, fault]}, steps=40, health={"on_event": tell})
    job.end()
    assert outcomes(job) == ["stuck", "done"], job.log
    assert f"rank 1 on {cluster.nodes[1]}" in job.history[0].reason
    assert "in meet" in job.run.stacks(0).read_text(), "the stacks of the rank that waits"
    if fault == "hold-lock":
        assert "in befall" in job.run.stacks(1).read_text()
    fault_time = max(row["time"] for row in job.steps() if row["attempt"] == job.history[0].attempt)
    lost, _ = job.price(f"hang ({fault})", fault_time)
    assert lost == 2
    assert said.read_text().split() == ["stuck", "done"]


@pytest.mark.covers("F17")
def test_the_same_crash_again_and_again_ends_with_6(cluster: Cluster, tmp_path: Path) -> None:
    plan = {str(start): [1, 7, "1"] for start in range(9)}
    job = SmallJob.submit(cluster, tmp_path, plan=plan)
    shown = job.end("FAILED")
    assert shown["ExitCode"] == f"{NoProgressError.exit_code}:0"
    # The first start made a checkpoint at step 5; three more did not come any farther.
    assert [(attempt.first_checkpoint, attempt.last_checkpoint) for attempt in job.history] == [
        (-1, 5),
        *[(5, 5)] * 3,
    ]
    assert "no progress: 3 starts in a row without a newer checkpoint" in job.log


@pytest.mark.parametrize("code", [2, 5])
def test_what_would_fail_again_is_not_started_again(cluster: Cluster, tmp_path: Path, code: int) -> None:
    job = SmallJob.submit(cluster, tmp_path, plan={"0": [1, 3, str(code)]})
    shown = job.end("FAILED")
    assert (shown["ExitCode"], outcomes(job)) == (f"{code}:0", ["failed"]), job.log


@pytest.mark.covers("F8")
def test_a_warning_is_a_stop_a_requeue_and_no_step_lost(cluster: Cluster, tmp_path: Path) -> None:
    job = SmallJob.submit(cluster, tmp_path, steps=60)
    job.reach(12)
    fault = time.time()
    cluster.run("scancel", "--batch", "--signal=USR2", job.job_id)  # What --signal=B:USR2@60 sends.
    shown = job.end()
    assert (shown["Restarts"], outcomes(job)) == ("1", ["stopped", "done"]), job.log
    lost, _ = job.price("warning before the time limit", fault)
    assert lost == 0
    assert job.history[0].ended - fault < 10


def test_where_requeue_is_forbidden_a_new_job_follows_once(cluster: Cluster, tmp_path: Path) -> None:
    job = SmallJob.submit(cluster, tmp_path, steps=40, site={"requeue": False})
    job.reach(12)
    cluster.run("scancel", "--batch", "--signal=USR2", job.job_id)
    job.end("FAILED")
    jobs = json.loads(job.run.jobs.read_text())["jobs"]
    assert [entry.get("follows") for entry in jobs] == [None, job.job_id]
    job.end(job_id=jobs[1]["job_id"])
    assert outcomes(job) == ["stopped", "done"]
    assert len(json.loads(job.run.jobs.read_text())["jobs"]) == 2
    steps = [row["step"] for row in job.steps()]
    assert steps == sorted(set(steps)), "no step was done twice"


def test_a_preempted_job_saves_in_the_grace_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    nodes = {"nodes": len(cluster.nodes)}
    job = SmallJob.submit(cluster, tmp_path, steps=60, site=nodes)
    job.reach(12)
    fault = time.time()
    words = ("sbatch", "--parsable", "--partition=urgent", f"--nodes={len(cluster.nodes)}", "--exclusive")
    urgent = cluster.run(*words, "--output=/dev/null", "--wrap=sleep 2")
    job.end()
    cluster.wait_for_state(urgent)
    assert outcomes(job) == ["stopped", "done"], job.log
    lost, _ = job.price("preemption (waiting for the other job included)", fault)
    assert lost == 0


def test_a_node_that_fails_the_preflight_is_named_and_left_out(cluster: Cluster, tmp_path: Path) -> None:
    job = SmallJob.submit(cluster, tmp_path, steps=10, plan={"0": [1, 0, "preflight"]}, site={"spares": 1})
    job.end()
    assert outcomes(job) == ["crashed", "done"], job.log
    assert f"node {cluster.nodes[1]} has failed the preflight: its memory forgets" in job.log
    assert bad_nodes(job.run) == [cluster.nodes[1]]
    assert [attempt.nodes for attempt in job.history] == [
        (cluster.nodes[0], cluster.nodes[1]),
        (cluster.nodes[0], cluster.nodes[2]),
    ]


@pytest.mark.covers("F47")
def test_a_killed_node_is_replaced_by_a_spare_in_the_same_job(network: Cluster, tmp_path: Path) -> None:
    job = SmallJob.submit(network, tmp_path, steps=150, site={"spares": 1})
    job.reach(22)
    fault = time.time()
    network.crash(network.nodes[1])
    until(lambda: len(job.history) == 1, 60, "the lost node to be seen")
    job.reach(30, attempt=1)
    assert outcomes(job) == ["lost"], job.log
    job.price("node killed, spare in the job", fault)
    assert bad_nodes(job.run) == [network.nodes[1]]
    shown = network.show(job.job_id)
    assert (shown["JobState"], shown["Restarts"]) == ("RUNNING", "0")


@pytest.mark.covers("F47")
def test_a_killed_node_without_a_spare_is_left_to_a_new_job(network: Cluster, tmp_path: Path) -> None:
    job = SmallJob.submit(network, tmp_path, steps=60)
    job.reach(22)
    fault = time.time()
    network.crash(network.nodes[1])
    until(lambda: len(json.loads(job.run.jobs.read_text())["jobs"]) == 2, 60, "the following job")
    follower = json.loads(job.run.jobs.read_text())["jobs"][1]["job_id"]
    job.end(job_id=follower)
    assert outcomes(job) == ["lost", "done"], job.log
    assert network.nodes[1] not in job.history[1].nodes
    job.price("node killed, new job", fault)
    # Slurm gives the node up now; the old job must not come back as a second copy.
    network.run("scontrol", "update", f"NodeName={network.nodes[1]}", "State=DOWN", "Reason=test")
    until(
        lambda: network.show(job.job_id)["JobState"] not in ("COMPLETING", "RUNNING"),
        60,
        "the end of the old job",
    )
    assert network.show(job.job_id)["Restarts"] == "0"
    assert len(job.history) == 2
