"""The collectives of `World` over real gloo processes, a rank that does not come, and a rank that fails."""

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.training.world import start_world
from tests.faults.outcome import ROOT
from tests.faults.ports import reserved_port
from tests.faults.ranks import run_ranks

pytestmark = pytest.mark.distributed


def exchange() -> dict[str, Any]:
    """Use every collective once on this rank; rank 2 is late for the last barrier."""
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    world = start_world(rank, world_size, rank, os.environ["MASTER_ADDR"], port, timeout_seconds=120)
    early = world.start_max(rank * 10)
    found: dict[str, Any] = {
        "broadcast": world.broadcast({"from": rank, "text": "ü" * (rank + 1)}),
        "gather": world.gather(list(range(rank))),
        "sum": world.sum([rank + 0.25, -rank]),
        "maximum": world.maximum(-rank),
        "early": early.wait(),
    }
    world.barrier(60)
    if rank == 2:
        time.sleep(4)
        return found
    try:
        world.barrier(1)
    except PipelineError as error:
        found["missing"] = str(error)
    return found


def test_three_ranks_agree_and_a_missing_one_is_named() -> None:
    results = run_ranks("tests.distributed.test_world:exchange", 3, {}, timeout_seconds=120)
    for found in results:
        assert found["broadcast"] == {"from": 0, "text": "ü"}
        assert found["gather"] == [[], [0], [0, 1]]
        assert found["sum"] == [3.75, -3.0]
        assert (found["maximum"], found["early"]) == (0, 20)
    assert "rank 0: waited 1 s for the others" in results[0]["missing"] and "2" in results[0]["missing"]


FAILING = """
import sys, torch.distributed as dist, torch
from pipeline.training.world import end_world, start_world
rank, port = int(sys.argv[1]), int(sys.argv[2])
world = start_world(rank, 2, rank, "127.0.0.1", port, timeout_seconds=600)
try:
    pending = world.start_max(rank)
    if rank == 1:
        raise ValueError("the data of rank 1 is damaged")
    dist.all_reduce(torch.ones(1))  # What gradients do: rank 1 will not come.
finally:
    end_world()
"""


def test_a_rank_that_fails_waits_for_nobody_and_lets_the_others_go() -> None:
    """With a time-out of ten minutes both are gone in seconds, and only rank 1 says why."""
    with reserved_port() as port:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", FAILING, str(rank), str(port)],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        try:
            said = [process.communicate(timeout=90)[1] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    assert [process.returncode for process in ranks] == [1, 1]
    assert "the data of rank 1 is damaged" in said[1] and "Connection closed" in said[0]
