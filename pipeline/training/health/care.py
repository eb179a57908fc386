"""Bringing the checks of a run together: what a step's outcome means, what is written of it, and the way back."""

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.loader import LatentBatch, LatentLoader
from pipeline.errors import DivergedError
from pipeline.paths import RunPaths
from pipeline.tracking import Records
from pipeline.training.engine import Engine, StepOutcome
from pipeline.training.fragments import Fragments
from pipeline.training.health.diagnosis import append_event, keys_of, write_diagnosis
from pipeline.training.health.judge import Health, Trouble, name_some, suspects
from pipeline.training.health.replicas import Replicas
from pipeline.training.health.rollback import bad_stretch, merged
from pipeline.training.saving.save import Checkpoints
from pipeline.training.saving.state import RunState
from pipeline.training.step import Losses
from pipeline.training.world import World

logger = logging.getLogger(__name__)


class Care:
    """The health of one attempt at a run; every method is called by all ranks together."""

    def __init__(
        self,
        config: RunConfig,
        paths: RunPaths,
        world: World,
        loader: LatentLoader,
        engine: Engine,
        fragments: Fragments,
    ) -> None:
        """Begin with nothing seen."""
        self._config, self._paths, self._world, self._loader = config.health, paths, world, loader
        self._fragments, self._global_batch = fragments, config.engine.global_batch
        self._replicas = Replicas(engine, fragments, world)
        self._health = Health(config.health, world, self._global_batch)
        self._last: tuple[Sequence[Tensor], list[str]] = ([], [])
        """The losses of this rank in the last skipped step, and the keys of its samples."""

    def resume(self, state: RunState) -> None:
        """Take up what the checkpoint kept of the steps before it."""
        self._health.load_json(state.health)

    def after_step(
        self, state: RunState, micro_batches: Sequence[LatentBatch], losses: Losses, outcome: StepOutcome
    ) -> None:
        """Take note of the step that `state` has just counted; waits for others only if it was skipped or a check is due."""
        position = state.samples - self._global_batch
        if outcome.applied:
            self._health.applied(state.step, position, losses.total, outcome.grad_norm)
        elif not outcome.loss_scale_search:
            # While fp16 looks for its scale steps overflow: no fault of the data.
            self._note_skip(state, position, micro_batches, losses)
        every = self._config.replica_check_every
        if every and state.step % every == 0:
            self._health.trouble = self._health.trouble or self._replicas.compare(state.step)

    def judge(self) -> int:
        """Return how many spikes there were since the last call, and write them down with the keys of their samples."""
        spikes = self._health.judge()
        if self._world.is_first:
            for spike in spikes:
                positions = np.arange(spike.position, spike.position + self._global_batch)
                indices = self._loader.order.samples(positions)
                keys = keys_of(self._loader.dataset, [int(index) for index in indices])
                logger.warning("%s; samples %s of the train split", spike, name_some(keys))
                self._write_down("spike", spike.step, said=str(spike), keys=keys)
        return len(spikes)

    def keep(self, state: RunState) -> None:
        """Put into `state` what a checkpoint keeps; waits for the device and the ranks."""
        self.judge()
        state.health = self._health.to_json()

    def treat(self, state: RunState, checkpoints: Checkpoints, records: Records, *, at_record: bool) -> bool:
        """Return whether the run went back: `state` is then that of a checkpoint; False if all is well.

        Spikes that were confirmed are treated at records only, whenever they were judged.

        Raises:
            DivergedError: all is not well, and the run may not or cannot go back.
        """
        trouble = self._health.trouble or (self._health.confirmed if at_record else None)
        if trouble is None:
            return False
        if self._config.rollback and self._roll_back(trouble, state, checkpoints, records):
            return True
        checkpoints.settle()  # What is on its way is from before, and may be the last good one.
        losses, keys = self._last
        report: dict[str, Any] = {"said": trouble.line, "keys": keys, "skipped_steps": state.skipped}
        report |= {"losses": [value for part in losses for value in part.tolist()]}
        report |= {"skipped_ranges": state.skipped_ranges, "rollbacks": self._health.rollbacks}
        folder = write_diagnosis(self._paths, state.step, self._world, self._fragments, report)
        raise DivergedError(
            f"{trouble.line}; more in {folder}; look at these samples with `ldm verify`, or lower "
            "optimizer.learning_rate and start again from an older checkpoint"
        )

    def _note_skip(
        self, state: RunState, position: int, micro_batches: Sequence[LatentBatch], losses: Losses
    ) -> None:
        indices = suspects(self._world, micro_batches, losses.per_sample)
        found = keys_of(self._loader.dataset, indices) if self._world.is_first else []
        keys: list[str] = self._world.broadcast(found)
        self._last = ([loss.detach().float().cpu() for loss in losses.per_sample], keys)
        line = self._health.skipped(state.step, position, state.skipped_in_a_row, name_some(keys))
        if self._world.is_first:
            logger.warning("%s", line)
            self._write_down("skip", state.step, said=line, keys=keys)

    def _roll_back(
        self, trouble: Trouble, state: RunState, checkpoints: Checkpoints, records: Records
    ) -> bool:
        """Load the checkpoint before the trouble into everything, and leave the bad stretch out; False if impossible."""
        rollbacks, gone_to, ranges = self._health.rollbacks + 1, state.samples, state.skipped_ranges
        if rollbacks > self._config.max_rollbacks:
            return False
        earlier = checkpoints.rewind(trouble.first_step or state.step)
        if earlier is None:
            return False
        step = state.step
        for entry in fields(RunState):
            setattr(state, entry.name, getattr(earlier, entry.name))
        self._health.load_json(state.health)
        self._health.rollbacks = rollbacks
        records.rewind(state.step)
        left_out: list[list[int]] = []
        if trouble.first_position is not None:
            margin = self._config.rollback_margin_steps * self._global_batch
            left_out = [bad_stretch(trouble.first_position, gone_to, state.samples, margin)]
        state.skipped_ranges = merged([*ranges, *state.skipped_ranges, *left_out])
        if self._world.is_first:
            said = f"positions [{left_out[0][0]}, {left_out[0][1]}) are left out" if left_out else "same data"
            said = f"{trouble.line}: back from step {step} to {state.step}, {said}"
            said += f" (way back {rollbacks} of at most {self._config.max_rollbacks})"
            logger.warning("%s", said)
            self._write_down("rollback", step, said=said, left_out=left_out, resumed_step=state.step)
        return True

    def _write_down(self, kind: str, step: int, **facts: Any) -> None:
        append_event(self._paths, {"kind": kind, "step": step, **facts})
