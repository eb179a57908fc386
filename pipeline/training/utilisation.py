"""How much of its device a training uses: memory, and the share of the arithmetic peak where that is published."""

from collections.abc import Sequence

import torch

from pipeline.config import RunConfig
from pipeline.latents.reader import LatentDataset
from pipeline.plan.devices import device_called
from pipeline.plan.network import network_cost
from pipeline.training.world import World

GIB = 2**30
SIXTEEN_BITS = ("bf16", "fp16", "autocast_bf16")


class Utilisation:
    """The figures of rank 0's device; on a CPU there are none."""

    def __init__(self, config: RunConfig, datasets: Sequence[LatentDataset], world: World) -> None:
        """Look up the device's peak and the arithmetic of a sample.

        MFU is told only where both are known: a device in the plan's table, by its exact name and in 16 bits, and
        latents of one size.
        """
        self._device, self._peak_flops = world.device, 0.0
        self._flops = _training_flops(config, datasets)
        if world.device.type == "cuda" and config.engine.precision in SIXTEEN_BITS:
            device = device_called(torch.cuda.get_device_name(world.device))
            self._peak_flops = device.peak_tflops * 1e12 * world.world_size if device else 0.0

    def figures(self, samples_per_second: float) -> dict[str, float]:
        """Return `mfu` and the device's peak memory since the last call, in GiB; no wait for the device.

        The network's own forward and backward count, nothing that is computed twice, no text encoder.

        Source: model FLOPs utilisation as in arXiv 2204.02311, appendix B.
        """
        found: dict[str, float] = {}
        if self._flops and self._peak_flops:
            found["mfu"] = samples_per_second * self._flops / self._peak_flops
        if self._device.type == "cuda":
            found["device_memory_peak_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
            found["device_memory_reserved_gib"] = torch.cuda.memory_reserved(self._device) / GIB
            torch.cuda.reset_peak_memory_stats(self._device)
        return found


def _training_flops(config: RunConfig, datasets: Sequence[LatentDataset]) -> int:
    """Return the FLOP of one sample, 0 where samples differ in size."""
    spec = datasets[0].spec
    sizes = {(each["height"], each["width"]) for one in datasets for each in one.manifest.buckets}
    if len(sizes) != 1:
        return 0
    ((height, width),) = sizes
    side = (height // spec.downsampling, width // spec.downsampling)
    return network_cost(config.model, side, spec.text_tokens).training_flops
