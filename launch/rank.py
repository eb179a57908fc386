"""One rank of a training: from its place among the processes to the exit code."""

import os
import uuid

import torch

from launch.nodes import Placement
from pipeline.config import RunConfig
from pipeline.errors import StoppedError
from pipeline.paths import RunPaths
from pipeline.training.train import train
from pipeline.training.world import end_world, start_world

ATTEMPT_VARIABLE = "LDM_ATTEMPT"
COLLECTIVE_TIMEOUT_SECONDS = 600.0


def train_rank(config: RunConfig, paths: RunPaths, placement: Placement) -> str:
    """Train as the rank that `placement` names; return the line to print, empty but on rank 0.

    Raises:
        StoppedError: when the training was asked to stop and has saved its state.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(config.engine.threads)
    world = start_world(
        placement.rank,
        placement.world_size,
        placement.local_rank,
        placement.master_address,
        placement.master_port,
        timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
    )
    try:
        result = train(
            config, paths, world, attempt=os.environ.get(ATTEMPT_VARIABLE) or uuid.uuid4().hex[:12]
        )
    finally:
        end_world()
    if result.stopped:
        raise StoppedError(
            f"{paths.root}: stopped at step {result.step} with its state saved; run the same command to go on"
        )
    if placement.rank:
        return ""
    return f"{paths.root}: step {result.step}, {result.samples} samples, loss {result.loss:.4f}"
