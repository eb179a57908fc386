"""`python -m tests.faults.rank_main FOLDER`: one rank that `tests/faults/ranks.py` has started.

Runs the function that `FOLDER/task.json` names with its arguments, and leaves `result-RANK.json`, or
`failure-RANK.json` with the moment of the failure, for the launcher to judge by.
"""

import ctypes
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pipeline.publish import whole_file

PR_SET_PDEATHSIG = 1


def main(folder: Path) -> int:
    """Return the exit code of this rank: 0, that of its SystemExit, or 1 for any other exception."""
    rank = os.environ["RANK"]
    task = json.loads((folder / "task.json").read_text())
    _die_with(task["launcher"])
    faulthandler.enable()  # SIGABRT from the launcher at its time-out shows where every thread stands.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        result = _called(task["function"], task["args"])
        _publish(folder / f"result-{rank}.json", {"result": result})
    except BaseException as error:
        _publish(
            folder / f"failure-{rank}.json", {"monotonic_seconds": time.monotonic(), "error": repr(error)}
        )
        traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        # No leave of the process group: the others' sockets close at once, and no barrier waits for the dead.
        os._exit(_exit_code(error))
    _leave_process_group()
    return 0


def _called(target: str, args: dict[str, Any]) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(**args)


def _die_with(launcher: int) -> None:
    """End this process when its launcher ends, however that happens; at once if it is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 1


def _leave_process_group() -> None:
    """Meet the other ranks once more and leave, so that none tears down what another still uses."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _publish(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content)
    with whole_file(path) as beside:
        beside.write_text(text)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
