"""The batch script: what sbatch reads, what bash does with it, and that no value of a config becomes code.

Scripts run through real bash with recorders in the place of srun, scontrol and every other program.
"""

import json
import os
import re
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

from launch import slurm
from launch.batch import BODY
from launch.nodes import job_port
from launch.slurm import quoted, render_job, submission_environment, submit_job
from pipeline.config import ClusterConfig, EncodeConfig, EngineConfig, RunConfig, TrainConfig, UNetConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, ToolError
from pipeline.paths import RunPaths

RUN = RunPaths(Path("/scratch/runs/tiny"))


def run_config(name: str = "tiny", engine: dict[str, Any] | None = None, **cluster: Any) -> RunConfig:
    return RunConfig(
        name=name,
        encode=EncodeConfig(source="shards", image_size=64),
        model=UNetConfig(),
        engine=EngineConfig(**{"global_batch": 64, "micro_batch": 4} | (engine or {})),
        train=TrainConfig(steps=10),
        cluster=ClusterConfig(**cluster),
    )


def directives(script: str) -> dict[str, str]:
    """Return the options as sbatch takes them: up to the first line that is no comment, split as a shell does."""
    found = {}
    for line in script.split("\n"):
        if line.strip() and not line.lstrip().startswith("#"):
            break
        if line.startswith("#SBATCH"):
            (word,) = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            name, _, value = word.removeprefix("--").partition("=")
            assert name not in found
            found[name] = value
    return found


def test_the_whole_job_stands_in_the_directives() -> None:
    config = run_config(
        partition="gpu",
        account="proj-7",
        nodes=2,
        tasks_per_node=8,
        gpus_per_node=8,
        cpus_per_task=12,
        memory_gib_per_node=500,
        time="1-06:00:00",
        signal_lead_seconds=600,
        exclude=("gpu[01-03,7]", "bad1"),
    )
    assert directives(render_job(config, run=RUN, command=["ldm"])) == {
        "job-name": "tiny",
        "partition": "gpu",
        "account": "proj-7",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "500G",
        "time": "1-06:00:00",
        "exclude": "gpu[01-03,7],bad1",
        "requeue": "",
        "open-mode": "append",
        "signal": "B:USR2@600",
        "export": "ALL",
        "output": "/scratch/runs/tiny/log/job-%j.txt",
    }


def test_what_the_config_leaves_out_is_left_to_the_cluster() -> None:
    found = directives(render_job(run_config(), run=RUN, command=["ldm"]))
    assert not {"partition", "account", "gpus-per-node", "exclude"} & set(found)
    assert found["mem"] == "0"


def test_the_text_is_a_function_of_its_arguments() -> None:
    config = run_config(nodes=4, setup=("module load cuda",))
    assert render_job(config, run=RUN, command=["a"]) == render_job(config, run=RUN, command=["a"])


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        ({"partition": "gpu\n#SBATCH --uid=0"}, "--partition='gpu\\n#SBATCH --uid=0'"),
        ({"partition": "a b"}, "--partition='a b'"),
        ({"partition": ""}, "--partition=''"),
        ({"account": "-x"}, "--account='-x'"),
        ({"account": "x#y"}, "--account='x#y'"),
        ({"account": "größe"}, "--account='größe'"),
        ({"exclude": ("node1 --wrap=id",)}, "cluster.exclude: 'node1 --wrap=id'"),
        ({"exclude": ("node[1-3",)}, "cluster.exclude: 'node[1-3'"),
        ({"exclude": ("",)}, "cluster.exclude: ''"),
        ({"time": "99:99:99"}, "cluster.time: '99:99:99'"),
        ({"time": "0:00:00"}, "0 s, not longer than signal_lead_seconds 300"),
        ({"time": "0:05:00"}, "300 s, not longer than signal_lead_seconds 300"),
        ({"gpus_per_node": 8, "tasks_per_node": 4}, "tasks_per_node: 4 with gpus_per_node 8"),
        ({"nodes": 65}, "global_batch: 64 is smaller than 65 nodes x 1 tasks = 65 ranks"),
        ({"nodes": 10**9}, "global_batch: 64 is smaller than"),
        ({"setup": ("a\0b",)}, "NUL"),
    ],
)
def test_a_value_that_slurm_would_misread_is_refused(cluster: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        render_job(run_config(**cluster), run=RUN, command=["ldm"])
    assert said in str(refusal.value)
    assert "\n" not in refusal.value.problems[0]


def test_all_problems_come_at_once() -> None:
    config = run_config(engine={"threads": 4}, partition="a b", time="24:61:00", nodes=100)
    with pytest.raises(ConfigError) as refusal:
        render_job(config, run=RunPaths(Path("/runs/with space")), command=[])
    said = str(refusal.value)
    for words in (
        "partition",
        "cluster.time",
        "global_batch",
        "engine.threads: 4",
        "with space",
        "command is empty",
    ):
        assert words in said
    assert len(refusal.value.problems) == 6


@pytest.mark.parametrize("folder", ["/runs/a%j", "/runs/x\n#SBATCH --a", "/runs/'q'", "-rf", "/runs/$(id)"])
def test_a_run_folder_that_sbatch_would_split_or_expand_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="--output="):
        render_job(run_config(), run=RunPaths(Path(folder)), command=["ldm"])


