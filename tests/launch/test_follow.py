"""`ldm status`, `cancel` and `logs`: from Slurm's answers and the run folder, each without the other."""

import json
from pathlib import Path

import pytest

from launch.follow import cancel as cancel_module
from launch.follow.cancel import cancel, cancel_run
from launch.follow.logs import log_lines
from launch.follow.run import goodput, json_of, lines_of, run_status
from launch.slurm.queue import job_states, live_jobs
from launch.status import describe
from launch.supervisor.history import Attempt, add_attempt
from pipeline.config_file import dump_config
from pipeline.errors import ConfigError, ToolError
from pipeline.paths import RunPaths
from tests.builders import tiny_config
from tests.launch.fake_login import LoginNode, login_node

NOW = 10_000.0


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoginNode:
    monkeypatch.setattr(cancel_module, "POLL_SECONDS", 0.01)
    return login_node(tmp_path, monkeypatch)


def trained_run(tmp_path: Path) -> RunPaths:
    """A run of 100 steps of 4 samples: 10 s for each 10 steps; killed after 30, resumed from 20 after 50 s."""
    config = tiny_config(tmp_path / "runs", train={"steps": 100})
    run = RunPaths(tmp_path / "runs" / "tiny")
    run.root.mkdir(parents=True)
    run.config.write_text(dump_config(config))
    records = [("7.0.0", 0, step, 1000.0 + step) for step in (10, 20, 30)]
    records += [("7.1.0", 20, step, 1060.0 + step) for step in (30, 40)]
    lines = [
        {
            "time": time,
            "kind": "train",
            "attempt": attempt,
            "resumed_step": resumed,
            "step": step,
            "samples": 4 * step,
            "loss": 0.5,
            "samples_per_second": 4.0,
        }
        for attempt, resumed, step, time in records
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.checkpoints / "step-00000020").mkdir(parents=True)
    for number, (began, outcome, reason) in enumerate(
        [(1000.0, "crashed", "rank 1 on node2 died of SIGKILL"), (1080.0, "stopped", "signal")]
    ):
        add_attempt(run, Attempt(f"7.{number}.0", "7", began, began + 30, -1, 20, 30, outcome, reason))
    run.jobs.write_text(
        json.dumps({"jobs": [{"job_id": "6", "stage": "encode"}, {"job_id": "7", "stage": "train"}]})
    )
    return run


SHOWN = "JobId=7 JobName=tiny JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0 NodeList=node[1-2]\n"
ARRAY = (
    "JobId=8 ArrayJobId=6 ArrayTaskId=0 JobState=COMPLETED Reason=None Restarts=0 ExitCode=0:0 NodeList=node1\n"
    "JobId=9 ArrayJobId=6 ArrayTaskId=1 JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=3:0 NodeList=node2\n"
)


def answer_all(login: LoginNode) -> None:
    login.answer("squeue", out="7|RUNNING|None|node[1-2]|23:10:02\n")
    login.answer("scontrol", "job", "7", out=SHOWN)
    login.answer("scontrol", "job", "6", out=ARRAY)


def test_a_run_s_page(login: LoginNode, tmp_path: Path) -> None:
    answer_all(login)
    run = trained_run(tmp_path)
    assert lines_of(run_status(run, now=1160.0)) == [
        f"{run.root}: step 40 of 100",
        "  samples 160, loss 0.5, images/s 4",
        "  last record 60 s ago, about 60 s left",
        lines_of(run_status(run, now=1160.0))[3],
        "  restarts: 1, goodput 40.0 %",
        "  attempt 7.0.0 crashed: rank 1 on node2 died of SIGKILL",
        "  attempt 7.1.0 stopped: signal",
        "  encode 6_0: COMPLETED, on node1",
        "  encode 6_1: FAILED, on node2, (NonZeroExitCode), exit code 3:0",
        "  train 7: RUNNING, on node[1-2], 23:10:02 left, restarted 1 times",
    ]
    assert "checkpoints: 1, the last at step 20" in describe(run.root)
    found = json.loads(json_of(run_status(run)))
    assert (found["step"], found["checkpoint_step"], found["attempts"], found["goodput"]) == (40, 20, 2, 0.4)
    assert [job["slurm_state"] for job in found["jobs"]] == ["COMPLETED", "FAILED", "RUNNING"]


def test_goodput_is_useful_time_over_all_time() -> None:
    """40 steps of a second within the 100 s from the first start to the last record."""
    records = [
        {"time": 1000.0 + at, "step": step, "samples_per_second": 4.0}
        for step, at in ((10, 10), (20, 20), (30, 90), (40, 100))
    ]
    assert goodput(records, 4) == pytest.approx(0.4)
    assert goodput(records, 4, began=900.0) == pytest.approx(0.2)
    assert goodput(records[:1], 4) is None


