"""`ldm submit` on a real cluster: the whole chain from raw shards to painted pictures, and what stops it in time."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.follow.cancel import cancel_run
from launch.follow.run import run_status
from launch.slurm.queue import job_states
from launch.status import describe
from launch.submit.run import Request, submit
from pipeline.config_file import dump_config, load_config
from pipeline.errors import ConfigError, ToolError
from pipeline.latents.manifest import Manifest
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from pipeline.training.saving.manifest import committed, step_of
from preprocessing.finalize import finalize_dataset
from preprocessing.leases import leased
from preprocessing.work import encode_dataset
from tests.builders import tiny_autoencoder, tiny_clip, tiny_config
from tests.preprocessing.builders import image_file, noise, pairs, write_input
from tests.requirements import leave_out
from tests.slurm.cluster import Cluster
from tests.slurm.machine import until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
SHARDS, SAMPLES = 6, 8
NOBODY = 65534
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards, an autoencoder and a text encoder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_input(
        folder / "source",
        {
            f"{shard:05d}": pairs([f"{shard:05d}{k:03d}" for k in range(SAMPLES)], 100 * shard)
            for shard in range(SHARDS)
        },
    )
    tiny_autoencoder(folder / "autoencoder")
    tiny_clip(folder / "text_encoder", folder / "clip")
    return folder


@pytest.fixture(scope="module")
def dataset(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished data set of those shards."""
    folder = tmp_path_factory.mktemp("dataset")
    config = tiny_config(folder, encode=encode_section(inputs))
    encoders = {name: inputs / name for name in ("autoencoder", "text_encoder")}
    encode_dataset(config, source=inputs / "source", out=folder / "latents", **encoders)
    finalize_dataset(config, folder / "latents", inputs / "source")
    return folder / "latents"


def encode_section(inputs: Path) -> dict[str, Any]:
    return {
        "source": str(inputs / "source"),
        "image_size": 16,
        "min_side": 8,
        "autoencoder": str(inputs / "autoencoder"),
        "text_encoder": str(inputs / "text_encoder"),
        "batch": 4,
        "validation_samples": 4,
        "lease_seconds": 5.0,
    }


@pytest.fixture
def write_config(inputs: Path, tmp_path: Path) -> Callable[..., tuple[Path, RunPaths]]:
    """Return a function that writes a run's config, for two nodes, and returns it with the run's folder."""

    def write(**sections: Any) -> tuple[Path, RunPaths]:
        cluster = {"nodes": 2, "time": "0:30:00", "signal_lead_seconds": 60, "encode_nodes": 2}
        tree: dict[str, Any] = {
            "encode": encode_section(inputs),
            "train": {"steps": 6, "log_every": 1, "checkpoint_every": 3},
            "optimizer": {"warmup_steps": 1},
            "evaluate": {"timesteps": 2, "batch": 4, "max_samples": 4},
            "sample": {"every": 6, "num_prompts": 2, "steps": 2},
            "cluster": cluster,
        }
        for name, value in sections.items():
            tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
        config = tiny_config(tmp_path / "runs", **tree)
        path = tmp_path / f"{config.name}.yaml"
        path.write_text(dump_config(config))
        return path, RunPaths(Path(config.runs) / config.name)

    return write


def ids_of(run: RunPaths) -> dict[str, str]:
    """Return the newest job of each stage."""
    return {job["stage"]: job["job_id"] for job in json.loads(run.jobs.read_text())["jobs"]}


def log_of(run: RunPaths) -> str:
    return "\n".join(
        f"== {path}\n{path.read_text(errors='replace')[-3000:]}"
        for path in sorted(run.root.rglob("log/**/*.txt"))
    )


def end_of(cluster: Cluster, run: RunPaths, job: str, seconds: float = 240) -> str:
    """Return the state in which a job ended; a job that ended badly shows its logs."""
    try:
        return cluster.wait_for_state(job, seconds=seconds)["JobState"]
    finally:
        print(log_of(run))


def test_the_whole_chain_from_raw_shards_to_pictures(
    cluster: Cluster, write_config: Callable[..., tuple[Path, RunPaths]]
) -> None:
    path, run = write_config()
    said = submit(Request(path, wish="all"))
    ids = ids_of(run)
    assert list(ids) == ["encode", "finalize", "train"]
    assert f"encode {ids['encode']}, then finalize {ids['finalize']}, then train {ids['train']}" in said
    assert "ClusterName" not in said and "grace " in said
    waiting = cluster.show(ids["train"])
    assert waiting["JobState"] == "PENDING" and waiting["Dependency"].startswith(f"afterok:{ids['finalize']}")
    assert end_of(cluster, run, ids["train"]) == "COMPLETED"
    manifest = Manifest.load(run.latents)
    assert manifest.counts.read == manifest.counts.written == SHARDS * SAMPLES
    assert (run.samples / "step-00000006.png").is_file()
    assert [record["step"] for record in read_records(run.metrics, "train")] == [1, 2, 3, 4, 5, 6]
    assert describe(run.root).startswith(f"{run.root}: step 6 of 6")


