"""The host's seconds in a step of our engine on the U-Net of Stable Diffusion 1.x, all 686 tensors of it, made narrow.

    python -m benchmarks.host_floor               # writes pipeline/plan/data/host.json, which `ldm plan` reads

A fortieth of its width and latents of 8 x 8 leave the device next to nothing to do: what is timed is dispatch, hooks,
optimizer and average on one thread, as CPU seconds, the least of the rounds. One process, so that no message is waited for.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.conditions import conditions_now
from pipeline.config import EmaConfig, EngineConfig, OptimizerConfig, UNetConfig
from pipeline.models.unet import UNet
from pipeline.publish import write_json
from pipeline.training.averages.ema import Ema
from pipeline.training.engine import Engine, decay_groups
from pipeline.training.fragments import Fragments
from pipeline.training.learning_rate import learning_rate
from pipeline.training.stop import Stop
from pipeline.training.world import World, end_world, start_world

REPOSITORY = Path(__file__).resolve().parents[1]
NARROW = UNetConfig(block_out_channels=(8, 16, 32, 32), cross_attention_dim=32, norm_num_groups=8)
ENGINES = (
    (0, "fp32"),
    (1, "fp32"),
    (1, "bf16"),
    (2, "fp32"),
    (2, "bf16"),
    (3, "bf16"),
)
OPTIMIZER = OptimizerConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Time the bare network, the plain loop and every engine, and write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_floor", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=12, help="steps that are timed, after three that are not"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "pipeline" / "plan" / "data" / "host.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    world = start_world(0, 1, 0, "127.0.0.1", 0)
    try:
        found = measure(world, options.rounds)
    finally:
        end_world()
    write_json(options.out, found)
    print(json.dumps(found, indent=2))
    return 0


def measure(world: World, rounds: int) -> dict[str, Any]:
    """Return the file's content: seconds of forward and backward, of the plain loop's step beyond, of each engine's."""
    network = _network()
    bare = _seconds(lambda: _forward_backward(network), rounds)
    adamw = torch.optim.AdamW(decay_groups(network, OPTIMIZER.weight_decay), fused=True)

    def plain() -> None:
        _forward_backward(network)
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.clip_grad_norm)
        adamw.step()
        adamw.zero_grad()

    engines = {"plain": _seconds(plain, rounds) - bare}
    for stage, precision in ENGINES:
        engines[f"{stage}/{precision}"] = _engine_seconds(world, stage, precision, rounds) - bare
    conditions = conditions_now()
    kept = ("date", "cpu", "cores", "load_before", "python", "torch", "deepspeed")
    return {
        "tensors": len(list(network.parameters())),
        "network_seconds": bare,
        "engine_seconds": engines,
        "conditions": {name: conditions[name] for name in kept},
    }


def _network() -> UNet:
    torch.manual_seed(0)
    return UNet(NARROW)


def _inputs() -> tuple[torch.Tensor, ...]:
    return torch.ones(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 77, 32)


def _forward_backward(network: UNet) -> None:
    network(*_inputs()).sum().backward()


def _engine_seconds(world: World, stage: int, precision: str, rounds: int) -> float:
    settings: dict[str, Any] = {"zero_stage": stage, "precision": precision}
    config = EngineConfig(global_batch=1, micro_batch=1, **settings)
    engine = Engine(_network(), engine=config, optimizer=OPTIMIZER, world=world, micro_batches=1)
    with closing(engine):
        ema, stop = Ema(Fragments(engine, world), EmaConfig()), Stop(world)

        def step() -> None:
            stop.agreed()
            engine.backward(engine(*_inputs()).sum())
            if engine.step(learning_rate(OPTIMIZER, 0, 1000)).applied:
                ema.update()

        return _seconds(step, rounds)


def _seconds(work: Callable[[], None], rounds: int) -> float:
    """Return the least CPU seconds of one call: other work on the machine only adds."""
    for _ in range(3):
        work()
    found = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


if __name__ == "__main__":
    sys.exit(main())
