"""`ldm submit` up to Slurm's door: the chain, what it waits for, the sweep, the snapshot, and what stops it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.nodes import Placement
from launch.submit import preflight as preflight_module
from launch.submit.chain import worker_of
from launch.submit.run import Request, submit
from launch.submit.snapshot import snapshot_code
from launch.submit.variants import rehearsal, split_values, sweep
from pipeline.config import RunConfig
from pipeline.config_file import dump_config, load_config
from pipeline.errors import ConfigError, ToolError
from pipeline.paths import RunPaths
from pipeline.tracking import commit_of
from tests.builders import tiny_config
from tests.launch.fake_login import LoginNode, login_node

ROOT = Path(__file__).parents[2]
Write = Callable[..., tuple[Path, RunPaths]]


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoginNode:
    monkeypatch.setattr(preflight_module, "PROBE_BYTES", 1 << 20)
    return login_node(tmp_path, monkeypatch)


@pytest.fixture
def write_config(tmp_path: Path) -> Write:
    def write(**sections: Any) -> tuple[Path, RunPaths]:
        for name in ("source", "autoencoder", "text_encoder"):
            (tmp_path / name).mkdir(exist_ok=True)
        tree: dict[str, Any] = {
            "encode": {name: str(tmp_path / name) for name in ("source", "autoencoder", "text_encoder")}
            | {"image_size": 16},
            "optimizer": {"warmup_steps": 5},
            "cluster": {"nodes": 2, "encode_nodes": 3},
        }
        for name, value in sections.items():
            tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
        config = tiny_config(tmp_path / "runs", **tree)
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config))
        return path, RunPaths(Path(config.runs) / config.name)

    return write


def submitted(login: LoginNode) -> list[tuple[list[str], str]]:
    """Return the options and the script's name of each job that was handed over."""
    calls = [words for words in login.calls("sbatch") if "--test-only" not in words]
    return [(words[1:-1], Path(words[-1]).name) for words in calls]


def test_all_is_a_chain_in_which_each_job_waits_for_the_one_before(
    login: LoginNode, write_config: Write
) -> None:
    path, run = write_config()
    said = submit(Request(path, wish="all", rehearse=True))
    kill = "--kill-on-invalid-dep=yes"
    assert submitted(login) == [
        ([], "submit-encode.sbatch"),
        (["--dependency=afterany:101", kill], "submit-finalize.sbatch"),
        (["--dependency=afterok:102", kill], "submit-rehearse.sbatch"),
        (["--dependency=afterok:103", kill], "submit.sbatch"),
    ]
    assert "submitted encode 101, then finalize 102, then rehearse 103, then train 104" in said
    assert "a preemption or scancel leaves 40 s, enough for a save" in said
    jobs = json.loads(run.jobs.read_text())["jobs"]
    assert [(job["stage"], job["job_id"], job["nodes"], job["array"]) for job in jobs] == [
        ("encode", "101", 1, 3),
        ("finalize", "102", 1, 0),
        ("rehearse", "103", 1, 0),
        ("train", "104", 2, 0),
    ]
    assert {folder.name for folder in run.log.iterdir()} == {"encode-0", "encode-1", "encode-2"}
    script = (run.root / "submit-encode.sbatch").read_text()
    assert "#SBATCH --array=0-2\n" in script and f" encode {run.root}/submit.yaml)" in script
    assert load_config(run.root / "submit.yaml") == load_config(path)
    assert load_config(run.root / "rehearsal-1/submit.yaml").train.steps == 3


def test_consent_to_other_data_reaches_the_training_alone(login: LoginNode, write_config: Write) -> None:
    path, run = write_config()
    submit(Request(path, wish="all", rehearse=True, accept_data_change=True))
    scripts = {script.name: script.read_text() for script in run.root.rglob("*.sbatch")}
    assert [name for name, text in scripts.items() if "--accept-data-change" in text] == ["submit.sbatch"]
    assert f" train {run.root}/submit.yaml --accept-data-change)" in scripts["submit.sbatch"]


