"""What the ranks do in the distributed tests; each start of processes runs several of these in a row."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from pipeline.training import deepspeed_config
from pipeline.training import train as train_module
from pipeline.training.saving import save as save_module
from pipeline.training.saving.manifest import step_folder
from pipeline.training.saving.plan import Plan
from pipeline.training.saving.retention import Retention
from pipeline.training.saving.save import Checkpoints
from pipeline.training.world import World, end_world
from tests.distributed.starter import meet

STEPS = 6
TREE: dict[str, Any] = {
    "encode": {"source": "nowhere", "image_size": 16},
    "model": {
        "sample_size": 8,
        "block_out_channels": [16],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "data": {"dataset": "latents", "threads": 1},
    "engine": {"global_batch": 8, "micro_batch": 2, "precision": "fp32"},
    "optimizer": {"learning_rate": 2e-3, "warmup_steps": 4},
    "ema": {"decay": 0.9},
    "train": {"steps": STEPS, "log_every": 1, "checkpoint_every": 2, "keep_last": 100},
    "tracking": {"mlflow": "off"},
}


def make_config(root: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    """Return a tiny run over ROOT/latents, 6 steps of 8 samples, saved every second step and recorded at each."""
    tree = {**TREE, "name": name, "runs": str(root)}
    for section, fields in sections.items():
        tree[section] = TREE.get(section, {}) | fields
    tree["data"] = tree["data"] | {"dataset": str(root / tree["data"]["dataset"])}
    return RunConfig.model_validate_json(json.dumps(tree))


def paths_of(root: Path, name: str) -> RunPaths:
    """Return the folders of the run `name`."""
    return RunPaths(root / name)


def run(world: World, root: Path, name: str, attempt: str = "a1", **sections: Any) -> dict[str, Any]:
    """Train one run and return its end and every warning it logged."""
    config, said = make_config(root, name, **sections), _Said()
    logging.getLogger("pipeline").addHandler(said)
    try:
        result = train_module.train(config, paths_of(root, name), world, attempt=attempt)
    finally:
        logging.getLogger("pipeline").removeHandler(said)
    return asdict(result) | {"said": said.lines}


def run_killed(world: World, root: Path, name: str, at_step: int, **sections: Any) -> str:
    """Train until an accident inside step `at_step`, on all ranks at once: no save, no farewell."""

    class AccidentError(Exception):
        pass

    def accident(step: int) -> None:
        if step == at_step:
            raise AccidentError

    with _before_each_step(accident):
        try:
            run(world, root, name, **sections)
        except AccidentError:
            return "killed"
    return "ended"


def run_with_nan(world: World, root: Path, name: str, rank: int, at_steps: list[int], **sections: Any) -> Any:
    """Train while `rank` alone sees NaN losses at some steps."""
    plain = train_module.TrainStep._losses
    present = {"step": -1}

    def losses(self: Any, batch: Any) -> tuple[Tensor, Tensor]:
        loss_B, weight_B = plain(self, batch)
        poisoned = world.rank == rank and present["step"] in at_steps
        return (loss_B * float("nan") if poisoned else loss_B), weight_B

    with _before_each_step(lambda step: present.update(step=step)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TrainStep, "_losses", losses)
        return run(world, root, name, **sections)


def run_with_full_disk(world: World, root: Path, name: str, failures: list[int], **sections: Any) -> Any:
    """Train while the disk of rank 1 is full at some saves, counted from 0."""
    plain, count = save_module.write_stretches, {"saves": 0}

    def write(path: Path, stretches: Any, *rest: Any) -> Any:
        count["saves"] += 1
        if world.rank == 1 and count["saves"] - 1 in failures:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device", str(path))
        return plain(path, stretches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "write_stretches", write)
        return run(world, root, name, **sections)


def run_on_wrong_shards(world: World, root: Path, name: str) -> Any:
    """Train in a mode in which DeepSpeed's links from weights to shards are wrong, past the config's refusal."""
    hatch = {"zero_optimization": {"round_robin_gradients": True}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_config, "hatch_problems", lambda hatch: [])
        return run(world, root, name, engine={"zero_stage": 1, "deepspeed": hatch})


def shard_bytes(world: World, root: Path, name: str, **sections: Any) -> dict[str, int]:
    """Return the bytes of Adam's moments, masters and averages that this rank really holds."""
    config = make_config(root, name, **sections)
    with ExitStack() as opened:
        run = train_module._assemble(config, paths_of(root, name), world, "a1", opened)
        adam = [
            tensor
            for state in run.engine.adamw.state.values()
            for key, tensor in state.items()
            if key != "step"
        ]
        averages = run.ema.averages
        return {
            "adam": sum(tensor.numel() * tensor.element_size() for tensor in adam),
            "ema": sum(tensor.numel() * tensor.element_size() for tensor in averages),
        }


def reshard(world: World, root: Path, name: str, to: str, **sections: Any) -> dict[str, Any]:
    """Load the newest checkpoint of `name` with the settings given and save what arrived as run `to`."""
    config = make_config(root, name, **sections)
    with ExitStack() as opened:
        run = train_module._assemble(config, paths_of(root, name), world, "a2", opened)
        old = run.checkpoints
        fresh = Checkpoints(
            paths_of(root, to).checkpoints,
            world=world,
            fragments=old._fragments,
            ema=run.ema,
            facts=old._facts,
            plan=Plan(Retention(2)),
        )
        fresh.resume()
        fresh.save(run.state)
        # Raises unless every weight is its master rounded to the weight's type.
        old._fragments._check(list(run.engine.network.module.named_parameters()), world)
        return {"step": run.state.step, "updates": old._fragments.updates}


def flip_bit(world: World, root: Path, name: str, step: int, file: str) -> int:
    """Change one bit in the middle of a file of the checkpoint after `step`."""
    path = step_folder(paths_of(root, name).checkpoints, step) / file
    if world.is_first:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return int(world.sum([1.0])[0])  # Nobody goes on before the damage is done.


def run_until_signal(root: str, name: str, **sections: Any) -> dict[str, Any]:
    """Meet the other ranks, tell the pid, and train for longer than anyone waits."""
    world = meet()
    Path(root, f"{name}-pid-{world.rank}").write_text(str(os.getpid()))
    ended = run(world, Path(root), name, **sections)
    end_world()
    return ended


def run_with_stop_file(world: World, root: Path, name: str, **sections: Any) -> dict[str, Any]:
    """Train with the file that asks to stop in place from the start."""
    paths = paths_of(root, name)
    if world.is_first:
        paths.root.mkdir()
        paths.stop_file.touch()
    world.sum([1.0])  # The other ranks would make the run's folder themselves.
    return run(world, root, name, **sections) | {"file_left": paths.stop_file.exists()}


@contextmanager
def _before_each_step(action: Callable[[int], None]) -> Iterator[None]:
    """Run `action(step)` before the first forward pass of each step."""
    plain = train_module.TrainStep.accumulate

    def accumulate(self: Any, micro_batches: Any, step: int) -> Any:
        action(step)
        return plain(self, micro_batches, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TrainStep, "accumulate", accumulate)
        yield


class _Said(logging.Handler):
    """Keeps what the pipeline logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
