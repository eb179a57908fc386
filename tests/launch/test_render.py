"""The text of every stage: golden files, and values that stay values in a real bash.

`python -m tests.launch.test_render` writes the golden files anew; look at what changed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.batch import BODY
from launch.slurm import render_job
from launch.slurm.render import Stage
from pipeline.config import ClusterConfig, RunConfig
from pipeline.config.cluster import ContainerConfig
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.paths import RunPaths
from tests.launch.fake_slurm import FakeSlurm, run_config
from tests.launch.test_batch import HOSTILE, passable

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
RUN = RunPaths(Path("/scratch/runs/sd15-512"))
PYTHON = "/opt/ldm/bin/python"


def on_site(name: str, **cluster: object) -> RunConfig:
    config = load_config(ROOT / "configs/sd15-512.yaml", site=ROOT / f"configs/cluster/{name}.yaml")
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=cluster)})


def cases() -> dict[str, tuple[RunConfig, Stage]]:
    h100, cpu = on_site("slurm-h100"), on_site("slurm-cpu")
    mounts = ("/data", "/models:/weights:ro")
    apptainer = ContainerConfig(kind="apptainer", image="/images/ldm one.sif", mounts=mounts)
    pyxis = ContainerConfig(kind="pyxis", image="registry.example#ldm:1", mounts=mounts)
    careful = {
        "partition": "gpu",
        "account": "proj-7",
        "qos": "long",
        "constraint": "h100|a100",
        "requeue": False,
    }
    careful |= {
        "exclude": ("gpu-[07,11]",),
        "setup": ("module load cuda/12.8", "export X='a b'"),
        "time": "2-00:00:00",
    }
    return {
        "train-h100": (h100, "train"),
        "encode-h100": (h100, "encode"),
        "finalize-h100": (h100, "finalize"),
        "rehearse-cpu": (cpu, "rehearse"),
        "train-apptainer": (on_site("slurm-h100", container=apptainer), "train"),
        "train-pyxis": (on_site("slurm-h100", container=pyxis), "train"),
        "train-careful": (on_site("slurm-h100", **careful), "train"),
    }


def rendered(name: str) -> str:
    config, stage = cases()[name]
    command = ["python", "-m", "launch.cli", "train", f"{RUN.root}/submit.yaml"]
    code, folder = RUN.root / "code/0123456789ab", Path("/home/me/ldm")
    return render_job(config, run=RUN, command=command, stage=stage, code=code, folder=folder)


@pytest.mark.parametrize("name", sorted(cases()))
def test_the_text_is_the_golden_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", PYTHON)
    script = rendered(name)
    assert script.endswith(BODY)
    assert script.removesuffix(BODY) == (GOLDEN / f"{name}.sbatch").read_text()


def test_every_golden_file_has_its_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sbatch")} == set(cases())


@pytest.fixture(scope="module")
def shared_fake(tmp_path_factory: pytest.TempPathFactory) -> FakeSlurm:
    return FakeSlurm(tmp_path_factory.mktemp("slurm"))


# Stands in for the body: hands all that the head has set to one recorder, word by word.
TAIL = """
srun "$ldm_run" "$ldm_log" "$NCCL_DEBUG" "$PYTHONPATH" "${#ldm_setup[@]}" "${ldm_setup[@]}" "${ldm_srun[@]}" "${ldm_command[@]}"
"""


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(HOSTILE, min_size=5, max_size=5), kind=st.sampled_from(("apptainer", "pyxis")))
def test_no_value_reaches_the_shell_as_code(values: list[str], kind: str, shared_fake: FakeSlurm) -> None:
    """Newlines, quotes, $(...) and backticks in every free value of a site arrive as they are, and start nothing."""
    shared_fake.forget()
    debug, image, setup, argument, code = values
    container = ContainerConfig(kind=kind, image=image or "x")  # type: ignore[arg-type]
    config = run_config(container=container, nccl={"NCCL_DEBUG": debug}, setup=(setup,))
    try:
        script = render_job(
            config, run=RUN, command=["ldm", argument], code=Path("/c" + code), folder=Path("/clone")
        )
    except (ConfigError, ValueError):
        assert not all(passable(value) for value in values)
        return
    if not passable(code):
        return  # No such folder can exist, so none can be handed in.
    head = script.removesuffix(BODY)
    done = subprocess.run(
        ["/bin/bash"],
        input=(head + TAIL).encode("utf-8", "surrogateescape"),
        env=shared_fake.environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    (call,) = shared_fake.calls("srun")
    options = [word for word in call[6:] if word.startswith("--container-image=")]
    assert call[:6] == [str(RUN.root), str(RUN.log), debug, str(Path("/c" + code)), "1", setup]
    assert call[-2:] == ["ldm", argument]
    assert (
        options == ([f"--container-image={image or 'x'}"] if kind == "pyxis" else []) or kind == "apptainer"
    )
    if kind == "apptainer":
        assert call[-3] == (image or "x")
        assert call[call.index("--pwd") + 1] == "/clone"
    assert shared_fake.started() == {"srun"}


@pytest.mark.parametrize("mount", ["data", "/a,b", "/a:b", "/a:/b:rx", "/a b", "/a:/b:ro:x"])
def test_a_mount_that_a_runtime_would_split_is_refused(mount: str) -> None:
    container = ContainerConfig(kind="pyxis", image="x", mounts=(mount,))
    with pytest.raises(ConfigError, match=r"cluster\.container\.mounts"):
        render_job(run_config(container=container), run=RUN, command=["ldm"])


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_folder_that_a_runtime_would_split_is_refused(kind: str) -> None:
    config = run_config(container=ContainerConfig(kind=kind, image="x"))  # type: ignore[arg-type]
    for folder in ("/home/a,b", "/home/a b", "/home/a:b"):
        with pytest.raises(ConfigError, match="cannot be shown to"):
            render_job(config, run=RUN, command=["ldm"], folder=Path(folder))
        render_job(run_config(), run=RUN, command=["ldm"], folder=Path(folder))


@pytest.mark.parametrize("value", ["a b", "x#y", "--uid=0", "$(id)", "a\nb", ""])
@pytest.mark.parametrize("name", ["qos", "constraint"])
def test_a_word_that_sbatch_would_misread_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name}="):
        render_job(run_config(**{name: value}), run=RUN, command=["ldm"])


def test_a_setting_of_the_network_outside_of_the_list_is_refused() -> None:
    for name in ("LD_PRELOAD", "NCCL_NET_PLUGIN", "NCCL_DEBUG_FILE", "PATH", "nccl_debug"):
        with pytest.raises(ValueError, match=f"may not hold {name}; allowed: FI_"):
            ClusterConfig(nccl={name: "x"})


if __name__ == "__main__":
    sys.executable = PYTHON
    GOLDEN.mkdir(exist_ok=True)
    for case in cases():
        (GOLDEN / f"{case}.sbatch").write_text(rendered(case).removesuffix(BODY))
    print(os.fspath(GOLDEN))
