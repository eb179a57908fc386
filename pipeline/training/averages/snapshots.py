"""Snapshots of the power-function averages, kept for good: what `ldm ema` makes an average of any length of.

`averages/step-XXXXXXXX/` is a sealed folder like a checkpoint's, with one file a rank that holds those averages
alone: fp32, 4 bytes a parameter and width. It is published by a rename, survives resharding, and no retention
removes it. A resumed run that comes by the same step again replaces it, at the same world size with equal bytes.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, PipelineError
from pipeline.publish import remove_temporaries
from pipeline.training.averages.ema import POSTHOC, Ema
from pipeline.training.fragments import Fragments
from pipeline.training.saving.checkpoint import on_first_rank
from pipeline.training.saving.commit import HEADER_BYTES, Draft, refuse_failed
from pipeline.training.saving.fence import Fence
from pipeline.training.saving.fragment_file import Stretch, write_stretches
from pipeline.training.saving.manifest import committed, damaged_files, rank_file, read_manifest, step_of
from pipeline.training.saving.writer import explain_os_error
from pipeline.training.world import World

logger = logging.getLogger(__name__)

FIELDS = frozenset(
    "step samples updates averaged kinds world_size attempt config data_digest parameters files format digest".split()
)


class Snapshots:
    """The snapshots of one attempt at a run."""

    def __init__(
        self,
        folder: Path,
        *,
        world: World,
        fragments: Fragments,
        ema: Ema,
        facts: Mapping[str, Any],
        fence: Fence,
    ) -> None:
        """Prepare to write to `folder`; `facts` are those of the checkpoints, `fence` is theirs."""
        self._folder, self._world, self._fragments, self._ema = folder, world, fragments, ema
        self._facts, self._fence = dict(facts), fence
        self._kinds = [kind for kind in ema.kinds if kind.startswith(POSTHOC)]

    def save(self, step: int, samples: int) -> bool:
        """Write a snapshot after `step` finished steps, all ranks together; return whether it was published.

        A full disk costs this snapshot and is said aloud; the training goes on.

        Raises:
            CheckpointError: a newer attempt has taken over this run.
        """
        if not (self._kinds and self._ema.averaged):
            return False  # Before the first applied step there is no average.
        began = time.monotonic()
        draft = Draft.of(self._folder, step, f"{self._facts['attempt']}-{step}")
        try:
            on_first_rank(self._world, lambda: self._open(draft))
            record = self._write(draft.beside / rank_file(self._world.rank))
            records = self._world.gather(record)
            on_first_rank(self._world, lambda: self._commit(draft, step, samples, records))
        except CheckpointError:
            raise
        except PipelineError as error:
            if self._world.is_first:
                logger.error("%s: no snapshot: %s; training goes on without it", draft.target, error)
            return False
        if self._world.is_first:
            logger.info("kept %s in %.1f s", draft.target, time.monotonic() - began)
        return True

    def _open(self, draft: Draft) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self._folder)  # The fence is held by us: whoever wrote there writes in vain.
        draft.open(4 * len(self._kinds) * self._fragments.total + HEADER_BYTES)

    def _write(self, path: Path) -> dict[str, Any]:
        stretches = [
            Stretch(kind, fragment.name, fragment.start, average.to("cpu"))
            for kind, fragment, average in self._ema.held()
            if kind in self._kinds
        ]
        try:
            return {"file": write_stretches(path, stretches), "said": ""}
        except OSError as error:
            return {"said": f"rank {self._world.rank}: {explain_os_error(error, path)}"}

    def _commit(self, draft: Draft, step: int, samples: int, records: list[dict[str, Any]]) -> None:
        try:
            refuse_failed(records)
        except PipelineError:
            draft.discard()
            raise
        manifest = {
            **self._facts,
            "step": step,
            "samples": samples,
            "updates": self._ema.updates,
            "averaged": self._ema.averaged,
            "kinds": self._kinds,
            "world_size": self._world.world_size,
            "parameters": {name: list(shape) for name, shape in self._fragments.shapes.items()},
            "files": {rank_file(rank): record["file"] for rank, record in enumerate(records)},
        }
        draft.commit(manifest, self._fence)


def usable_snapshots(averages: Path, up_to_step: int) -> list[tuple[Path, dict[str, Any]]]:
    """Return the snapshots up to a step whose every byte is right, oldest first; a damaged one is named and left out.

    Raises:
        OSError: one cannot be read at all, which says nothing about its content.
    """
    usable = []
    for folder in committed(averages):
        if step_of(folder) > up_to_step:
            continue
        try:
            manifest = read_manifest(folder, FIELDS)
        except CheckpointError as error:
            logger.warning("%s; left out", error)
            continue
        problems = list(damaged_files(folder, manifest, sorted(manifest["files"])))
        if problems:
            logger.warning("%s; left out", "; ".join(problems))
        else:
            usable.append((folder, manifest))
    return usable