def test_a_killed_worker_costs_nothing_but_time(
    cluster: Cluster, write_config: Callable[..., tuple[Path, RunPaths]], tmp_path: Path
) -> None:
    """Its shards are taken over by the other element; finalize, which waits for both, finds nothing missing."""
    shards = {
        f"{n:05d}": [file for k in range(12) for file in large_pair(f"{n:05d}{k:03d}", 12 * n + k)]
        for n in range(6)
    }
    write_input(tmp_path / "large", shards)
    path, run = write_config(encode={"source": str(tmp_path / "large"), "lease_seconds": 60.0})
    submit(Request(path, wish="encode"))
    ids = ids_of(run)

    def owners() -> list[int]:
        return [owner.pid for owner in leased(run.latents).values() if owner is not None]

    victim = until(owners, 90, "a worker to hold a lease")[0]
    element = worker_variable(victim, "SLURM_ARRAY_TASK_ID")
    # All of it at once, its supervisor too: a worker that dies alone is started again in its place.
    cluster.run("scancel", "--full", "--signal=KILL", f"{ids['encode']}_{element}")
    assert end_of(cluster, run, ids["finalize"]) == "COMPLETED"
    states = {state.job_id: state.state for state in job_states([ids["encode"]])}
    other = "1" if element == "0" else "0"
    assert states[f"{ids['encode']}_{element}"] in ("FAILED", "CANCELLED")
    assert states[f"{ids['encode']}_{other}"] == "COMPLETED"
    manifest = Manifest.load(run.latents)
    assert manifest.counts.read == manifest.counts.written == 6 * 12


def large_pair(key: str, seed: int) -> list[tuple[str, bytes]]:
    """A picture that takes long enough to decode for a kill to meet its shard half done."""
    return [(f"{key}.png", image_file(noise(seed, 600, 600))), (f"{key}.txt", b"a large picture")]


def worker_variable(pid: int, name: str) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(
        value for key, _, value in (part.decode().partition("=") for part in variables) if key == name
    )


def test_cancel_leaves_a_checkpoint_and_the_same_submit_goes_on(
    cluster: Cluster, write_config: Callable[..., tuple[Path, RunPaths]], dataset: Path
) -> None:
    endless = {"steps": 100_000, "log_every": 1, "checkpoint_every": 50_000}
    path, run = write_config(train=endless, sample={"every": None}, data={"dataset": str(dataset)})
    submit(Request(path))
    job = ids_of(run)["train"]
    until(lambda: run.metrics.exists() and len(read_records(run.metrics, "train")) > 3, 120, "some steps")
    with pytest.raises(ConfigError, match=f"job {job} of this run is RUNNING; `ldm cancel"):
        submit(Request(path))
    said: list[str] = []
    words = cancel_run(run, wait_seconds=90, say=said.append)
    shown = cluster.show(job)
    assert shown["JobState"] in ("FAILED", "CANCELLED") and shown["Restarts"] == "0", log_of(run)
    (checkpoint,) = committed(run.checkpoints)
    step = step_of(checkpoint)
    assert step > 3 and f"the last checkpoint is of step {step}" in words
    assert said == [f"job {job}: told to save and stop"]
    status = run_status(run)
    assert (status.checkpoint_step, status.attempts, status.slurm) == (step, 1, "")
    submit(Request(path, ("train.steps=" + str(step + 2),)))
    job = ids_of(run)["train"]
    assert end_of(cluster, run, job) == "COMPLETED"
    assert run_status(run).attempts == 2 and step_of(committed(run.checkpoints)[-1]) == step + 2


def test_a_rehearsal_goes_before_the_big_job_and_can_stop_it(
    cluster: Cluster, write_config: Callable[..., tuple[Path, RunPaths]], dataset: Path, tmp_path: Path
) -> None:
    path, run = write_config(data={"dataset": str(dataset)}, train={"steps": 2}, sample={"every": None})
    submit(Request(path, rehearse=True))
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    for tar in broken.glob("*/*.tar"):
        os.truncate(tar, 512)
    path, stopped = write_config(name="broken", data={"dataset": str(broken)}, sample={"every": None})
    submit(Request(path, rehearse=True))

    assert end_of(cluster, run, ids_of(run)["train"]) == "COMPLETED"
    beside = RunPaths(run.root / "rehearsal-1")
    assert {record["step"] for record in read_records(beside.metrics, "train")} == {1, 2, 3}
    assert [step_of(folder) for folder in committed(beside.checkpoints)] == [3]
    assert read_records(beside.metrics, "train")[-1]["val_loss_ema"] > 0
    assert step_of(committed(run.checkpoints)[-1]) == 2

    ids = ids_of(stopped)
    assert end_of(cluster, stopped, ids["rehearse"]) == "FAILED"
    assert end_of(cluster, stopped, ids["train"], 30) == "CANCELLED"
    assert not stopped.metrics.exists()


