"""Seconds of a step: the published stack as a bound, and our engine with its measured host floor."""

from dataclasses import dataclass
from typing import Literal

from pipeline.data.shares import micro_batches_per_step
from pipeline.plan.devices import Device, host_floor
from pipeline.plan.published import MLPERF_FLOPS, Generation
from pipeline.plan.workload import Workload

EAGER_SHARE = 16.40 / 21.52
"""Speed of eager NCHW with fused attention over the whole stack (channels last, Inductor): NeMo's ControlNet table, one
A100 (docs.nvidia.com, NeMo framework 24.12, performance). Published, not measured with this project."""
SMALL_LATENT_SHARE, SMALL_LATENT_POSITIONS = 0.85, 48 * 48
"""Efficiency at 256 px over that at 512 px: MosaicML's 23.8 % over 28.0 % of peak on 8 A100 (its README)."""
HIDDEN_SHARE, LEAST_EXPOSED = 2 / 3, 0.15
"""Communication hides behind the last backward pass, two thirds of the arithmetic, all but a rest: assumed."""

Binds = Literal["compute", "host", "network", "file system"]


@dataclass(frozen=True)
class StepTime:
    """One optimizer step, in seconds; `device` + `exposed` and `host` run side by side, the longer one counts."""

    micro_batches: int
    micro_batch: float
    device: float
    exposed: float
    host: float
    data: float

    @property
    def seconds(self) -> float:
        """What a step lasts."""
        return max(self.device + self.exposed, self.host, self.data)

    @property
    def binds(self) -> Binds:
        """What would have to be faster for a shorter step."""
        if self.data >= self.seconds:
            return "file system"
        if self.host >= self.seconds:
            return "host"
        return "network" if self.exposed > self.device / 4 else "compute"


def split(workload: Workload, ranks: int) -> tuple[int, float]:
    """Return the micro-batches of a step and the mean samples in one."""
    engine = workload.config.engine
    count = micro_batches_per_step(engine.global_batch, engine.micro_batch, ranks)
    return count, engine.global_batch / ranks / count


def relative_cost(workload: Workload, flops: int) -> float:
    """Return the seconds of `flops` in terms of a sample of the published benchmark: smaller latents are less efficient."""
    height, width = (side // workload.spec.downsampling for side in workload.picture)
    share = SMALL_LATENT_SHARE if height * width < SMALL_LATENT_POSITIONS else 1.0
    return flops / MLPERF_FLOPS / share


def published_bound(workload: Workload, generation: Generation, ranks: int) -> float:
    """Return a step's seconds on the published stack: tuned kernels, CUDA graphs, nothing of ours; cached text."""
    count, micro_batch = split(workload, ranks)
    return generation.base_seconds + count * micro_batch * generation.sample_seconds * relative_cost(
        workload, workload.network.training_flops
    )


def our_step(
    workload: Workload, generation: Generation, device: Device, ranks: int, read_bytes_per_second: float
) -> StepTime:
    """Return our engine's step: published arithmetic speed, our bytes, the measured host floor.

    `read_bytes_per_second` is what all nodes together read.
    """
    engine = workload.config.engine
    count, micro_batch = split(workload, ranks)
    stack = 1.0 if engine.compile else EAGER_SHARE
    sample_seconds = generation.sample_seconds / stack * relative_cost(workload, workload.sample_flops)
    arithmetic = count * micro_batch * sample_seconds
    travel = wire_bytes(workload, ranks) / (device.bus_gb_per_second(ranks) * 1e9)
    overlapped = engine.zero_stage >= 2 or (
        engine.zero_stage == 1 and engine.precision in ("fp32", "autocast_bf16")
    )
    hidden = HIDDEN_SHARE * micro_batch * sample_seconds
    exposed = max(LEAST_EXPOSED * travel, travel - hidden) if overlapped else travel
    floor = host_floor().seconds(count, engine.zero_stage, engine.precision, workload.network.tensors)
    read = engine.global_batch * workload.stored_bytes() / read_bytes_per_second
    update = update_bytes(workload, ranks) / (device.memory_gb_per_second * 1e9)
    return StepTime(count, micro_batch, arithmetic + update, exposed, floor, read)


def wire_bytes(workload: Workload, ranks: int) -> float:
    """Return the bytes that pass each rank's link in a step, as an all-reduce counts them (2 x payload x (S - 1) / S).

    Gradients travel in fp32; DeepSpeed's stages 1 and 2 reduce whole buckets and gather the weights afterwards, stage
    3 gathers them in both passes of every micro-batch and scatters the gradients.
    """
    engine = workload.config.engine
    narrow = 2 if engine.precision in ("bf16", "fp16") else 4
    count, _ = split(workload, ranks)
    payload = {
        0: 2 * 4.0,
        1: 2 * 4.0 + narrow,
        2: 2 * 4.0 + narrow,
        3: count * (2 * narrow + 4.0),
    }[engine.zero_stage]
    return payload * workload.parameters * (ranks - 1) / ranks


def update_bytes(workload: Workload, ranks: int) -> float:
    """Return the bytes that AdamW (28 a parameter), the norm (4) and each average (12) move in a device's memory."""
    shared = 1 / ranks
    adam = 32 * (1.0 if workload.config.engine.zero_stage == 0 else shared)
    return workload.parameters * (adam + 12 * shared * workload.averages / workload.config.ema.every)
