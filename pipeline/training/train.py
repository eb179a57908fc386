"""One training run, to be read from top to bottom: resume, step, average, record, save, stop.

A run is a function of (config, data set, seed). Position, noise, timestep and dropped captions of every sample
come with its batch; the only other draw, dropout inside the U-Net, is seeded anew for every micro-batch. So a
killed and resumed run is the uninterrupted one bit for bit, and no random state is ever saved.
"""

import logging
import math
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import RunConfig
from pipeline.config_file import dump_config
from pipeline.data.changes import data_facts
from pipeline.data.loader import LatentBatch, LatentLoader
from pipeline.data.sets import open_datasets
from pipeline.errors import CheckpointError, DataError
from pipeline.latents.manifest import refuse_mismatch
from pipeline.latents.reader import LatentDataset
from pipeline.models.unet import UNet
from pipeline.paths import RunPaths
from pipeline.progress import Progress, progress_bar
from pipeline.publish import write_bytes, write_json
from pipeline.tracking import NoRecords, Records, open_records, redacted_config
from pipeline.training.averages.ema import Ema
from pipeline.training.averages.snapshots import Snapshots
from pipeline.training.engine import Engine
from pipeline.training.facts import changed_settings, run_facts, tracker_run_id
from pipeline.training.fragments import Fragments
from pipeline.training.health.care import Care
from pipeline.training.health.heartbeat import Heartbeat
from pipeline.training.health.rollback import beyond, refuse_straddling
from pipeline.training.learning_rate import learning_rate
from pipeline.training.midway import Midway
from pipeline.training.saving.checkpoint import on_first_rank
from pipeline.training.saving.interval import Interval, due
from pipeline.training.saving.plan import save_plan
from pipeline.training.saving.save import Checkpoints
from pipeline.training.saving.state import RunState
from pipeline.training.step import TrainStep
from pipeline.training.stop import Stop
from pipeline.training.text import open_text
from pipeline.training.utilisation import Utilisation
from pipeline.training.warm_start import freeze, warm_start
from pipeline.training.world import World, limit_waiting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    samples: int
    loss: float
    """Mean loss of the run's last record, NaN if there is none or it had only skipped steps."""
    stopped: bool
    """Whether it ended on request before the last step; the same command goes on."""
    reason: str = ""
    """Why it stopped: "signal", "stop file" or "max seconds"."""


def train(
    config: RunConfig, paths: RunPaths, world: World, *, attempt: str, accept_data_change: bool = False
) -> TrainResult:
    """Train until the configured step or a request to stop, from the newest valid checkpoint on if there is one.

    Called by all ranks together. `attempt` names this start of the run: an older attempt that still lives can no
    longer publish checkpoints. `accept_data_change`: on other data than before a new epoch begins where the run
    stands; otherwise that is refused.

    Raises:
        ConfigError, DataError, CheckpointError, DivergedError: what the user can act on.
    """
    stop = Stop(
        world,
        stop_file=paths.stop_file,
        max_seconds=config.train.max_seconds,
        stacks=paths.stacks(world.rank),
    )
    heartbeat = Heartbeat(paths, world.rank, hang_seconds=config.health.hang_seconds)
    with ExitStack() as opened:
        opened.enter_context(stop)
        opened.enter_context(heartbeat)
        with heartbeat.phase("load"):
            run = _assemble(config, paths, world, attempt, opened, accept_data_change)
        state, total, global_batch = run.state, config.train.steps, config.engine.global_batch
        interval = _open_interval(run)
        batches = opened.enter_context(closing(_steps(run)))
        records = opened.enter_context(_open_records(config, paths, world, attempt, state.step))
        progress = opened.enter_context(_open_progress(config, world, state.step))
        heartbeat.enter("step")

        while state.step < total and not stop.agreed():
            heartbeat.beat(state.step)
            with interval.waiting():
                micro_batches = next(batches)
            losses = run.step.accumulate(micro_batches, state.step)
            rate = learning_rate(config.optimizer, state.step, total)
            outcome = run.engine.step(rate)
            if outcome.applied:
                run.ema.update()
            state.count(outcome.applied, global_batch)
            interval.add(losses.total if outcome.applied else None, global_batch, losses.by_timestep_2K)
            progress.advance()
            run.care.after_step(state, micro_batches, losses, outcome)
            at_record = due(state.step, config.train.log_every) or state.step == total
            if at_record:
                values = _record(run, interval, float(outcome.grad_norm), rate)
                records.log(state.step, values, samples=state.samples)
                progress.advance(0, loss=values["loss"])
            if run.care.treat(state, run.checkpoints, records, at_record=at_record):
                interval = _open_interval(run)
                continue
            run.checkpoints.poll()
            if due(state.step, config.train.checkpoint_every) or run.checkpoints.overdue:
                with interval.paused(), heartbeat.phase("save"):
                    run.checkpoints.begin(_state_now(run, interval))
            if config.ema.posthoc and due(state.step, config.ema.posthoc.snapshot_every):
                with interval.paused(), heartbeat.phase("save"):
                    run.snapshots.save(state.step, state.samples)
            if due(state.step, config.evaluate.every) or due(state.step, config.sample.every):
                with interval.paused(), heartbeat.phase("evaluate"):
                    run.midway.look(state, records)
        heartbeat.beat(state.step)
        heartbeat.enter("save")
        run.checkpoints.settle()
        if state.step != run.checkpoints.saved_step and not run.checkpoints.save(_state_now(run, interval)):
            raise CheckpointError(
                f"{paths.checkpoints}: the last state, step {state.step}, could not be saved"
            )
        if state.step < total:
            records.close("stopped")
        return _result(run, stop)


