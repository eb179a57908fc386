"""One process of an evaluation: alone, or one rank among those that torchrun or srun has started."""

from collections.abc import Sequence
from typing import Any

import torch

from launch.nodes import Placement
from pipeline.config import RunConfig
from pipeline.evaluation.run import KINDS, evaluate_run
from pipeline.paths import RunPaths
from pipeline.training.world import end_world, start_world


def evaluate_here(
    paths: RunPaths, config: RunConfig, weights: Sequence[str] | None, placement: Placement
) -> dict[str, Any] | None:
    """Return the result of the evaluation on rank 0, None on the others.

    Raises:
        PipelineError: the same on all ranks, whichever could not go on.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(config.engine.threads)  # Sums over threads are part of the bits.
    if placement.source == "single":
        return evaluate_run(paths, config, weights or KINDS)
    world = start_world(
        placement.rank,
        placement.world_size,
        placement.local_rank,
        placement.master_address,
        placement.master_port,
        timeout_seconds=config.health.collective_seconds,
    )
    try:
        result = evaluate_run(paths, config, weights or KINDS, world)
    finally:
        end_world()
    return result if world.is_first else None
