"""What every test with real gloo processes begins with: one start for many cases, since a start costs seconds."""

import gc
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.training.world import World, end_world, start_world
from tests.faults.ranks import run_ranks

Orders = Mapping[str, tuple[str, dict[str, Any]]]
"""Name of the case -> (function of the module, its arguments)."""


def start(
    module: str, root: Path, world_size: int, orders: Orders, timeout_seconds: float = 280
) -> dict[str, list[Any]]:
    """Run the cases of `module` in order in so many processes; return what each rank said of each.

    A case is `function(world, root, **arguments)`; an error of ours is a result too: {"error", "code", "said"}.
    """
    listed = [[function, arguments] for function, arguments in orders.values()]
    arguments = {"module": module, "root": str(root), "orders": listed}
    quiet = {"LDM_QUIET": "1"}
    outcome = run_ranks("tests.distributed.starter:run_all", world_size, arguments, timeout_seconds, quiet)
    return {case: [answers[number] for answers in outcome] for number, case in enumerate(orders)}


def run_all(module: str, root: str, orders: Sequence[Sequence[Any]]) -> list[Any]:
    """Meet the other ranks and run the cases [function name, arguments] of `module`."""
    cases, world = importlib.import_module(module), meet()
    gc.freeze()  # DeepSpeed collects garbage at every start of an engine: not through all of torch again.
    results: list[Any] = []
    for name, arguments in orders:
        try:
            results.append(getattr(cases, name)(world, Path(root), **arguments))
        except PipelineError as error:
            results.append({"error": type(error).__name__, "code": error.exit_code, "said": str(error)})
    end_world()
    return results


def meet() -> World:
    """Return the world that the launcher's environment names."""
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return start_world(rank, world_size, rank, os.environ["MASTER_ADDR"], port, timeout_seconds=300)
