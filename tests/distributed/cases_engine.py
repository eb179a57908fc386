"""What the ranks do in the engine's tests: steps of a small network, without data set, records or checkpoints."""

import gc
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.config import EmaConfig, EngineConfig, OptimizerConfig
from pipeline.config.engine import REFUSALS
from pipeline.training import train as train_module
from pipeline.training.averages.ema import Ema
from pipeline.training.engine import Engine
from pipeline.training.fragments import Fragments
from pipeline.training.learning_rate import learning_rate
from pipeline.training.step import TrainStep, micro_batch_seed
from pipeline.training.world import Pending, World, end_world, start_world
from tests.distributed.cases import make_config, paths_of
from tests.distributed.waits import Waits

STEPS = 20
GLOBAL_BATCH = 8
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, warmup_steps=5, schedule="cosine", weight_decay=0.1, clip_grad_norm=0.8
)
FIRST_WATCHED, WATCHED_STEPS = 3, 4
Settings = dict[str, Any]


class SmallNetwork(nn.Module):
    """Convolutions, a norm, a timestep, attention to text and dropout: 9 weights that shards cut at odd places."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, 10, 3, padding=1)
        self.time = nn.Linear(3, 10, bias=False)
        self.norm = nn.GroupNorm(2, 10)
        self.text = nn.Linear(7, 10, bias=False)
        self.dropout = nn.Dropout(0.1)
        self.leave = nn.Conv2d(10, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.checkpointing = False

    def enable_gradient_checkpointing(self) -> None:
        """Compute the block again in the backward pass, dropout masks included."""
        self.checkpointing = True

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        hidden = self.enter(latents_BCHW)
        if self.checkpointing:
            hidden = checkpoint(self._block, hidden, timesteps_B, text_BLD, use_reentrant=False)
        else:
            hidden = self._block(hidden, timesteps_B, text_BLD)
        return self.leave(hidden) * self.scale

    def _block(self, hidden: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        phase = timesteps_B.to(text_BLD.dtype)[:, None] / 1000
        time = self.time(torch.cat([phase, phase.sin(), phase.cos()], dim=1))
        hidden = self.norm(hidden + time[:, :, None, None])
        flat, text = hidden.flatten(2).transpose(1, 2), self.text(text_BLD)
        attended = functional.scaled_dot_product_attention(flat, text, text)
        hidden = hidden + attended.transpose(1, 2).unflatten(2, hidden.shape[2:])
        return self.dropout(functional.silu(hidden))


def new_network() -> SmallNetwork:
    """Return the network with the same weights at every call."""
    torch.manual_seed(7)
    return SmallNetwork()


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, timesteps, text and target of the global batch of one step.

    The targets of some steps are large, so that their gradients are clipped and others' are not.
    """
    draw = torch.Generator().manual_seed(1000 + step)
    latents, target = (torch.randn(GLOBAL_BATCH, 4, 6, 6, generator=draw) for _ in range(2))
    timesteps = torch.randint(0, 1000, (GLOBAL_BATCH,), generator=draw)
    text = torch.randn(GLOBAL_BATCH, 5, 7, generator=draw)
    return latents, timesteps, text, target * (2.0 if step % 3 == 0 else 0.3)


def micro_batch(step: int, number: int, micro_batches: int, rank: int, world_size: int) -> list[Tensor]:
    """Return the part of the global batch that `rank` sees in its micro-batch `number`."""
    each = GLOBAL_BATCH // world_size // micro_batches
    first = (rank * micro_batches + number) * each
    return [tensor[first : first + each] for tensor in batch(step)]


def micro_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the part of a micro-batch in the mean loss over the global batch."""
    return functional.mse_loss(prediction.float(), target, reduction="sum") / target[0].numel() / GLOBAL_BATCH


def matrix() -> list[Settings]:
    """Return every combination that the config does not refuse; fp16 needs a GPU."""
    names = ("zero_stage", "precision", "micro_batches", "activation_checkpointing", "offload_optimizer")
    values = ((0, 1, 2, 3), ("fp32", "bf16", "autocast_bf16"), (1, 2), (False, True), (False, True))
    combinations = [dict(zip(names, chosen, strict=True)) for chosen in product(*values)]
    return [settings for settings in combinations if not _refused(settings)]


def _refused(settings: Settings) -> bool:
    return any(
        all(settings.get(name) in values for name, values in refusal.settings.items()) for refusal in REFUSALS
    )


def config_of(settings: Settings, world_size: int) -> tuple[EngineConfig, int]:
    """Return the engine's section and the micro-batches of a step."""
    fields = dict(settings)
    micro_batches = fields.pop("micro_batches", 1)
    micro = GLOBAL_BATCH // world_size // micro_batches
    return EngineConfig(global_batch=GLOBAL_BATCH, micro_batch=micro, **fields), micro_batches


