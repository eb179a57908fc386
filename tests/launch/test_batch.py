"""What bash does with the batch script: arguments, environment, signals, exit codes and the requeue.

Scripts run through real bash with recorders in the place of srun, scontrol and every other program.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.batch import BODY
from launch.nodes import job_port
from launch.slurm import quoted, render_job
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths
from tests.launch.fake_slurm import RUN, FakeSlurm, directives, run_config, task_of


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


@pytest.fixture(scope="module")
def shared_fake(tmp_path_factory: pytest.TempPathFactory) -> FakeSlurm:
    return FakeSlurm(tmp_path_factory.mktemp("slurm"))


def test_one_srun_with_one_task_a_device(fake: FakeSlurm) -> None:
    code, output = fake.run(render_job(run_config(nodes=2), run=RUN, command=["ldm", "train", "x.yaml"]))
    assert (code, output) == (0, "")
    (call,) = fake.calls("srun")
    assert call[: call.index("bash")] == [
        "--export=ALL",
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--distribution=block",
        "--cpus-per-task=3",
        "--label",
        "--open-mode=append",
        "--output=/scratch/runs/tiny/log/node-%n.txt",
    ]
    assert task_of(call) == ["ldm", "train", "x.yaml"]
    assert ["show", "hostnames", "gpu-[07-08]"] in fake.calls("scontrol")
    assert ["requeue", "4711"] not in fake.calls("scontrol")


def environment_of_a_rank(fake: FakeSlurm, script: str, **environment: str) -> dict[str, str]:
    code, output = fake.run(script, RUN_TASK="1", **environment)
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])
    folder = Path(found["TORCH_EXTENSIONS_DIR"])
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    return found


PRINT_ENVIRONMENT = [sys.executable, "-S", "-c", "import json, os; print(json.dumps(dict(os.environ)))"]


def test_ranks_get_the_master_and_folders_of_this_attempt(fake: FakeSlurm) -> None:
    script = render_job(
        run_config(engine={"threads": 2}, cpus_per_task=3), run=RUN, command=PRINT_ENVIRONMENT
    )
    stale = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "old"}
    attempts = []
    for restart in (None, "1", "2"):
        extra = {} if restart is None else {"SLURM_RESTART_COUNT": restart}
        ranks = environment_of_a_rank(fake, script, **stale, **extra)
        assert ranks["MASTER_ADDR"] == "gpu-07"
        assert ranks["MASTER_PORT"] == str(job_port(4711, int(restart or 0)))
        assert ranks["LDM_ATTEMPT"] == f"4711.{restart or 0}"
        assert ranks["OMP_NUM_THREADS"] == "2"
        assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(ranks)
        attempts.append(Path(ranks["TORCH_EXTENSIONS_DIR"]))
    assert len(set(attempts)) == 3


def test_an_extensions_folder_of_somebody_else_is_refused(fake: FakeSlurm, tmp_path: Path) -> None:
    script = render_job(run_config(), run=RUN, command=PRINT_ENVIRONMENT)
    job = str(os.getpid() + 10_000_000)
    planted = Path(f"/tmp/ldm-{os.getuid()}-{job}.0")
    planted.symlink_to(tmp_path)
    try:
        code, output = fake.run(script, RUN_TASK="1", SLURM_JOB_ID=job)
    finally:
        planted.unlink()
    assert code == 1
    assert f"not ours: {planted}" in output


def test_without_a_host_no_rank_starts(fake: FakeSlurm) -> None:
    code, output = fake.run(render_job(run_config(), run=RUN, command=["ldm"]), HOSTS="")
    assert code == 1
    assert "ldm job 4711: scontrol names no host in gpu-[07-08]" in output
    assert not fake.calls("srun")


def test_without_its_folder_no_rank_starts(fake: FakeSlurm) -> None:
    fake.work.rmdir()
    code, output = fake.run(render_job(run_config(), run=RUN, command=["ldm"]))
    assert code == 1
    assert f"the folder it was submitted from is not on this node: {fake.work}" in output
    assert not fake.calls("srun")


def test_setup_lines_shape_the_environment_of_the_ranks(fake: FakeSlurm) -> None:
    # `set -u`, and names that the script itself might use, as sourced environments bring along.
    setup = ("export FROM_SETUP='a b'", "set -eu; code=9 job=x state=y hosts=z step=1", "# a comment", "true")
    script = render_job(run_config(setup=setup), run=RUN, command=PRINT_ENVIRONMENT)
    assert environment_of_a_rank(fake, script)["FROM_SETUP"] == "a b"


@pytest.mark.parametrize("line", ["false", "x='", "no-such-program --x", "if true; then"])
def test_a_setup_line_that_fails_ends_the_job_by_name(line: str, fake: FakeSlurm) -> None:
    code, output = fake.run(render_job(run_config(setup=("true", line)), run=RUN, command=["ldm"]))
    assert code == 1
    assert f"ldm job 4711: cluster.setup failed: {line}" in output
    assert not fake.calls("srun")


SIGNS = "\n\r\t '\"`$();&|<>\\#*?[]{}~!-=%\x1b\x7f\u2028\xa0aüあ😀\udcff"
TRICKS = [
    "$(id)",
    "`id`",
    "; touch x",
    "\nreboot\n",
    "' uname '",
    '"',
    "\\",
    "$PATH",
    "${x:-$(id)}",
    "&& rm -rf x",
]
TRICKS += [
    "| sh",
    "> x",
    "$'\\x41'",
    "EOF",
    "\n#SBATCH --wrap=id",
    "!!",
    "--",
    "-n",
    "[[",
    "x=$(cat /etc/passwd)",
]
HOSTILE = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=30),
    st.text(st.sampled_from(SIGNS), max_size=20),
    st.lists(st.sampled_from(TRICKS), max_size=4).map("".join),
)


def passable(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(HOSTILE, min_size=1, max_size=5))
def test_arguments_arrive_unchanged_and_nothing_else_runs(
    arguments: list[str], shared_fake: FakeSlurm
) -> None:
    shared_fake.forget()
    command = ["ldm", *arguments]
    if not all(passable(argument) for argument in arguments):
        with pytest.raises(ConfigError, match="bash cannot hold this text"):
            render_job(run_config(), run=RUN, command=command)
        return
    script = render_job(run_config(), run=RUN, command=command)
    parsed = subprocess.run(["/bin/bash", "-n"], input=script.encode(), capture_output=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, b"")
    code, output = shared_fake.run(script)
    assert (code, output) == (0, "")
    (call,) = shared_fake.calls("srun")
    assert task_of(call) == command
    assert shared_fake.started() == {"srun", "scontrol"}
    assert list(shared_fake.work.iterdir()) == []


@settings(max_examples=300, deadline=None)
@given(text=HOSTILE.filter(passable))
def test_a_quoted_text_is_one_line_and_one_word(text: str) -> None:
    word = quoted(text)
    assert len(word.splitlines()) == 1
    assert word.isprintable()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=HOSTILE.filter(passable))
def test_a_setup_line_cannot_break_the_text_around_it(line: str, shared_fake: FakeSlurm) -> None:
    # Its own effect is the user's wish; the rest of the script must stay what it is.
    script = render_job(run_config(setup=(line,)), run=RUN, command=["ldm", "train"])
    header, body = script.split("\n\n", 1)
    assert directives(script) == directives(header)
    assert body.split("\n", 4)[4].startswith("ldm_command=(ldm train)\n")
    assert script.endswith(BODY)
    parsed = subprocess.run(["/bin/bash", "-n"], input=script.encode(), capture_output=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, b"")


@settings(max_examples=200, deadline=None)
@given(partition=HOSTILE, account=HOSTILE, exclude=HOSTILE, folder=HOSTILE)
def test_a_directive_holds_the_value_or_the_value_is_refused(
    partition: str, account: str, exclude: str, folder: str
) -> None:
    config = run_config()
    cluster = config.cluster.model_copy(
        update={"partition": partition, "account": account, "exclude": (exclude,)}
    )
    run = RunPaths(Path("/runs") / folder) if "\0" not in folder else RUN
    try:
        script = render_job(config.model_copy(update={"cluster": cluster}), run=run, command=["ldm"])
    except ConfigError as error:
        assert all("\n" not in problem for problem in error.problems)
        return
    found = directives(script)
    assert (found["partition"], found["account"], found["exclude"]) == (partition, account, exclude)
    assert found["output"] == f"{run.log}/job-%j.txt"
    assert set(found) <= set(directives(render_job(config, run=RUN, command=["ldm"]))) | {
        "partition",
        "account",
        "exclude",
    }


# --- the end of a job -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("srun_code", [0, 1, 2, 3, 4, 5, 6, 137, 140, 143])
def test_other_ends_are_not_requeued_and_keep_their_code(srun_code: int, fake: FakeSlurm) -> None:
    code, output = fake.run(render_job(run_config(), run=RUN, command=["ldm"]), SRUN_CODE=str(srun_code))
    assert code == srun_code
    assert (f"ended with exit code {srun_code}" in output) == (srun_code != 0)
    assert not [call for call in fake.calls("scontrol") if call[0] == "requeue"]


@pytest.mark.parametrize(
    ("environment", "requeued"),
    [
        ({}, ["4711"]),
        ({"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}, ["4700_11"]),
        ({"STATE": "JobState=COMPLETING Reason=TimeLimit"}, ["4711"]),
        # scancel leaves the same exit code 75; the state is the one that Slurm 22.05 shows then.
        ({"STATE": "JobState=COMPLETING Reason=None"}, []),
        ({"STATE": "JobState=CANCELLED Reason=None"}, []),
        # Preempted while it started: the ranks died of TERM before they could listen.
        ({"SRUN_CODE": "143", "STATE": "JobState=RUNNING PreemptTime=2026-01-01T00:00:00"}, ["4711"]),
        ({"SRUN_CODE": "3", "STATE": "JobState=RUNNING PreemptTime=2026-01-01T00:00:00"}, []),
    ],
)
def test_a_stopped_job_goes_back_to_the_queue_unless_cancelled(
    environment: dict[str, str], requeued: list[str], fake: FakeSlurm
) -> None:
    environment = {"SRUN_CODE": "75", "STATE": "JobState=RUNNING Reason=None PreemptTime=None"} | environment
    code, output = fake.run(render_job(run_config(), run=RUN, command=["ldm"]), **environment)
    assert code == int(environment["SRUN_CODE"])
    assert [call[1] for call in fake.calls("scontrol") if call[0] == "requeue"] == requeued
    if environment["SRUN_CODE"] == "75":
        assert ("back to the queue" if requeued else "not requeued: it was cancelled") in output


def test_strict_options_of_a_setup_line_do_not_end_the_job_early(fake: FakeSlurm) -> None:
    code, _ = fake.run(render_job(run_config(setup=("set -eu",)), run=RUN, command=["ldm"]), SRUN_CODE="75")
    assert code == 75
    assert ["requeue", "4711"] in fake.calls("scontrol")


def test_a_refused_requeue_is_said(fake: FakeSlurm) -> None:
    code, output = fake.run(
        render_job(run_config(), run=RUN, command=["ldm"]), SRUN_CODE="75", REQUEUE_CODE="1"
    )
    assert code == 75
    assert "Slurm refused the requeue: submit it again" in output


@pytest.mark.parametrize(
    ("signals", "stop_code", "requeued"),
    [
        (["SIGUSR2"], 75, True),
        (["SIGTERM"], 75, True),
        (["SIGCONT", "SIGUSR2", "SIGCONT"], 75, True),  # as Slurm sends them
        (["SIGUSR2", "SIGTERM", "SIGUSR2"], 75, True),
        (["SIGUSR2"], 140, True),  # USR2 before the ranks could listen
        (["SIGUSR2"], 3, False),
    ],
)
def test_a_warning_becomes_a_stop_of_the_step_and_its_code_is_kept(
    signals: list[str], stop_code: int, requeued: bool, fake: FakeSlurm
) -> None:
    process = fake.start(render_job(run_config(), run=RUN, command=["ldm"]), STOP_CODE=str(stop_code))
    wait_for((fake.records / "up").exists)
    for name in signals:
        process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=30)
    assert process.returncode == stop_code, output
    assert (fake.records / "got-USR2").exists()
    assert bool([call for call in fake.calls("scontrol") if call[0] == "requeue"]) == requeued


def test_a_warning_before_the_step_is_not_lost(fake: FakeSlurm) -> None:
    # The setup lasts long enough for the signal to come before srun, which then dies of it or stops.
    noted = f": > {shlex.quote(str(fake.records / 'up'))}"
    sleep = f"{sys.executable} -S -c 'import time; time.sleep(1)'"
    script = render_job(run_config(setup=(noted, sleep)), run=RUN, command=["ldm"])
    process = fake.start(script, STOP_CODE="75")
    wait_for((fake.records / "up").exists)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=30)
    assert process.returncode in (75, 140), output
    assert [call for call in fake.calls("scontrol") if call[0] == "requeue"] == [["requeue", "4711"]]


def wait_for(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
