"""What the ranks do in the tests of averages: train with and without looking, swap, measure, paint, reshard."""

import hashlib
import shutil
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import RunConfig
from pipeline.paths import RunPaths
from pipeline.tracking import read_records
from pipeline.training import train as train_module
from pipeline.training.averages.swap import weights_of
from pipeline.training.engine import Engine
from pipeline.training.saving.checkpoint import load_weights, newest_checkpoint
from pipeline.training.world import World
from tests.builders import CAPTIONS, tiny_config

STEPS = 4
MODEL = {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "dropout": 0.1,
}
EMA = {
    "decay": 0.9,
    "more_decays": [0.5],
    "posthoc": {"sigma_rel": [0.05, 0.10], "snapshot_every": 2},
}
LOOKING = {
    "evaluate": {"every": 2, "timesteps": 2, "batch": 2},
    "sample": {"every": 2, "prompts": list(CAPTIONS[:5]), "steps": 2},
}
ALL_PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def make_config(root: Path, name: str, stage: int, **sections: Any) -> RunConfig:
    """Return the run `name` over the data and encoders of ROOT/tiny: 4 steps of 4 samples, each step saved."""
    folder = root / "tiny"
    tree: dict[str, Any] = {
        "encode": {"autoencoder": str(folder / "autoencoder"), "text_encoder": str(folder / "text_encoder")},
        "data": {"dataset": str(folder / "latents"), "threads": 1},
        "model": MODEL,
        "engine": {"zero_stage": stage},
        "ema": EMA,
        "train": {"steps": STEPS, "checkpoint_every": 1, "keep_last": 100, "log_every": 1},
    }
    for section, fields in sections.items():
        tree[section] = tree.get(section, {}) | fields
    return tiny_config(root, name=name, **tree)


def run(world: World, root: Path, name: str, stage: int, attempt: str = "a1", **sections: Any) -> int:
    """Train one run and return its last step."""
    config = make_config(root, name, stage, **sections)
    return train_module.train(config, RunPaths(root / name), world, attempt=attempt).step


def look(world: World, root: Path, name: str, origin: str, stage: int, **sections: Any) -> dict[str, Any]:
    """Load the newest checkpoint of `origin` at this world size and stage, and return what every test asks of it.

    Whether the averages arrived, what a swap put into the weights and took of memory, what was measured and painted,
    whether all of it left the state alone, and what an error within a swap did.
    """
    config, paths = make_config(root, name, stage, **LOOKING, **sections), RunPaths(root / name)
    _copy_checkpoints(world, RunPaths(root / origin), paths)
    with ExitStack() as opened, pytest.MonkeyPatch.context() as patch:
        part = train_module._assemble(config, paths, world, "a2", opened)
        whole = {kind: load_weights(newest_checkpoint(paths.checkpoints), kind) for kind in part.ema.kinds}
        arrived = _arrived(part, whole)
        before, generator = _state(part), torch.get_rng_state()
        swapped = _swap(part, whole["ema"])
        calls = _count_calls(patch)
        records = opened.enter_context(
            train_module._open_records(config, paths, world, "a2", part.state.step)
        )
        part.midway.evaluate(part.state, records)
        part.midway.paint(part.state, records)
        unmoved = _state(part) == before and torch.equal(torch.get_rng_state(), generator)
        grid = paths.samples / f"step-{part.state.step:08d}.png"
        found = read_records(paths.metrics, "train")[-1]
        return {
            "arrived": arrived,
            "swapped": swapped,
            "calls": calls["count"],
            "unmoved": unmoved,
            "losses": {key: value for key, value in found.items() if key.startswith("val_loss")},
            "grid": hashlib.sha256(grid.read_bytes()).hexdigest(),
            "pictures": len(list(grid.with_suffix("").iterdir())),
            "accident": _accident(part),
        }


def _arrived(part: Any, whole: dict[str, dict[str, Tensor]]) -> dict[str, bool]:
    equal = dict.fromkeys(part.ema.kinds, True)
    for kind, fragment, average in part.ema.held():
        equal[kind] &= torch.equal(average, _piece(whole[kind], fragment, torch.float32))
    return equal


def _swap(part: Any, average: dict[str, Tensor]) -> dict[str, Any]:
    fragments, meter = part.midway._fragments, _Meter()
    with meter, weights_of(fragments, part.ema, "ema"):
        fits = [
            torch.equal(weight, _piece(average, fragment, weight.dtype))
            for fragment in fragments.owned
            for weight in [_weight(part, fragment)]
        ]
    return {
        "weights_are_the_average": all(fits) and len(fits) > 0,
        "peak_bytes": meter.peak_bytes,
        "largest_fragment_bytes": 4 * max(fragment.master.numel() for fragment in fragments.owned),
        "full_bytes": 4 * fragments.total,
    }


def _accident(part: Any) -> list[Any]:
    """Fail within a swap as one rank alone would: nobody may be waited for, and what a rank owns must be its own again."""
    fragments = part.midway._fragments
    masters = [fragment.master.clone() for fragment in fragments.owned]
    try:
        with weights_of(fragments, part.ema, "ema"):
            raise RuntimeError("an accident")
    except RuntimeError as error:
        back = [torch.equal(piece.master, kept) for piece, kept in zip(fragments.owned, masters, strict=True)]
        return [str(error), all(back)]


def _copy_checkpoints(world: World, origin: RunPaths, paths: RunPaths) -> None:
    if world.is_first:
        shutil.copytree(origin.checkpoints, paths.checkpoints)
    world.maximum(0)  # Nobody goes on before the copy is there.


def _weight(part: Any, fragment: Any) -> Tensor:
    """Return this rank's piece of the low-precision weight that `fragment` is the master of."""
    weight: Any = dict(part.engine.network.module.named_parameters())[fragment.name]
    if part.engine.stage == 3:
        return weight.ds_tensor.detach().view(-1)[: fragment.master.numel()].clone()
    return weight.detach().view(-1)[fragment.start : fragment.stop].clone()


def _piece(whole: dict[str, Tensor], fragment: Any, dtype: torch.dtype) -> Tensor:
    return whole[fragment.name].view(-1)[fragment.start : fragment.stop].to(dtype)


def _state(part: Any) -> dict[str, str]:
    """Return digests of everything that training goes on from, as it lies on this rank."""
    tensors = {
        "masters": [fragment.master for fragment in part.midway._fragments.resident],
        "moments": [fragment.exp_avg for fragment in part.midway._fragments.resident],
        "averages": [average for _, _, average in part.ema.held()],
        "weights": [_weight(part, fragment) for fragment in part.midway._fragments.resident],
    }
    return {
        name: hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in several)).hexdigest()
        for name, several in tensors.items()
    }


def _count_calls(patch: pytest.MonkeyPatch) -> dict[str, int]:
    plain, counted = Engine.__call__, {"count": 0}

    def call(self: Engine, *inputs: Tensor) -> Tensor:
        counted["count"] += 1
        return plain(self, *inputs)

    patch.setattr(Engine, "__call__", call)
    return counted


class _Meter(TorchDispatchMode):
    """Adds up the bytes of float32 tensors made and not yet given back."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {part.untyped_storage().data_ptr() for part in args if isinstance(part, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                if tensor.untyped_storage().data_ptr() not in known:
                    size_bytes = tensor.untyped_storage().nbytes()
                    self.live_bytes += size_bytes
                    self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                    weakref.finalize(tensor, self._gone, size_bytes)
        return made

    def _gone(self, size_bytes: int) -> None:
        self.live_bytes -= size_bytes