def test_a_job_that_slurm_refuses_takes_those_before_it_along(login: LoginNode, write_config: Write) -> None:
    login.answer("sbatch", "submit.sbatch", "--parsable", error="sbatch: error: QOSMaxJobs\n", code=1)
    path, _ = write_config()
    with pytest.raises(ToolError, match=r"sbatch refused .*submit\.sbatch \(exit code 1\): QOSMaxJobs"):
        submit(Request(path, wish="all"))
    assert login.calls("scancel") == [["101", "102"]]


def test_every_problem_is_told_at_once_and_nothing_is_queued(
    login: LoginNode, write_config: Write, tmp_path: Path
) -> None:
    login.answer(
        "sbatch", "--test-only", error="sbatch: error: invalid partition specified: nowhere\n", code=1
    )
    login.answer("squeue", out="7|RUNNING|None|node1|1:00\n")
    path, run = write_config(
        optimizer={"warmup_steps": 11},
        cluster={"gpus_per_node": 1, "gpu_memory_gib": 1, "signal_lead_seconds": 60},
        engine={"micro_batch": 4096, "global_batch": 8192},
    )
    run.root.mkdir(parents=True)
    run.jobs.write_text(json.dumps({"jobs": [{"job_id": "7", "stage": "train"}]}))
    with pytest.raises(ConfigError) as refusal:
        submit(Request(path))
    said = str(refusal.value)
    for words in (
        "optimizer.warmup_steps: 11",
        f"{run.latents}: no finished data set (manifest.json); `--stage all` makes it first",
        "engine.micro_batch: 4096 takes about",
        f"job 7 of this run is RUNNING; `ldm cancel {run.root}`",
        "train: Slurm would never run this job: invalid partition specified: nowhere",
    ):
        assert words in said
    assert submitted(login) == []
    assert [path.name for path in run.root.iterdir()] == ["jobs.json"]


def test_too_little_disk_and_too_short_a_warning_are_told_with_figures(
    login: LoginNode, write_config: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write_config(model={"block_out_channels": [320, 640]})
    monkeypatch.setattr(preflight_module, "write_rate", lambda folder: 1e6)
    with pytest.raises(
        ConfigError, match=r"signal_lead_seconds: 300, but a save takes at most \d{3,} s at the 1 MB/s"
    ):
        submit(Request(path, wish="all"))
    usage = preflight_module.shutil.disk_usage("/")._replace(free=10**8)
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match=r"train\.keep_last: 4 checkpoints of .* GiB in .*, 0 GiB free"):
        submit(Request(path, wish="all"))


