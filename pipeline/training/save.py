"""Writing checkpoints: every rank writes and hashes its file, rank 0 seals and renames; a failure costs nothing.

A save that fails (disk full, quota, read-only) leaves the older checkpoints as they are and training goes on; the
third failure in a row ends the run. What is written follows from stretches and a manifest alone, so that staging
and a writer thread fit in between.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, PipelineError
from pipeline.publish import fsync_folder, remove_temporaries, temporary_beside, write_json
from pipeline.training.checkpoint import (
    MANIFEST_NAME,
    choose_checkpoint,
    committed,
    load_stretches,
    on_first_rank,
    refuse_other_model,
    seal,
    set_aside,
    step_folder,
    step_of,
)
from pipeline.training.ema import Ema
from pipeline.training.fragment_file import Stretch, explain_os_error, write_stretches
from pipeline.training.fragments import Fragments
from pipeline.training.world import World

logger = logging.getLogger(__name__)

FENCE_NAME = "attempt.json"
FAILURES_IN_A_ROW = 3
HEADER_BYTES = 2**20


@dataclass
class RunState:
    """Where a run stands, in plain numbers: everything a resume needs beside the tensors."""

    step: int = 0
    """Finished steps, skipped ones included."""
    samples: int = 0
    """Samples consumed: the whole state of the data."""
    skipped: int = 0
    """Steps whose gradients were not finite; the rest were applied."""
    skipped_in_a_row: int = 0
    loss: float | None = None
    """Mean loss of the last record."""
    interval: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """This rank's [sum of losses, applied steps] since the last record: the next record is then the same one."""

    @property
    def applied(self) -> int:
        """Steps that moved the weights: Adam's count."""
        return self.step - self.skipped

    def count(self, applied: bool, samples: int) -> None:
        """Count one finished step; a skipped one has consumed its samples too."""
        self.step += 1
        self.samples += samples
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1


