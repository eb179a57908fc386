"""The text of a job: what sbatch reads in it, what is refused, and how it is submitted."""

import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import job_options, render_job, submission_environment, submit_job
from launch.slurm import sbatch as sbatch_module
from pipeline.config_file import load_config
from pipeline.errors import ConfigError, ToolError
from pipeline.paths import RunPaths
from tests.launch.fake_slurm import RUN, FakeSlurm, directives, run_config


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


@pytest.fixture
def fake(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


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


def test_a_missing_sbatch_is_one_line(sbatch: Callable[..., None], fake: FakeSlurm, tmp_path: Path) -> None:
    (fake.programs / "sbatch").unlink(missing_ok=True)
    with pytest.raises(ToolError, match="sbatch: not found on this machine; submit from a login node"):
        submit_job(run_config(), RunPaths(tmp_path), ["ldm"])


def test_a_silent_sbatch_is_given_up(
    sbatch: Callable[..., None], fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sbatch_module, "SBATCH_TIMEOUT_SECONDS", 0.2)
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
    options = job_options(run_config(account="a"), RUN)
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
    options = job_options(run_config(partition="p", account="a", exclude=("n",), gpus_per_node=1), RUN)
    manual = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "requeue": "NO_REQUEUE"}
    for option in options:
        name = "SBATCH_" + manual.get(option, option.upper().replace("-", "_"))
        assert submission_environment({name: "x"}, options) == {}, name
        assert re.fullmatch(r"SBATCH_[A-Z_]+", name)
