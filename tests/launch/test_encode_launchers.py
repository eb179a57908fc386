"""`torchrun` and `accelerate launch` start the workers of `ldm encode`: each takes its part, the bytes are one worker's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.nodes import free_port
from pipeline.config_file import dump_config
from pipeline.paths import RunPaths
from preprocessing import work
from preprocessing.work import encode_dataset, processes_here
from tests.builders import tiny_autoencoder, tiny_clip, tiny_config
from tests.preprocessing.builders import three_shards
from tests.preprocessing.encode_process import contents

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2"]
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
"""With `--cpu` accelerate starts one process whatever it is told; this way as many, and needs no GPU to do so."""
PORT = {"torchrun": "--master-port", "accelerate": "--main_process_port"}


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "words"), [("torchrun", TORCHRUN), ("accelerate", ACCELERATE.split())])
def test_workers_of_other_launchers(tmp_path: Path, name: str, words: list[str]) -> None:
    models = {
        "autoencoder": str(tiny_autoencoder(tmp_path / "autoencoder")),
        "text_encoder": str(tiny_clip(tmp_path / "text_encoder", tmp_path / "clip")),
    }
    encode = {"source": str(three_shards(tmp_path / "in")), "image_size": 16, "batch": 4, "processes": 3}
    config = tiny_config(tmp_path, encode=encode | models)
    straight = tmp_path / "straight"
    encode_dataset(
        config,
        source=config.encode.source,
        out=straight,
        autoencoder=Path(models["autoencoder"]),
        text_encoder=Path(models["text_encoder"]),
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LDM_JSON": "1"}
    command = [
        sys.executable,
        "-m",
        *words,
        f"{PORT[name]}={free_port(os.getpid())}",
        "-m",
        "launch.cli",
        "encode",
        str(path),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(told) == 2, "two workers, though encode.processes says three: the launcher decides"
    assert sum(worker["encoded"] for worker in told) == 3
    assert contents(RunPaths(tmp_path / "tiny").latents) == contents(straight)


def test_each_process_of_a_machine_has_a_gpu_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with four: as many workers, the local number says which GPU; more workers share them in turn."""
    used: list[str] = []

    class SeenError(Exception):
        """Stops before a GPU is really needed."""

    def load(folder: Path, device: str, *rest: object, **named: object) -> None:
        used.append(device)
        raise SeenError

    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(work.FrozenAutoencoder, "load", load)
    config = tiny_config(tmp_path, encode={"source": str(three_shards(tmp_path / "in")), "image_size": 16})
    assert processes_here(config) == 4
    for local_worker in (0, 3, 5):
        with pytest.raises(SeenError):
            encode_dataset(
                config,
                source=config.encode.source,
                out=tmp_path / "out",
                autoencoder=tmp_path,
                text_encoder=tmp_path,
                worker=local_worker,
                workers=8,
                local_worker=local_worker,
            )
    assert used == chosen == ["cuda:0", "cuda:3", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert processes_here(config) == 1
