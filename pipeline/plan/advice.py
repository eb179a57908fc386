"""What to change, in words: what binds, what does not fit, what burns money."""

from collections.abc import Sequence

from pipeline.plan.estimate import Estimate, Target
from pipeline.plan.memory import device_memory
from pipeline.plan.workload import Workload

DEAR = 1.25
"""A sample that costs so many times the cheapest plan's is said aloud."""


def advice(workload: Workload, target: Target, plans: Sequence[Estimate]) -> list[str]:
    """Return a line for each thing that ought to be changed or known, most pressing first."""
    lines = [line for plan in plans for line in (_memory(workload, plan), _binding(workload, plan)) if line]
    lines += _burning(plans)
    lines += [line for plan in plans if (line := _grace(workload, plan))]
    if target.generation is None and target.calibration is None:
        lines.append(
            f"no usable run on {target.device.name} is published, so no speed is told: train a few hundred steps and give "
            "--calibrate RUN"
        )
    engine = workload.config.engine
    if engine.zero_stage == 1 and engine.precision in ("bf16", "fp16") and engine.offload_optimizer is False:
        spare = (
            device_memory(workload, plans[0].ranks, 0).gib - device_memory(workload, plans[0].ranks, 0, 2).gib
        )
        if spare > 0:
            lines.append(
                f"engine.zero_stage 2 would hold {spare:.1f} GiB less a device than 1 at this precision"
            )
    return lines


def _memory(workload: Workload, plan: Estimate) -> str | None:
    if plan.fits:
        return None
    parts = plan.memory
    if parts.activations > parts.total / 2:
        remedy = "lower engine.micro_batch, or set engine.activation_checkpointing"
    elif workload.config.engine.zero_stage < 3:
        remedy = "raise engine.zero_stage, or set engine.offload_optimizer"
    else:
        remedy = "use more devices"
    return f"{plan.ranks} devices: {parts.gib:.1f} GiB do not fit into {plan.memory_gib:.0f}: {remedy}"


def _binding(workload: Workload, plan: Estimate) -> str | None:
    step = plan.step
    if step is None or step.binds == "compute":
        return None
    if step.binds == "host":
        wanted = step.micro_batch * step.host / max(step.device, 1e-9)
        return (
            f"{plan.ranks} devices: the host's {step.host * 1e3:.0f} ms a step are longer than the device's "
            f"{step.device * 1e3:.0f}: from about {wanted:.0f} samples a rank on they hide; raise engine.global_batch or use "
            "fewer devices"
        )
    if step.binds == "network":
        return (
            f"{plan.ranks} devices: {step.exposed * 1e3:.0f} ms of a step are communication that nothing hides: raise "
            "engine.global_batch or engine.micro_batch, or use fewer devices"
        )
    remedy = "" if workload.tokens_mode else ", or store encode.text: tokens"
    rate = (plan.read_per_node or 0) / 1e9
    return (
        f"{plan.ranks} devices: a node would read {rate:.1f} GB/s, its file system's limit: raise it{remedy}"
    )


def _burning(plans: Sequence[Estimate]) -> list[str]:
    priced = [(plan, plan.ranks * plan.training_seconds) for plan in plans if plan.training_seconds]
    if not priced:
        return []
    cheapest, least = min(priced, key=lambda pair: pair[1])
    return [
        f"{plan.ranks} devices burn money: {cost / least:.1f} times the device-hours of {cheapest.ranks} for "
        f"{cheapest.training_seconds / plan.training_seconds:.1f} times the speed; raise engine.global_batch with the devices"
        for plan, cost in priced
        if cost > DEAR * least and plan.training_seconds and cheapest.training_seconds
    ]


def _grace(workload: Workload, plan: Estimate) -> str | None:
    lead, save = workload.config.cluster.signal_lead_seconds, plan.saving.write_seconds
    if lead >= 2 * save:
        return None
    return (
        f"{plan.ranks} devices: cluster.signal_lead_seconds {lead} is shorter than two saves of {save:.0f} s: a job that "
        f"is warned may lose its last steps; set at least {2 * save:.0f}"
    )
