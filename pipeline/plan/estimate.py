"""A plan for one number of devices: whether it fits, how fast it is, what it costs, what binds and what to change."""

import math
from dataclasses import dataclass

from pipeline.plan.calibrate import Calibration
from pipeline.plan.devices import Device, Site
from pipeline.plan.goodput import Saving, best_interval_seconds, goodput, mttf_seconds, restart_seconds
from pipeline.plan.memory import DeviceMemory, device_memory
from pipeline.plan.published import Generation
from pipeline.plan.speed import StepTime, our_step, published_bound, split
from pipeline.plan.workload import Workload

HOUR_SECONDS = 3600.0
ENCODE_SHARE = 0.45
"""Of the dense peak that a VAE's encoder reaches: an RTX 4090's 15 ms at 512 px (diffusers' documentation). Published."""


@dataclass(frozen=True)
class Target:
    """What a plan is made for."""

    device: Device
    generation: Generation | None
    site: Site
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Estimate:
    """Everything that is known before `ranks` devices are paid for. Rates are None where nothing says how fast it is."""

    ranks: int
    nodes: int
    micro_batches: int
    micro_batch: float
    memory: DeviceMemory
    memory_gib: float
    step_seconds: float | None
    step: StepTime | None
    bound_seconds: float | None
    """The published stack's step: not ours."""
    samples_per_second: float | None
    mfu: float | None
    saving: Saving
    interval_seconds: float
    goodput: float
    training_seconds: float | None
    dollars: float | None
    read_bytes_per_second: float | None
    """By all nodes together."""

    @property
    def held(self) -> int:
        """Samples that a rank holds at once at most."""
        return math.ceil(self.micro_batch)

    @property
    def fits(self) -> bool:
        """Whether a device's memory is enough."""
        return self.memory.gib <= self.memory_gib

    @property
    def read_per_node(self) -> float | None:
        """Bytes a second that a node reads."""
        return None if self.read_bytes_per_second is None else self.read_bytes_per_second / self.nodes


def estimate(workload: Workload, target: Target, ranks: int) -> Estimate:
    """Return the plan for `ranks` devices."""
    config, device, site = workload.config, target.device, target.site
    per_node = config.cluster.gpus_per_node or device.domain
    nodes = -(-ranks // per_node)
    count, micro_batch = split(workload, ranks)
    step, seconds = _step(workload, target, ranks, nodes)
    saving = _saving(workload, ranks, nodes, site)
    mttf = mttf_seconds(nodes, site.failures_per_node_day)
    interval = best_interval_seconds(saving, mttf)
    kept = goodput(saving, interval, mttf, restart_seconds(ranks))
    rate = None if seconds is None else config.engine.global_batch / seconds
    training = None if seconds is None else config.train.steps * seconds / max(kept, 1e-9)
    price = site.dollars if site.dollars is not None else device.dollars
    return Estimate(
        ranks=ranks,
        nodes=nodes,
        micro_batches=count,
        micro_batch=micro_batch,
        memory=device_memory(workload, ranks, math.ceil(micro_batch)),
        memory_gib=config.cluster.gpu_memory_gib or device.memory_gib,
        step_seconds=seconds,
        step=step,
        bound_seconds=published_bound(workload, target.generation, ranks) if target.generation else None,
        samples_per_second=rate,
        mfu=_mfu(workload, device, ranks, rate),
        saving=saving,
        interval_seconds=interval,
        goodput=kept,
        training_seconds=training,
        dollars=None
        if training is None or price is None or target.calibration
        else price * ranks * training / HOUR_SECONDS,
        read_bytes_per_second=None if rate is None else rate * workload.stored_bytes(),
    )


def encode_hours(workload: Workload, device: Device, samples: int) -> float:
    """Return the GPU-hours that encoding so many samples takes, arithmetic alone; decoding is the host's."""
    return samples * workload.encode_flops() / (ENCODE_SHARE * device.peak_tflops * 1e12) / HOUR_SECONDS


def checkpoint_bytes(workload: Workload) -> int:
    """Return the size of a checkpoint: fp32 masters, both moments, every average."""
    return (12 + 4 * workload.averages) * workload.parameters


def _step(workload: Workload, target: Target, ranks: int, nodes: int) -> tuple[StepTime | None, float | None]:
    if target.calibration is not None:
        return None, target.calibration.step_seconds(workload, ranks)
    if target.generation is None:
        return None, None
    reading = nodes * target.site.read_gb_per_second * 1e9
    step = our_step(workload, target.generation, target.device, ranks, reading)
    return step, step.seconds


def _mfu(workload: Workload, device: Device, ranks: int, rate: float | None) -> float | None:
    """Return the share of the dense peak that the network's own FLOP are; what is computed again does not count."""
    if rate is None:
        return None
    return rate * workload.network.training_flops / (ranks * device.peak_tflops * 1e12)


def _saving(workload: Workload, ranks: int, nodes: int, site: Site) -> Saving:
    size = checkpoint_bytes(workload)
    return Saving(
        size_bytes=size,
        stall_seconds=size / ranks / (site.copy_gb_per_second * 1e9),
        write_seconds=size / (nodes * site.write_gb_per_second * 1e9),
    )
