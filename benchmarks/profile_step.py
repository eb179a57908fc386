"""Where the time of the demo's training step goes, by torch's profiler: U-Net, optimizer, engine, collectives, the rest.

    python -m benchmarks.profile_step --at-most 0.03      # fails where the rest is more

The run of configs/demo.yaml on latents and texts of its shapes: its U-Net, batch, engine, precision and threads, our loader,
loss and average. The parts are ranges that are marked from outside, by wrapping what the loop calls: nothing in the
product knows of it. `engine` is what DeepSpeed does around the others; its hooks inside the backward pass stay in
`backward`. The rest is ours: loader, posterior, noise, loss, average, bookkeeping; average and data are told apart.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.conditions import conditions_now
from benchmarks.step import write_dataset
from pipeline.config import DataConfig, RunConfig
from pipeline.config_file import load_config
from pipeline.data.loader import LatentLoader
from pipeline.latents.reader import LatentDataset
from pipeline.models.unet import UNet
from pipeline.publish import write_json
from pipeline.training.averages.ema import Ema
from pipeline.training.engine import Engine
from pipeline.training.fragments import Fragments
from pipeline.training.saving.interval import Interval
from pipeline.training.step import TrainStep
from pipeline.training.stop import Stop
from pipeline.training.text import StoredText
from pipeline.training.world import World, end_world, start_world

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = (
    "step",
    "data",
    "engine_forward",
    "network",
    "engine_backward",
    "backward",
    "update",
    "adamw",
    "average",
    "collectives",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Profile the steps, print and write each part's share.

    Raises: SystemExit with code 1 where what is ours takes more than `--at-most`.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--at-most", type=float, help="largest share outside U-Net, optimizer, engine and collectives"
    )
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    options = parser.parse_args(argv)
    config = load_config(REPOSITORY / "configs" / "demo.yaml")
    assert config.engine.processes == 1, "the ranges are marked in this process"
    torch.set_num_threads(config.engine.threads)
    world = start_world(0, 1, 0, "127.0.0.1", 0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = shares(world, config, write_dataset(Path(folder), "demo"), options.steps)
    finally:
        end_world()
    write_json(options.out_dir / "profile_step.json", found)
    print(json.dumps(found, indent=2))
    rest = found["shares"]["rest"]
    if options.at_most is not None and rest > options.at_most:
        print(
            f"profile_step: {rest:.1%} of the step are ours, at most {options.at_most:.1%} wanted",
            file=sys.stderr,
        )
        return 1
    return 0


def shares(world: World, config: RunConfig, dataset: Path, steps: int) -> dict[str, Any]:
    """Return the file's content: seconds a step, and the share of each part in it."""
    network = UNet(config.model)
    _wrap(network, "forward", "network")
    engine = Engine(network, engine=config.engine, optimizer=config.optimizer, world=world, micro_batches=1)
    _wrap(engine.adamw, "step", "adamw")
    _wrap(engine.network, "forward", "engine_forward")
    _wrap(engine.network, "backward", "engine_backward")
    with closing(engine), closing(LatentDataset(dataset)) as reader:
        ema, stop = Ema(Fragments(engine, world), config.ema), Stop(world)
        train_step = TrainStep(
            config, world, engine, reader.spec, StoredText(reader, world.device, pooled=False)
        )
        _wrap(torch.Tensor, "backward", "backward")
        with _stream(reader, config) as stream, _collectives():
            interval = Interval(world.device)

            def step() -> None:
                with record_function("step"):
                    stop.agreed()
                    with record_function("data"):
                        batches = next(stream)
                    losses = train_step.accumulate(batches, 0)
                    with record_function("update"):
                        applied = engine.step(1e-4).applied
                    if applied:
                        with record_function("average"):
                            ema.update()
                    interval.add(losses.total, config.engine.global_batch)

            for _ in range(3):
                step()
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                for _ in range(steps):
                    step()
    return _report({one.key: one.cpu_time_total / 1e6 for one in profiled.key_averages()}, steps)


def _report(seconds: dict[str, float], steps: int) -> dict[str, Any]:
    named = {part: seconds.get(part, 0.0) / steps for part in PARTS}
    whole = named["step"]
    inside = named["network"] + named["backward"] + named["adamw"]
    engine = named["engine_forward"] + named["engine_backward"] + named["update"] - inside
    rest = whole - inside - engine - named["collectives"]
    parts = {
        "unet_forward": named["network"],
        "backward": named["backward"],
        "optimizer": named["adamw"],
        "engine": engine,
        "collectives": named["collectives"],
        "rest": rest,
        "of_rest_waiting_for_data": named["data"],
        "of_rest_average": named["average"],
    }
    conditions = conditions_now()
    kept = ("commit", "date", "cpu", "cores", "load_before", "torch", "deepspeed")
    return {
        "step_seconds": whole,
        "shares": {name: part / whole for name, part in parts.items()},
        "conditions": {name: conditions[name] for name in kept},
    }


def _wrap(owner: Any, name: str, label: str) -> None:
    """Mark every call of the method as a range of the profile; for the life of this process."""
    call = getattr(owner, name)

    def marked(*arguments: Any, **settings: Any) -> Any:
        with record_function(label):
            return call(*arguments, **settings)

    setattr(owner, name, marked)


@contextmanager
def _collectives() -> Iterator[None]:
    """Mark collectives; there are none between the ranges of one process, so what this finds is the stop flag's."""
    original: Callable[..., Any] = torch.distributed.all_reduce
    _wrap(torch.distributed, "all_reduce", "collectives")
    try:
        yield
    finally:
        torch.distributed.all_reduce = original


@contextmanager
def _stream(reader: LatentDataset, config: RunConfig) -> Iterator[Any]:
    loader = LatentLoader(
        reader,
        seed=0,
        engine=config.engine,
        objective=config.objective,
        data=DataConfig(verify="off"),
        rank=0,
        world_size=1,
    )
    with closing(loader.steps(0)) as stream:
        yield stream


if __name__ == "__main__":
    sys.exit(main())
