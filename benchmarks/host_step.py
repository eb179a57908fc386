"""What a step costs the host: our engine with its EMA against stock ZeRO-1, DDP and a plain loop.

    python -m benchmarks.host_step                 # fp32, one process
    python -m benchmarks.host_step --at-most 3     # fail where ours takes over 3 times the plain loop

686 tensors, as many as the U-Net of Stable Diffusion 1.x has, of a few elements each: nothing but the host's work
is left. On a GPU it shows as the floor under a step's time. One process: what travels is not measured either. At
A stands what ours (B) is compared with, so the ratio says how many of its steps one of ours takes.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import MARKDOWN_HEADER, Comparison, Rounds, Side, compare, gate, markdown_row
from pipeline.config import EmaConfig, EngineConfig, OptimizerConfig
from pipeline.publish import whole_file
from pipeline.training.averages.ema import Ema
from pipeline.training.engine import Engine, decay_groups, deepspeed, meet_deepspeed
from pipeline.training.fragments import Fragments
from pipeline.training.learning_rate import learning_rate
from pipeline.training.stop import Stop
from pipeline.training.world import World, end_world, start_world

REPOSITORY = Path(__file__).resolve().parents[1]
TENSORS = 686
OPTIMIZER = OptimizerConfig()
STOCK = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": OPTIMIZER.clip_grad_norm,
    "zero_optimization": {"stage": 1},
}
OURS: dict[str, dict[str, Any]] = {
    "ours ZeRO-0": {"zero_stage": 0},
    "ours ZeRO-1": {"zero_stage": 1},
    "ours ZeRO-2": {"zero_stage": 2},
    "ours ZeRO-3": {"zero_stage": 3},
    "ours ZeRO-1 during backward": {"zero_stage": 1, "reduction": "during_backward"},
    "ours bf16 ZeRO-1": {"zero_stage": 1, "precision": "bf16"},
    "ours bf16 ZeRO-2": {"zero_stage": 2, "precision": "bf16"},
}
Step = Callable[[], object]


class ManyTensors(nn.Module):
    """343 linear layers of two features one after the other, each with a bias."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(TENSORS // 2))

    def forward(self, latents_BC: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Return latents of the same shape."""
        for layer in self.layers:
            latents_BC = layer(latents_BC)
        return latents_BC


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and text that no one looks at closely."""
    return torch.ones(1, 2), torch.zeros(1), torch.zeros(1, 1, 1)


def new_network() -> ManyTensors:
    """Return the network with the same weights at every call."""
    torch.manual_seed(0)
    return ManyTensors()


@contextmanager
def plain(distributed: bool) -> Iterator[Step]:
    """Give the step of a training loop as torch's manual has it, under DDP or not."""
    network: nn.Module = new_network()
    adamw = torch.optim.AdamW(decay_groups(network, OPTIMIZER.weight_decay), fused=True)
    if distributed:
        network = DistributedDataParallel(network)

    def step() -> None:
        network(*inputs()).sum().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.clip_grad_norm)
        adamw.step()
        adamw.zero_grad()

    yield step


@contextmanager
def stock_zero() -> Iterator[Step]:
    """Give the step of DeepSpeed's ZeRO-1 as its manual has it, with torch's fused AdamW."""
    network = new_network()
    adamw = torch.optim.AdamW(decay_groups(network, OPTIMIZER.weight_decay), fused=True)
    engine = deepspeed.initialize(model=network, optimizer=adamw, config=STOCK, dist_init_required=False)[0]

    def step() -> None:
        engine.backward(engine(*inputs()).sum())
        engine.step()

    yield step
    engine.destroy()


@contextmanager
def ours(world: World, settings: Mapping[str, Any]) -> Iterator[Step]:
    """Give the step of `pipeline.training.train` without data and loss: stop flag, engine, rate, average."""
    config = EngineConfig(global_batch=1, micro_batch=1, **({"precision": "fp32"} | dict(settings)))
    engine = Engine(new_network(), engine=config, optimizer=OPTIMIZER, world=world, micro_batches=1)
    with closing(engine):
        ema, stop = Ema(Fragments(engine, world), EmaConfig()), Stop(world)

        def step() -> None:
            stop.agreed()
            engine.backward(engine(*inputs()).sum())
            if engine.step(learning_rate(OPTIMIZER, 0, 1000)).applied:
                ema.update()

        yield step


def main(argv: Sequence[str] | None = None) -> int:
    """Run all comparisons; write CSV, PNG and `host_step.md`, print the table.

    Raises: SystemExit with code 1 where `--at-most` does not hold for ZeRO-1 against the plain loop.
    """
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    world = start_world(0, 1, 0, "127.0.0.1", 0)
    meet_deepspeed(world)
    rounds = Rounds(measured=options.rounds, warmup=options.warmup)
    found: dict[str, Comparison] = {}
    try:
        for name, a, b in _pairs(world):
            with ExitStack() as opened:
                sides = [Side(label, opened.enter_context(opening())) for label, opening in (a, b)]
                found[name] = compare(
                    *sides, name=f"host_step_{name}", out_dir=options.out_dir, rounds=rounds
                )
                print(markdown_row(found[name]), flush=True)
    finally:
        end_world()
    table = "\n".join([MARKDOWN_HEADER, *map(markdown_row, found.values())])
    with whole_file(options.out_dir / "host_step.md") as beside:
        beside.write_text(table + "\n")
    if options.at_most is not None:
        gate(found["zero_1"], at_most=options.at_most)
    return 0


Opening = tuple[str, Callable[[], Any]]


def _pairs(world: World) -> Iterator[tuple[str, Opening, Opening]]:
    """Yield the name of each comparison with its two sides; the plain loop is the measure of all."""
    loop: Opening = ("plain loop", lambda: plain(False))
    yield "ddp", loop, ("DDP", lambda: plain(True))
    yield "stock", loop, ("stock ZeRO-1", stock_zero)
    for label, settings in OURS.items():
        name = label.removeprefix("ours ").lower().replace("-", "_").replace(" ", "_")
        yield name, loop, (label, lambda settings=settings: ours(world, settings))  # type: ignore[misc]
    stock: Opening = ("stock ZeRO-1", stock_zero)
    for name, label in (
        ("stock_against_ours", "ours ZeRO-1"),
        ("stock_against_during_backward", "ours ZeRO-1 during backward"),
    ):
        yield name, stock, (label, lambda label=label: ours(world, OURS[label]))  # type: ignore[misc]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_step", description="Time the host's work of a step at 686 tensors."
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="measured rounds, one step of each side in each"
    )
    parser.add_argument("--warmup", type=int, default=3, help="untimed rounds before")
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument(
        "--at-most", type=float, help="fail where the interval of the ratio reaches above this"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