@dataclass(frozen=True)
class Run:
    """The parts of a run that the loop works with."""

    config: RunConfig
    world: World
    loader: LatentLoader
    engine: Engine
    ema: Ema
    checkpoints: Checkpoints
    snapshots: Snapshots
    midway: Midway
    step: TrainStep
    care: Care
    utilisation: Utilisation
    state: RunState


def _assemble(
    config: RunConfig,
    paths: RunPaths,
    world: World,
    attempt: str,
    opened: ExitStack,
    accept_data_change: bool = False,
) -> Run:
    """Open the data, build and shard the network, and load the newest checkpoint if there is one."""
    datasets = _open_datasets(config, paths, world)
    for dataset in datasets:
        opened.callback(dataset.close)
    dataset = datasets[0]  # All have its spec and its encoders, or the loader refuses them.
    loader = _open_loader(config, datasets, world)
    engine = _build_engine(config, paths, world, loader.micro_batches)
    opened.callback(engine.close)
    limit_waiting(config.health.collective_seconds)
    fragments = Fragments(engine, world)
    ema = Ema(fragments, config.ema)
    facts = run_facts(config, dataset, attempt) | data_facts(datasets, config)
    checkpoints = Checkpoints(
        paths.checkpoints,
        world=world,
        fragments=fragments,
        ema=ema,
        facts=facts,
        plan=save_plan(config.train),
        tracker_run_id=lambda: tracker_run_id(paths),
    )
    opened.callback(checkpoints.close)
    state = _resume(checkpoints, facts, world, accept_data_change)
    if state is None:
        state = warm_start(config, fragments, ema, world, facts["data_digest"])
    on_first_rank(world, lambda: _describe_run(config, paths, facts["versions"]))
    text = open_text(config, dataset, paths, world.device)
    step = TrainStep(config, world, engine, dataset.spec, text)
    care = Care(config, paths, world, loader, engine, fragments)
    care.resume(state)
    snapshots = Snapshots(
        paths.averages, world=world, fragments=fragments, ema=ema, facts=facts, fence=checkpoints.fence
    )
    midway = Midway(config, paths, world, engine, fragments, ema)
    utilisation = Utilisation(config, datasets, world)
    return Run(
        config, world, loader, engine, ema, checkpoints, snapshots, midway, step, care, utilisation, state
    )


def _open_datasets(config: RunConfig, paths: RunPaths, world: World) -> list[LatentDataset]:
    """Open them on all ranks or fail on all: each rank looks at other shards, and none may wait for one that left."""
    datasets, said = [], ""
    try:
        datasets = open_datasets(config.data, paths.latents, rank=world.rank, world_size=world.world_size)
    except DataError as error:
        said = str(error)
    problems = sorted({part for part in world.gather(said) if part})
    if problems:
        raise DataError("; ".join(problems))
    for dataset in datasets:
        refuse_mismatch(dataset.manifest, config, dataset.folder)
    return datasets


