"""Rank, device, and the few collectives of our own: the only room that imports `torch.distributed`.

Our messages are small: verdicts, a stop flag, a little JSON. They travel over a gloo group of their own on the
CPU, so that they neither wait for nor reorder the gradient traffic. Without a process group a `World` is one
process alone, and every collective answers at once.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import PipelineError

DEFAULT_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class Pending:
    """A maximum over all ranks that is on its way."""

    value: Tensor
    work: dist.Work | None

    def wait(self) -> int:
        """Return the maximum; blocks until every rank has sent its part."""
        if self.work is not None:
            self.work.wait()
        return int(self.value.item())


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that decides, writes and prints for all."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` (plain JSON data) on every rank."""
        if self.control is None:
            return value
        payload = _encode(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        size_bytes = torch.tensor([len(payload)])
        dist.broadcast(size_bytes, src=0, group=self.control)
        if not self.is_first:
            payload = torch.empty(int(size_bytes.item()), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self.control)
        return _decode(payload)

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` (plain JSON data) of every rank, in the order of ranks, on every rank."""
        if self.control is None:
            return [value]
        payload = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=self.control)
        longest = max(int(size_bytes.item()) for size_bytes in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(payload)] = payload
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.control)
        return [_decode(part[: int(size.item())]) for part, size in zip(parts, sizes, strict=True)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks of each value, in float64."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.control is not None:
            dist.all_reduce(total, group=self.control)
        return [float(value) for value in total]

    def send(self, tensor: Tensor, source: int) -> None:
        """Make `tensor`, on this rank's device, on all ranks what it is on the rank `source`, in place."""
        if self.control is not None:
            dist.broadcast(tensor, src=source)

    def add_up(self, tensor: Tensor) -> None:
        """Make `tensor`, on this rank's device, on all ranks the sum over all of them, in place, as gradients travel."""
        if self.control is not None:
            dist.all_reduce(tensor)

    def start_max(self, value: int) -> Pending:
        """Begin to agree on the maximum of `value` over all ranks and return at once."""
        mine = torch.tensor([value], dtype=torch.int64)
        if self.control is None:
            return Pending(mine, None)
        return Pending(mine, dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.control, async_op=True))

    def maximum(self, value: int) -> int:
        """Return the maximum of `value` over all ranks."""
        return self.start_max(value).wait()

    def barrier(self, timeout_seconds: float) -> None:
        """Return when every rank has come here.

        Raises:
            PipelineError: naming the ranks that did not come within `timeout_seconds`.
        """
        if self.control is None:
            return
        try:
            limit = timedelta(seconds=timeout_seconds)
            dist.monitored_barrier(group=self.control, timeout=limit, wait_all_ranks=True)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise PipelineError(
                f"rank {self.rank}: waited {timeout_seconds:g} s for the others: {said}"
            ) from error


def start_world(
    rank: int,
    world_size: int,
    local_rank: int,
    master_address: str,
    master_port: int,
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> World:
    """Join the process group (gloo on CPU, nccl on GPU) and return this process's place in it.

    `timeout_seconds` bounds the meeting at the start and every collective afterwards. A run of one process
    meets nobody and opens no port. `DS_ACCELERATOR=cpu`, DeepSpeed's own variable, keeps a GPU out of it.

    Raises:
        PipelineError: naming the address and this rank when the processes do not meet in time.
    """
    device = _device(local_rank)
    limit = timedelta(seconds=timeout_seconds)
    where = f"{master_address}:{master_port}"
    try:
        store = _store(rank, world_size, master_address, master_port, limit)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit)
    except (RuntimeError, OSError) as error:
        said = str(error).splitlines()[0]
        raise PipelineError(
            f"rank {rank} of {world_size}: no meeting at {where} within {timeout_seconds:g} s ({said}); is rank 0 "
            "up, does its name resolve, is the port free and open between the nodes?"
        ) from error
    return World(rank, world_size, local_rank, device, control)


def limit_waiting(timeout_seconds: float) -> None:
    """Let no collective of any group of this process wait longer from now on.

    DeepSpeed makes groups of its own, with torch's 30 minutes: a rank that is stopped would hold the others that long.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def end_world() -> None:
    """Leave the process group; while an error is on its way without waiting for the others, who may never come.

    A rank that waited here in its `finally` while the others wait for its gradients would hold all of them until
    the time-out.
    """
    if not dist.is_initialized():
        return
    if sys.exception() is not None:
        return  # The end of the process closes the connections, and the others see that at once.
    on_gpu = dist.get_backend() == "nccl"
    dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)
    dist.destroy_process_group()


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _store(rank: int, world_size: int, address: str, port: int, limit: timedelta) -> dist.Store:
    if world_size == 1:
        return dist.HashStore()
    # torchrun's agent already listens on the port, and counts its restarts in the keys.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0 and not by_agent, timeout=limit)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"ldm/{attempt}", store)


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(payload: Tensor) -> Any:
    return json.loads(payload.numpy().tobytes())
