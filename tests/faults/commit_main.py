"""`python -m tests.faults.commit_main FOLDER STEP`: one save of a small state by the checkpoint's room alone, without torch.

The same calls in the same order as a rank's writer thread makes them: fence, room on the disk, file, seal, rename,
pointer, retention. It prints "saved" or what went wrong; a sweep kills it at each of its system calls.
"""

import sys
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.training.saving.commit import Draft, publish
from pipeline.training.saving.fence import Fence
from pipeline.training.saving.manifest import MANIFEST_FIELDS, rank_file
from pipeline.training.saving.retention import Retention
from pipeline.training.saving.writer import explain_os_error, write_file

ELEMENTS = 3000
KEEP = Retention(last=2)


def payload(step: int) -> bytes:
    """Return the bytes of the state after `step` steps."""
    return bytes((step * 7 + place) % 251 for place in range(4 * ELEMENTS))


def save(folder: Path, step: int, attempt: str = "a1") -> None:
    """Save the state after `step` steps as the one rank of `attempt`."""
    fence, draft = Fence(folder, attempt), Draft.of(folder, step, f"{attempt}-{step}")
    fence.refuse_stale(draft.target)
    try:
        draft.open(8 * ELEMENTS)
        record = write_file(draft.beside / rank_file(0), {"master/w/0": memoryview(payload(step))})
        publish(draft, manifest(step, record), fence, KEEP)
    except BaseException:
        draft.discard()
        fence.refuse_stale(draft.target)
        raise


def manifest(step: int, record: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with every field there must be."""
    plain: dict[str, Any] = dict.fromkeys(MANIFEST_FIELDS - {"format", "digest"})
    return {**plain, "step": step, "files": {rank_file(0): record}, "parameters": {"w": [ELEMENTS]}}


if __name__ == "__main__":
    assert "torch" not in sys.modules
    try:
        save(Path(sys.argv[1]), int(sys.argv[2]))
    except OSError as error:
        print(explain_os_error(error, Path(sys.argv[1])))
        sys.exit(1)
    except PipelineError as error:
        print(error)
        sys.exit(error.exit_code)
    print("saved")
