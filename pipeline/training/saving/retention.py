"""Which checkpoints stay: the last few and every so many steps; an old one goes only after a newer one is committed."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.publish import temporary_beside
from pipeline.training.saving.manifest import committed, step_of
from pipeline.training.saving.writer import explain_os_error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Keep the last `last` checkpoints, and for good those whose step is a multiple of `every_steps`."""

    last: int
    every_steps: int | None = None

    def surplus(self, steps: Sequence[int]) -> list[int]:
        """Return which of the steps, oldest first, go."""
        older = sorted(steps)[: -self.last]
        return [step for step in older if self.every_steps is None or step % self.every_steps]


def remove_old(newest: Path, retention: Retention) -> None:
    """Remove what is surplus up to `newest`, which was just committed; a failure is only said.

    Checkpoints after `newest` are another branch of the run and none of this one's business.
    """
    older = {step_of(path): path for path in committed(newest.parent) if step_of(path) <= step_of(newest)}
    for step in retention.surplus(list(older)):
        path = older[step]
        try:
            # One rename takes it out of sight: a half-removed checkpoint is never seen as one.
            trash = temporary_beside(path)
            os.replace(path, trash)
            shutil.rmtree(trash)
        except OSError as error:
            logger.warning("%s: not removed: %s", path, explain_os_error(error, path))