class Checkpoints:
    """The checkpoints of one attempt at a run."""

    def __init__(
        self,
        folder: Path,
        *,
        world: World,
        fragments: Fragments,
        ema: Ema,
        facts: Mapping[str, Any],
        keep_last: int,
    ) -> None:
        """Prepare to resume from and save to `folder`, where the last `keep_last` checkpoints stay.

        `facts` go into every manifest as they are: attempt, config, data_digest, zero_stage, versions.
        """
        self._folder, self._world, self._fragments, self._ema = folder, world, fragments, ema
        self._facts, self._keep_last = dict(facts), keep_last
        self._failures = 0
        self.saved_step = -1

    def resume(self) -> tuple[RunState, Mapping[str, Any]] | None:
        """Load the newest valid checkpoint into this rank's shards; return the state and the manifest.

        None when nothing was ever committed. Takes the fence: an older attempt that still lives can no longer
        publish.

        Raises:
            CheckpointError: there are checkpoints and none can be trusted.
            ConfigError: the checkpoint is of another model.
        """
        on_first_rank(self._world, self._take_fence)
        chosen = choose_checkpoint(self._folder, self._world)
        if chosen is None:
            return None
        checkpoint, manifest, damaged = chosen
        refuse_other_model(checkpoint, manifest["parameters"], self._fragments.shapes)
        load_stretches(checkpoint, manifest, self._stretches(resident=True), self._world)
        self._fragments.loaded(manifest["applied"])
        self._ema.load_json(manifest["ema"])
        on_first_rank(self._world, lambda: set_aside(damaged))
        self.saved_step = manifest["step"]
        names = ("step", "samples", "skipped", "skipped_in_a_row", "loss")
        state = RunState(**{name: manifest[name] for name in names}, interval=self._interval(manifest))
        return state, manifest

    def save(self, state: RunState) -> bool:
        """Write a checkpoint of `state`, all ranks together; return whether it was committed.

        Raises:
            CheckpointError: the third failure in a row, or a newer attempt has taken over this run.
        """
        began = time.monotonic()
        assert self._fragments.updates == state.applied, (self._fragments.updates, state)
        target = step_folder(self._folder, state.step)
        try:
            self._write(target, state)
        except CheckpointError:
            raise
        except PipelineError as error:
            self._failures += 1
            self._report_failure(target, str(error))
            return False
        self._failures = 0
        self.saved_step = state.step
        if self._world.is_first:
            self._remove_old(target)
            logger.info("saved %s in %.1f s", target, time.monotonic() - began)
        return True

    def _write(self, target: Path, state: RunState) -> None:
        """Write and commit. Raises PipelineError on every rank when any could not."""
        beside = Path(on_first_rank(self._world, lambda: self._open(target)))
        record: dict[str, Any] = {"interval": state.interval, "said": ""}
        name = f"rank-{self._world.rank:05d}.safetensors"
        try:
            record["file"] = write_stretches(beside / name, self._stretches(resident=False))
        except OSError as error:
            record["said"] = f"rank {self._world.rank}: {explain_os_error(error, beside)}"
        # The gather is also the barrier: nobody seals or removes the folder while another still writes to it.
        records = self._world.gather(record)
        on_first_rank(self._world, lambda: self._commit(beside, target, state, records))

    def _open(self, target: Path) -> str:
        """Make the temporary folder if the state fits on the disk, and return its name."""
        self._refuse_stale(target)
        need_bytes = 16 * self._fragments.total + HEADER_BYTES
        free_bytes = shutil.disk_usage(self._folder).free
        if free_bytes < need_bytes:
            raise OSError(errno.ENOSPC, f"needs {need_bytes} bytes", str(self._folder))
        beside = temporary_beside(target)
        beside.mkdir()
        return str(beside)

    def _commit(
        self, beside: Path, target: Path, state: RunState, records: Sequence[Mapping[str, Any]]
    ) -> None:
        """Seal the folder and give it its name, or remove it."""
        try:
            said = "; ".join(record["said"] for record in records if record["said"])
            if said:
                raise PipelineError(said)
            write_json(beside / MANIFEST_NAME, seal(self._manifest(state, records)))
            fsync_folder(beside)
            self._refuse_stale(target)
            old = temporary_beside(target)
            if target.exists():
                os.replace(target, old)
            os.replace(beside, target)
            fsync_folder(self._folder)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise

    def _manifest(self, state: RunState, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        numbers = {name: value for name, value in asdict(state).items() if name != "interval"}
        return {
            **self._facts,
            **numbers,
            "applied": state.applied,
            "interval": [record["interval"] for record in records],
            "ema": self._ema.to_json(),
            "world_size": self._world.world_size,
            "parameters": {name: list(shape) for name, shape in self._fragments.shapes.items()},
            "files": {f"rank-{rank:05d}.safetensors": record["file"] for rank, record in enumerate(records)},
        }

    def _report_failure(self, target: Path, said: str) -> None:
        valid = [path.name for path in committed(self._folder)]
        kept = f"{valid[-1]} is intact" if valid else "there is no older checkpoint"
        line = (
            f"{target}: not saved: {said}; {kept}; failure {self._failures} of {FAILURES_IN_A_ROW} in a row"
        )
        if self._failures >= FAILURES_IN_A_ROW:
            raise CheckpointError(f"{line}: make room or mend the folder, then run the same command again")
        if self._world.is_first:
            logger.error("%s; training goes on", line)

    def _remove_old(self, newest: Path) -> None:
        """Remove all but the last checkpoints up to `newest`, which was just committed; a failure is only said."""
        older = [path for path in committed(self._folder) if step_of(path) <= step_of(newest)]
        for path in older[: -self._keep_last]:
            trash = temporary_beside(path)
            try:
                os.replace(path, trash)
                shutil.rmtree(trash)
            except OSError as error:
                logger.warning("%s: not removed: %s", path, explain_os_error(error, path))

    def _stretches(self, *, resident: bool) -> list[Stretch]:
        """Return what is saved, or, with `resident`, what loading has to fill."""
        fragments = self._fragments.resident if resident else self._fragments.owned
        adam = [
            Stretch(kind, fragment.name, fragment.start, getattr(fragment, kind))
            for kind in ("master", "exp_avg", "exp_avg_sq")
            for fragment in fragments
        ]
        owned = zip(self._fragments.owned, self._ema.averages, strict=True)
        return adam + [Stretch("ema", fragment.name, fragment.start, mean) for fragment, mean in owned]

    def _interval(self, manifest: Mapping[str, Any]) -> list[float]:
        """Return this rank's part of the open interval; at another world size rank 0 takes it all."""
        parts: list[list[float]] = manifest["interval"]
        if len(parts) == self._world.world_size:
            return list(parts[self._world.rank])
        losses, counts = zip(*parts, strict=True)
        return [sum(losses) if self._world.is_first else 0.0, counts[0]]

    def _take_fence(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self._folder)
        write_json(self._folder / FENCE_NAME, {"attempt": self._facts["attempt"]})

    def _refuse_stale(self, target: Path) -> None:
        """Raise CheckpointError if a newer attempt has taken the fence since."""
        holder = json.loads((self._folder / FENCE_NAME).read_text(encoding="utf-8"))["attempt"]
        if holder != self._facts["attempt"]:
            raise CheckpointError(
                f"{target}: attempt {holder} has taken over this run; this one, {self._facts['attempt']}, "
                "publishes nothing and ends"
            )
