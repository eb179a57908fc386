"""The training loop that both first-stage models share: accelerate, AdamW, warm-up and cosine, resume to the bit.

A step is a pure function of (weights, AdamW state, seed, step): learning rate, batch, flips and noise are
computed from the step, so a checkpoint holds tensors and nothing else. `accelerate` moves the model to the
device and averages gradients over the processes that a launcher started; alone, it does nothing.
"""

import math
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.errors import CheckpointError, ConfigError, DivergedError
from pipeline.first_stage import resume
from pipeline.paths import RunPaths
from pipeline.progress import Progress, progress_bar
from pipeline.publish import remove_temporaries
from pipeline.tracking import NoRecords, Records, open_records

# (network, step from 0) -> the scalar handed to backward on this process, and scalars to record.
StepLoss = Callable[[nn.Module, int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Recipe:
    """The numbers of one first-stage training."""

    kind: str
    batch: int
    steps: int
    warmup_steps: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip_grad_norm: float
    checkpoint_every: int
    log_every: int


@dataclass(frozen=True)
class Stage:
    """One first-stage training of one run: where it writes, on what it runs, and what makes it this training."""

    config: RunConfig
    paths: RunPaths
    accelerator: Accelerator
    recipe: Recipe
    settings: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Folder of the resumable checkpoints; gone once the model is published."""
        return checkpoint_folder(self.paths, self.recipe.kind)


def checkpoint_folder(paths: RunPaths, kind: str) -> Path:
    """Return where the first stage `kind` (`autoencoder` or `clip`) keeps its resumable checkpoints."""
    return paths.root / "first_stage" / kind


def start_accelerator(batch: int, setting: str) -> Accelerator:
    """Return accelerate's view of the processes that a launcher started (RANK, WORLD_SIZE, ...), or of one.

    Precision is not handed to it: its state is one a process, and both trainings may run in the same process.

    Raises:
        ConfigError: when the processes do not divide `batch`, the value of `setting`.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    if batch % accelerator.num_processes:
        raise ConfigError(
            f"{setting} {batch} is not a multiple of the {accelerator.num_processes} processes: every process "
            f"takes an equal share; change one of them"
        )
    return accelerator


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then a half cosine that ends near zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    through = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * through))


def fit(
    stage: Stage, network: nn.Module, step_loss: StepLoss, after_update: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Train `network` in place to the recipe's last step and return `first_loss` and `last_loss`.

    Goes on from the newest checkpoint that verifies. `after_update` is called after every optimizer step.

    Raises:
        DivergedError: when the loss or the gradient is no longer finite; nothing not finite is ever saved.
        CheckpointError: when there are checkpoints and none verifies.
        ConfigError: when the checkpoints belong to other settings.
    """
    accelerator, recipe = stage.accelerator, stage.recipe
    network.to(accelerator.device)
    optimizer = _adamw(network, recipe)
    start, noted = _resume(stage, network, optimizer)
    prepared, stepper = accelerator.prepare(network, optimizer)
    prepared.train()
    with _deterministic(), _records(stage, start) as records, _progress(stage, start) as progress:
        for step in range(start, recipe.steps):
            objective, values = step_loss(prepared, step)
            accelerator.backward(objective)
            grad_norm = accelerator.clip_grad_norm_(prepared.parameters(), recipe.clip_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            stepper.step()
            stepper.zero_grad()
            after_update()
            done = step + 1
            saves = done % recipe.checkpoint_every == 0 or done == recipe.steps
            shown = {}
            if saves or step == 0 or done % recipe.log_every == 0:
                shown = _global_values(stage, step, {**values, "grad_norm": grad_norm})
                noted = {"first_loss": shown["loss"], **noted, "last_loss": shown["loss"]}
                records.log(
                    done, {**shown, "learning_rate": learning_rate(recipe, step)}, samples=done * recipe.batch
                )
            if saves:
                _save(stage, done, network, optimizer, noted)
            progress.advance(1, **({"loss": shown["loss"]} if shown else {}))
    return noted


def _adamw(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW over two groups: matrices and kernels decay, biases and norms do not."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=fused)


def _resume(
    stage: Stage, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, float]]:
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
    resume.restore(saved, network, optimizer)
    return step, dict(saved.noted)


def _save(
    stage: Stage, step: int, network: nn.Module, optimizer: torch.optim.Optimizer, noted: dict[str, float]
) -> None:
    if stage.accelerator.is_main_process:
        about = {"settings": stage.settings, "noted": noted}
        resume.save(stage.checkpoints, step, network, optimizer, about)
    stage.accelerator.wait_for_everyone()


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
