"""The commit of one checkpoint, without torch: a temporary folder, a sealed manifest, a rename, a pointer for tools.

All that decides between the old state and the new is here, so that a sweep can kill it at every system call.
"""

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.publish import TEMPORARY_MARK, fsync_folder, temporary_beside, write_bytes, write_json
from pipeline.training.saving.fence import Fence
from pipeline.training.saving.manifest import MANIFEST_NAME, POINTER_NAME, seal, step_folder
from pipeline.training.saving.retention import Retention, remove_old
from pipeline.training.saving.writer import explain_os_error

logger = logging.getLogger(__name__)

HEADER_BYTES = 2**20
"""Room asked for beside the tensors: headers, the manifest, and a file system's own needs."""


@dataclass(frozen=True)
class Draft:
    """A checkpoint in the making: written in `beside`, published as `target`. All ranks derive the same names."""

    target: Path
    beside: Path

    @classmethod
    def of(cls, checkpoints: Path, step: int, token: str) -> "Draft":
        """Return the draft of `step`; `token` is new for each attempt and each save."""
        target = step_folder(checkpoints, step)
        return cls(target, target.with_name(f".{target.name}{TEMPORARY_MARK}{token}"))

    def open(self, need_bytes: int) -> None:
        """Make the temporary folder if `need_bytes` fit on the disk beside the older checkpoints.

        Raises:
            OSError: ENOSPC before anything is written, or whatever the system says.
        """
        free_bytes = shutil.disk_usage(self.target.parent).free
        if free_bytes < need_bytes:
            raise OSError(errno.ENOSPC, f"needs {need_bytes} bytes", str(self.target.parent))
        self.beside.mkdir(exist_ok=True)

    def commit(self, manifest: Mapping[str, Any], fence: Fence) -> None:
        """Seal the folder and give it its name; the rename is the commit. What fails before it leaves nothing behind.

        Raises:
            CheckpointError: a newer attempt has taken over.
            OSError: whatever the system says; published or not, what is there is whole.
        """
        try:
            write_json(self.beside / MANIFEST_NAME, seal(manifest))
            fsync_folder(self.beside)
            fence.refuse_stale(self.target)
            self._publish()
        except OSError:
            self.discard()
            # A newer attempt moves our folder away: that is why it is missing.
            fence.refuse_stale(self.target)
            raise
        except BaseException:
            self.discard()
            raise

    def _publish(self) -> None:
        folder = self.target.parent
        old = temporary_beside(self.target)
        if self.target.exists():  # An older one is valid then: this attempt has resumed from it.
            os.replace(self.target, old)
        try:
            os.replace(self.beside, self.target)
        except OSError:
            if old.exists():
                os.replace(old, self.target)
            raise
        fsync_folder(folder)
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the temporary folder; only when no rank writes to it any more."""
        shutil.rmtree(self.beside, ignore_errors=True)


def publish(draft: Draft, manifest: Mapping[str, Any], fence: Fence, retention: Retention) -> None:
    """Commit, name the newest in `latest` for tools (nothing of ours reads it), and remove what is surplus.

    What goes wrong after the commit costs a line in the log: the checkpoint is there.

    Raises:
        CheckpointError, OSError: as `Draft.commit`.
    """
    draft.commit(manifest, fence)
    newest = draft.target
    try:
        write_bytes(newest.parent / POINTER_NAME, f"{newest.name}\n".encode())
        if fence.held():
            remove_old(newest, retention)
    except OSError as error:
        said = explain_os_error(error, newest.parent)
        logger.warning("%s: saved, but the tidying up after it failed: %s", newest, said)


def refuse_failed(records: list[dict[str, Any]]) -> None:
    """Do nothing if every rank wrote its file.

    Raises:
        PipelineError: what the failing ranks said.
    """
    said = "; ".join(record["said"] for record in records if record["said"])
    if said:
        raise PipelineError(said)
