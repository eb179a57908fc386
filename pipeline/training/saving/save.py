"""Writing checkpoints while training goes on: the step waits for a copy to host memory, a thread does the rest.

Every rank stages its state and writes it; that all have finished travels in asynchronous maxima, one a step and
read one step late; then rank 0's thread seals and renames. One save is in flight at a time: a later one waits for
it. A save that fails (disk full, quota, read-only) is seen at the next step, counted and logged, leaves the older
checkpoints as they are, and training goes on; the third failure in a row ends the run.
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, PipelineError
from pipeline.publish import json_digest
from pipeline.training.averages.ema import Ema
from pipeline.training.fragments import Fragments
from pipeline.training.health.rollback import put_aside
from pipeline.training.saving.checkpoint import on_first_rank
from pipeline.training.saving.commit import HEADER_BYTES, Draft, publish, refuse_failed
from pipeline.training.saving.fence import Fence
from pipeline.training.saving.fragment_file import Stretch, write_stretches
from pipeline.training.saving.manifest import committed, rank_file
from pipeline.training.saving.plan import BUSY, COMMITTED, FAILED, STALE, Flight, Phase, Plan
from pipeline.training.saving.resume import load_newest
from pipeline.training.saving.staging import Staging
from pipeline.training.saving.state import RunState, merged_substitutes, stretches
from pipeline.training.saving.writer import Writer, explain_os_error
from pipeline.training.world import Pending, World

logger = logging.getLogger(__name__)

FAILURES_IN_A_ROW = 3


class Checkpoints:
    """The checkpoints of one attempt at a run; every method is called by all ranks together."""

    def __init__(
        self,
        folder: Path,
        *,
        world: World,
        fragments: Fragments,
        ema: Ema,
        facts: Mapping[str, Any],
        plan: Plan,
        tracker_run_id: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Prepare to resume from and save to `folder`.

        `facts` go into every manifest as they are: attempt, config, data_digest and data, scheduler, zero_stage,
        versions.
        `tracker_run_id` is asked at each save: a tracker may only come to know it after the start.
        """
        self._folder, self._world, self._fragments, self._ema = folder, world, fragments, ema
        self._facts, self._plan, self._tracker_run_id = dict(facts), plan, tracker_run_id
        self.fence = Fence(folder, self._facts["attempt"])
        self._staging, self._writer = Staging(pinned=world.device.type == "cuda"), Writer()
        self._phase = Phase.IDLE
        self._flight: Flight | None = None
        self._pending: Pending | None = None
        self._asked = Phase.IDLE
        self._ending: dict[str, Any] = {}
        self._token: str = world.broadcast(uuid.uuid4().hex[:12])
        self._begun = self._failures = 0
        self._began_seconds = time.monotonic()
        self.overdue = False
        """Whether all ranks agree that `plan.every_seconds` have passed."""
        self.saved_step = -1
        """The step of the newest checkpoint that this attempt has loaded or committed."""
        self.failed = 0
        """Saves of this attempt that were not committed."""
        self.stall_seconds = 0.0
        """What all saves of this attempt have made the training wait."""

    def resume(self, *, accept_data_change: bool = False) -> tuple[RunState, Mapping[str, Any]] | None:
        """Load the newest valid checkpoint into this rank's shards; return the state and the manifest.

        None when nothing was ever committed. Takes the fence: an older attempt that still lives can no longer
        publish.

        Raises:
            CheckpointError: there are checkpoints and none can be trusted.
            ConfigError: the checkpoint is of another model.
            DataError: it was trained on other data, and that was not accepted.
        """
        on_first_rank(self._world, self.fence.take)
        loaded = load_newest(
            self._folder,
            self._world,
            self._fragments,
            self._ema,
            self._facts,
            accept_data_change=accept_data_change,
        )
        if loaded is not None:
            self.saved_step = loaded[0].step
        return loaded

    def rewind(self, first_step: int) -> RunState | None:
        """Load the newest valid checkpoint from before step `first_step` and return its state; the later ones step aside.

        None when there is none, and nothing is changed then. Raises what `resume` and `poll` raise: no run goes back
        behind a change of its data by itself.
        """
        self.settle()
        on_first_rank(self._world, lambda: self.fence.refuse_stale(self._folder))
        if not on_first_rank(self._world, lambda: put_aside(self._folder, first_step)):
            return None
        resumed = self.resume()
        assert resumed is not None
        return resumed[0]

    def begin(self, state: RunState) -> None:
        """Begin to save `state`: waits for the save in flight, copies to host memory, and leaves the rest to a thread.

        Raises:
            CheckpointError: the third failure in a row, or a newer attempt has taken over this run.
        """
        began_seconds = time.monotonic()
        if self._phase is not Phase.IDLE:
            self._wait_for_flight(state.step)
        assert self._fragments.updates == state.applied, (self._fragments.updates, state)
        staged = self._staging.copy(stretches(self._fragments, self._ema, resident=False))
        numbers = state.to_json() | {"ema": self._ema.to_json()}
        self._begun += 1
        draft = Draft.of(self._folder, state.step, f"{self._token}-{self._begun}")
        self._flight = Flight(draft, state.step, numbers, self._need_bytes(staged), began_seconds)
        self._writer.begin(partial(self._write, self._flight, staged))
        self._phase, self.overdue, self._began_seconds = Phase.WRITING, False, began_seconds
        self.stall_seconds += time.monotonic() - began_seconds

    def poll(self) -> None:
        """Take note of what the ranks said at the step before, and tell them how it stands; once a step, no waiting.

        Raises:
            CheckpointError: the third failure in a row, or a newer attempt has taken over this run.
        """
        if self._pending is not None:
            answer = self._pending.wait()
            self._pending = None
            if self._asked is self._phase:  # Otherwise `begin` came in between.
                self._heed(answer)
        if self._phase is not Phase.IDLE or self._plan.every_seconds is not None:
            self._pending, self._asked = self._world.start_max(self._standing()), self._phase

    def figures(self) -> dict[str, float]:
        """Return what a record says of the saves: this attempt's failures, and seconds that the training waited."""
        return {"save_failures": self.failed, "save_stall_seconds": round(self.stall_seconds, 6)}

    def settle(self) -> None:
        """Return when no save is in flight. Raises what `poll` raises."""
        while self._phase is not Phase.IDLE:
            self._writer.wait()
            self.poll()
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def save(self, state: RunState) -> bool:
        """Save `state` and wait for it; return whether it was committed. Raises what `poll` raises."""
        self.begin(state)
        failed = self.failed
        self.settle()
        return self.failed == failed

    def close(self) -> None:
        """Break off what is still being written, on this rank alone: for the end of a run, however it comes."""
        self._writer.close()

    def _wait_for_flight(self, step: int) -> None:
        flight = self._flight
        assert flight is not None
        waiting_seconds = time.monotonic()
        self.settle()
        waited_seconds = time.monotonic() - waiting_seconds
        if self._world.is_first and waited_seconds > 1.0:
            logger.warning(
                "%s: was still being written when step %d was to be saved: training waited %.1f s; save less often "
                "(train.checkpoint_every) or to a faster folder",
                flight.draft.target,
                step,
                waited_seconds,
            )

    def _standing(self) -> int:
        """Return what this rank has to tell in the present phase."""
        if self._phase is Phase.IDLE:
            every_seconds, passed = self._plan.every_seconds, time.monotonic() - self._began_seconds
            return int(self._world.is_first and every_seconds is not None and passed >= every_seconds)
        if self._writer.busy:
            return BUSY
        # In the commit only rank 0 has an ending to tell; who has just begun to write has none.
        if self._phase is Phase.WRITING or not self._world.is_first:
            return COMMITTED
        self._ending = self._writer.take()
        return int(self._ending["code"])

    def _heed(self, answer: int) -> None:
        """Move on by what all ranks agreed on."""
        if self._phase is Phase.IDLE:
            self.overdue = bool(answer)
        elif answer == BUSY:
            return
        elif self._phase is Phase.WRITING:
            # Every rank's thread has ended, so this gather waits for nothing but the network.
            records = self._world.gather(self._writer.take())
            self._phase, self._ending = Phase.COMMITTING, {}
            if self._world.is_first:
                assert self._flight is not None
                self._writer.begin(partial(self._commit, self._flight, records))
        else:
            self._conclude(answer)

    def _write(self, flight: Flight, staged: list[Stretch]) -> dict[str, Any]:
        """Write this rank's file, on its thread; return what the manifest says of it, or what went wrong."""
        own = {name: flight.numbers[name] for name in ("interval", "substituted")}
        record: dict[str, Any] = {**own, "said": ""}
        path = flight.draft.beside / rank_file(self._world.rank)
        try:
            if self._world.is_first:
                self.fence.refuse_stale(flight.draft.target)
            # Only rank 0 asks for room for all: what the others have begun to write is part of it.
            own_bytes = 4 * sum(stretch.tensor.numel() for stretch in staged)
            flight.draft.open(flight.need_bytes if self._world.is_first else own_bytes)
            record["file"] = write_stretches(path, staged, self._writer.stop)
        except OSError as error:
            record["said"] = f"rank {self._world.rank}: {explain_os_error(error, flight.draft.beside)}"
        except Exception as error:
            record["said"] = f"rank {self._world.rank}: {error!r}"
        return record

    def _commit(self, flight: Flight, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Seal and publish, on rank 0's thread; return how it ended."""
        draft, code = flight.draft, FAILED
        try:
            self.fence.refuse_stale(draft.target)
            refuse_failed(records)
            publish(draft, self._manifest(flight, records), self.fence, self._plan.retention)
            return {"code": COMMITTED, "said": ""}
        except CheckpointError as error:
            code, said = STALE, str(error)
        except OSError as error:
            said = f"rank 0: {explain_os_error(error, draft.beside)}"
        except Exception as error:
            said = str(error) if isinstance(error, PipelineError) else f"rank 0: {error!r}"
        draft.discard()
        return {"code": code, "said": said}

    def _conclude(self, code: int) -> None:
        """End the flight, on all ranks."""
        flight, self._phase = self._flight, Phase.IDLE
        assert flight is not None
        if code == COMMITTED:
            self._failures, self.saved_step = 0, flight.step
            if self._world.is_first:
                seconds = time.monotonic() - flight.began_seconds
                logger.info("saved %s, in the background for %.1f s", flight.draft.target, seconds)
            return
        said = self._world.broadcast(self._ending.get("said"))
        if code == STALE:
            raise CheckpointError(said)
        self.failed += 1
        self._failures += 1
        self._report_failure(flight.draft.target, said)

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

    def _manifest(self, flight: Flight, records: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._facts,
            **flight.numbers,
            "interval": [record["interval"] for record in records],
            "substituted": merged_substitutes([record["substituted"] for record in records]),
            "config_digest": json_digest(self._facts["config"]),
            "tracker_run_id": self._tracker_run_id(),
            "world_size": self._world.world_size,
            "parameters": {name: list(shape) for name, shape in self._fragments.shapes.items()},
            "files": {rank_file(rank): record["file"] for rank, record in enumerate(records)},
        }

    def _need_bytes(self, staged: list[Stretch]) -> int:
        """Return the bytes that the files of all ranks take: every kind of state is as large as the model."""
        kinds = {stretch.kind for stretch in staged}
        return 4 * len(kinds) * self._fragments.total + HEADER_BYTES
