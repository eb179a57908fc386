"""Going on: the newest valid checkpoint into this rank's shards, and whether the data is still what it was."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.changes import data_changes, refuse_changes
from pipeline.training.averages.ema import Ema
from pipeline.training.fragments import Fragments
from pipeline.training.saving.checkpoint import (
    choose_checkpoint,
    load_stretches,
    on_first_rank,
    refuse_other_model,
)
from pipeline.training.saving.manifest import set_aside
from pipeline.training.saving.state import RunState, stretches
from pipeline.training.world import World

logger = logging.getLogger(__name__)


def load_newest(
    folder: Path,
    world: World,
    fragments: Fragments,
    ema: Ema,
    facts: Mapping[str, Any],
    *,
    accept_data_change: bool,
) -> tuple[RunState, Mapping[str, Any]] | None:
    """Load the newest valid checkpoint in `folder`, all ranks together; return the state and the manifest.

    None when nothing was ever committed. Damaged checkpoints on the way step aside. Where the data is no longer what
    it was and that is accepted, the state begins a new epoch of it where the run stands.

    Raises:
        CheckpointError: there are checkpoints and none can be trusted.
        ConfigError: the checkpoint is of another model.
        DataError: it was trained on other data; nothing is loaded then.
    """
    chosen = choose_checkpoint(folder, world)
    if chosen is None:
        return None
    checkpoint, manifest, damaged = chosen
    refuse_other_model(checkpoint, manifest["parameters"], fragments.shapes)
    changes = data_changes(manifest, facts)
    if not accept_data_change:
        refuse_changes(checkpoint, changes)
    averages = ema.load_json(manifest["ema"])
    load_stretches(checkpoint, manifest, stretches(fragments, ema, resident=True), world)
    fragments.loaded(manifest["applied"])
    ema.loaded()
    state = RunState.of(manifest, world.rank, world.world_size)
    if changes:
        state.begin_data()
    if world.is_first:
        for line in averages:
            logger.warning("%s: %s", checkpoint, line)
        for line in changes:
            logger.warning(
                "%s: %s; accepted: a new epoch begins at position %d", checkpoint, line, state.samples
            )
    on_first_rank(world, lambda: set_aside(damaged))
    return state, manifest
