"""Two processes take the steps that one takes: same losses, same gradients, one set of files."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.first_stage.autoencoder import train_autoencoder
from pipeline.first_stage.clip import train_clip
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from tests.pipeline.first_stage.tiny import FULL, drawn_pairs, tiny_config

# The discriminator plays from its fifth step on.
PLAYED = ("adversarial", "adaptive_weight", "discriminator_loss", "discriminator_grad_norm")
TERMS = ("l1", "gradient", "perceptual", "kl", *PLAYED)
TRAIN: dict[str, Callable[..., Path]] = {"autoencoder": train_autoencoder, "clip": train_clip}


def train_in_two_processes(kind: str, paths: RunPaths) -> None:
    """Run the tiny training in two processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "tests.pipeline.first_stage.tiny", kind, str(paths.root)]
    ranks = [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **launched,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["autoencoder", "clip"])
def test_two_processes_equal_one(kind: str, tmp_path: Path) -> None:
    one, two = RunPaths(tmp_path / "one"), RunPaths(tmp_path / "two")
    config = tiny_config(autoencoder=FULL)
    trained = TRAIN[kind](config, drawn_pairs(), one)
    train_in_two_processes(kind, two)
    expected, found = (read_records(paths.metrics, kind) for paths in (one, two))
    assert (
        [record["step"] for record in found] == [record["step"] for record in expected] == list(range(1, 13))
    )
    names = {"loss", "grad_norm", *(("logit_scale",) if kind == "clip" else TERMS)}
    for name in sorted(names):
        theirs, ours = (
            [record[name] for record in records if name in record] for records in (expected, found)
        )
        assert len(ours) == len(theirs) == (8 if name in PLAYED else 12), name
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5), name
        assert ours == pytest.approx(theirs, rel=2e-3), name
    for path in trained.glob("*.safetensors"):
        weights = load_file(two.root / trained.name / path.name)
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(weights[name], tensor, rtol=0.0, atol=2e-3, msg=name)
