"""What the ranks do in the tests of the launcher: each function runs in a process of its own."""

import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

# Ends one thread, where `_exit` ends the process.
SYS_EXIT = {"x86_64": 60, "aarch64": 93}
RANK = int(os.environ.get("RANK", "-1"))


def told(word: str, numbers: list[float]) -> dict[str, Any]:
    """Return the rank's own view of the job, its arguments and what is set for its libraries."""
    names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    seen = {
        name: os.environ.get(name) for name in (*names, "TORCH_EXTENSIONS_DIR", "SLURM_PROCID", "LDM_ADDED")
    }
    time.sleep(0.1 * (2 - RANK))  # The last rank ends first.
    return {"rank": RANK, "word": word, "numbers": numbers, "cwd": os.getcwd(), **seen}


def all_reduced(value: float) -> dict[str, Any]:
    """Return the sum over all gloo ranks of value * (rank + 1)."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    total = torch.tensor([value * (RANK + 1)])
    distributed.all_reduce(total)
    return {"sum": total.item(), "backend": distributed.get_backend(), "threads": torch.get_num_threads()}


def gloo_rank_killed(victim: int) -> None:
    """Kill one rank while the others wait for it in a collective."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo")
    distributed.barrier()
    if victim == RANK:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.all_reduce(torch.ones(1))


def one_raises(rank: int, others_seconds: float) -> str:
    """Raise on one rank; the others go on for a while, or fail in its wake."""
    if rank == RANK:
        raise ValueError(f"latents of shard 00007 hold NaN on rank {RANK}")
    time.sleep(others_seconds)
    return "done"


def both_raise(folder: str) -> NoReturn:
    """Raise on rank 1, and then on rank 0, which is out long before rank 1 has ended."""
    flag = Path(folder, "rank-1-failed")
    if RANK == 1:
        import atexit

        atexit.register(time.sleep, 1)
        _leave_flag_as_the_error_is_shown(flag)
        raise ValueError("the cause")
    while not flag.exists():
        time.sleep(0.01)
    raise ConnectionError("the consequence")


def _leave_flag_as_the_error_is_shown(flag: Path) -> None:
    """Make the showing of the traceback slow: it sets the flag, then dawdles."""
    import traceback

    shown = traceback.print_exc

    def slow_print_exc() -> None:
        flag.touch()
        time.sleep(0.5)
        shown()

    traceback.print_exc = slow_print_exc  # type: ignore[assignment]


def dies_slowly() -> NoReturn:
    """End rank 1 thread by thread, the main one first; rank 0 fails in between."""
    if RANK == 1:
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        ctypes.CDLL(None).syscall(SYS_EXIT[platform.machine()], 0)
    time.sleep(0.5)
    raise ConnectionError("the consequence")


def leaves(how: str) -> str:
    """Leave rank 1 in a way of its own, the others with a result."""
    if RANK == 1:
        if how == "without_result":
            os._exit(0)
        if how == "system_exit":
            raise SystemExit(75)
        if how == "segfault":
            while not Path(sys.argv[1], "result-0.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "after_result":
            import atexit

            atexit.register(os._exit, 9)
    return "done"


def hangs(ranks: list[int], folder: str) -> str:
    """Hang on some ranks, each with a child of its own whose pid is left in `folder`."""
    Path(folder, f"{RANK}-{os.getpid()}").touch()
    if RANK in ranks:
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"])
        Path(folder, f"child-{child.pid}").touch()
        wait_for_a_shard_that_never_comes()
    return "done"


def wait_for_a_shard_that_never_comes() -> None:
    """The frame that a stack dump must show."""
    while True:
        time.sleep(0.05)


def not_json() -> object:
    """Return what JSON cannot hold."""
    return object()
