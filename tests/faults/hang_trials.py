"""`python -m tests.faults.hang_trials [COUNT]`: how often the judge names the right rank, and how fast.

Each trial is a world of three real ranks over gloo that step together; one of them, drawn at random, hangs in one of
five ways. The judge sees what a supervisor sees: the heartbeats, and the stacks that USR1 asks for.
"""

import ctypes
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from launch.nodes import free_port
from launch.supervisor.hang import Judge, collect_stacks, guilty_rank, stack_marks
from pipeline.config.health import HealthConfig
from pipeline.paths import RunPaths
from pipeline.training.health.heartbeat import Heartbeat, read_heartbeats
from pipeline.training.stop import Stop
from pipeline.training.world import start_world

WORLD_SIZE = 3
# Of a hundredth of a second each: not before a second heartbeat, since the first step may take start_seconds.
STEPS = (120, 160)
HEALTH = HealthConfig(hang_seconds=2.0, start_seconds=60.0)


def deadlock() -> None:
    """Wait in C for a lock that this thread has itself, under Python's lock; no signal wakes it."""
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def spin() -> None:
    while True:
        pass


def backtrack() -> None:
    """Exponential in C, under Python's lock."""
    re.match(r"(a+)+$", "a" * 60 + "b")


FAULTS: dict[str, Callable[[], object]] = {
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "asleep": lambda: time.sleep(600),
    "waits for a lock": lambda: threading.Semaphore(0).acquire(),
    "holds the GIL asleep": deadlock,
    "holds the GIL busy": backtrack,
    "spins": spin,
}


@dataclass(frozen=True)
class Trial:
    """Who hung and how, whom the judge named, and after how many seconds."""

    fault: str
    guilty: int
    named: int
    seconds: float
    how: str


def run_trials(count: int, seed: int) -> Iterator[Trial]:
    """Yield `count` trials; guilty rank, step and fault follow from `seed`, every fault and rank 0 among six of them."""
    draw = random.Random(seed)
    for number in range(count):
        fault = list(FAULTS)[number % len(FAULTS)]
        guilty = 0 if number % 4 == 0 else draw.randrange(WORLD_SIZE)
        with tempfile.TemporaryDirectory() as folder:
            yield _trial(RunPaths(Path(folder)), fault, guilty, draw.randrange(*STEPS))


def _trial(run: RunPaths, fault: str, guilty: int, at_step: int) -> Trial:
    port = free_port(os.getpid())
    pids = [_start(run, rank, port, (guilty, at_step, fault)) for rank in range(WORLD_SIZE)]
    try:
        judge, began = Judge(HEALTH, WORLD_SIZE), time.monotonic()
        while judge.look(read_heartbeats(run)) is None:
            assert time.monotonic() - began < 120, "nobody was found silent"
            time.sleep(0.1)
        silent_seconds = time.monotonic() - began
        marks = stack_marks(run, WORLD_SIZE)
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        stacks = collect_stacks(run, marks, wait_seconds=2.0)
        named, how = guilty_rank(judge.beats, stacks, WORLD_SIZE, range(WORLD_SIZE))
        return Trial(fault, guilty, named, silent_seconds, how)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _start(run: RunPaths, rank: int, port: int, plan: tuple[int, int, str]) -> int:
    """Fork a rank: this process has imported torch already and computed nothing."""
    pid = os.fork()
    if pid:
        return pid
    try:
        _rank(run, rank, port, plan)
    finally:
        os._exit(1)


def _rank(run: RunPaths, rank: int, port: int, plan: tuple[int, int, str]) -> None:
    guilty, at_step, fault = plan
    torch.set_num_threads(1)
    world = start_world(rank, WORLD_SIZE, rank, "127.0.0.1", port, timeout_seconds=100.0)
    gradients, step = torch.ones(1000), 0
    with Stop(world, stacks=run.stacks(rank)) as stop, Heartbeat(run, rank, hang_seconds=600.0) as heartbeat:
        heartbeat.enter("step")
        while not stop.agreed():
            heartbeat.beat(step)
            if (rank, step) == (guilty, at_step):
                FAULTS[fault]()
            time.sleep(0.01)
            world.add_up(gradients)
            step += 1


def main() -> None:
    trials = []
    for trial in run_trials(int(sys.argv[1]) if len(sys.argv) > 1 else 20, seed=0):
        trials.append(trial)
        line = (
            f"rank {trial.guilty} {trial.fault}: named {trial.named} after {trial.seconds:.1f} s; {trial.how}"
        )
        print(line, flush=True)
    right = sum(trial.guilty == trial.named for trial in trials)
    print(f"right in {right} of {len(trials)} trials")
    sys.exit(right != len(trials))


if __name__ == "__main__":
    main()
