"""Wrap the network with DeepSpeed and take optimizer steps: the only room that imports it.

Every combination of settings that the config does not refuse gives the losses of plain torch on two ranks
(tests/distributed/test_engine.py). At stages 1 to 3 DeepSpeed waits for the device once a step to see whether the
gradients are finite, and nothing here adds to that; at stage 0, where DeepSpeed does not look, this room does.
"""

import atexit
import contextlib
import io
import logging
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import EngineConfig, OptimizerConfig
from pipeline.errors import ConfigError
from pipeline.training.deepspeed_config import derive_deepspeed_config
from pipeline.training.world import World

EXTENSIONS_VARIABLE = "TORCH_EXTENSIONS_DIR"
if EXTENSIONS_VARIABLE not in os.environ:
    # Processes that share torch's default folder rebuild each other's extensions, and one killed while it builds
    # leaves a lock that the next one waits on for ever. Nothing here needs a build; if the escape hatch asks for one
    # it lands in a folder of this process, which comes to be only then. DeepSpeed reads the variable at its import.
    _own_extensions = Path(tempfile.gettempdir(), f"ldm-torch-extensions-{uuid.uuid4().hex}")
    os.environ[EXTENSIONS_VARIABLE] = str(_own_extensions)
    atexit.register(shutil.rmtree, _own_extensions, ignore_errors=True)

# Said at every import, and at every skipped step without the step: `world` and `health` say it better.
_SAID_ELSEWHERE = ("Setting accelerator to CPU", "OVERFLOW! Skipping step")
logging.getLogger("DeepSpeed").addFilter(
    lambda record: not any(said in record.getMessage() for said in _SAID_ELSEWHERE)
)

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime import torch_autocast  # noqa: E402

logger = logging.getLogger(__name__)

