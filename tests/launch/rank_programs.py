"""Programs that stand in for ranks: each notes its pid, waits until all have, then does what the test says."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A rank notes its pid, waits until all have, then does what the test says; HERE, RANK and SIZE are at hand.
PROLOGUE = """
import os, signal, sys, time
HERE, RANK, SIZE = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def meet(name):
    open(f"{HERE}/{name}-{RANK}.new", "w").write(str(os.getpid()))
    os.rename(f"{HERE}/{name}-{RANK}.new", f"{HERE}/{name}-{RANK}")
    while not all(os.path.exists(f"{HERE}/{name}-{rank}") for rank in range(SIZE)):
        time.sleep(0.01)
"""


def rank_command(body: str, folder: Path) -> list[str]:
    return [sys.executable, "-S", "-c", PROLOGUE + body, str(folder)]


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(folder: Path, name: str, count: int) -> list[int]:
    files = [folder / f"{name}-{number}" for number in range(count)]
    wait_until(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]
