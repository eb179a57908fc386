"""How long a checkpoint makes the training wait: ours against a plain copy, torch.save, DeepSpeed and accelerate.

    python -m benchmarks.checkpoint                      # 20 million parameters: 320 MB with moments and EMA
    python -m benchmarks.checkpoint --millions 50 --rounds 10 --at-least 5

One process on the CPU. For ours the clock stands still while the thread writes, as a training would go on then; the
others return when they are done. `whole` lets it run: what a save costs from its beginning until it is published.
torch.save is given an fsync, without which a file may be lost with the power; DeepSpeed and accelerate do none, and
write no EMA (12 bytes a parameter where ours are 16).
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.harness import (
    HOST_CLOCK,
    MARKDOWN_HEADER,
    Comparison,
    Rounds,
    Side,
    compare,
    gate,
    markdown_row,
)
from pipeline.config import EmaConfig, EngineConfig, OptimizerConfig
from pipeline.publish import whole_file
from pipeline.training.averages.ema import Ema
from pipeline.training.engine import Engine
from pipeline.training.fragments import Fragments
from pipeline.training.saving.checkpoint import load_weights, newest_checkpoint
from pipeline.training.saving.plan import Plan
from pipeline.training.saving.retention import Retention
from pipeline.training.saving.save import Checkpoints
from pipeline.training.saving.state import RunState
from pipeline.training.world import end_world, start_world

REPOSITORY = Path(__file__).resolve().parents[1]
WIDTH = 1000


class StallClock:
    """The host's clock, which stands still where training would go on."""

    def __init__(self) -> None:
        self._away_seconds = 0.0

    def wall_seconds(self) -> float:
        """Return seconds of the host's clock without those spent in `away`."""
        return HOST_CLOCK.wall_seconds() - self._away_seconds

    def cpu_seconds(self) -> float:
        """Return the host's CPU seconds, the thread's included."""
        return HOST_CLOCK.cpu_seconds()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Leave the block out of the wall seconds."""
        began_seconds = HOST_CLOCK.wall_seconds()
        yield
        self._away_seconds += HOST_CLOCK.wall_seconds() - began_seconds


class Ours:
    """A state under DeepSpeed ZeRO-1 with its average, and the checkpoints of it."""

    def __init__(self, millions: int, folder: Path) -> None:
        world = start_world(0, 1, 0, "127.0.0.1", 0)
        optimizer = OptimizerConfig(warmup_steps=0)
        config = EngineConfig(global_batch=2, micro_batch=2, zero_stage=1, precision="fp32")
        self.engine = Engine(
            network_of(millions), engine=config, optimizer=optimizer, world=world, micro_batches=1
        )
        fragments = Fragments(self.engine, world)
        self.ema = Ema(fragments, EmaConfig())
        facts = {
            "attempt": "benchmark",
            "config": {},
            "data_digest": "",
            "data": {},
            "scheduler": {},
            "zero_stage": 1,
        }
        self.checkpoints = Checkpoints(
            folder,
            world=world,
            fragments=fragments,
            ema=self.ema,
            facts=facts | {"versions": {}},
            plan=Plan(Retention(2)),
        )
        self.checkpoints.resume()
        self.live = [
            tensor
            for fragment in fragments.owned
            for tensor in (fragment.master, fragment.exp_avg, fragment.exp_avg_sq)
        ] + list(self.ema.averages)
        self.folder, self._steps = folder, count(1)

    def begin(self) -> None:
        """Begin a save of a state whose steps were all skipped: the optimizer has not moved."""
        step = next(self._steps)
        self.checkpoints.begin(RunState(step=step, skipped=step))

    def whole(self) -> None:
        """Save and wait until it is published."""
        self.begin()
        self.checkpoints.settle()

    def stall(self, clock: StallClock) -> Callable[[], None]:
        """Return a save of which the clock sees what a step would wait for."""

        def save() -> None:
            self.begin()
            with clock.away():
                self.checkpoints.settle()

        return save


def network_of(millions: int) -> nn.Sequential:
    """Return a network of so many million parameters."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(millions)))


