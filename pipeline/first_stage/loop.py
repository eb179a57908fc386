"""The training loop that all first-stage models share: records, checkpoints, resume to the bit, collapse.

A step is a pure function of (tensors, seed, step): learning rate, batch, flips and noise are computed from the step,
so a checkpoint holds tensors and nothing else.
"""

import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import CheckpointError, DivergedError
from pipeline.first_stage import resume
from pipeline.first_stage.stage import Parts, Stage, learning_rate_factor
from pipeline.progress import Progress, progress_bar
from pipeline.publish import remove_temporaries, whole_file
from pipeline.tracking import NoRecords, Records, open_records

Model = TypeVar("Model", bound="Trainee")
PATIENCE = 5
"""Records in a row that must look collapsed before the training ends."""
_SUSPECT = "collapsed_records"


class Trainee(Protocol):
    """What is trained: a step at a time, with all its state in named tensors."""

    def step(self, step: int, *, measured: bool) -> dict[str, Tensor]:
        """Take step `step` (from 0) and return scalars to record, `loss` among them; all of them if `measured`."""

    def parts(self) -> Parts:
        """Return everything that the next step depends on."""

    def restore(self, parts: Parts) -> None:
        """Lay saved parts in, bit for bit."""

    def collapse(self, shown: dict[str, float]) -> str | None:
        """Return what has collapsed and what to do, judged by one record, or None."""

    def picture(self) -> Image.Image | None:
        """Return a picture of what the model does by now, or None; draws nothing and leaves the model as it was."""


def train_once(
    stage: Stage,
    folders: Sequence[Path],
    report: str,
    make: Callable[[], Model],
    publish: Callable[[Model, dict[str, float]], None],
) -> None:
    """Leave `folders` trained: at once if their `report` says that they are, else by training what is left to do.

    `make` draws from torch's generator, seeded for it; `publish` runs on the main process with what the loop noted.

    Raises:
        ConfigError: when the folders or the checkpoints belong to others.
    """
    finished = [resume.is_finished(folder, report, stage.settings) for folder in folders]
    if not all(finished):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.config.seed)
            trainee = make()
        noted = fit(stage, trainee)
        if stage.accelerator.is_main_process:
            publish(trainee, noted)
    if stage.accelerator.is_main_process:
        for folder in folders:
            resume.clear(stage.checkpoints, folder)
    stage.accelerator.wait_for_everyone()


def fit(stage: Stage, trainee: Trainee) -> dict[str, float]:
    """Train to the recipe's last step and return `first_loss` and `last_loss`.

    Goes on from the newest checkpoint that verifies.

    Raises:
        DivergedError: when a recorded value is no longer finite, or the model has collapsed for five records in a
            row; nothing not finite is ever saved.
        CheckpointError: when there are checkpoints and none verifies.
        ConfigError: when the checkpoints belong to other settings.
    """
    recipe = stage.recipe
    start, noted = _resume(stage, trainee)
    with _deterministic(), _records(stage, start) as records, _progress(stage, start) as progress:
        for step in range(start, recipe.steps):
            done = step + 1
            saves = done % recipe.checkpoint_every == 0 or done == recipe.steps
            logs = saves or step == 0 or done % recipe.log_every == 0
            values = trainee.step(step, measured=logs)
            shown = {}
            if logs:
                shown = _global_values(stage, step, values)
                suspect = _suspect(stage, trainee, step, shown, noted)
                noted = {
                    "first_loss": shown["loss"],
                    **noted,
                    "last_loss": shown["loss"],
                    _SUSPECT: suspect,
                }
                rate = recipe.learning_rate * learning_rate_factor(recipe, step)
                records.log(done, {**shown, "learning_rate": rate}, samples=done * recipe.batch)
            if saves:
                _save(stage, done, trainee, noted)
                _show(stage, done, trainee, records)
            progress.advance(1, **({"loss": shown["loss"]} if shown else {}))
    return {name: value for name, value in noted.items() if name != _SUSPECT}