def _open_loader(config: RunConfig, datasets: Sequence[LatentDataset], world: World) -> LatentLoader:
    return LatentLoader(
        datasets,
        seed=config.seed,
        engine=config.engine,
        objective=config.objective,
        data=config.data,
        rank=world.rank,
        world_size=world.world_size,
    )


def _build_engine(config: RunConfig, paths: RunPaths, world: World, micro_batches: int) -> Engine:
    if world.device.type == "cpu":
        torch.set_num_threads(config.engine.threads)  # Sums over threads are part of the bits.
    torch.manual_seed(config.seed)
    network = UNet(config.model)
    freeze(network, config, paths, world)
    return Engine(
        network,
        engine=config.engine,
        optimizer=config.optimizer,
        world=world,
        micro_batches=micro_batches,
    )


def _resume(
    checkpoints: Checkpoints, facts: Mapping[str, Any], world: World, accept_data_change: bool
) -> RunState | None:
    resumed = checkpoints.resume(accept_data_change=accept_data_change)
    if resumed is None:
        return None
    state, manifest = resumed
    if world.is_first:
        for line in changed_settings(manifest["config"], facts["config"]):
            logger.warning("resumed at step %d with a changed setting: %s", state.step, line)
    return state


def _describe_run(config: RunConfig, paths: RunPaths, found: Mapping[str, str]) -> None:
    write_bytes(paths.config, dump_config(redacted_config(config)).encode())
    write_json(paths.versions, dict(found))


def _steps(run: Run) -> Generator[tuple[LatentBatch, ...], None, None]:
    """Yield the micro-batches of each step, wherever `run.state` stands; closing it ends the loader's threads."""
    state, global_batch = run.state, run.config.engine.global_batch
    while True:
        position = state.samples = beyond(state.samples, state.skipped_ranges)
        run.loader.resume(state.data_origin, state.substituted)
        with closing(_stream(run.loader, position)) as stream:
            for micro_batches in stream:
                if beyond(state.samples, state.skipped_ranges) != position:
                    break  # A skipped range begins here, or the run has gone back.
                refuse_straddling(position, state.skipped_ranges, global_batch)
                yield micro_batches
                position += global_batch


def _stream(loader: LatentLoader, position: int) -> Generator[tuple[LatentBatch, ...], None, None]:
    yield from loader.steps(position)


def _open_interval(run: Run) -> Interval:
    loss_sum, applied, *binned = run.state.interval
    timesteps = run.config.objective.timesteps
    return Interval(run.world.device, loss_sum=loss_sum, applied=applied, binned=binned, timesteps=timesteps)


def _record(run: Run, interval: Interval, grad_norm: float, rate: float) -> dict[str, float]:
    """Close the interval and return what is recorded of it, the same on all ranks; waits for device and ranks."""
    state, parts = run.state, {"text_encoder": run.step.text.take_seconds()}
    values = interval.close(run.world, run.config.engine.global_batch, parts)
    state.loss = values["loss"] if math.isfinite(values["loss"]) else None
    values |= {"grad_norm": grad_norm, "learning_rate": rate, "ema_decay": run.ema.decay}
    values |= {"skipped": state.skipped, "spikes": run.care.judge()}
    values |= run.utilisation.figures(values["samples_per_second"])
    return values | run.loader.order.figures(state.samples) | run.checkpoints.figures()


def _state_now(run: Run, interval: Interval) -> RunState:
    run.state.interval = interval.to_json()
    run.care.keep(run.state)
    run.state.substituted = run.loader.substituted
    return run.state


def _result(run: Run, stop: Stop) -> TrainResult:
    state = run.state
    stopped = state.step < run.config.train.steps
    loss = math.nan if state.loss is None else state.loss
    return TrainResult(state.step, state.samples, loss, stopped, str(stop.reason) if stopped else "")


def _open_records(
    config: RunConfig, paths: RunPaths, world: World, attempt: str, resumed_step: int
) -> Records:
    hosts = world.gather(socket.gethostname())
    if not world.is_first:
        return NoRecords()
    return open_records(paths, config, kind="train", attempt=attempt, resumed_step=resumed_step, hosts=hosts)


def _open_progress(config: RunConfig, world: World, done: int) -> AbstractContextManager[Progress]:
    if not world.is_first:
        return nullcontext(Progress(config.train.steps, done=done))
    return progress_bar(config.train.steps, "training", done=done)