def torch_save(ours: Ours, folder: Path) -> Callable[[], None]:
    """Return a save of the same tensors by `torch.save`, forced to the disk."""

    def save() -> None:
        with open(folder / "state.pt", "wb") as stream:
            torch.save(dict(enumerate(ours.live)), stream)
            stream.flush()
            os.fsync(stream.fileno())

    return save


def accelerate_save(millions: int, folder: Path) -> Callable[[], None]:
    """Return accelerate's `save_state` of a network and its AdamW."""
    accelerator = Accelerator(cpu=True)
    network = network_of(millions)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network, optimizer = accelerator.prepare(network, optimizer)
    accelerator.backward(network(torch.ones(1, WIDTH)).sum())
    optimizer.step()
    return lambda: accelerator.save_state(str(folder), safe_serialization=True)


def same_state(ours: Ours) -> None:
    """Assert that what ours has published is the state."""
    saved = load_weights(newest_checkpoint(ours.folder), "ema")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(mean.numel() for mean in ours.ema.averages)
    for _, fragment, mean in ours.ema.held():
        assert torch.equal(mean, saved[fragment.name].view(-1)[fragment.start : fragment.stop])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparisons; write CSV, PNG and `checkpoint.md`, print the table.

    Raises: SystemExit with code 1 where `--at-least` does not hold.
    """
    options = _parser().parse_args(argv)
    clock, out_dir = StallClock(), options.out_dir.resolve()
    rounds = Rounds(measured=options.rounds, warmup=2, clock=clock)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folders = {name: Path(place, name) for name in ("ours", "torch", "deepspeed", "accelerate")}
        for folder in folders.values():
            folder.mkdir()
        ours = Ours(options.millions, folders["ours"])
        stall = Side("ours, stall", ours.stall(clock))
        tag = "state"
        peers = {
            "copy": Side("clone of the state", lambda: [tensor.clone() for tensor in ours.live]),
            "torch": Side("torch.save and fsync", torch_save(ours, folders["torch"])),
            "deepspeed": Side(
                "DeepSpeed save_checkpoint",
                lambda: ours.engine.network.save_checkpoint(str(folders["deepspeed"]), tag=tag),
            ),
            "accelerate": Side(
                "accelerate save_state", accelerate_save(options.millions, folders["accelerate"])
            ),
        }
        comparisons = [
            compare(stall, peer, name=f"checkpoint_stall_{name}", out_dir=out_dir, rounds=rounds)
            for name, peer in peers.items()
        ]
        same_state(ours)
        whole = Side("ours, until published", ours.whole)
        comparisons.append(
            compare(whole, peers["torch"], name="checkpoint_whole_torch", out_dir=out_dir, rounds=rounds)
        )
        ours.checkpoints.close()
    end_world()
    return _report(comparisons, out_dir, options.at_least)


def _report(comparisons: list[Comparison], out_dir: Path, at_least: float | None) -> int:
    table = "\n".join([MARKDOWN_HEADER, *map(markdown_row, comparisons)])
    with whole_file(out_dir / "checkpoint.md") as beside:
        beside.write_text(table + "\n")
    print(table)
    if at_least is not None:
        for comparison in comparisons[1:-1]:
            gate(comparison, at_least=at_least)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint", description="Time what a checkpoint makes the training wait."
    )
    parser.add_argument("--millions", type=int, default=20, help="parameters, in millions")
    parser.add_argument(
        "--rounds", type=int, default=10, help="measured rounds, one run of each side in each"
    )
    parser.add_argument("--folder", type=Path, help="where to write the checkpoints; default: the system's")
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument(
        "--at-least", type=float, help="fail unless every library's save takes at least so many of our stalls"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
