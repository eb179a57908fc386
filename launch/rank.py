"""One rank of a training: from its place among the processes to the exit code."""

import atexit
import faulthandler
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from launch.nodes import Placement
from launch.preflight import preflight
from pipeline.config import RunConfig
from pipeline.errors import PipelineError, StoppedError
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import name_silent, read_heartbeats
from pipeline.training.stop import answer_with_stacks
from pipeline.training.train import TrainResult, train
from pipeline.training.world import end_world, start_world

ATTEMPT_VARIABLE = "LDM_ATTEMPT"
# What torch's gloo and NCCL say when another rank is gone or silent; they have no type of error for it.
LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL", "gloo")
SECONDS_AFTER_THE_CAUSE = 3.0
NO_MEMORY = ("can't allocate memory", "out of memory")


def train_rank(
    config: RunConfig, paths: RunPaths, placement: Placement, *, accept_data_change: bool = False
) -> TrainResult:
    """Train as the rank that `placement` names, to the last step.

    Raises:
        StoppedError: when the training was asked to stop and has saved its state.
        PipelineError: another rank is gone or silent, or this one is out of memory.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(config.engine.threads)
    if sys.__stderr__ is not None:
        faulthandler.enable(file=sys.__stderr__)  # Where a segfault or an abort happened.
    answer_with_stacks(paths.stacks(placement.rank))  # A supervisor may ask before the training has begun.
    with _explained(config, paths, placement.rank):
        world = start_world(
            placement.rank,
            placement.world_size,
            placement.local_rank,
            placement.master_address,
            placement.master_port,
            timeout_seconds=config.health.collective_seconds,
        )
        try:
            attempt = os.environ.get(ATTEMPT_VARIABLE) or uuid.uuid4().hex[:12]
            said = preflight(config, paths, world, attempt)
            if world.is_first and world.world_size > 1:
                print(said, file=sys.stderr, flush=True)
            result = train(config, paths, world, attempt=attempt, accept_data_change=accept_data_change)
        finally:
            end_world()
    if result.stopped:
        raise StoppedError(
            f"{paths.root}: stopped at step {result.step} with its state saved; run the same command to go on"
        )
    return result


@contextmanager
def _explained(config: RunConfig, paths: RunPaths, rank: int) -> Iterator[None]:
    """Turn what other ranks or the machine did to this one into one line; this rank's own mistakes pass through."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, MemoryError) or any(words in said for words in NO_MEMORY):
            raise PipelineError(
                f"rank {rank}: out of memory ({said or 'MemoryError'}); lower engine.micro_batch, now "
                f"{config.engine.micro_batch} (the global batch and the result stay as they are), or set "
                "engine.activation_checkpointing"
            ) from error
        if any(words in said for words in LOST_CONTACT):
            # At the interpreter's end torch's groups wait once more for ranks that do not come.
            atexit.register(os._exit, PipelineError.exit_code)
            time.sleep(
                SECONDS_AFTER_THE_CAUSE
            )  # Who is the cause ends first, and is whom the launcher names.
            silent = name_silent(read_heartbeats(paths), rank)
            raise PipelineError(f"rank {rank}: lost contact with the others ({said}); {silent}") from error
        raise
