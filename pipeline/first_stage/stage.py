"""One first-stage training: its numbers, where it writes, on what it runs, and its optimizer steps.

`accelerate` moves a model to the device and averages gradients over the processes that a launcher started; alone,
it does nothing.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.first_stage import resume
from pipeline.paths import RunPaths

Parts = Mapping[str, Mapping[str, Tensor]]
"""What a checkpoint holds: name of a file -> name of a tensor -> tensor."""


class Paced(Protocol):
    """The settings that every trained model has."""

    @property
    def batch(self) -> int:
        """Samples a step over all processes."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""

    @property
    def warmup_steps(self) -> int:
        """Linear warm-up steps."""

    @property
    def learning_rate(self) -> float:
        """Peak of AdamW's rate."""

    @property
    def checkpoint_every(self) -> int:
        """Steps between resumable checkpoints."""

    @property
    def log_every(self) -> int:
        """Steps between records."""


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

    @classmethod
    def paced(
        cls,
        kind: str,
        section: Paced,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        clip_grad_norm: float,
    ) -> Self:
        """Return the recipe of `kind` with the pace that the config's section sets."""
        return cls(
            kind=kind,
            batch=section.batch,
            steps=section.steps,
            warmup_steps=section.warmup_steps,
            learning_rate=section.learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            clip_grad_norm=clip_grad_norm,
            checkpoint_every=section.checkpoint_every,
            log_every=section.log_every,
        )


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
    """Return where the first stage `kind` (`autoencoder`, `features` or `clip`) keeps its resumable checkpoints."""
    return paths.root / "first_stage" / kind


def open_stage(config: RunConfig, paths: RunPaths, recipe: Recipe, settings: Mapping[str, Any]) -> Stage:
    """Return the training of `recipe`; `settings` and the run's seed and image size say which one it is.

    Raises:
        ConfigError: when the processes do not divide the batch.
    """
    whole = {**settings, "image_size": config.encode.image_size, "seed": config.seed}
    setting = f"first_stage.{recipe.kind.replace('features', 'autoencoder.perceptual')}.batch"
    return Stage(config, paths, start_accelerator(recipe.batch, setting), recipe, whole)


def start_accelerator(batch: int, setting: str) -> Accelerator:
    """Return accelerate's view of the processes that a launcher started (RANK, WORLD_SIZE, ...), or of one.

    Precision is not handed to it: its state is one a process, and several trainings may run in the same process.

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


def learning_rate_factor(recipe: Recipe, step: int) -> float:
    """Return the part of the peak rate that step `step` (from 0) has: linear warm-up, then a half cosine to near 0."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    through = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * through))


class Learner:
    """A network under AdamW: wrapped for the processes, stepped, saved to the bit."""

    def __init__(
        self, stage: Stage, network: nn.Module, *, learning_rate: float | None = None, prefix: str = ""
    ) -> None:
        """Move `network` to the device; `prefix` tells the checkpoint files of several learners apart."""
        self._stage, self._prefix = stage, prefix
        self._rate = stage.recipe.learning_rate if learning_rate is None else learning_rate
        self.network = network.to(stage.accelerator.device)
        self.optimizer = adamw(network, stage.recipe)
        self.wrapped, self._stepper = stage.accelerator.prepare(network, self.optimizer)
        self.wrapped.train()

    def learn(self, loss: Tensor, step: int) -> Tensor:
        """Take one AdamW step down the gradient of `loss` and return the gradient's norm before it was cut."""
        accelerator, recipe = self._stage.accelerator, self._stage.recipe
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), recipe.clip_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * learning_rate_factor(recipe, step)
        self._stepper.step()
        self._stepper.zero_grad()
        assert isinstance(norm, Tensor)
        return norm

    def parts(self) -> Parts:
        """Return weights and AdamW state."""
        return {
            f"{self._prefix}model": self.network.state_dict(),
            f"{self._prefix}optimizer": resume.optimizer_tensors(self.network, self.optimizer),
        }

    def restore(self, parts: Parts) -> None:
        """Lay the saved weights and AdamW state in, bit for bit."""
        self.network.load_state_dict(parts[f"{self._prefix}model"], strict=True)
        resume.restore_optimizer(parts[f"{self._prefix}optimizer"], self.network, self.optimizer)


class Average:
    """An exponential moving average of a network's fp32 weights; every process keeps an equal one."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Start at the weights as they are; `decay` holds after the ramp."""
        self._decay = decay
        self._named = dict(network.named_parameters())
        self._held = {name: parameter.detach().clone() for name, parameter in self._named.items()}

    def update(self, updates: int) -> None:
        """Move towards the weights: a <- d a + (1 - d) w, d = min(decay, (1 + s) / (10 + s)) after s updates.

        Source: the ramp of latent-diffusion's and diffusers' EMA, which forgets a random start.
        """
        decay = min(self._decay, (1 + updates) / (10 + updates))
        weights = [parameter.detach() for parameter in self._named.values()]
        torch._foreach_lerp_(list(self._held.values()), weights, 1.0 - decay)

    @torch.no_grad()
    def into_weights(self) -> None:
        """Replace the network's weights by their average: at the end, to measure and publish it."""
        for name, parameter in self._named.items():
            parameter.copy_(self._held[name])

    def parts(self) -> Parts:
        """Return the average."""
        return {"average": self._held}

    def restore(self, parts: Parts) -> None:
        """Lay the saved average in."""
        for name, held in self._held.items():
            held.copy_(parts["average"][name])


def joined(parts: Iterable[Parts]) -> Parts:
    """Return all files of several savers."""
    return {name: tensors for some in parts for name, tensors in some.items()}


def adamw(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW over two groups: matrices and kernels decay, biases and norms do not."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=fused)
