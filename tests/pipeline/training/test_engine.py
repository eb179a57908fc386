"""The engine's own pure parts; steps against plain torch are in tests/distributed."""

import os
import subprocess
import sys

from torch import nn

from pipeline.training.engine import decay_groups


def test_kernels_decay_and_biases_and_norms_do_not() -> None:
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    network[2].weight.requires_grad_(False)
    decaying, other = decay_groups(network, 0.05)
    assert decaying == {"params": [network[0].weight], "weight_decay": 0.05}
    assert other["weight_decay"] == 0.0
    names = {id(weight): name for name, weight in network.named_parameters()}
    found = {names[id(weight)] for weight in other["params"]}  # type: ignore[attr-defined]
    assert found == {"0.bias", "1.weight", "1.bias", "2.bias"}


def test_extensions_have_a_private_folder_unless_the_user_names_one() -> None:
    # A stand-in for DeepSpeed saves seconds.
    code = (
        "import os, sys, types; sys.modules['deepspeed'] = sys.modules['deepspeed.ops'] = types.ModuleType('d'); "
        "sys.modules['deepspeed'].__version__ = '0'; "
        "import pipeline.training.engine; print(os.environ['TORCH_EXTENSIONS_DIR'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_EXTENSIONS_DIR"}

    def folder(**extra: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | extra, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()[-1]

    assert "/ldm/torch_extensions-" in folder(HOME="/nonexistent/home")
    assert folder(TORCH_EXTENSIONS_DIR="/mine") == "/mine"


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
