"""The fence: of two attempts at one run that live at once only the newer publishes.

The order makes it hold at every interleaving, without locks that a dead process would keep. The newer attempt
first writes its name, then moves every temporary folder out of its place by a rename. The older one looks at the
name before it renames its temporary folder: if it looks too early, the folder is gone when it renames.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.publish import TEMPORARY_MARK, temporary_beside, write_json

FENCE_NAME = "attempt.json"


@dataclass(frozen=True)
class Fence:
    """The claim of `attempt` to the checkpoints in `folder`."""

    folder: Path
    attempt: str

    def take(self) -> None:
        """Take over from every older attempt, and remove what it was writing; before anything is loaded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FENCE_NAME, {"attempt": self.attempt})
        # Renamed before it is emptied: a rename that the older attempt makes at this moment finds all of it or nothing.
        for left in sorted(self.folder.glob(".*")):
            if TEMPORARY_MARK in left.name:
                taken = temporary_beside(self.folder / "taken")
                os.replace(left, taken)
                shutil.rmtree(taken) if taken.is_dir() else taken.unlink()

    def held(self) -> bool:
        """Return whether no newer attempt has taken over; OSError passes through."""
        return self._holder() == self.attempt

    def refuse_stale(self, target: Path) -> None:
        """Do nothing while the fence is held.

        Raises:
            CheckpointError: a newer attempt has taken over this run.
        """
        holder = self._holder()
        if holder != self.attempt:
            raise CheckpointError(
                f"{target}: attempt {holder} has taken over this run; this one, {self.attempt}, publishes nothing "
                "and ends"
            )

    def _holder(self) -> object:
        return json.loads((self.folder / FENCE_NAME).read_text(encoding="utf-8"))["attempt"]


def fence_holder(folder: Path) -> str | None:
    """Return the newest attempt that has taken the checkpoints in `folder`, None if there was none."""
    try:
        return str(json.loads((folder / FENCE_NAME).read_text(encoding="utf-8"))["attempt"])
    except FileNotFoundError:
        return None