def test_no_text_can_add_a_directive() -> None:
    texts = ["\n#SBATCH --uid=0\n", "'\n#SBATCH --wrap=id\n'", "\r\n#SBATCH --x"]
    script = render_job(run_config(setup=tuple(texts)), run=RUN, command=texts)
    assert directives(script) == directives(render_job(run_config(), run=RUN, command=["ldm"]))
    assert [line for line in script.split("\n") if "#SBATCH --uid" in line and line.startswith("#")] == []
    assert "\r" not in script  # sbatch refuses scripts with DOS line ends


# --- through bash -----------------------------------------------------------------------------------------------

RECORDER = """#!{python} -S
import os, sys
record = os.path.join(os.environ["RECORDS"], f"{{os.path.basename(sys.argv[0])}}-{{os.getpid()}}")
with open(record + ".new", "wb") as stream:
    stream.write(b"\\0".join(map(os.fsencode, sys.argv[1:])))
os.rename(record + ".new", record)
"""
# Stands in for srun: becomes the task (RUN_TASK), waits for a stop (STOP_CODE), or ends with SRUN_CODE.
SRUN = (
    RECORDER
    + """
import signal, time
def stopped(number, frame):
    open(os.path.join(os.environ["RECORDS"], "got-USR2"), "w").close()
    sys.exit(int(os.environ["STOP_CODE"]))
if "STOP_CODE" in os.environ:
    signal.signal(signal.SIGUSR2, stopped)
    open(os.path.join(os.environ["RECORDS"], "up"), "w").close()
    time.sleep(60)
if "RUN_TASK" in os.environ:
    at = next(place for place, word in enumerate(sys.argv) if place and not word.startswith("-"))
    os.environ["PATH"] = os.defpath
    os.execvp(sys.argv[at], sys.argv[at:])
sys.exit(int(os.environ.get("SRUN_CODE", "0")))
"""
)
SCONTROL = (
    RECORDER
    + """
if sys.argv[1:3] == ["show", "hostnames"]:
    print(os.environ.get("HOSTS", "gpu-07\\ngpu-08"))
elif "job" in sys.argv:
    print("JobId=1 JobName=tiny", os.environ.get("STATE", "JobState=RUNNING Reason=None PreemptTime=None"), "End=x")
elif sys.argv[1] == "requeue":
    sys.exit(int(os.environ.get("REQUEUE_CODE", "0")))
"""
)
# Everything that hostile texts below try to start; a record of one of them is an injection.
BAIT = ("id", "touch", "rm", "uname", "sh", "cat", "reboot", "module")


