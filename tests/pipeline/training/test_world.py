"""A world of one: collectives answer at once, no port is opened. Two processes are in tests/distributed."""

import subprocess
import sys
import time

import pytest

from pipeline.errors import PipelineError
from pipeline.training.world import World, start_world


def test_without_a_group_every_collective_is_its_own_answer() -> None:
    world = World()
    assert world.is_first and world.world_size == 1
    assert world.broadcast({"a": [1, None]}) == {"a": [1, None]}
    assert world.gather("x") == ["x"]
    assert world.sum([1.5, 2.0]) == [1.5, 2.0]
    assert world.maximum(3) == 3 and world.start_max(2).wait() == 2
    world.barrier(0.1)


def test_nobody_to_meet_names_the_address_in_time() -> None:
    began_seconds = time.monotonic()
    with pytest.raises(PipelineError, match=r"rank 1 of 2: no meeting at 127\.0\.0\.1:9 within 1 s"):
        start_world(1, 2, 1, "127.0.0.1", 9, timeout_seconds=1)
    assert time.monotonic() - began_seconds < 30


ALONE = """
from pipeline.training.world import end_world, start_world
world = start_world(0, 1, 0, "nowhere.invalid", 1, timeout_seconds=5)
assert world.gather({"rank": world.rank}) == [{"rank": 0}] and world.broadcast([1]) == [1]
assert world.sum([2.0]) == [2.0] and world.maximum(4) == 4
world.barrier(1.0)
end_world()
end_world()
"""


def test_one_process_needs_no_address() -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True, timeout=60)
