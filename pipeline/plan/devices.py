"""Devices and sites that a plan is made for."""

import json
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """A device's published figures; bandwidths are bus bandwidths of an all-reduce."""

    name: str
    peak_tflops: float
    memory_gib: float
    memory_gb_per_second: float
    domain: int
    nvlink_gb_per_second: float
    network_gb_per_second: float
    dollars: float | None = None

    def bus_gb_per_second(self, ranks: int) -> float:
        """Return what all ranks together are bound by: the domain's links inside it, the network beyond."""
        inside = ranks <= self.domain
        return (
            self.nvlink_gb_per_second
            if inside
            else min(self.nvlink_gb_per_second, self.network_gb_per_second)
        )


@dataclass(frozen=True)
class Site:
    """What differs from cluster to cluster; the defaults are assumptions."""

    dollars: float | None = None
    """Of a GPU-hour; None = the device's."""
    write_gb_per_second: float = 2.0
    """A node's rate of writing a checkpoint."""
    read_gb_per_second: float = 2.0
    """A node's rate of reading samples."""
    copy_gb_per_second: float = 20.0
    """A rank's rate of copying its state to pinned host memory."""
    failures_per_node_day: float = 0.005
    """Llama 3 (arXiv 2407.21783): 419 unexpected interruptions in 54 days on 2,048 nodes are 0.0038."""


@dataclass(frozen=True)
class HostFloor:
    """The host's measured seconds in a step, at `tensors` tensors: of the bare network, and of the engine beyond it."""

    tensors: int
    network_seconds: float
    engine_seconds: dict[str, float]
    conditions: dict[str, str]

    def seconds(self, micro_batches: int, stage: int, precision: str, tensors: int) -> float:
        """Return the host's seconds of one step, in proportion to the tensors; autocast is taken as fp32."""
        kind = {"autocast_bf16": "fp32", "fp16": "bf16"}.get(precision, precision)
        # What was not timed is no cheaper than the next stage below it that was.
        engine = next(
            self.engine_seconds[key]
            for key in (f"{stage}/{kind}", f"{stage}/bf16", f"{stage}/fp32")
            if key in self.engine_seconds
        )
        return (micro_batches * self.network_seconds + engine) * tensors / self.tensors


@lru_cache(maxsize=1)
def devices() -> dict[str, Device]:
    """Return the known devices by name in capitals."""
    table = tomllib.loads(files("pipeline.plan").joinpath("data/devices.toml").read_text())
    return {name: Device(name, **figures) for name, figures in table.items()}


CALLED = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100-PCIE-40GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
    "NVIDIA L40S": "L40S",
}
"""What the driver calls a device; an H100 on PCIe is another, slower one."""


def device_called(driver_name: str) -> Device | None:
    """Return the known device that the driver calls so, None for any other: its peak is not guessed."""
    known = CALLED.get(driver_name)
    return devices()[known] if known else None


def device_named(name: str) -> Device:
    """Return the device called `name`, in any case of letters.

    Raises:
        ConfigError: listing those there are.
    """
    found = devices().get(name.upper())
    if found is None:
        raise ConfigError(f"plan --device: {name!r} is not known; there are {', '.join(devices())}")
    return found


@lru_cache(maxsize=1)
def host_floor() -> HostFloor:
    """Return what `benchmarks/host_floor.py` measured."""
    table: dict[str, Any] = json.loads(files("pipeline.plan").joinpath("data/host.json").read_text())
    return HostFloor(**table)