class FakeSlurm:
    """A PATH with nothing but recorders, and the environment of a batch script in it."""

    def __init__(self, folder: Path) -> None:
        self.records, self.programs, self.work = (folder / name for name in ("records", "bin", "work"))
        for made in (self.records, self.programs, self.work):
            made.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **dict.fromkeys(BAIT, RECORDER)}.items():
            program = self.programs / name
            program.write_text(text.format(python=sys.executable))
            program.chmod(0o755)
        sleep = self.programs / "sleep"
        sleep.write_text(f"#!{sys.executable} -S\nimport time; time.sleep(0.2)\n")
        sleep.chmod(0o755)
        self.environment = {
            "PATH": str(self.programs),
            "RECORDS": str(self.records),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "gpu-[07-08]",
            "SLURM_SUBMIT_DIR": str(self.work),
            "SLURM_CPUS_PER_TASK": "3",
        }

    def start(self, script: str, **environment: str) -> "subprocess.Popen[str]":
        file = self.work.parent / "job.sh"
        file.write_bytes(script.encode())
        return subprocess.Popen(
            ["/bin/bash", str(file)],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd="/",
        )

    def run(self, script: str, **environment: str) -> tuple[int, str]:
        process = self.start(script, **environment)
        output, _ = process.communicate(timeout=30)
        return process.returncode, output

    def calls(self, name: str) -> list[list[str]]:
        found = sorted(self.records.glob(f"{name}-*"), key=lambda file: file.stat().st_mtime_ns)
        return [[os.fsdecode(word) for word in file.read_bytes().split(b"\0")] for file in found]

    def started(self) -> set[str]:
        return {file.name.rsplit("-", 1)[0] for file in self.records.glob("*-*[0-9]")}

    def forget(self) -> None:
        for file in self.records.iterdir():
            file.unlink()


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


@pytest.fixture(scope="module")
def shared_fake(tmp_path_factory: pytest.TempPathFactory) -> FakeSlurm:
    return FakeSlurm(tmp_path_factory.mktemp("slurm"))


def task_of(call: list[str]) -> list[str]:
    """Return the command behind srun's own options and the shell that prepares a rank."""
    at = call.index("rank")
    assert call[at - 3 : at - 1] == ["bash", "-c"]
    return call[at + 1 :]


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


# --- submission -------------------------------------------------------------------------------------------------

