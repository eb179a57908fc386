"""What the machine's NVIDIA GPUs are doing, asked of the driver (NVML): no CUDA context, no torch."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pynvml

MEGABYTE, MILLIWATT = 1e6, 1e-3


class Graphics:
    """The GPUs that the driver shows to this process; none without NVIDIA's driver."""

    def __init__(self) -> None:
        self._devices: list[Any] = []
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def figures(self) -> dict[str, float]:
        """Return the values by MLflow's own names; what a device does not tell (in MIG mode, its load) is absent."""
        values: dict[str, float] = {}
        for index, device in enumerate(self._devices):
            parts: tuple[Callable[[Any], dict[str, float]], ...] = (self._load, self._memory, self._power)
            for part in parts:
                with suppress(pynvml.NVMLError):
                    values |= {f"system/gpu_{index}_{name}": value for name, value in part(device).items()}
        return values

    def _load(self, device: Any) -> dict[str, float]:
        return {"utilization_percentage": float(pynvml.nvmlDeviceGetUtilizationRates(device).gpu)}

    def _memory(self, device: Any) -> dict[str, float]:
        memory = pynvml.nvmlDeviceGetMemoryInfo(device)
        return {
            "memory_usage_megabytes": memory.used / MEGABYTE,
            "memory_usage_percentage": 100.0 * memory.used / memory.total,
        }

    def _power(self, device: Any) -> dict[str, float]:
        return {"power_usage_watts": MILLIWATT * pynvml.nvmlDeviceGetPowerUsage(device)}