def test_a_run_without_slurm_still_has_its_figures(login: LoginNode, tmp_path: Path) -> None:
    login.answer("squeue", error="slurm_load_jobs error: Unable to contact slurm controller\n", code=1)
    run = trained_run(tmp_path)
    status = run_status(run)
    assert (
        status.step == 40
        and status.slurm == "squeue: slurm_load_jobs error: Unable to contact slurm controller"
    )
    assert lines_of(status)[-1] == f"  slurm: {status.slurm}"
    (login.programs / "squeue").unlink()
    assert "squeue: not found on this machine" in run_status(run).slurm


def test_jobs_that_the_controller_has_forgotten_come_from_the_accounts(
    login: LoginNode, tmp_path: Path
) -> None:
    run = trained_run(tmp_path)
    assert {job["state"] for job in run_status(run).jobs} == {"over, Slurm no longer knows it"}
    login.answer("sacct", out="6_0|COMPLETED|0:0|node1\n7|CANCELLED by 0|0:15|node[1-2]\n")
    assert [str(state) for state in job_states(["6", "7"])] == [
        "COMPLETED, on node1",
        "CANCELLED, on node[1-2], exit code 0:15",
    ]


def test_a_job_that_nobody_knows_is_no_failure_but_no_controller_is(login: LoginNode) -> None:
    login.answer("squeue", error="slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert live_jobs(["7"]) == []
    login.answer("squeue", error="slurm_load_jobs error: Unable to contact slurm controller\n", code=1)
    with pytest.raises(ToolError, match="squeue: slurm_load_jobs error: Unable to contact"):
        live_jobs(["7"])
    assert live_jobs([]) == []


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_cancel_marks_the_run_before_it_touches_a_job(login: LoginNode, tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    login.answer("squeue", out="6_[1-3]|PENDING|Resources||\n7|RUNNING|None|node1|1:00\n")
    with pytest.raises(ToolError, match="6_\\[1-3\\], 7 did not stop within 2 s and is left to Slurm's kill"):
        cancel_run(run, wait_seconds=2.0, say=lambda line: None, clock=Clock())
    assert run.cancelled.exists()
    assert login.calls("scontrol") == [["update", "JobId=7", "Requeue=0"]]
    calls = login.calls("scancel")
    assert calls[0] == ["6_[1-3]"] and calls[1] == ["--batch", "--signal=USR2", "7"]


def test_cancel_of_what_is_over_says_where_it_stands(login: LoginNode, tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    words = cancel_run(run, wait_seconds=1.0, say=lambda line: None)
    assert words.endswith(
        "no job is left; the last checkpoint is of step 20; `ldm submit` goes on from there"
    )
    assert not run.cancelled.exists() and login.calls("scancel") == []
    with pytest.raises(ConfigError, match="no job was submitted for this run"):
        cancel_run(RunPaths(tmp_path), wait_seconds=1.0, say=lambda line: None)


def test_the_lines_of_one_rank(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    (run.log / "encode-0").mkdir(parents=True)
    (run.log / "node-0.txt").write_text(" 0: zero\n 3: three: a\n12: twelve\n")
    (run.log / "node-1.txt").write_text("03: again\nno rank\n13: x\n 3: torn")
    (run.log / "job-7.txt").write_text("ldm job 7: started\n")
    assert sorted(log_lines(run, 3)) == ["again", "three: a"]
    assert list(log_lines(run, None)) == ["ldm job 7: started"]
    with pytest.raises(ConfigError, match="no line of rank 99"):
        list(log_lines(run, 99))


def test_following_goes_on_with_what_is_written_later(tmp_path: Path) -> None:
    run = RunPaths(tmp_path)
    run.log.mkdir()
    log = run.log / "node-0.txt"
    log.write_text("0: one\n0: tw")
    lines = log_lines(run, 0, follow=True)
    assert next(lines) == "one"
    with log.open("a") as stream:
        stream.write("o\n1: other\n0: three\n")
    assert [next(lines), next(lines)] == ["two", "three"]


def test_cancel_of_a_sweep_ends_each_of_its_runs(login: LoginNode, tmp_path: Path) -> None:
    for name in ("seed-1", "seed-2"):
        run = RunPaths(tmp_path / name)
        run.root.mkdir()
        run.jobs.write_text(json.dumps({"jobs": [{"job_id": "7", "stage": "train"}]}))
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": ["seed-1", "seed-2"]}))
    words = cancel(tmp_path, wait_seconds=1.0, say=lambda line: None)
    assert [line.partition(": ")[0] for line in words.splitlines()] == [
        f"{tmp_path}/seed-1",
        f"{tmp_path}/seed-2",
    ]


def test_a_folder_that_is_no_run_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        run_status(RunPaths(tmp_path))