@contextmanager
def small_engine(world: World, settings: Settings) -> Iterator[tuple[Engine, Fragments]]:
    """Give an engine around the small network, bound and checked."""
    config, micro_batches = config_of(settings, world.world_size)
    engine = Engine(
        new_network(), engine=config, optimizer=OPTIMIZER, world=world, micro_batches=micro_batches
    )
    with closing(engine):
        yield engine, Fragments(engine, world)


def take_step(world: World, engine: Engine, step: int) -> tuple[Tensor, Any]:
    """Run one step; return this rank's part of the loss and what the engine says of the step."""
    losses = []
    for number in range(engine.micro_batches):
        torch.manual_seed(micro_batch_seed(0, step, number, world.rank))
        parts = micro_batch(step, number, engine.micro_batches, world.rank, world.world_size)
        loss = micro_loss(engine(*parts[:3]), parts[3])
        # As pipeline.training.step does: DeepSpeed divides by ranks and micro-batches.
        engine.backward(loss * world.world_size * engine.micro_batches)
        losses.append(loss.detach())
    return torch.stack(losses).sum(), engine.step(learning_rate(OPTIMIZER, step, STEPS))


def train_matrix(world: World, several: Sequence[Settings]) -> list[dict[str, Any]]:
    """Return for each engine its losses and gradient norms, and the fragments whose master was not the fp32 weight."""
    found = []
    for settings in several:
        true = {name: weight.detach().view(-1) for name, weight in new_network().named_parameters()}
        with small_engine(world, settings) as (engine, fragments):
            unlike = [
                fragment.name
                for fragment in fragments.owned
                if not torch.equal(fragment.master, true[fragment.name][fragment.start : fragment.stop])
            ]
            losses, norms = [], []
            for step in range(STEPS):
                loss, outcome = take_step(world, engine, step)
                assert outcome.applied, (settings, step)
                losses.append(loss)
                norms.append(float(outcome.grad_norm))
            total = world.sum(torch.stack(losses).tolist())
            updates = fragments.updates
        found.append({"losses": total, "norms": norms, "unlike": unlike, "updates": updates})
    return found


def run_cases(orders: list[list[Any]]) -> list[Any]:
    """Meet the other ranks and run the cases [function name, arguments] of this module in order."""
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    world = start_world(rank, world_size, rank, os.environ["MASTER_ADDR"], port, timeout_seconds=120)
    # DeepSpeed collects garbage at every start of an engine, half a second through all of torch.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *generation: 0)
        results = [globals()[name](world, **arguments) for name, arguments in orders]
    end_world()
    return results


def plain_torch(precision: str, micro_batches: int, world_size: int) -> dict[str, list[float]]:
    """Train the small network with nothing but torch in this process, all ranks' micro-batches one by one.

    fp32 masters; in bf16 a rounded copy computes, as mixed precision is defined (Micikevicius et al. 2017).
    """
    masters, network = new_network(), new_network()
    if precision == "bf16":
        network.bfloat16()
    weights, copies = list(masters.parameters()), list(network.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        sums = [torch.zeros_like(weight) for weight in weights]
        for rank, number in product(range(world_size), range(micro_batches)):
            torch.manual_seed(micro_batch_seed(0, step, number, rank))
            latents, timesteps, text, target = micro_batch(step, number, micro_batches, rank, world_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast_bf16"):
                prediction = network(latents.to(copies[0].dtype), timesteps, text.to(copies[0].dtype))
            loss = micro_loss(prediction, target)
            for total_gradient, gradient in zip(sums, torch.autograd.grad(loss, copies), strict=True):
                total_gradient += gradient.float()
            total += loss.item()
        for weight, gradient in zip(weights, sums, strict=True):
            weight.grad = gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, OPTIMIZER.clip_grad_norm)))
        for group in adamw.param_groups:
            group["lr"] = plain_rate(step)
        adamw.step()
        with torch.no_grad():
            for copy, weight in zip(copies, weights, strict=True):
                copy.copy_(weight)
        losses.append(total)
    return {"losses": losses, "norms": norms}


def plain_rate(step: int) -> float:
    """Return the rate written out: five steps up to 1e-2, then half a cosine down to step 20."""
    if step < 5:
        return 1e-2 * (step + 1) / 5
    return 0.5e-2 * (1 + math.cos(math.pi * (step - 5) / 15))


