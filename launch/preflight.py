"""Whether the nodes can carry a training, asked by its own ranks right before the first step.

Each rank looks at its device, its node's disks and memory, and computes a product with a known answer; together they
compare clocks and versions, and add up a tensor with a known sum. A node that fails is named, and noted where the
supervisor looks for it. Takes a fraction of a second on CPU, once the ranks are there.
"""

import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from launch.check import refuse_untrainable
from launch.supervisor.exits import preflight_file
from pipeline import publish
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.paths import RunPaths
from pipeline.training.facts import versions
from pipeline.training.world import World

GIB = 2**30
LEAST_DISK_BYTES = 2**28
LEAST_SHARED_BYTES = 2**25
LEAST_FREE_SHARE = 0.9
LEAST_HOST_BYTES = 2**28
CLOCK_SECONDS = 60.0
# A rank that computes at less than this share of the median is told: it sets the pace of all.
SLOW = 0.7
# Multiples of 35, the period of the product below.
MATMUL_SIZE = {"cpu": 420, "cuda": 4095}
REDUCE_FLOATS = {"cpu": 2**20, "cuda": 2**26}


@dataclass(frozen=True)
class Finding:
    """What one rank has found on its node."""

    node: str
    problems: list[str]
    versions: dict[str, str]
    time: float
    matmul_gflops: float


def preflight(config: RunConfig, paths: RunPaths, world: World, attempt: str) -> str:
    """Return a line with what was measured; called by all ranks together.

    Raises:
        ConfigError, DataError: what `ldm check` finds, and a data set that is not there, on all ranks.
        PipelineError: naming every node that cannot carry the training, and why.
    """
    started = time.monotonic()
    _check_config(config, paths, world)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    problems = [*_disk_problems(paths), *_memory_problems(world.device)]
    gflops, wrong = _matmul(world.device)
    problems += wrong
    world.maximum(0)  # All read their clocks now.
    mine = Finding(node, problems, versions(), time.time(), gflops)
    findings = [Finding(**found) for found in world.gather(asdict(mine))]
    by_rank = [[*found.problems, *_odd(found, findings)] for found in findings]
    if by_rank[world.rank]:
        note = preflight_file(paths, attempt, world.rank)
        if note.parent.is_dir():
            publish.write_json(note, {"node": node, "problems": by_rank[world.rank]})
    bad = [
        f"rank {rank} on {findings[rank].node}: {'; '.join(lines)}"
        for rank, lines in enumerate(by_rank)
        if lines
    ]
    if bad:
        raise PipelineError("preflight: " + " | ".join(bad))
    speed, wrong = _all_reduce(world)
    said = [f"rank {rank}: {line}" for rank, line in enumerate(world.gather("; ".join(wrong))) if line]
    if said:
        raise PipelineError("preflight: " + " | ".join(said))
    return _summary(config, world, findings, speed, time.monotonic() - started)


def _check_config(config: RunConfig, paths: RunPaths, world: World) -> None:
    """What `ldm check` does, by the first rank for all: a rank that srun or torchrun started has not been asked."""
    said: list[str] = []
    by_data = False
    if world.is_first:
        try:
            refuse_untrainable(config, paths, str(paths.root))
        except (ConfigError, DataError) as error:
            said, by_data = str(error).splitlines(), isinstance(error, DataError)
    said, by_data = world.broadcast([said, by_data])
    if said:
        raise DataError("; ".join(said)) if by_data else ConfigError(said)


def _disk_problems(paths: RunPaths) -> list[str]:
    problems = []
    places = {
        "run folder": paths.root,
        "node's own disk": Path(tempfile.gettempdir()),
        "shared memory": Path("/dev/shm"),
    }
    least = {"shared memory": LEAST_SHARED_BYTES}
    for name, folder in places.items():
        try:
            free = shutil.disk_usage(folder).free
            if free < least.get(name, LEAST_DISK_BYTES):
                needed = least.get(name, LEAST_DISK_BYTES)
                problems.append(
                    f"{name} {folder}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} are needed"
                )
            elif name != "shared memory":
                _write_and_read(folder)
        except OSError as error:
            problems.append(f"{name} {folder}: {error.strerror or error}")
    return problems


def _write_and_read(folder: Path) -> None:
    probe = folder / f".preflight-{uuid.uuid4().hex}"
    payload = uuid.uuid4().bytes * 256
    try:
        probe.write_bytes(payload)
        publish.fsync_file(probe)
        if probe.read_bytes() != payload:
            raise OSError("reads other bytes than were written")
    finally:
        probe.unlink(missing_ok=True)


