"""`torchrun` and `accelerate launch` on one machine start the same `ldm train` as we do ourselves: same files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.nodes import free_port
from pipeline.config_file import dump_config
from pipeline.training.saving.manifest import committed, read_manifest
from tests.distributed.cases import make_config, paths_of
from tests.distributed.dataset import build_dataset

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
TRAIN = ["-m", "launch.cli", "train"]


def launcher(name: str) -> list[str]:
    port = free_port(os.getpid())
    if name == "torchrun":
        words = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", *TRAIN]
    elif name == "accelerate":
        words = [
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes=2",
            "--num_machines=1",
            "--mixed_precision=no",
        ]
        words += ["--dynamo_backend=no", f"--main_process_port={port}", *TRAIN]
    else:
        words = TRAIN[1:]
    return [sys.executable, "-m", *words]


def test_other_launchers_train_the_same_run(tmp_path: Path) -> None:
    build_dataset(tmp_path / "latents", 30)
    files = {}
    for name in ("own", "torchrun", "accelerate"):
        config = tmp_path / f"{name}.yaml"
        train = {"steps": 2, "checkpoint_every": 2}
        config.write_text(
            dump_config(
                make_config(
                    tmp_path, name, train=train, engine={"processes": 2}, optimizer={"warmup_steps": 1}
                )
            )
        )
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT),
        }
        environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "OMP_NUM_THREADS": "1"}
        words = [*launcher(name), str(config)]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        assert done.stderr.count("preflight: 2 ranks in") == 1, name
        files[name] = read_manifest(committed(paths_of(tmp_path, name).checkpoints)[-1])["files"]
    assert files["torchrun"] == files["own"]
    assert files["accelerate"] == files["own"]
