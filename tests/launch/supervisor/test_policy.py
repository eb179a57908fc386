"""What follows from an end: the count of starts without progress, bad nodes, and whether a job was cancelled."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from launch.supervisor.comeback import Job, is_cancelled, requeue
from launch.supervisor.events import tell
from launch.supervisor.history import Attempt, add_attempt, failures_without_progress, read_history
from launch.supervisor.nodes import EXPIRY_SECONDS, bad_nodes, note_bad, silent_nodes
from launch.supervisor.step import StepPlan, rank_environment
from launch.supervisor.straggler import Stragglers
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import Beat


def attempt(first: int, outcome: str) -> Attempt:
    return Attempt("7.0.0", "7", 1.0, 2.0, first, first, first + 3, outcome, "why", ("n1",))


@pytest.mark.parametrize(
    ("history", "newest", "count"),
    [
        ([], -1, 0),
        ([(-1, "crashed")], -1, 1),
        ([(-1, "crashed")], 5, 0),
        ([(-1, "crashed"), (5, "stuck"), (5, "lost")], 5, 2),
        ([(5, "crashed"), (5, "stopped"), (5, "crashed")], 5, 1),
        ([(5, "crashed"), (5, "crashed"), (5, "crashed")], 10, 0),
    ],
)
def test_only_failures_with_no_newer_checkpoint_count(
    history: list[tuple[int, str]], newest: int, count: int
) -> None:
    assert failures_without_progress([attempt(*entry) for entry in history], newest) == count


def test_the_history_survives_a_line_cut_off_by_a_kill(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    add_attempt(run, attempt(5, "crashed"))
    with run.attempts.open("a") as stream:
        stream.write('{"attempt": "7.0')
    assert read_history(run) == [attempt(5, "crashed")]
    assert read_history(run)[0].lost_steps == 3


def test_a_bad_node_is_left_out_for_a_day(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    assert bad_nodes(run) == []
    note_bad(run, "n1", "lost", "gone")
    note_bad(run, "n2", "stuck", "once")
    assert bad_nodes(run) == ["n1"]
    note_bad(run, "n2", "stuck", "twice")
    assert bad_nodes(run) == ["n1", "n2"]
    assert bad_nodes(run, now=time.time() + EXPIRY_SECONDS + 1) == []


def test_a_node_that_takes_no_connection_is_silent() -> None:
    with socket.socket() as listening, socket.socket() as bound:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        bound.bind(("127.0.0.1", 0))
        addresses = {
            "up": listening.getsockname(),
            "refused": bound.getsockname(),
            "no-such-name": ("no-such-host.invalid", 1),
            # Documentation's own network (RFC 5737): nobody is there, or no route.
            "cut": ("192.0.2.1", 9),
        }
        began = time.monotonic()
        assert silent_nodes(addresses, timeout_seconds=0.3) == ["cut", "no-such-name", "refused"]
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("state", "cancelled"),
    [
        ({}, False),
        ({"JobState": "RUNNING", "Reason": "None"}, False),
        ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, False),
        # What Slurm 22.05 shows after scancel.
        ({"JobState": "COMPLETING", "Reason": "None"}, True),
        ({"JobState": "CANCELLED", "Reason": "None"}, True),
    ],
)
def test_a_cancelled_job_is_told_from_a_preempted_one(
    tmp_path: Path, state: dict[str, str], cancelled: bool
) -> None:
    assert is_cancelled(Job("7", "7", 0), RunPaths(tmp_path), state) == cancelled


def test_a_run_that_was_cancelled_stays_so(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    run.cancelled.touch()
    assert is_cancelled(Job("7", "7", 0), run, {"JobState": "RUNNING"})


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({"SLURM_JOB_ID": "7"}, Job("7", "7", 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, Job("7", "7", 2)),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, Job("9", "7_3", 0)),
    ],
)
def test_an_element_of_an_array_is_requeued_by_its_own_name(environment: dict[str, str], job: Job) -> None:
    assert Job.of(environment) == job


def test_a_requeue_is_heard_although_slurm_ends_the_one_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as Slurm has taken the request it sends TERM to all of the job."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/bash\necho "$@" > "${0%/*}/asked"\nkill -TERM $$ $PPID\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert requeue(Job("9", "7_3", 0)) == ""
    assert (tmp_path / "asked").read_text() == "requeue 7_3\n"
    scontrol.write_text("#!/bin/bash\necho 'Requested operation is presently disabled' >&2; exit 1\n")
    assert requeue(Job("9", "7_3", 0)) == "Requested operation is presently disabled"


def test_an_event_runs_the_command_without_a_shell(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    program = "import sys; open(sys.argv[1], 'w').write(repr(sys.argv[2:]))"
    message = "rank 1: $(touch x); `id`\nnext"
    tell([sys.executable, "-S", "-c", program, str(out)], "stuck", RunPaths(tmp_path), message)
    assert out.read_text() == repr(["stuck", str(tmp_path), message])
    tell(["no-such-program"], "done", RunPaths(tmp_path), "")
    tell(["false"], "done", RunPaths(tmp_path), "")
    said = capfd.readouterr().err
    assert "'no-such-program' for 'done'" in said
    assert "'false' for 'done': exit code 1" in said


def plan_of(collective: bool = True) -> StepPlan:
    return StepPlan(
        "7.1.2", ("a", "b"), 2, 3, ("--container-image=x",), ("ldm", "train"), "/log", Path("/r"), collective
    )


def test_the_step_is_one_task_a_device_that_nobody_ends_early() -> None:
    words = plan_of().words
    at = words.index("bash")
    assert words[:at] == [
        "srun",
        "--job-name=ldm-7.1.2",
        "--export=ALL",
        "--overlap",
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--distribution=block",
        "--nodes=2",
        "--ntasks=4",
        "--ntasks-per-node=2",
        "--nodelist=a,b",
        "--cpus-per-task=3",
        "--label",
        "--open-mode=append",
        "--output=/log/node-%n.txt",
        "--container-image=x",
    ]
    assert words[-4:] == ["rank", "/r", "ldm", "train"]
    assert [plan_of().host_of(rank) for rank in range(4)] == ["a", "a", "b", "b"]
    assert "--wait=0" in plan_of(collective=False).words, (
        "a worker may go on when another has nothing left to do"
    )


def test_every_attempt_has_caches_of_its_own_and_no_foreign_place() -> None:
    base = {"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "KEPT": "1"}
    found = rank_environment(base, plan_of(), address="a", port=15007, threads=2)
    assert "RANK" not in found and "TORCHELASTIC_RUN_ID" not in found
    assert (found["MASTER_ADDR"], found["MASTER_PORT"], found["LDM_ATTEMPT"]) == ("a", "15007", "7.1.2")
    assert (found["KEPT"], found["OMP_NUM_THREADS"]) == ("1", "2")
    for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
        assert found[name].startswith("/tmp/ldm-") and "-7.1.2/" in found[name]


@pytest.mark.covers("F13")
def test_the_rank_that_never_waits_is_named() -> None:
    now = [0.0]
    stragglers = Stragglers(plan_of(), 60.0, clock=lambda: now[0])

    def beats(seconds: float, waited: list[float]) -> list[Beat]:
        return [
            Beat(rank, int(seconds), "step", seconds, seconds, 1, "h", share * seconds)
            for rank, share in enumerate(waited)
        ]

    for seconds, lines in ((30.0, 0), (61.0, 0), (122.0, 1), (130.0, 0)):
        now[0] = seconds
        said = stragglers.look(beats(seconds, [0.6, 0.55, 0.65, 0.05]))
        assert len(said) == lines
        if said:
            assert "rank 3 on b waits 5% of the time for the others, they wait 60% for it" in said[0]
    now[0] = 200.0
    assert stragglers.look(beats(200.0, [0.3, 0.3, 0.3, 0.3])) == []
