"""What a job does about each fault, on a real cluster: it comes back, or says why not, and never runs twice."""

import json
import sys
import time
from pathlib import Path

import pytest

from launch.supervisor.nodes import bad_nodes
from pipeline.errors import NoProgressError
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import SmallJob
from tests.slurm.machine import until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def teller(file: Path) -> tuple[str, ...]:
    """Return a command for `health.on_event` that adds the event to `file`."""
    program = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"
    return (sys.executable, "-S", "-c", program, str(file))


def outcomes(job: SmallJob) -> list[str]:
    return [attempt.outcome for attempt in job.history]


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
    job = SmallJob.submit(
        cluster, tmp_path, plan={"0": [1, 22, fault]}, steps=40, health={"on_event": teller(said)}
    )
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


@pytest.mark.covers("F13")
def test_the_rank_that_slows_the_others_is_named(cluster: Cluster, tmp_path: Path) -> None:
    plan, often = {"0": [1, 0, "slow"]}, {"straggler_seconds": 3.0}
    job = SmallJob.submit(cluster, tmp_path, plan=plan, steps=1000, health=often)
    line = f"straggler: rank 1 on {cluster.nodes[1]} waits "
    until(lambda: line in job.log, 60, "a line about the slow rank")
    assert "straggler: rank 0" not in job.log
    assert not job.history, "it is told and left running"


@pytest.mark.covers("F17")
def test_the_same_crash_again_and_again_ends_with_6(cluster: Cluster, tmp_path: Path) -> None:
    plan, said = {str(start): [1, 7, "1"] for start in range(9)}, tmp_path / "said.txt"
    job = SmallJob.submit(cluster, tmp_path, plan=plan, health={"on_event": teller(said)})
    shown = job.end("FAILED")
    assert shown["ExitCode"] == f"{NoProgressError.exit_code}:0"
    # The first start made a checkpoint at step 5; two more, the second of them the last, did not come any farther.
    assert [(attempt.first_checkpoint, attempt.last_checkpoint) for attempt in job.history] == [
        (-1, 5),
        (5, 5),
        (5, 5),
    ]
    assert "no progress: 2 starts in a row without a newer checkpoint" in job.log
    assert said.read_text().split() == ["failed"]


def test_what_would_fail_again_is_not_started_again(cluster: Cluster, tmp_path: Path) -> None:
    job = SmallJob.submit(cluster, tmp_path, plan={"0": [1, 3, "5"]})
    shown = job.end("FAILED")
    assert (shown["ExitCode"], outcomes(job)) == ("5:0", ["failed"]), job.log


@pytest.mark.covers("F8")
def test_the_warning_before_the_time_limit_is_a_stop_a_requeue_and_no_step_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Slurm's own warning: 40 s before the end of a minute, or at the next of its looks at the clock, half a minute apart."""
    said, site, total = tmp_path / "said.txt", {"time": "0:01:00", "signal_lead_seconds": 40}, 100
    # A slow machine's first start may be warned before step 12; then it is the next one that waits there.
    plan, health = {str(start): [0, 12, "wait"] for start in range(9)}, {"hang_seconds": 60.0}
    job = SmallJob.submit(
        cluster, tmp_path, steps=total, plan=plan, site=site, health={"on_event": teller(said), **health}
    )
    until(lambda: job.history, 90, "the warning")
    shown, restarts = job.end(seconds=200), len(job.history) - 1
    assert shown["Restarts"] == str(restarts), job.log
    assert outcomes(job) == ["stopped"] * restarts + ["done"] and restarts >= 1, job.log
    assert said.read_text().split() == ["requeued"] * restarts + ["done"]
    steps = job.steps()
    fault = max(row["time"] for row in steps if row["attempt"] == steps[0]["attempt"])
    lost, _ = job.price("warning before the time limit", fault)
    assert lost == 0
    assert [row["step"] for row in steps] == list(range(1, total + 1)), "no step was left out or done twice"


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


@pytest.mark.covers("F47")
def test_a_rank_behind_a_cut_cable_lives_on_and_publishes_nothing(network: Cluster, tmp_path: Path) -> None:
    job = SmallJob.submit(network, tmp_path, steps=300, site={"nodes": 1})
    job.reach(22)
    old, node = job.beat(0), network.show(job.job_id)["NodeList"]
    fault = time.time()
    network.cut(node)
    # What Slurm does by itself when SlurmdTimeout is over: it gives the node up and starts the job elsewhere.
    network.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=cut")
    job.reach(30, attempt=1)
    first, second = dict.fromkeys(row["attempt"] for row in job.steps())
    job.price("cable cut, old rank alive", fault)
    late = [row for row in job.steps() if row["attempt"] == first and row["time"] > fault]
    assert late, "the old rank went on behind the cut"
    until(lambda: not Path(f"/proc/{old.pid}").exists(), 30, "the old rank to find itself replaced")
    said = f"attempt {second} has taken over this run; this one, {first}, publishes nothing"
    until(lambda: said in job.log, 20, "its word about that")
    job.reach(45, attempt=1)
    taken = next(row["time"] for row in job.steps() if row["attempt"] == second)
    for checkpoint in job.run.checkpoints.glob("step-*"):
        if (checkpoint / "of.txt").stat().st_mtime > taken:
            assert (checkpoint / "of.txt").read_text() == second
    assert network.show(job.job_id)["Restarts"] == "1"
