"""The engine's own pure parts; steps against plain torch are in tests/distributed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.training.engine import (
    Engine,
    decay_groups,
    deepspeed,
    refuse_without_fp16,
    stale_locks,
)


def test_kernels_decay_and_biases_and_norms_do_not() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    network[2].weight.requires_grad_(False)
    decaying, other = decay_groups(network, 0.05)
    assert decaying == {"params": [network[0].weight], "weight_decay": 0.05}
    assert other["weight_decay"] == 0.0
    names = {id(weight): name for name, weight in network.named_parameters()}
    found = {names[id(weight)] for weight in other["params"]}  # type: ignore[attr-defined]
    assert found == {"0.bias", "1.weight", "1.bias", "2.bias"}


STAND_IN = """
import os, sys, types
for name in ("deepspeed", "deepspeed.ops", "deepspeed.runtime"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["deepspeed"].__version__ = "0"
sys.modules["deepspeed.runtime"].torch_autocast = None
from pathlib import Path
import pipeline.training.engine
folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
print(folder.exists())
if len(sys.argv) > 1:
    folder.mkdir()
    (folder / "lock").touch()
print(folder)
"""


def extensions(environment: dict[str, str], *arguments: str) -> tuple[str, Path]:
    """Import the engine in a process of its own, with a stand-in for DeepSpeed, which saves seconds."""
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    exists, folder = done.stdout.splitlines()
    return exists, Path(folder)


def test_every_process_has_its_own_folder_of_extensions_that_goes_with_it(tmp_path: Path) -> None:
    """No folder until something is built; a lock in it can hold nobody else up."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_EXTENSIONS_DIR"}
    environment["TMPDIR"] = str(tmp_path)
    first, second = extensions(environment), extensions(environment, "build")
    assert first[0] == second[0] == "False" and first[1] != second[1]
    assert {first[1].parent, second[1].parent} == {tmp_path}
    assert list(tmp_path.iterdir()) == []
    assert extensions(environment | {"TORCH_EXTENSIONS_DIR": "/mine"})[1] == Path("/mine")


def test_locks_of_killed_builds_are_named(tmp_path: Path) -> None:
    assert stale_locks(tmp_path / "none") == []
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    (line,) = stale_locks(tmp_path)
    assert str(lock) in line and "s old" in line and "remove the file" in line


def test_fp16_on_a_cpu_says_what_to_take_instead() -> None:
    with pytest.raises(ConfigError, match=r"engine\.precision: fp16 needs a GPU .* use bf16"):
        refuse_without_fp16("fp16", torch.device("cpu"))
    refuse_without_fp16("fp16", torch.device("cuda"))
    refuse_without_fp16("bf16", torch.device("cpu"))


class OverflowingNetwork:
    """What the engine sees of DeepSpeed at fp16: DeepSpeed's own scaler, and gradients that always overflow."""

    def __init__(self, scale: float) -> None:
        limits = {"init_scale": scale, "scale_window": 1000, "min_scale": 1}
        limits |= {"delayed_shift": 1, "consecutive_hysteresis": False}
        create = deepspeed.runtime.fp16.loss_scaler.CreateLossScaler
        self.scaler = create(torch.float16, 1, True, limits)

    def step(self) -> None:
        self.scaler.update_scale(True)

    def get_global_grad_norm(self) -> float:
        return float("inf")

    def was_step_applied(self) -> bool:
        return False


def test_skips_while_the_loss_scale_falls_are_told_from_those_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deepspeed.runtime.fp16.loss_scaler.dist, "get_rank", lambda: 0)  # Only to log.
    engine = Engine.__new__(Engine)
    network = OverflowingNetwork(4.0)
    network.scaler.raise_error_at_min_scale = False
    engine.network, engine._scaler = network, network.scaler
    engine.stage, engine.micro_batches, engine.adamw = 1, 1, torch.optim.AdamW([torch.zeros(1)])
    found = []
    for _ in range(4):
        engine._backwards = 1
        outcome = engine.step(1e-3)
        assert not outcome.applied
        found.append((outcome.loss_scale_search, network.scaler.cur_scale))
    assert found == [(True, 2.0), (True, 1.0), (False, 1.0), (False, 1.0)]


FIRST_IMPORT = """
import os, sys, importlib.abc
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "deepspeed":
            print("set" if "TORCH_EXTENSIONS_DIR" in os.environ else "NOT SET", flush=True)
sys.meta_path.insert(0, Watch())
import pipeline.training.train
"""


def test_whoever_comes_first_the_folder_is_set_before_deepspeed_is_imported_and_nothing_is_said() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_EXTENSIONS_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IMPORT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set\n"