def test_a_save_longer_than_the_grace_is_a_warning(
    login: LoginNode, write_config: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    login.answer("scontrol", "partition", out="PartitionName=train GraceTime=0\n")
    path, _ = write_config(cluster={"signal_lead_seconds": 80_000})
    monkeypatch.setattr(preflight_module, "write_rate", lambda folder: 1e5)
    said = submit(Request(path, wish="all"))
    assert (
        "warning      a preemption or scancel leaves 30 s (KillWait 30, GraceTime 0), less than a save"
        in said
    )


def test_a_folder_that_cannot_be_written_is_named(
    login: LoginNode, write_config: Write, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    path, _ = write_config()
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        submit(Request(path, (f"runs={tmp_path}/file/runs",), wish="all"))


def test_slurm_that_does_not_answer_is_one_line(login: LoginNode, write_config: Write) -> None:
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    login.answer("sbatch", "--test-only", error=f"sbatch: error: {words}\n", code=1)
    path, _ = write_config()
    with pytest.raises(ToolError, match="Unable to contact slurm controller") as refusal:
        submit(Request(path, wish="all"))
    assert "\n" not in str(refusal.value)
    (login.programs / "sbatch").unlink()
    with pytest.raises(ToolError, match="sbatch: not found on this machine; submit from a login node"):
        submit(Request(path, wish="all"))


def test_a_dry_run_shows_the_chain_and_writes_nothing(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    path, run = write_config()
    said = submit(Request(path, wish="all", rehearse=True, dry_run=True))
    heads = [line for line in said.splitlines() if ": sbatch " in line]
    assert [head.split()[1] for head in heads] == ["encode:", "finalize:", "rehearse:", "train:"]
    assert "--dependency=afterok:$REHEARSE --kill-on-invalid-dep=yes" in heads[3]
    assert not run.root.exists()
    swept = submit(Request(path, sweep=("seed=1,2",), wish="all", dry_run=True))
    assert swept.count("#!/bin/bash") == 4 and not run.root.exists()


def test_a_sweep_waits_for_one_data_set(login: LoginNode, write_config: Write) -> None:
    path, run = write_config()
    submit(Request(path, wish="all", sweep=("seed=1,2",)))
    options = [words for words, _ in submitted(login)]
    assert [words[0] for words in options[1:]] == [
        "--dependency=afterany:101",
        "--dependency=afterok:102",
        "--dependency=afterok:102",
    ]
    for seed in (1, 2):
        child = load_config(run.root / f"seed-{seed}/submit.yaml")
        assert (child.seed, child.data.dataset) == (seed, str(run.latents))
        assert json.loads((run.root / f"seed-{seed}/jobs.json").read_text())["jobs"][0]["stage"] == "train"
    assert json.loads((run.root / "sweep.json").read_text())["runs"] == ["seed-1", "seed-2"]


def test_one_wrong_value_of_a_sweep_submits_none(login: LoginNode, write_config: Write) -> None:
    path, _ = write_config()
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate"):
        submit(Request(path, wish="all", sweep=("optimizer.learning_rate=1e-3,2.0",)))
    with pytest.raises(ConfigError, match="warmup_steps: 11"):
        submit(Request(path, wish="all", sweep=("optimizer.warmup_steps=5,11",)))
    assert submitted(login) == []


@pytest.mark.parametrize(
    "choice", ["seed", "seed=", "seed=1,,2", "=1", "name=a,b", "encode.batch=1,2", "seed=1,1"]
)
def test_a_sweep_that_is_none_is_refused(choice: str, write_config: Write) -> None:
    path, run = write_config()
    with pytest.raises(ConfigError, match="--sweep"):
        sweep(load_config(path), run, [choice])


def test_a_sweep_over_two_settings_is_every_combination(write_config: Write) -> None:
    path, run = write_config()
    found = sweep(load_config(path), run, ["seed=1,2", "optimizer.learning_rate=1e-3,2e-3"])
    assert [(one.seed, one.optimizer.learning_rate) for one in found] == [
        (1, 1e-3),
        (1, 2e-3),
        (2, 1e-3),
        (2, 2e-3),
    ]
    assert found[1].name == "seed-1_learning_rate-2e-3"


def test_values_are_split_outside_of_brackets_and_quotes() -> None:
    assert split_values("1, 2") == ["1", "2"]
    assert split_values("[1,2],[3]") == ["[1,2]", "[3]"]
    assert split_values("'a,b',{x: 1, y: 2}") == ["'a,b'", "{x: 1, y: 2}"]


def test_a_rehearsal_computes_full_micro_batches_on_one_node() -> None:
    config = load_config(ROOT / "configs/sd15-512.yaml")
    run = RunPaths(Path("/runs/sd15-512"))
    found = rehearsal(config, run, 2)
    assert (found.name, found.runs) == ("rehearsal-2", "/runs/sd15-512")
    assert found.engine.global_batch == 8 * config.engine.micro_batch == 256
    assert found.engine.micro_batch == config.engine.micro_batch and found.model == config.model
    assert (found.train.steps, found.train.checkpoint_every, found.evaluate.every) == (3, 3, 3)
    assert (found.cluster.nodes, found.data.dataset) == (1, config.data.dataset)


def test_a_worker_of_an_array_begins_with_shards_of_its_own() -> None:
    placed = Placement(1, 2, 1, 2, "", 0, "slurm")
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert worker_of(placed, array) == (7, 8)
    assert worker_of(placed, {}) == (1, 2)
    assert worker_of(Placement(0, 1, 0, 1, "", 0, "single"), array) == (0, 1)


def test_the_code_is_kept_as_it_was_and_runs_from_there(tmp_path: Path) -> None:
    folder = snapshot_code(tmp_path)
    assert snapshot_code(tmp_path) == folder
    facts = json.loads((folder / "commit.json").read_text())
    assert facts["digest"].startswith(folder.name)
    assert (folder / "pipeline/errors.py").read_bytes() == (ROOT / "pipeline/errors.py").read_bytes()
    code = "import launch, pipeline; print(launch.__file__, pipeline.__file__)"
    given = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [f"{folder}/launch/__init__.py", f"{folder}/pipeline/__init__.py"]


def test_the_commit_and_what_differs_from_it(tmp_path: Path) -> None:
    assert commit_of(tmp_path / "no-clone") == {"commit": None, "changed": [], "diff_lines": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/a.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "launch/a.py").write_text("2")
    (tmp_path / "notes.txt").write_text("not the project's")
    found = commit_of(tmp_path)
    assert len(str(found["commit"])) == 40 and found["changed"] == ["launch/a.py"]
    assert found["diff_lines"] == 2  # One line away, one come.


def test_without_a_cluster_the_stages_run_here(
    write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Python notes its words; the second stage fails, and the third does not begin."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$3" >> {tmp_path}/calls\n[ "$3" != finalize ] || exit 3\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    path, run = write_config()
    with pytest.raises(SystemExit) as ended:
        submit(Request(path, wish="all", site=ROOT / "configs/cluster/local.yaml"))
    assert ended.value.code == 3
    assert (tmp_path / "calls").read_text().split() == ["encode", "finalize"]
    assert not run.jobs.exists()


def site_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return path


def test_a_site_lies_between_the_config_and_the_command_line(write_config: Write, tmp_path: Path) -> None:
    path, _ = write_config(cluster={"partition": "mine", "time": "1:00:00"})
    site = site_of(tmp_path, "partition: gpu\nnodes: 4\n")
    cluster = load_config(path, ["cluster.nodes=3"], site).cluster
    assert (cluster.partition, cluster.nodes, cluster.time) == ("gpu", 3, "1:00:00")


def test_a_wrong_site_is_told_by_its_own_lines_with_the_config_s_problems(
    write_config: Write, tmp_path: Path
) -> None:
    path, _ = write_config()
    site = site_of(tmp_path, "partitoin: gpu\nnodes: 0\nnccl: {LD_PRELOAD: x}\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(path, ["train.steps=0"], site)
    said = refusal.value.problems
    assert any(
        line.startswith(f"{site}:1: cluster.partitoin: unknown key; did you mean 'partition'?")
        for line in said
    )
    assert any(
        line.startswith(f"{site}:2: cluster.nodes: input should be greater than or equal to 1")
        for line in said
    )
    assert any(line.startswith(f"{site}:3: cluster.nccl: may not hold LD_PRELOAD") for line in said)
    assert any(line.startswith("override train.steps") for line in said)


@pytest.mark.parametrize("name", ["local", "slurm-cpu", "slurm-h100"])
def test_every_setting_of_a_shipped_site_has_its_reason(name: str) -> None:
    path = ROOT / f"configs/cluster/{name}.yaml"
    config: RunConfig = load_config(ROOT / "configs/small.yaml", site=path)
    assert (config.cluster.scheduler == "none") == (name == "local")
    settings = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    lines = path.read_text().splitlines()
    for line in settings:
        assert " # " in line or lines[lines.index(line) - 1].startswith("# "), line
    named = {line.partition(":")[0] for line in settings}
    assert name == "local" or named == set(type(config.cluster).model_fields)
