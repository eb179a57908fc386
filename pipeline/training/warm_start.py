"""A run that begins with weights that are there: of another run, at any of its checkpoints, or of a diffusers folder.

Each rank reads what its own shards need, so nothing is gathered and nothing is written. Only the weights' names and
shapes must agree: resolution, objective, data, precision and world size may be others.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import RunConfig, UNetConfig, WarmStartConfig
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.models.unet import UNet
from pipeline.models.unet_folder import UNetFolder, open_unet_folder, refuse_other_weights
from pipeline.paths import RunPaths
from pipeline.training.averages.ema import Ema
from pipeline.training.fragments import Fragment, Fragments
from pipeline.training.frozen import (
    frozen_names,
    frozen_weights,
    read_frozen,
    refuse_other_names,
    write_frozen,
)
from pipeline.training.saving.checkpoint import choose_checkpoint, load_stretches, on_first_rank
from pipeline.training.saving.fragment_file import Stretch, read_whole
from pipeline.training.saving.manifest import (
    MANIFEST_NAME,
    committed,
    damaged_files,
    read_manifest,
    step_folder,
    step_of,
)
from pipeline.training.saving.state import RunState
from pipeline.training.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSource:
    """One verified checkpoint of a run, and which of its weights are wanted."""

    checkpoint: Path
    manifest: Mapping[str, Any]
    kind: str
    """How its files call the weights: "master", "ema", or another average."""
    fixed: Mapping[str, Tensor]
    """The weights that were frozen in that run, which its checkpoints do not hold."""

    @property
    def where(self) -> str:
        """The place for messages."""
        return str(self.checkpoint)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight."""
        trained = {name: tuple(shape) for name, shape in self.manifest["parameters"].items()}
        return trained | {name: tuple(tensor.shape) for name, tensor in self.fixed.items()}

    def weights(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, float32 on the CPU) of whole weights."""
        saved = self.manifest["parameters"]
        files = [self.checkpoint / name for name in sorted(self.manifest["files"])]
        yield from read_whole(
            files, self.kind, {name: saved[name] for name in names if name in saved}
        ).items()
        yield from ((name, self.fixed[name]) for name in names if name in self.fixed)

    def fill(self, fragments: Sequence[Fragment], world: World) -> None:
        """Write the weights into this rank's masters."""
        stored = [fragment for fragment in fragments if fragment.name not in self.fixed]
        wanted = [Stretch(self.kind, piece.name, piece.start, piece.master) for piece in stored]
        load_stretches(self.checkpoint, self.manifest, wanted, world)
        for piece in fragments:
            if piece.name in self.fixed:
                piece.master.copy_(self.fixed[piece.name].view(-1)[piece.start : piece.stop])


