"""`python -m tests.faults.training_main FAULT CONFIG [OVERRIDE...]`: `ldm train` as one rank that a fault befalls.

The fault is planted in this process, at a place that is the same every time, and is a real one: a real signal to
itself, a real segfault, real memory exhausted.
"""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.cli import main
from pipeline.training import train as train_module
from pipeline.training.saving import resume as resume_module
from pipeline.training.saving import save as save_module

RANK = int(os.environ.get("RANK", "0"))
STEP = 3


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raise_error() -> None:
    raise ValueError("latents of shard 00007 are not what they were")


def exhaust_memory() -> None:
    """Take memory until there is none, under a limit a little above what is used."""
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + 2**26, resource.RLIM_INFINITY))
    bytearray(2**34)


def read_null() -> None:
    ctypes.string_at(0)


def interrupt_self() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_again() -> None:
    """The second Ctrl-C, in the middle of the save that the first one asked for."""
    interrupt_self()
    time.sleep(30)


# Name: (ranks, place, what happens)
FAULTS: dict[str, list[tuple[tuple[int, ...], str, Callable[[], None]]]] = {
    "none": [],
    "kill-1-in-step": [((1,), "step", kill_self)],
    "kill-0-in-save": [((0,), "save", kill_self)],
    "kill-all-in-load": [((0, 1), "load", kill_self)],
    "stop-1": [((1,), "step", stop_self)],
    "raise-1": [((1,), "step", raise_error)],
    "memory-1": [((1,), "step", exhaust_memory)],
    "segfault-1": [((1,), "step", read_null)],
    "interrupt-twice": [((0,), "step", interrupt_self), ((0,), "save", interrupt_again)],
}


def plant(place: str, action: Callable[[], None]) -> None:
    """Let `action` happen once: in step 3, in the writing of a checkpoint after it, or in the loading of one."""
    owner: Any = {"step": train_module.TrainStep, "save": save_module, "load": resume_module}[place]
    name = {"step": "accumulate", "save": "write_stretches", "load": "load_stretches"}[place]
    plain = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        result = plain(*arguments, **named)
        if place != "step" or arguments[-1] == STEP:
            action()
        return result

    setattr(owner, name, call)


if __name__ == "__main__":
    for ranks, place, action in FAULTS[sys.argv[1]]:
        if RANK in ranks:
            plant(place, action)
    main(["train", *sys.argv[2:]])
