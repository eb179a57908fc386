"""What the ranks do in the tests of warm starts: begin with weights that are there, freeze some, go on, stop, resume."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline.config import RunConfig
from pipeline.models.unet import UNet
from pipeline.training import train as train_module
from pipeline.training.averages.ema import Ema
from pipeline.training.engine import Engine
from pipeline.training.fragments import Fragments
from pipeline.training.frozen import frozen_weights
from pipeline.training.saving.checkpoint import load_weights
from pipeline.training.warm_start import warm_start
from pipeline.training.world import World
from tests.distributed.cases import make_config, paths_of


def warm_config(root: Path, name: str, **sections: Any) -> RunConfig:
    """Return the tiny run of `make_config` with these sections changed; `source` is relative to ROOT."""
    tree = json.loads(make_config(root, name).model_dump_json())
    for section, fields in sections.items():
        tree[section] = (tree[section] or {}) | fields
    if tree["warm_start"]:
        tree["warm_start"]["source"] = str(root / tree["warm_start"]["source"])
    tree["data"]["dataset"] = str(root / tree["data"]["dataset"])
    return RunConfig.model_validate_json(json.dumps(tree))


def train(world: World, root: Path, name: str, attempt: str = "a1", **sections: Any) -> dict[str, Any]:
    """Train one run and return where it ended."""
    config, paths = warm_config(root, name, **sections), paths_of(root, name)
    result = train_module.train(config, paths, world, attempt=attempt)
    return {"step": result.step, "samples": result.samples}


def begin(world: World, root: Path, name: str, kind: str, **sections: Any) -> dict[str, Any]:
    """Begin without a step; return what in this rank's shards is not the source's `kind` of weights."""
    config = warm_config(root, name, **sections)
    torch.manual_seed(9)
    network = UNet(config.model)
    engine = Engine(network, engine=config.engine, optimizer=config.optimizer, world=world, micro_batches=1)
    fragments = Fragments(engine, world)
    ema = Ema(fragments, config.ema)
    state = warm_start(config, fragments, ema, world, data_digest="another")
    assert config.warm_start is not None
    expected = load_weights(root / "source" / "checkpoints" / "step-00000004", kind)
    wrong = [
        piece.name
        for tensors in (
            [(piece, piece.master) for piece in fragments.resident],
            [(piece, average) for _, piece, average in ema.held()],
        )
        for piece, tensor in tensors
        if not torch.equal(tensor, expected[piece.name].view(-1)[piece.start : piece.stop])
    ]
    moments = sum(float(piece.exp_avg.abs().sum()) for piece in fragments.resident)
    reference = UNet(config.model).to(world.device)
    reference.load_state_dict(expected)
    inputs = (torch.ones(1, 4, 8, 8), torch.tensor([7]), torch.ones(1, 3, 32))
    with torch.no_grad():
        difference = float((engine(*inputs).float() - reference(*inputs)).abs().max())
    engine.close()
    answer = {"wrong": wrong, "moments": moments, "difference": difference, "adam": fragments.updates}
    return answer | {"step": state.step, "ema": ema.updates, "pieces": len(fragments.resident)}


def frozen_after(world: World, root: Path, name: str, step: int) -> dict[str, Any]:
    """Return how the weights of a run's checkpoint compare with the source's."""
    started = load_weights(root / "source" / "checkpoints" / "step-00000006", "ema")
    checkpoint = paths_of(root, name).checkpoints / f"step-{step:08d}"
    fixed, learnt = frozen_weights(checkpoint), load_weights(checkpoint, "raw")
    whole = learnt | fixed
    return {
        "fixed": sorted(fixed),
        "fixed_as_they_were": all(torch.equal(fixed[weight], started[weight]) for weight in fixed),
        "learnt_moved": all(
            not torch.equal(learnt[weight], started[weight]) for weight in learnt.keys() - fixed
        ),
        "whole": whole.keys() == started.keys(),
    }
