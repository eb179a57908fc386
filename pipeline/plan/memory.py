"""Bytes on one device, part by part, as the engine lays them out; docs/engine.md has the table and its test."""

from dataclasses import asdict, dataclass

from pipeline.plan.published import memory_fit
from pipeline.plan.workload import Workload

GIB = 2**30


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one rank's device while it trains."""

    weights: float
    gradients: float
    masters: float
    moments: float
    averages: float
    buckets: float
    activations: float
    text_encoder: float
    base: float
    """Context, communicators and workspaces: the published fit's base, not measured with this project."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(asdict(self).values())

    @property
    def gib(self) -> float:
        """GiB in all."""
        return self.total / GIB


def state_bytes(stage: int, precision: str, ranks: int) -> dict[str, float]:
    """Return the bytes per parameter of one rank, for one average: weights, gradients, masters, moments, averages.

    At stage 0 the weights are the masters. Stage 1 in bf16 keeps bf16 gradients and a whole fp32 buffer of them.
    """
    narrow = 2 if precision in ("bf16", "fp16") else 4
    shared = 1 / ranks
    if stage == 0:
        return {"weights": 4, "gradients": 4, "masters": 0, "moments": 8, "averages": 4 * shared}
    gradients = 6.0 if stage == 1 and narrow == 2 else 4 * shared
    return {
        "weights": narrow * (shared if stage == 3 else 1),
        "gradients": gradients,
        "masters": 4 * shared,
        "moments": 8 * shared,
        "averages": 4 * shared,
    }


def bucket_bytes(stage: int, precision: str, elements: int) -> float:
    """Return what DeepSpeed's buffers of communication take: two of gradients, one more in fp32 where it reduces in it.

    At stage 1 in bf16 gradients are reduced where they lie; one bucket of weights is gathered.
    """
    narrow = 2 if precision in ("bf16", "fp16") else 4
    if stage == 0:
        return 0.0
    if stage == 1 and narrow == 2:
        return narrow * elements
    return (2 * narrow + (4 if narrow == 2 else 0)) * elements


def device_memory(workload: Workload, ranks: int, micro_batch: int, stage: int | None = None) -> DeviceMemory:
    """Return the bytes of one of `ranks` ranks that holds `micro_batch` samples, at the config's stage or another."""
    engine = workload.config.engine
    stage = engine.zero_stage if stage is None else stage
    per_parameter = state_bytes(stage, engine.precision, ranks)
    states = {name: count * workload.parameters for name, count in per_parameter.items()}
    states["averages"] *= workload.averages
    if engine.offload_optimizer:
        states |= {"masters": 0.0, "moments": 0.0, "averages": 0.0}
    text = 4 if workload.config.encode.precision == "fp32" else 2
    return DeviceMemory(
        **states,
        buckets=bucket_bytes(stage, engine.precision, workload.bucket_elements),
        activations=micro_batch * workload.network.activation_bytes(engine.precision),
        text_encoder=text * workload.text_parameters if workload.tokens_mode else 0.0,
        base=memory_fit().base_gib * GIB,
    )


def host_bytes(workload: Workload, ranks: int) -> float:
    """Return one rank's pinned host memory: the copy that a checkpoint is written from, and what is offloaded."""
    state = (12 + 4 * workload.averages) * workload.parameters / ranks
    return state * (2 if workload.config.engine.offload_optimizer else 1)