@dataclass(frozen=True)
class FolderSource:
    """A U-Net in diffusers' format."""

    found: UNetFolder

    @property
    def where(self) -> str:
        """The place for messages."""
        return str(self.found.folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight."""
        return {name: stored.shape for name, stored in self.found.tensors.items()}

    def weights(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, float32 on the CPU) of whole weights."""
        yield from self.found.weights(names)

    def fill(self, fragments: Sequence[Fragment], world: World) -> None:
        """Write the weights into this rank's masters."""
        pieces: dict[str, list[Fragment]] = {}
        for fragment in fragments:
            pieces.setdefault(fragment.name, []).append(fragment)
        for name, tensor in self.found.weights(list(pieces)):
            for piece in pieces[name]:
                piece.master.copy_(tensor.reshape(-1)[piece.start : piece.stop])


Source = RunSource | FolderSource


def open_source(config: WarmStartConfig, model: UNetConfig, world: World) -> Source:
    """Return the source, its bytes verified (a run's) and its weights those of `model`; all ranks together.

    Raises:
        ConfigError: there is no such source, or it has no such step or weights, or another model's: each is listed.
        CheckpointError, DataError: it is damaged.
    """
    path = Path(config.source)
    source = _of_run(path, config, world) if _is_run(path) else _of_folder(path, config)
    try:
        refuse_other_weights(source.where, model, source.shapes())
    except DataError as error:
        end = f"{source.where}: a warm start needs the config's own weights; take over its model section with `ldm import`"
        raise ConfigError([*str(error).splitlines(), end]) from None
    return source


def freeze(network: UNet, config: RunConfig, paths: RunPaths, world: World) -> None:
    """Give the weights that `train.freeze` names their values and no gradients; all ranks together, before sharding.

    Raises:
        ConfigError: a pattern names nothing, or the run began with others; and what `open_source` raises.
    """
    if not config.train.freeze:
        return
    parameters = dict(network.named_parameters())
    names = frozen_names(list(parameters), config.train.freeze)
    assert config.warm_start is not None
    if not world.broadcast(paths.frozen.is_file()):
        source = open_source(config.warm_start, config.model, world)
        on_first_rank(world, lambda: write_frozen(paths.frozen, dict(source.weights(names))))
    stored = read_frozen(paths.frozen)
    refuse_other_names(paths.frozen, stored, names)
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(stored[name]).requires_grad_(False)
    if world.is_first:
        count = sum(parameters[name].numel() for name in names)
        logger.info("train.freeze: %d weights with %d elements stay as they are", len(names), count)


@torch.no_grad()
def warm_start(config: RunConfig, fragments: Fragments, ema: Ema, world: World, data_digest: str) -> RunState:
    """Return the state that a run without a checkpoint begins in, its first weights in this rank's shards.

    Without `config.warm_start` the weights stay as they were drawn. With `optimizer` the run goes on where the
    source stood: at an unchanged config and data set it is the source's own continuation, bit for bit.

    Raises:
        ConfigError, CheckpointError, DataError: see `open_source`.
    """
    wanted = config.warm_start
    if wanted is None:
        return RunState()
    source = open_source(wanted, config.model, world)
    if wanted.optimizer:
        assert isinstance(source, RunSource)
        state = _fork(source, fragments, ema, world)
        if data_digest != source.manifest["data_digest"]:
            state.begin_data()
    else:
        source.fill(fragments.resident, world)
        fragments.loaded(0)
        for _, fragment, average in ema.held():
            average.copy_(fragment.master)
        state = RunState()
    if world.is_first:
        logger.info("begins at step %d with the %s weights of %s", state.step, wanted.weights, source.where)
    return state


def _fork(source: RunSource, fragments: Fragments, ema: Ema, world: World) -> RunState:
    """Load the whole state of the checkpoint, as a resume of its own run would."""
    manifest = source.manifest
    lacking = sorted(fragments.shapes.keys() - manifest["parameters"].keys())
    if lacking:
        raise ConfigError(
            f"{source.where}: has no optimizer state of {lacking[0]} ({len(lacking)} such), which was frozen there; set "
            "warm_start.optimizer: false"
        )
    begun = ema.load_json(manifest["ema"])
    adam = [
        Stretch(kind, piece.name, piece.start, getattr(piece, kind))
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for piece in fragments.resident
    ]
    averages = [
        Stretch(kind, piece.name, piece.start, average) for kind, piece, average in ema.held(to_load=True)
    ]
    load_stretches(source.checkpoint, manifest, adam + averages, world)
    fragments.loaded(manifest["applied"])
    ema.loaded()
    if world.is_first:
        for line in begun:
            logger.warning("%s: %s", source.where, line)
    return replace(RunState.of(manifest), interval=RunState().interval)


def _is_run(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_file() or RunPaths(path).checkpoints.is_dir()


def _of_folder(path: Path, config: WarmStartConfig) -> FolderSource:
    if config.optimizer or config.step is not None:
        asked = "optimizer: true" if config.optimizer else f"step: {config.step}"
        raise ConfigError(
            f"warm_start.{asked}: {path} is no run folder and no checkpoint, so it has weights only; remove it"
        )
    return FolderSource(open_unet_folder(path))


def _of_run(path: Path, config: WarmStartConfig, world: World) -> RunSource:
    if (path / MANIFEST_NAME).is_file():
        if config.step not in (None, step_of(path)):
            raise ConfigError(f"warm_start.step: {config.step}, but warm_start.source is {path}; remove one")
        checkpoint = path
        manifest = _verified(checkpoint, world)
    elif config.step is not None:
        checkpoints = RunPaths(path).checkpoints
        checkpoint = step_folder(checkpoints, config.step)
        if not checkpoint.is_dir():
            steps = ", ".join(str(step_of(found)) for found in committed(checkpoints)) or "none"
            raise ConfigError(
                f"warm_start.step: {config.step}; {checkpoints} holds the steps {steps}; take one of them"
            )
        manifest = _verified(checkpoint, world)
    else:
        chosen = choose_checkpoint(RunPaths(path).checkpoints, world)
        if chosen is None:
            raise ConfigError(f"warm_start.source: {path} has no checkpoint yet")
        checkpoint, manifest, _ = chosen
    held = ["raw", *manifest["ema"].get("kinds", ["ema"])]
    if config.weights not in held:
        raise ConfigError(
            f"warm_start.weights: {config.weights!r}; {checkpoint} holds {', '.join(held)}; take one of them"
        )
    kind = "master" if config.weights == "raw" else config.weights
    return RunSource(checkpoint, manifest, kind, frozen_weights(checkpoint))


def _verified(checkpoint: Path, world: World) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose every byte is right: each rank hashes its share of the files."""
    manifest = read_manifest(checkpoint)
    mine = sorted(manifest["files"])[world.rank :: world.world_size]
    problems = [
        line for report in world.gather(list(damaged_files(checkpoint, manifest, mine))) for line in report
    ]
    if problems:
        raise CheckpointError(f"{'; '.join(problems)}; take another step with warm_start.step")
    return manifest