def test_a_sweep_is_a_run_for_each_value_below_one_parent(
    cluster: Cluster, write_config: Callable[..., tuple[Path, RunPaths]], dataset: Path
) -> None:
    path, parent = write_config(
        data={"dataset": str(dataset)}, train={"steps": 2}, sample={"every": None}, cluster={"nodes": 1}
    )
    submit(Request(path, sweep=("optimizer.learning_rate=1e-3,1e-4",)))
    runs = [RunPaths(parent.root / f"learning_rate-{value}") for value in ("1e-3", "1e-4")]
    for run, rate in zip(runs, (1e-3, 1e-4), strict=True):
        assert end_of(cluster, run, ids_of(run)["train"]) == "COMPLETED"
        assert load_config(run.config).optimizer.learning_rate == rate
    page = describe(parent.root)
    assert [line.split(": ")[1] for line in page.splitlines() if line.startswith("/")] == ["step 2 of 2"] * 2


def test_a_user_without_rights_submits_and_follows(
    cluster: Cluster, inputs: Path, dataset: Path, open_folder: Path
) -> None:
    """Root may do to jobs and nodes what users may not, so one run is nobody's."""
    shutil.copytree(dataset, open_folder / "latents")
    shutil.copytree(inputs, open_folder / "inputs")
    config = tiny_config(
        open_folder / "runs",
        encode=encode_section(open_folder / "inputs"),
        data={"dataset": str(open_folder / "latents")},
        train={"steps": 2, "log_every": 1},
        optimizer={"warmup_steps": 1},
        cluster={"time": "0:30:00", "signal_lead_seconds": 60},
    )
    path = open_folder / "config.yaml"
    path.write_text(dump_config(config))
    said = as_nobody(cluster, open_folder, "submit", str(path))
    run = RunPaths(open_folder / "runs" / "tiny")
    job = ids_of(run)["train"]
    assert f"submitted train {job}" in said and cluster.show(job)["UserId"].endswith(f"({NOBODY})")
    assert end_of(cluster, run, job) == "COMPLETED"
    status = json.loads(as_nobody(cluster, open_folder, "status", str(run.root), "--json"))
    assert (status["step"], status["checkpoint_step"], status["slurm"]) == (2, 2, "")
    assert "no job is left; the last checkpoint is of step 2" in as_nobody(
        cluster, open_folder, "cancel", str(run.root)
    )


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may write to: pytest's own are for their owner alone."""
    folder = Path(tempfile.mkdtemp(prefix="ldm-nobody-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def as_nobody(cluster: Cluster, home: Path, *words: str) -> str:
    """Run `ldm` as a user who owns nothing, by a Python of this version that this user may start."""
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    system = shutil.which("python{}.{}".format(*sys.version_info), path="/usr/local/bin:/usr/bin")
    pythons = [python for python in (sys.executable, system) if python]
    usable = [python for python in pythons if not subprocess.run([*command, "test", "-x", python]).returncode]
    packages = Path(pytest.__file__).parents[1]
    if not usable or subprocess.run([*command, "test", "-r", str(packages / "torch/__init__.py")]).returncode:
        leave_out(
            f"needs a Python {sys.version_info[:2]} and packages that user {NOBODY} may read: {pythons}, {packages}"
        )
    environment = {**cluster.environment, "HOME": str(home), "PYTHONPATH": f"{ROOT}:{packages}"}
    done = subprocess.run(
        [*command, usable[0], "-m", "launch.cli", *words],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_slurm_would_never_run_is_one_clear_line(
    cluster: Cluster, write_config: Callable[..., tuple[Path, RunPaths]], dataset: Path
) -> None:
    data = {"dataset": str(dataset)}
    path, run = write_config(data=data, cluster={"partition": "nowhere"})
    with pytest.raises(ConfigError) as refusal:
        submit(Request(path))
    (line,) = refusal.value.problems
    assert line.startswith("train: Slurm would never run this job: invalid partition specified: nowhere")
    path, run = write_config(data=data, name="huge", cluster={"cpus_per_task": 4096})
    with pytest.raises(ConfigError) as refusal:
        submit(Request(path))
    (line,) = refusal.value.problems
    assert line.startswith("train: Slurm would never run this job: ")
    assert "node configuration is not available" in line, line
    assert not run.root.exists()
    assert not run.jobs.exists() and not cluster.run("squeue", "--noheader")


def test_without_a_controller_it_is_one_clear_line(
    cluster: Cluster,
    write_config: Callable[..., tuple[Path, RunPaths]],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = cluster.config.read_text()
    dead = tmp_path / "slurm.conf"
    dead.write_text(re.sub(r"(?m)^SlurmctldPort=.*$", "SlurmctldPort=1", text))
    monkeypatch.setenv("SLURM_CONF", str(dead))
    path, run = write_config(data={"dataset": str(dataset)})
    with pytest.raises(ToolError) as refusal:
        submit(Request(path))
    assert "Unable to contact slurm controller" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not run.jobs.exists()