DEEPSPEED_VERSION: str = deepspeed.__version__
COMPUTE_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The type of the network's weights by precision; float32 for the others."""


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did, the same on all ranks."""

    applied: bool
    """False when a gradient was not finite: nothing was changed, on any rank."""
    grad_norm: Tensor
    """Global norm before clipping, scalar; not finite when the step was skipped."""
    loss_scale_search: bool = False
    """Skipped while DeepSpeed looks for a smaller loss scale, at fp16 only: no sign that the run is ill."""


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

        Every rank must hand over equal weights. Raises ConfigError for a wrong `engine.deepspeed`, and for fp16 on a
        CPU.
        """
        config = derive_deepspeed_config(
            engine, optimizer, world.world_size, micro_batches, on_gpus=world.device.type != "cpu"
        )
        refuse_without_fp16(engine.precision, world.device)
        self.stage, self.precision, self.micro_batches = engine.zero_stage, engine.precision, micro_batches
        self._clip_grad_norm = optimizer.clip_grad_norm
        self._dtype = COMPUTE_TYPES.get(engine.precision, torch.float32)
        self._backwards = 0
        self._true_weights = _true_weights(network) if self._dtype != torch.float32 else {}
        network.to(world.device)
        if engine.activation_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        self.adamw = _adamw(network, optimizer)
        meet_deepspeed(world)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):  # Reports of its own memory, at some stages.
            self.network: deepspeed.DeepSpeedEngine = deepspeed.initialize(
                model=network, optimizer=self.adamw, config=config, dist_init_required=False
            )[0]
        if world.world_size == 1 and self.stage == 0:
            # It would flatten all gradients, sum them over this rank alone and copy them back, at every step.
            self.network.enable_backward_allreduce = False
        if engine.compile:
            self.network.compile()
        self._scaler: Any = self.network.optimizer.loss_scaler if engine.precision == "fp16" else None
        if self._scaler is not None:
            # At the smallest scale DeepSpeed would raise; gradients that overflow there are judged like any NaN.
            self._scaler.raise_error_at_min_scale = False
        self.network.train()
        logger.debug("DeepSpeed %s said: %s", DEEPSPEED_VERSION, said.getvalue())
        logger.info("DeepSpeed %s, derived config %s", DEEPSPEED_VERSION, config)

    def take_true_weights(self) -> Mapping[str, Tensor]:
        """Return the fp32 weights that were handed over, by name, once; empty where the network still has them.

        In bf16 and fp16 DeepSpeed makes its masters of weights that are rounded already: whoever knows where the
        masters lie (`fragments`) puts the true ones there.
        """
        weights, self._true_weights = self._true_weights, {}
        return weights

    def __call__(self, latents_BCHW: Tensor, timesteps_B: Tensor, *conditions: Tensor) -> Tensor:
        """Return the network's prediction [B, C, H, W], its inputs cast to the weights' type.

        All but the numbers that it embeds itself, times and sizes: bfloat16 cannot tell 1024 pixels from 1026.
        """
        texts, sizes = conditions[:2], conditions[2:]
        cast = (text.to(self._dtype) for text in texts)
        prediction: Tensor = self.network(latents_BCHW.to(self._dtype), timesteps_B, *cast, *sizes)
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
        # Above the smallest scale a gradient that overflowed says nothing yet.
        searching = self._scaler is not None and self._scaler.cur_scale > self._scaler.min_scale
        self.network.step()
        norm = self.network.get_global_grad_norm()
        applied = bool(self.network.was_step_applied())
        return StepOutcome(applied, torch.as_tensor(norm, dtype=torch.float32), searching and not applied)

    def _replicated_step(self) -> StepOutcome:
        """Step at stage 0, where DeepSpeed neither looks for NaN nor tells the norm: both are done here.

        Reading the verdict is the one wait of ours for the device in a step, and stands where DeepSpeed's own
        stands at stages 1 to 3. The update is queued before it and passes over itself on the device. The ranks need
        no word with each other: they hold the same averaged gradients to the bit.
        """
        weights = [weight for weight in self.network.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(weights, self._clip_grad_norm, norm)
        finite = torch.isfinite(norm)
        # The protocol between torch's GradScaler and its fused optimizers: 1 makes the step no step, count included.
        self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.network.step()
        return StepOutcome(bool(finite.item()), norm)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the network, so that the memory can go."""
        self.network.destroy()
        # Otherwise DeepSpeed takes the next engine of this process for one of autocast too.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def refuse_without_fp16(precision: str, device: torch.device) -> None:
    """Do nothing where the device has the precision.

    Raises:
        ConfigError: fp16 on a CPU, where DeepSpeed has no kernels for it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "engine.precision: fp16 needs a GPU and this process runs on the CPU; use bf16, autocast_bf16 or fp32"
        )


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return AdamW's two groups: matrices and kernels decay, biases and norms (fewer than two axes) do not."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    return [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]


def _true_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights as they are; DeepSpeed gives the network new ones and leaves these alone."""
    return {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}


def _adamw(network: nn.Module, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    # DeepSpeed's own "AdamW" is compiled at first use, even on a CPU; torch's fused one comes with torch.
    return torch.optim.AdamW(
        decay_groups(network, optimizer.weight_decay),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=True,
    )


def meet_deepspeed(world: World) -> None:
    """Let DeepSpeed use our process group, without compiling anything and without looking for MPI."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for line in stale_locks(Path(os.environ[EXTENSIONS_VARIABLE])):
        logger.warning(line)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates, and torch says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.world_size)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def stale_locks(extensions: Path) -> list[str]:
    """Return a line for each lock of an extension's build in the folder: whoever needs that one waits on it for ever.

    Nothing of ours needs one, so it is no error; an op asked for by `engine.deepspeed` would.
    """
    lines = []
    for lock in sorted(extensions.glob("**/lock")):
        with contextlib.suppress(FileNotFoundError):
            age_seconds = time.time() - lock.stat().st_mtime
            lines.append(
                f"{EXTENSIONS_VARIABLE}: {lock} is {age_seconds:.0f} s old: a build goes on or was killed, and what needs "
                "it waits without a word; remove the file if no compiler runs"
            )
    return lines
