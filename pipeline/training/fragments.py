"""The adapter to DeepSpeed's shards: which stretch of which fp32 master this rank holds, as live views.

Checkpoints and the EMA know nothing else of DeepSpeed. Every name private to DeepSpeed stands in this file; it is
tested with the range below and checks itself at the start.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ToolError
from pipeline.training.engine import DEEPSPEED_VERSION, Engine
from pipeline.training.world import World

TESTED_VERSIONS = ("0.19",)
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name` of `shape`, float32, one-dimensional.

    `master` and Adam's moments are views of what the optimizer works on: writing to them is loading.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.master.numel()

    def narrow(self, start: int, stop: int) -> "Fragment":
        """Return the elements [start, stop) of the flattened parameter as a fragment of their own."""
        first, count = start - self.start, stop - start
        master, mean, square = (
            view.narrow(0, first, count) for view in (self.master, self.exp_avg, self.exp_avg_sq)
        )
        return Fragment(self.name, self.shape, start, master, mean, square)


class Fragments:
    """What this rank holds of the training state.

    `owned` of all ranks together is every trainable element exactly once: it is saved and averaged. `resident`
    is everything on this rank, which loading must fill; it is more than `owned` at stage 0 only, where each rank
    holds the whole state and owns an even share of it.
    """

    def __init__(self, engine: Engine, world: World) -> None:
        """Bind to the engine's shards.

        Raises:
            ToolError: DeepSpeed is not a tested version, or its shards are not what this adapter takes them for.
        """
        refuse_untested(DEEPSPEED_VERSION)
        self._engine, self._world = engine, world
        network: Any = engine.network.module
        named = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
        self.shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in named}
        self.total = sum(math.prod(shape) for shape in self.shapes.values())
        self.resident = tuple(_resident(engine, named, world))
        self.owned = tuple(
            _even_share(self.resident, world.rank, world.world_size) if engine.stage == 0 else self.resident
        )
        self._check(named, world)
        self._make_masters_true()

    @property
    def updates(self) -> int:
        """Adam's count of applied steps."""
        counts = {int(state["step"].item()) for state in self._engine.adamw.state.values()}
        assert len(counts) <= 1, counts
        return counts.pop() if counts else 0

    @torch.no_grad()
    def loaded(self, updates: int) -> None:
        """Finish a load: set Adam's step count and make the network's weights of the masters just written."""
        for state in self._engine.adamw.state.values():
            state["step"].fill_(float(updates))
        self.refresh_weights()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Make the network's weights of the masters that each rank owns; all ranks together, between two steps.

        As DeepSpeed does after a step. At stage 0 every rank gets what the others own; at stage 3 weights that
        an earlier forward pass has left gathered are given up first, for they would stay as they were.
        """
        optimizer: Any = self._engine.network.optimizer
        if self._engine.stage == 0:
            for source in range(self._world.world_size):
                for piece in _even_share(self.resident, source, self._world.world_size):
                    self._world.send(piece.master, source)
        elif self._engine.stage in (1, 2):
            optimizer.update_lp_params()
        else:
            optimizer.empty_partition_cache()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    @torch.no_grad()
    def _make_masters_true(self) -> None:
        """Write the fp32 weights that the engine was given into the masters, which DeepSpeed made of rounded ones.

        The network's weights stay what they are: the same numbers, rounded.
        """
        weights = self._engine.take_true_weights()
        for fragment in self.resident if weights else ():
            fragment.master.copy_(weights[fragment.name].view(-1)[fragment.start : fragment.stop])

    def _check(self, named: list[tuple[str, nn.Parameter]], world: World) -> None:
        """Refuse to start when the shards of all ranks are not the model: a wrong checkpoint would be silent."""
        count = sum(fragment.master.numel() for fragment in self.owned)
        wrong = [fragment.name for fragment in self.resident if fragment.master.dtype != torch.float32]
        wrong += [
            name for name in _unlike_weights(self.resident, dict(named), self._engine.stage, world.rank)
        ]
        reports = world.gather({"count": count, "wrong": wrong[:5]})
        found = sum(report["count"] for report in reports)
        names = sorted({name for report in reports for name in report["wrong"]})
        if found != self.total or names:
            raise ToolError(
                f"DeepSpeed {DEEPSPEED_VERSION}: its shards hold {found} of {self.total} trainable elements"
                + (f", and differ from the weights in {', '.join(names)}" if names else "")
                + f"; this code is tested with DeepSpeed {', '.join(TESTED_VERSIONS)}.x without NVMe offload"
            )


def refuse_untested(version: str) -> None:
    """Do nothing for a DeepSpeed version this adapter is tested with.

    Raises:
        ToolError: naming the version found and the tested ones.
    """
    if ".".join(version.split(".")[:2]) not in TESTED_VERSIONS:
        raise ToolError(
            f"DeepSpeed {version}: this code reads names private to DeepSpeed and is tested with "
            f"{', '.join(TESTED_VERSIONS)}.x; install one of those"
        )


def _resident(engine: Engine, named: list[tuple[str, nn.Parameter]], world: World) -> Iterator[Fragment]:
    if engine.stage == 0:
        for name, weight in named:
            yield _cut(engine, name, tuple(weight.shape), 0, weight, slice(0, weight.numel()))
    elif engine.stage == 3:
        yield from _partitioned(engine, named, world)
    else:
        for name, weight in named:
            # DeepSpeed's link from a weight to its stretch of the flat fp32 partition; None: another rank's.
            link = getattr(weight, "_hp_mapping", None)
            if link is not None:
                flat = engine.adamw.param_groups[link.param_group_index]["params"][0]
                first, count = link.hp_fragment_address.start, link.hp_fragment_address.numel
                start = link.lp_fragment_address.start
                yield _cut(engine, name, tuple(weight.shape), start, flat, slice(first, first + count))


def _partitioned(engine: Engine, named: list[tuple[str, nn.Parameter]], world: World) -> Iterator[Fragment]:
    """Yield the fragments at stage 3: every weight is cut into equal pieces, the last ones padded."""
    optimizer: Any = engine.network.optimizer
    for name, weight in named:
        piece: Any = weight
        group, first, length = optimizer.grad_position[optimizer.get_param_id(weight)]
        start = world.rank * piece.partition_numel()
        count = min(length, piece.ds_numel - start)
        if count > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield _cut(engine, name, tuple(piece.ds_shape), start, flat, slice(first, first + count))


def _cut(
    engine: Engine, name: str, shape: tuple[int, ...], start: int, master: Tensor, at: slice
) -> Fragment:
    """Return the fragment in `master[at]`, with Adam's moments beside it, made now if Adam has not begun."""
    state = engine.adamw.state[master]
    if not state:
        # What torch's AdamW makes at its first step; there is something to load into before it.
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state.update({moment: torch.zeros_like(master) for moment in MOMENTS})
    master, mean, square = (
        tensor.detach().view(-1)[at] for tensor in (master, state["exp_avg"], state["exp_avg_sq"])
    )
    return Fragment(name, shape, start, master, mean, square)


def _even_share(whole: tuple[Fragment, ...], rank: int, world_size: int) -> Iterator[Fragment]:
    """Yield the stretch of `rank` of all fragments laid end to end: shares differ by at most one element."""
    total = sum(fragment.master.numel() for fragment in whole)
    first, last = (total * number // world_size for number in (rank, rank + 1))
    offset = 0
    for fragment in whole:
        start, stop = max(first - offset, fragment.start), min(last - offset, fragment.stop)
        if start < stop:
            yield fragment.narrow(start, stop)
        offset += fragment.master.numel()


def _unlike_weights(
    fragments: tuple[Fragment, ...], named: dict[str, nn.Parameter], stage: int, rank: int
) -> Iterator[str]:
    """Yield the names whose master, rounded to the weight's type, is not the weight at the place it claims."""
    for fragment in fragments:
        weight: Any = named[fragment.name]
        if stage == 3:
            same = weight.ds_tensor.detach().view(-1)[: fragment.master.numel()]
        else:
            same = weight.detach().view(-1)[fragment.start : fragment.stop]
        if not torch.equal(fragment.master.to(same.device, same.dtype), same):
            yield fragment.name
