"""What the ranks do in the tests of saving and resuming; each start of processes runs several of these in a row."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.models.unet import UNet
from pipeline.training.deepspeed_config import derive_deepspeed_config
from pipeline.training.engine import decay_groups, deepspeed
from pipeline.training.saving import checkpoint as checkpoint_module
from pipeline.training.saving import save as save_module
from pipeline.training.saving import writer as writer_module
from pipeline.training.saving.checkpoint import newest_checkpoint
from pipeline.training.saving.deepspeed_export import export_deepspeed
from pipeline.training.saving.fragment_file import read_whole
from pipeline.training.saving.manifest import committed, read_manifest
from pipeline.training.world import World, end_world
from tests.distributed import cases
from tests.distributed.cases import reshard, run
from tests.distributed.starter import meet

safe_get_full_fp32_param = deepspeed.utils.safe_get_full_fp32_param
safe_get_full_optimizer_state = deepspeed.utils.safe_get_full_optimizer_state

__all__ = ["reshard", "run"]
BYTES_PER_SECOND = 50e6
# Wide where the picture is one pixel: 40 million parameters that cost next to nothing to compute.
WIDE = {
    "block_out_channels": [16, 32, 64, 576],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
}


def run_slowly_written(world: World, root: Path, name: str, **sections: Any) -> Any:
    """Train while the first save is written at 50 MB/s; say how large each rank's file is."""
    plain, saves = save_module.write_stretches, {"count": 0}
    put = writer_module.put

    def slow(stream: Any, chunk: memoryview) -> None:
        put(stream, chunk)
        time.sleep(len(chunk) / BYTES_PER_SECOND)

    def write(path: Path, stretches: Any, *rest: Any) -> Any:
        saves["count"] += 1
        with pytest.MonkeyPatch.context() as patch:
            if saves["count"] == 1:
                patch.setattr(writer_module, "put", slow)
            return plain(path, stretches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "write_stretches", write)
        return cases.run(world, root, name, **sections) | {"saves": saves["count"]}


def run_with_other_eyes(world: World, root: Path, name: str, **sections: Any) -> Any:
    """Train while rank 1 sees an empty folder and has a clock that stands a million seconds back."""

    def blind(checkpoints: Path) -> list[Path]:
        return [] if world.rank == 1 else committed(checkpoints)

    plain = time.monotonic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "committed", blind)
        if world.rank == 1:
            patch.setattr(save_module.time, "monotonic", lambda: plain() - 1e6)
        return cases.run(world, root, name, **sections)


def export_universal(world: World, root: Path, name: str) -> str:
    """Export the newest checkpoint for DeepSpeed; nobody goes on before it is there."""
    paths = cases.paths_of(root, name)
    folder = export_deepspeed(paths) if world.is_first else paths.deepspeed
    world.maximum(0)
    return folder.name


def load_universal(world: World, root: Path, name: str, stage: int) -> dict[str, Any]:
    """Load the export into a plain DeepSpeed engine with other weights; return how far it is from our checkpoint."""
    paths = cases.paths_of(root, name)
    config = cases.make_config(root, name, engine={"zero_stage": stage})
    torch.manual_seed(99)
    network = UNet(config.model)
    groups = decay_groups(network, 0.01) if stage < 3 else [{"params": list(network.parameters())}]
    plain = derive_deepspeed_config(config.engine, config.optimizer, world.world_size, 2, on_gpus=False)
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=torch.optim.AdamW(groups, lr=1.0, fused=True),
        config=plain | {"checkpoint": {"load_universal": True}},
        dist_init_required=False,
    )
    _, client = engine.load_checkpoint(str(paths.deepspeed))
    checkpoint = newest_checkpoint(paths.checkpoints)
    manifest = read_manifest(checkpoint)
    files = [checkpoint / file for file in sorted(manifest["files"])]
    wrong = []
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        expected = read_whole(files, kind, manifest["parameters"])
        for weight_name, weight in engine.module.named_parameters():
            whole = (
                safe_get_full_fp32_param(weight)
                if kind == "master"
                else safe_get_full_optimizer_state(weight, kind)
            )
            if not torch.equal(whole.view(-1), expected[weight_name].view(-1)):
                wrong.append(f"{kind}/{weight_name}")
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    rates = {group["lr"] for group in engine.optimizer.param_groups}
    counted, samples = engine.global_steps, client["ldm"]["samples"]
    engine.destroy()
    return {
        "wrong": wrong,
        "steps": sorted(steps),
        "rates": sorted(rates),
        "global_steps": counted,
        "samples": samples,
    }


def run_as(root: str, name: str, attempt: str, **sections: Any) -> dict[str, Any]:
    """Be one attempt of a run: tell the pid, train, and return how it ended."""
    world = meet()
    Path(root, f"{attempt}-pid").write_text(str(os.getpid()))
    with _told(world):
        try:
            return cases.run(world, Path(root), name, attempt=attempt, **sections)
        except PipelineError as error:
            return {"error": type(error).__name__, "code": error.exit_code, "said": str(error)}


@contextmanager
def _told(world: World) -> Iterator[None]:
    try:
        yield
    finally:
        end_world()
