"""Wrap the network with DeepSpeed and take optimizer steps: the only room that imports it.

Measured against plain torch on two ranks: ZeRO 0 to 3 give the same fp32 losses to 1e-6. DeepSpeed syncs the
device once a step to decide whether the gradients are finite; nothing here adds another at stages 1 to 3.
"""

import contextlib
import hashlib
import io
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config import EngineConfig, OptimizerConfig
from pipeline.training.deepspeed_config import derive_deepspeed_config
from pipeline.training.world import World

# Environments that share torch's default folder rebuild each other's extensions, and a process killed while it
# builds leaves a lock that the next one waits on for ever. DeepSpeed reads the variable when it is imported.
_ENVIRONMENT_DIGEST = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "ldm" / f"torch_extensions-{_ENVIRONMENT_DIGEST}")
)

# Said at every import, and at every skipped step without the step: `world` and `health` say it better.
_SAID_ELSEWHERE = ("Setting accelerator to CPU", "OVERFLOW! Skipping step")
logging.getLogger("DeepSpeed").addFilter(
    lambda record: not any(said in record.getMessage() for said in _SAID_ELSEWHERE)
)

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

logger = logging.getLogger(__name__)

DEEPSPEED_VERSION: str = deepspeed.__version__


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, the same on all ranks."""

    applied: bool
    """False when a gradient was not finite: nothing was changed, on any rank."""
    grad_norm: Tensor
    """Global norm before clipping, scalar; not finite when the step was skipped."""


class Engine:
    """The network on its device, sharded by ZeRO, with AdamW on fp32 masters."""

    def __init__(
        self,
        network: nn.Module,
        *,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        world: World,
        micro_batches: int,
    ) -> None:
        """Take over `network` (its parameters become DeepSpeed's) for steps of `micro_batches` micro-batches.

        Every rank must hand over equal weights. Raises ConfigError for a wrong `engine.deepspeed`.
        """
        config = derive_deepspeed_config(engine, optimizer, world.world_size, micro_batches)
        self.stage, self.precision, self.micro_batches = engine.zero_stage, engine.precision, micro_batches
        self._world, self._clip_grad_norm = world, optimizer.clip_grad_norm
        self._dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
        self._backwards = 0
        network.to(world.device)
        if engine.activation_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        self.adamw = _adamw(network, optimizer)
        _meet_deepspeed(world)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):  # Reports of its own memory, at some stages.
            self.network: deepspeed.DeepSpeedEngine = deepspeed.initialize(
                model=network, optimizer=self.adamw, config=config, dist_init_required=False
            )[0]
        self.network.train()
        logger.debug("DeepSpeed %s said: %s", DEEPSPEED_VERSION, said.getvalue())
        logger.info("DeepSpeed %s, derived config %s", DEEPSPEED_VERSION, config)

    def __call__(self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Return the network's prediction [B, C, H, W], its inputs cast to the weights' type."""
        prediction: Tensor = self.network(latents_BCHW.to(self._dtype), timesteps_B, text_BLD.to(self._dtype))
        return prediction

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; DeepSpeed divides by micro-batches and averages over ranks."""
        assert self._backwards < self.micro_batches, "step() is due"
        self.network.backward(loss)
        self._backwards += 1
        if self._backwards < self.micro_batches:
            # Only moves DeepSpeed's own count of micro-batches.
            self.network.step()

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip, update masters and weights with `learning_rate`, and forget the gradients.

        A gradient that is not finite on any rank makes this a skip on all of them: weights, moments and Adam's
        step count stay as they were.
        """
        assert self._backwards == self.micro_batches, (self._backwards, self.micro_batches)
        self._backwards = 0
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            return self._replicated_step()
        self.network.step()
        norm = self.network.get_global_grad_norm()
        applied = bool(self.network.was_step_applied())
        return StepOutcome(applied, torch.as_tensor(norm, dtype=torch.float32))

    def _replicated_step(self) -> StepOutcome:
        """Step at stage 0, where DeepSpeed neither looks for NaN nor tells the norm: both are done here."""
        weights = [weight for weight in self.network.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        applied = self._world.maximum(int(not torch.isfinite(norm).item())) == 0
        if applied:
            torch.nn.utils.clip_grads_with_norm_(weights, self._clip_grad_norm, norm)
        else:
            for weight in weights:
                weight.grad = None  # AdamW passes over what has no gradient, weight decay included.
        self.network.step()
        return StepOutcome(applied, norm)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the network, so that the memory can go."""
        self.network.destroy()


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return AdamW's two groups: matrices and kernels decay, biases and norms (fewer than two axes) do not."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]


def _adamw(network: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    # DeepSpeed's own "AdamW" is compiled at first use, even on a CPU; torch's fused one comes with torch.
    return torch.optim.AdamW(
        decay_groups(network, optimizer.weight_decay),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=True,
    )


def _meet_deepspeed(world: World) -> None:
    """Let DeepSpeed use our process group, without compiling anything and without looking for MPI."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, and torch says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.world_size)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
