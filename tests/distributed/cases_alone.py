"""What one process does in the tests of an engine that has nobody to share with."""

from pathlib import Path
from typing import Any

from pipeline.training.world import World
from tests.distributed.cases_engine import small_engine, take_step

STEPS = 4


def train(world: World, root: Path, reduced: bool, **settings: Any) -> dict[str, Any]:
    """Take a few steps, with DeepSpeed's reduction over the one rank put back if `reduced`; count the reductions."""
    with small_engine(world, settings) as (engine, fragments):
        network, reductions = engine.network, []
        network.enable_backward_allreduce |= reduced
        plain = network.allreduce_gradients
        network.allreduce_gradients = lambda *given, **named: (reductions.append(1), plain(*given, **named))
        losses = [float(take_step(world, engine, step)[0]) for step in range(STEPS)]
        weights = [fragment.master.tolist() for fragment in fragments.owned]
    return {"losses": losses, "weights": weights, "reductions": len(reductions)}
