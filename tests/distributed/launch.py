"""Start a function of the tests in several gloo processes and collect what each rank returned."""

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PR_SET_PDEATHSIG = 1


class Ranks:
    """Running processes, one a rank; `wait` returns what each function returned."""

    def __init__(self, target: str, world_size: int, arguments: dict[str, Any]) -> None:
        """Start `target` ("module:function") as `function(world, **arguments)` in `world_size` processes."""
        self.folder = Path(tempfile.mkdtemp(prefix="ldm-ranks-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LDM_QUIET": "1", "DS_ACCELERATOR": "cpu"}
        environment["TORCH_EXTENSIONS_DIR"] = str(self.folder / "extensions")
        self.processes = []
        for rank in range(world_size):
            order = [target, str(rank), str(world_size), str(port), str(self.folder), json.dumps(arguments)]
            with self._log(rank).open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.distributed.launch", *order],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def _log(self, rank: int) -> Path:
        return self.folder / f"log-{rank}.txt"

    def said(self, rank: int) -> str:
        """Return what the rank has written to stdout and stderr so far."""
        return self._log(rank).read_text(errors="replace")

    def wait(self, timeout_seconds: float) -> list[Any]:
        """Return the results by rank; a rank without one fails the test with what it wrote."""
        deadline_seconds = time.monotonic() + timeout_seconds
        while any(process.poll() is None for process in self.processes):
            if any(process.returncode for process in self.processes):
                deadline_seconds = min(deadline_seconds, time.monotonic() + 5.0)  # The others wait in vain.
            if time.monotonic() > deadline_seconds:
                self.kill()
            time.sleep(0.05)
        results = [self.folder / f"result-{rank}.json" for rank in range(len(self.processes))]
        assert all(path.exists() for path in results), self._endings()
        return [json.loads(path.read_text()) for path in results]

    def kill(self) -> None:
        """End what still runs, and only that."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def _endings(self) -> str:
        return "\n".join(
            f"--- rank {rank}, exit {process.returncode}\n{self.said(rank)[-6000:]}"
            for rank, process in enumerate(self.processes)
        )


def run_ranks(target: str, world_size: int, arguments: dict[str, Any], timeout_seconds: float) -> list[Any]:
    """Return what `target` returned on each rank (JSON data)."""
    return Ranks(target, world_size, arguments).wait(timeout_seconds)


def _main() -> None:
    target, rank, world_size, port, folder, arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    from pipeline.training.world import end_world, start_world

    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    gc.freeze()  # DeepSpeed collects garbage at every start of an engine: not through all of torch again.
    world = start_world(int(rank), int(world_size), int(rank), "127.0.0.1", int(port), timeout_seconds=120)
    result = function(world, **json.loads(arguments))
    Path(folder, f"result-{rank}.json").write_text(json.dumps(result))
    end_world()


if __name__ == "__main__":
    _main()