def skip_nan(world: World, settings: Settings) -> dict[str, Any]:
    """Take a step, one in which rank 1 alone loses NaN, and another; return what the middle one left as it was."""
    with small_engine(world, settings) as (engine, fragments):
        take_step(world, engine, 0)
        held = [(f.master, f.exp_avg, f.exp_avg_sq) for f in fragments.resident]
        before = [[tensor.clone() for tensor in three] for three in held]
        for number in range(engine.micro_batches):
            parts = micro_batch(1, number, engine.micro_batches, world.rank, world.world_size)
            loss = micro_loss(engine(*parts[:3]), parts[3])
            engine.backward(loss * float("nan") if world.rank == 1 else loss)
        skipped = engine.step(1e-2)
        pairs = zip(held, before, strict=True)
        same = all(torch.equal(*pair) for now, then in pairs for pair in zip(now, then, strict=True))
        updates = fragments.updates
        _, after = take_step(world, engine, 2)
        return {
            "applied": [skipped.applied, after.applied],
            "finite": [math.isfinite(float(skipped.grad_norm)), math.isfinite(float(after.grad_norm))],
            "same": same,
            "updates": [updates, fragments.updates],
            "search": skipped.loss_scale_search,
        }


def train_compiled(world: World, settings: Settings) -> dict[str, Any]:
    """Return the losses of three steps eager and compiled, and whether the compiler ran."""
    losses: dict[str, list[float]] = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        with small_engine(world, settings | {"compile": compiled}) as (engine, _):
            engine.network.module.dropout.p = 0.0
            losses[name] = [float(take_step(world, engine, step)[0]) for step in range(3)]
    return {"losses": losses, "compiled": bool(torch._dynamo.utils.counters["stats"]["unique_graphs"])}


def start_beside_locks(world: World) -> list[str]:
    """Start an engine with its optimizer offloaded, take a step, and return the warnings."""
    said = Said()
    logging.getLogger("pipeline").addHandler(said)
    try:
        with small_engine(world, {"zero_stage": 2, "precision": "bf16", "offload_optimizer": True}) as (
            engine,
            _,
        ):
            take_step(world, engine, 0)
    finally:
        logging.getLogger("pipeline").removeHandler(said)
    return said.lines


class Said(logging.Handler):
    """Keeps the warnings of the pipeline."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(record.getMessage())


def count_waits(world: World, root: str, stage: int, precision: str) -> dict[str, Any]:
    """Train nine steps without a record in between; return what waited in four of them, and the ages of stop flags."""
    settings = {"zero_stage": stage, "precision": precision}
    name = f"waits-{stage}-{precision}"
    config = make_config(
        Path(root), name, engine=settings, train={"steps": 9, "log_every": 100, "checkpoint_every": 100}
    )
    waits, steps, sent, ages = Waits(), {"now": -1}, [], []
    accumulate, start, wait = TrainStep.accumulate, World.start_max, Pending.wait

    def at_step(self: Any, batches: Any, step: int) -> Any:
        steps["now"] = step
        if step == FIRST_WATCHED:
            waits.begin()
        if step == FIRST_WATCHED + WATCHED_STEPS:
            waits.end()
        return accumulate(self, batches, step)

    def sending(self: World, value: int) -> Pending:
        sent.append(steps["now"])
        return start(self, value)

    def waiting(self: Pending) -> int:
        if waits.counting:
            ages.append(steps["now"] - sent[-1])
        return wait(self)

    with pytest.MonkeyPatch.context() as patch, waits.watching():
        patch.setattr(TrainStep, "accumulate", at_step)
        patch.setattr(World, "start_max", sending)
        patch.setattr(Pending, "wait", waiting)
        train_module.train(config, paths_of(Path(root), name), world, attempt="a1")
    return {"waits": dict(waits.found), "ages": ages}


def held_bytes(world: World, settings: Settings) -> dict[str, int]:
    """Return the bytes of each part of the state that this rank holds after a step, and its number of weights."""
    with small_engine(world, settings) as (engine, fragments):
        ema = Ema(fragments, EmaConfig(decay=0.9))
        found = {"gradients": 0}
        step = engine.network.step

        def measured(*given: Any) -> Any:
            if engine.network.is_gradient_accumulation_boundary():
                found["gradients"] = gradient_bytes(engine)
            return step(*given)

        engine.network.step = measured
        take_step(world, engine, 0)
        ema.update()
        state = [pair for pair in engine.adamw.state.items() if pair[0].numel()]
        weights = [getattr(weight, "ds_tensor", weight) for weight in engine.network.module.parameters()]
        return found | {
            "weights": bytes_of(weights),
            "masters": bytes_of([master for master, _ in state]) if engine.stage else 0,
            "moments": bytes_of([held[kind] for _, held in state for kind in ("exp_avg", "exp_avg_sq")]),
            "ema": bytes_of(ema.averages),
            "total": fragments.total,
        }


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the sum of what the tensors' elements take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gradient_bytes(engine: Engine) -> int:
    """Return the bytes behind all gradients between backward and step, buckets left out, each storage once."""
    optimizer: Any = engine.network.optimizer
    tensors = [weight.grad for weight in engine.network.module.parameters()]
    for group in getattr(optimizer, "averaged_gradients", {}).values():
        tensors += group or []
    tensors += getattr(optimizer, "fp32_groups_gradients_flat", [])
    tensors += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    there = [tensor.untyped_storage() for tensor in tensors if tensor is not None and tensor.numel()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in there}.values())