SBATCH = """#!{python} -S
import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open(os.environ["RECORDS"] + "/sbatch.json", "w"))
print(os.environ["ANSWER"], end="")
sys.stderr.write(os.environ.get("COMPLAINT", ""))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def sbatch(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def answer(text: str, **environment: str) -> None:
        program = fake.programs / "sbatch"
        program.write_text(SBATCH.format(python=sys.executable))
        program.chmod(0o755)
        for name, value in ({"ANSWER": text} | environment).items():
            monkeypatch.setenv(name, value)

    monkeypatch.setenv("PATH", str(fake.programs))
    monkeypatch.setenv("RECORDS", str(fake.records))
    return answer


def test_a_submission_is_written_down(sbatch: Callable[..., None], fake: FakeSlurm, tmp_path: Path) -> None:
    sbatch("815\n")
    run = RunPaths(tmp_path / "runs" / "tiny")
    config = run_config(nodes=2)
    job = submit_job(config, run, ["ldm", "train", "a b"])
    assert (job.job_id, job.sbatch) == ("815", ("sbatch", "--parsable", str(run.sbatch)))
    assert (
        run.sbatch.read_text() == job.script == render_job(config, run=run, command=["ldm", "train", "a b"])
    )
    assert run.log.is_dir()
    arguments, _ = json.loads((fake.records / "sbatch.json").read_text())
    assert arguments == ["--parsable", str(run.sbatch)]
    sbatch("816;cluster-b\n")
    submit_job(config, run, ["ldm"])
    jobs = json.loads(run.jobs.read_text())["jobs"]
    assert [(entry["job_id"], entry["cluster"]) for entry in jobs] == [("815", None), ("816", "cluster-b")]
    assert [entry["command"] for entry in jobs] == [["ldm", "train", "a b"], ["ldm"]]
    assert jobs[0]["script_sha256"] != jobs[1]["script_sha256"]
    assert abs(jobs[0]["submitted_unix_seconds"] - time.time()) < 60


def test_the_training_runs_from_the_config_as_it_was(sbatch: Callable[..., None], tmp_path: Path) -> None:
    sbatch("1\n")
    config = run_config(nodes=3)
    job = submit_job(config, RunPaths(tmp_path))
    resolved = tmp_path / "submit.yaml"
    assert load_config(resolved) == config
    command = [sys.executable, "-m", "launch.cli", "train", str(resolved)]
    assert f"ldm_command=({shlex.join(command)})" in job.script


def test_a_relative_run_folder_becomes_absolute(
    sbatch: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sbatch("1\n")
    job = submit_job(run_config(), RunPaths(Path("runs/tiny")), ["ldm"])
    assert directives(job.script)["output"] == f"{tmp_path}/runs/tiny/log/job-%j.txt"


def test_a_dry_run_writes_nothing_and_needs_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = submit_job(run_config(), RunPaths(tmp_path / "run"), ["ldm"], dry_run=True)
    assert job.job_id is None
    assert list(tmp_path.iterdir()) == []
    assert job.sbatch == ("sbatch", "--parsable", f"{tmp_path}/run/submit.sbatch")
    assert "#SBATCH --job-name=tiny" in job.script


def test_what_sbatch_complains_about_comes_as_one_line(sbatch: Callable[..., None], tmp_path: Path) -> None:
    complaint = (
        "sbatch: error: invalid partition specified: gpu\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    sbatch("", COMPLAINT=complaint, CODE="1")
    run = RunPaths(tmp_path / "run")
    with pytest.raises(ToolError) as refusal:
        submit_job(run_config(), run, ["ldm"])
    assert str(refusal.value) == (
        f"sbatch refused {run.sbatch} (exit code 1): invalid partition specified: gpu; "
        "Batch job submission failed: Invalid partition name specified"
    )
    assert not run.jobs.exists()


def test_an_answer_without_a_job_id_is_an_error(sbatch: Callable[..., None], tmp_path: Path) -> None:
    sbatch("Submitted batch job 7\n")
    with pytest.raises(ToolError, match="answered 'Submitted batch job 7"):
        submit_job(run_config(), RunPaths(tmp_path), ["ldm"])


def test_a_missing_sbatch_is_one_line(sbatch: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="sbatch: not found on this machine; submit from a login node"):
        submit_job(run_config(), RunPaths(tmp_path), ["ldm"])


def test_a_silent_sbatch_is_given_up(
    sbatch: Callable[..., None], fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "SBATCH_TIMEOUT_SECONDS", 0.2)
    (fake.programs / "sbatch").write_text(f"#!{sys.executable} -S\nimport time; time.sleep(60)\n")
    (fake.programs / "sbatch").chmod(0o755)
    with pytest.raises(ToolError, match=r"no answer within 0\.2 s"):
        submit_job(run_config(), RunPaths(tmp_path), ["ldm"])


@pytest.mark.parametrize("text", ["[]", "{", '{"jobs": 1}', "\xff"])
def test_a_broken_record_of_jobs_stops_the_submission_first(
    text: str, sbatch: Callable[..., None], fake: FakeSlurm, tmp_path: Path
) -> None:
    sbatch("1\n")
    (tmp_path / "jobs.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="not a record of jobs"):
        submit_job(run_config(), RunPaths(tmp_path), ["ldm"])
    assert not (fake.records / "sbatch.json").exists()


def test_variables_that_would_overrule_the_script_are_dropped() -> None:
    options = slurm.job_options(run_config(account="a"), RUN)
    kept = {
        "HOME": "/home/a",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_PARTITION": "left to the site, as the config names none",
        "SBATCH_RESERVATION": "r",
    }
    dropped = {
        "SBATCH_ACCOUNT": "b",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_MEM_PER_CPU": "1",
        "SBATCH_OPEN_MODE": "truncate",
        "SBATCH_JOB_NAME": "x",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_SIGNAL": "x",
        "SLURM_NTASKS": "7",
        "SLURM_JOB_ID": "1",
        "SRUN_DEBUG": "1",
    }
    assert submission_environment(kept | dropped, options) == kept


def test_every_overruling_variable_of_sbatch_is_covered() -> None:
    """Each option of the script is dropped under the name by which sbatch's manual reads it."""
    options = slurm.job_options(run_config(partition="p", account="a", exclude=("n",), gpus_per_node=1), RUN)
    manual = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "requeue": "NO_REQUEUE"}
    for option in options:
        name = "SBATCH_" + manual.get(option, option.upper().replace("-", "_"))
        assert submission_environment({name: "x"}, options) == {}, name
        assert re.fullmatch(r"SBATCH_[A-Z_]+", name)