def _memory_problems(device: torch.device) -> list[str]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < LEAST_FREE_SHARE * total:
            return [
                f"{device}: {free / GIB:.1f} of {total / GIB:.1f} GiB free; another process holds the rest (nvidia-smi)"
            ]
        return []
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < LEAST_HOST_BYTES and _available_bytes() < LEAST_HOST_BYTES:
        return [
            f"memory: {_available_bytes() / 2**20:.0f} MiB available, {LEAST_HOST_BYTES / 2**20:.0f} are needed"
        ]
    return []


def _available_bytes() -> int:
    """Return what the kernel could give, its caches included."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**62)


def _matmul(device: torch.device) -> tuple[float, list[str]]:
    """Return GFLOP/s and what is wrong with a product of small whole numbers, which float32 holds exactly.

    a[i, k] = (i + k) mod 5 - 2 and b[k, j] = (3k + j) mod 7 - 3: c[i, j] depends on i mod 5 and j mod 7 alone, and is
    size / 35 times the sum over one period of 35.
    """
    size = MATMUL_SIZE[device.type]
    index = torch.arange(size, device=device)
    a = ((index[:, None] + index[None]) % 5 - 2).float()
    b = ((3 * index[:, None] + index[None]) % 7 - 3).float()
    period = torch.arange(35)
    left = (torch.arange(5)[:, None] + period[None]) % 5 - 2
    right = (3 * period[:, None] + torch.arange(7)[None]) % 7 - 3
    table = (left @ right) * (size // 35)
    expected = table[index.cpu()[:, None] % 5, index.cpu()[None] % 7].float().to(device)
    product = a @ b
    _finish(device)
    began = time.perf_counter()
    product = a @ b
    _finish(device)
    seconds = max(time.perf_counter() - began, 1e-9)
    differing = int((product != expected).sum())
    wrong = (
        [f"{device}: {differing} of {size * size} elements of a matrix product are wrong"]
        if differing
        else []
    )
    return 2 * size**3 / seconds / 1e9, wrong


def _all_reduce(world: World) -> tuple[float, list[str]]:
    """Return the bus bandwidth in GiB/s and what is wrong with the sum of rank + 1 over all ranks."""
    if world.world_size == 1:
        return 0.0, []
    tensor = torch.empty(REDUCE_FLOATS[world.device.type], device=world.device)
    seconds = 0.0
    for _ in range(2):  # The first one opens the connections.
        tensor.fill_(world.rank + 1)
        _finish(world.device)
        began = time.perf_counter()
        world.add_up(tensor)
        _finish(world.device)
        seconds = max(time.perf_counter() - began, 1e-9)
    expected = world.world_size * (world.world_size + 1) / 2
    differing = int((tensor != expected).sum())
    wrong = [f"{differing} elements of a sum over all ranks are not {expected:g}"] if differing else []
    moved_bytes = 2 * (world.world_size - 1) / world.world_size * tensor.nbytes
    return moved_bytes / seconds / GIB, wrong


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _odd(found: Finding, findings: list[Finding]) -> list[str]:
    """Return what sets this rank's node apart from most others."""
    usual = statistics.median(other.time for other in findings)
    problems = []
    if abs(found.time - usual) > CLOCK_SECONDS:
        problems.append(f"clock: {found.time - usual:+.0f} s off the others'")
    for name, version in found.versions.items():
        common = statistics.mode(other.versions.get(name, "") for other in findings)
        if version != common:
            problems.append(f"{name} {version}, the others have {common}")
    return problems


def _summary(config: RunConfig, world: World, findings: list[Finding], speed: float, seconds: float) -> str:
    expected = config.health.allreduce_gib_per_second
    if world.is_first and world.world_size > 1 and speed < expected:
        print(
            f"preflight: all-reduce {speed:.2f} GiB/s, expected {expected:g}: look at the network's settings "
            "(cluster.nccl, NCCL_SOCKET_IFNAME)",
            file=sys.stderr,
        )
    speeds = [found.matmul_gflops for found in findings]
    usual = statistics.median(speeds)
    for rank, found in enumerate(findings):
        if world.is_first and found.matmul_gflops < SLOW * usual:
            print(
                f"preflight: rank {rank} on {found.node} computes at {found.matmul_gflops / usual:.0%} of the others' "
                "speed: it sets the pace of all",
                file=sys.stderr,
            )
    network = f", all-reduce {speed:.2f} GiB/s" if world.world_size > 1 else ""
    return (
        f"preflight: {world.world_size} ranks in {seconds:.1f} s, matrix product {min(speeds):.0f} to {max(speeds):.0f} "
        f"GFLOP/s{network}"
    )