def _suspect(
    stage: Stage, trainee: Trainee, step: int, shown: dict[str, float], noted: dict[str, float]
) -> float:
    """Return how many records in a row looked collapsed; the warm-up is not judged."""
    found = trainee.collapse(shown) if step >= stage.recipe.warmup_steps else None
    suspect = noted.get(_SUSPECT, 0.0) + 1.0 if found else 0.0
    if suspect >= PATIENCE:
        raise DivergedError(
            f"{stage.recipe.kind}, step {step + 1}: {found} (so for {PATIENCE} records in a row)"
        )
    return suspect


def _resume(stage: Stage, trainee: Trainee) -> tuple[int, dict[str, float]]:
    """Lay the newest verified checkpoint in; return its step and notes, or 0 and none."""
    if stage.accelerator.is_main_process:
        remove_temporaries(stage.checkpoints)
    saved = resume.newest(stage.checkpoints)
    step = saved.step if saved else 0
    steps = stage.accelerator.gather(torch.tensor([step], device=stage.accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"{stage.checkpoints}: the processes see different newest checkpoints, steps {sorted(set(steps))}; "
            f"the run folder must be on a file system that all of them share"
        )
    if saved is None:
        return 0, {}
    resume.require_equal_settings(saved.settings, stage.settings, saved.path, str(stage.checkpoints))
    trainee.restore(resume.load(saved))
    return step, dict(saved.noted)


def _save(stage: Stage, step: int, trainee: Trainee, noted: dict[str, float]) -> None:
    if stage.accelerator.is_main_process:
        about = {"settings": stage.settings, "noted": noted}
        resume.save(stage.checkpoints, step, trainee.parts(), about)
    stage.accelerator.wait_for_everyone()


def _show(stage: Stage, step: int, trainee: Trainee, records: Records) -> None:
    """Keep the trainee's picture as samples/KIND-XXXXXXXX.png, and where the records go."""
    if not stage.accelerator.is_main_process:
        return
    picture = trainee.picture()
    if picture is not None:
        path = stage.paths.samples / f"{stage.recipe.kind}-{step:08d}.png"
        with whole_file(path) as beside:
            picture.save(beside, format="PNG")
        records.image(path, step, "reconstructions")


def _global_values(stage: Stage, step: int, values: dict[str, Tensor]) -> dict[str, float]:
    """Return the means over the processes; raise DivergedError where one is not finite."""
    names = sorted(values)
    means = stage.accelerator.reduce(torch.stack([values[name].detach().float() for name in names]), "mean")
    shown = dict(zip(names, means.tolist(), strict=True))
    bad = [name for name in names if not math.isfinite(shown[name])]
    if bad:
        raise DivergedError(
            f"{stage.recipe.kind}, step {step + 1}: {', '.join(f'{name} is {shown[name]}' for name in bad)}; "
            f"lower first_stage.{stage.recipe.kind}.learning_rate (now {stage.recipe.learning_rate:g})"
        )
    return shown


def _records(stage: Stage, start: int) -> Records:
    if not stage.accelerator.is_main_process:
        return NoRecords()
    attempt = uuid.uuid4().hex[:12]
    return open_records(
        stage.paths, stage.config, kind=stage.recipe.kind, attempt=attempt, resumed_step=start
    )


@contextmanager
def _progress(stage: Stage, start: int) -> Iterator[Progress]:
    shows = stage.accelerator.is_main_process
    bar = progress_bar(stage.recipe.steps, stage.recipe.kind, done=start)
    with bar if shows else nullcontext(Progress(stage.recipe.steps, done=start)) as progress:
        yield progress


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let cuDNN choose the same kernels every time: without it a resumed training differs in the last bits."""
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=False,
        deterministic=True,
        allow_tf32=torch.backends.cudnn.allow_tf32,
    ):
        yield
