"""What bash does with the batch script: the shell it prepares, and the words it hands over to the supervisor.

Scripts run through real bash with recorders in the place of Slurm's programs, and of the Python that the script names.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.batch import BODY
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


def rendered(command: list[str], **cluster: Any) -> str:
    """Return a batch script whose Python is a recorder."""
    script = render_job(run_config(**cluster), run=RUN, command=command)
    named = f"ldm_python={quoted(sys.executable)}\n"
    assert script.count(named) == 1
    return script.replace(named, "ldm_python=supervisor\n")


def test_the_supervisor_gets_the_step_and_the_command(fake: FakeSlurm) -> None:
    code, output = fake.run(rendered(["ldm", "train", "x.yaml"], nodes=2, spares=1))
    assert (code, output) == (0, "")
    (call,) = fake.calls("supervisor")
    assert call == ["-m", "launch.supervisor", "--", "ldm", "train", "x.yaml"]
    assert fake.started() == {"supervisor"}


def test_without_its_folder_no_rank_starts(fake: FakeSlurm) -> None:
    fake.work.rmdir()
    code, output = fake.run(rendered(["ldm"]))
    assert code == 1
    assert f"the folder it was submitted from is not on this node: {fake.work}" in output
    assert not fake.calls("supervisor")


def test_setup_lines_shape_the_environment_of_the_supervisor(fake: FakeSlurm) -> None:
    # `set -u`, and names that the script itself might use, as sourced environments bring along.
    setup = ("export FROM_SETUP='a b'", "set -eu; code=9 job=x state=y hosts=z step=1", "# a comment", "true")
    code, output = fake.run(rendered(["ldm"], setup=setup), PRINT_ENVIRONMENT="1")
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])
    assert (found["FROM_SETUP"], found["LDM_JOB_STAGE"], found["LDM_JOB_RUN"]) == (
        "a b",
        "train",
        str(RUN.root),
    )
    assert (found["LDM_JOB_LOG"], found["LDM_JOB_THREADS"], found["LDM_JOB_STOP"]) == (str(RUN.log), "1", "")


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_warning_before_the_supervisor_listens_is_noted(fake: FakeSlurm, name: str) -> None:
    noted = f": > {shlex.quote(str(fake.records / 'up'))}"
    sleep = f"{sys.executable} -S -c 'import time; time.sleep(0.5)'"
    process = fake.start(rendered(["ldm"], setup=(noted, sleep)), PRINT_ENVIRONMENT="1")
    wait_for((fake.records / "up").exists)
    process.send_signal(signal.Signals[name])
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert json.loads(output.splitlines()[-1])["LDM_JOB_STOP"] == "1"


@pytest.mark.parametrize("line", ["false", "x='", "no-such-program --x", "if true; then"])
def test_a_setup_line_that_fails_ends_the_job_by_name(line: str, fake: FakeSlurm) -> None:
    code, output = fake.run(rendered(["ldm"], setup=("true", line)))
    assert code == 1
    assert f"ldm job 4711: cluster.setup failed: {line}" in output
    assert not fake.calls("supervisor")


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
    script = rendered(command)
    parsed = subprocess.run(["/bin/bash", "-n"], input=script.encode(), capture_output=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, b"")
    code, output = shared_fake.run(script)
    assert (code, output) == (0, "")
    (call,) = shared_fake.calls("supervisor")
    assert task_of(call) == command
    assert shared_fake.started() == {"supervisor"}
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
    assert "ldm_command=(ldm train)" in body.split("\n", 8)[:8]
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


def wait_for(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
