"""A plan as text and as JSON. Every figure says where it comes from; nothing that was not measured is called measured."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.plan.advice import advice
from pipeline.plan.devices import host_floor
from pipeline.plan.estimate import Estimate, Target, checkpoint_bytes, encode_hours
from pipeline.plan.memory import GIB, device_memory, host_bytes
from pipeline.plan.speed import split
from pipeline.plan.workload import Workload

MILLION = 1_000_000


def as_json(workload: Workload, target: Target, plans: Sequence[Estimate]) -> dict[str, Any]:
    """Return plain data: the workload, a plan for each number of devices, sources, advice."""
    network = workload.network
    return {
        "run": workload.config.name,
        "device": asdict(target.device),
        "sources": sources(target),
        "network": asdict(network) | {"flops_per_sample": workload.sample_flops},
        "storage": storage(workload, target),
        "plans": [_plan_json(workload, plan) for plan in plans],
        "memory_gib_by_stage": {
            str(plan.ranks): {
                str(stage): device_memory(workload, plan.ranks, plan.held, stage).gib for stage in range(4)
            }
            for plan in plans
        },
        "advice": advice(workload, target, plans),
    }


def storage(workload: Workload, target: Target) -> dict[str, Any]:
    """Return bytes and GPU-hours of the data set, for the samples there are or a million, and of a checkpoint."""
    samples = workload.samples or MILLION
    return {
        "samples": samples,
        "samples_known": workload.samples is not None,
        "bytes_per_sample": {text: workload.stored_bytes(text) for text in ("embeddings", "tokens")},
        "dataset_bytes": samples * workload.stored_bytes(),
        "encode_gpu_hours": encode_hours(workload, target.device, samples),
        "checkpoint_bytes": checkpoint_bytes(workload),
        "epochs": workload.config.train.steps * workload.config.engine.global_batch / samples,
    }


def sources(target: Target) -> list[str]:
    """Return where the figures come from, a line each."""
    lines = ["memory: states and activations counted (docs/plan.md); the base published, not measured here"]
    if target.calibration is not None:
        runs = ", ".join(f"{one.run} ({one.records} records)" for one in target.calibration.runs)
        return [*lines, f"speed: measured on {runs}; other numbers of devices are extrapolated"]
    if target.generation is None:
        return [*lines, f"speed: nothing usable is published for {target.device.name}"]
    one, floor = target.generation, host_floor().conditions
    return [
        *lines,
        f"device's arithmetic: published, {one.device} {one.generation} set by {' and '.join(one.set_by)}, scaled by FLOP; "
        "an eager network's share of it published too (NeMo): not measured with this project on a GPU",
        f"host floor: measured with this project on {floor['cpu']}, one thread, torch {floor['torch']}, DeepSpeed "
        f"{floor['deepspeed']}; a compiled network's was not, so the eager one's stands for it",
        "published stack: a bound by other people's tuned code (CUDA graphs, fp16, no EMA), never a promise of this one",
        "bandwidths, prices, failures and restarts: published or assumed, in pipeline/plan/data/devices.toml and docs/plan.md",
    ]


def text(workload: Workload, target: Target, plans: Sequence[Estimate]) -> str:
    """Return the page that `ldm plan` prints."""
    lines = [_title(workload, target), "", *_table(plans), "", *_memory_lines(workload, plans[0]), ""]
    lines += _data_lines(workload, target, plans)
    lines += ["", "what binds, what to change:"]
    lines += [f"  {plan.ranks} devices: {_bound_words(plan)}" for plan in plans if plan.step]
    lines += [f"  ! {line}" for line in advice(workload, target, plans)]
    lines += ["", "where the figures come from:", *(f"  {line}" for line in sources(target))]
    return "\n".join(lines)


def _title(workload: Workload, target: Target) -> str:
    network, engine = workload.network, workload.config.engine
    extra = ", activations computed again" if engine.activation_checkpointing else ""
    return (
        f"{workload.config.name} on {target.device.name}: {network.parameters / 1e6:,.1f} M parameters in {network.tensors} "
        f"tensors, {workload.sample_flops / 1e9:,.0f} GFLOP a sample, ZeRO-{engine.zero_stage}, {engine.precision}{extra}, "
        f"global batch {engine.global_batch}, {workload.config.train.steps:,} steps"
    )


COLUMNS = (
    "devices",
    "fits",
    "GiB",
    "micro",
    "step s",
    "samples/s",
    "MFU",
    "binds",
    "bound s*",
    "goodput",
    "days",
    "dollars",
    "GB/s node",
)


def _table(plans: Sequence[Estimate]) -> list[str]:
    rows = [COLUMNS, *(_row(plan) for plan in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [*lines, "* the published stack's step, other people's tuned code: a bound, not this engine"]


def _row(plan: Estimate) -> tuple[str, ...]:
    return (
        str(plan.ranks),
        "yes" if plan.fits else "NO",
        f"{plan.memory.gib:.1f}/{plan.memory_gib:.0f}",
        f"{plan.micro_batches} x {plan.micro_batch:g}",
        _number(plan.step_seconds, ".3f"),
        _number(plan.samples_per_second, ",.0f"),
        _number(plan.mfu, ".1%"),
        plan.step.binds if plan.step else "-",
        _number(plan.bound_seconds, ".3f"),
        f"{plan.goodput:.2%}",
        _number(plan.training_seconds and plan.training_seconds / 86_400, ",.2f"),
        _number(plan.dollars, ",.0f"),
        _number(plan.read_per_node and plan.read_per_node / 1e9, ".3f"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _memory_lines(workload: Workload, plan: Estimate) -> list[str]:
    parts = {name: value / GIB for name, value in asdict(plan.memory).items() if value}
    inside = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in parts.items())
    stages = ", ".join(
        f"{stage}: {device_memory(workload, plan.ranks, plan.held, stage).gib:.1f}" for stage in range(4)
    )
    return [
        f"memory of a device among {plan.ranks}, GiB: {inside}",
        f"  by ZeRO stage: {stages}; pinned host memory a rank {host_bytes(workload, plan.ranks) / GIB:.2f}",
    ]


def _data_lines(workload: Workload, target: Target, plans: Sequence[Estimate]) -> list[str]:
    found = storage(workload, target)
    a_sample = found["bytes_per_sample"]
    known = f"{found['samples']:,} samples" if found["samples_known"] else "a million samples (none made yet)"
    lines = [
        f"data: {a_sample['embeddings']:,} B a sample with text embeddings, {a_sample['tokens']:,} with token ids, whose "
        f"encoding is {workload.text_flops / workload.network.training_flops:.1%} of a sample's arithmetic; configured: "
        f"{workload.spec.text}",
        f"  {known}: {found['dataset_bytes'] / 1e9:,.1f} GB, {found['encode_gpu_hours']:.1f} {target.device.name}-hours of "
        f"encoding (arithmetic; published efficiency), {found['epochs']:,.2f} epochs",
    ]
    for plan in plans:
        saving = plan.saving
        lines.append(
            f"  {plan.ranks} devices: a checkpoint of {saving.size_bytes / 1e9:.1f} GB stalls {saving.stall_seconds:.2f} s and "
            f"is safe after {saving.write_seconds:.1f} s; best every {plan.interval_seconds / 60:.1f} min{_in_steps(plan)}"
        )
    for plan in plans:
        if plan.samples_per_second is not None:
            rates = [plan.samples_per_second * a_sample[kind] / 1e9 for kind in ("embeddings", "tokens")]
            lines.append(
                f"  {plan.ranks} devices read {rates[0]:.3f} GB/s in all with embeddings ({rates[0] / plan.nodes:.3f} a node), "
                f"{rates[1]:.3f} ({rates[1] / plan.nodes:.3f}) with token ids"
            )
    return lines


def _in_steps(plan: Estimate) -> str:
    return (
        ""
        if plan.step_seconds is None
        else f" = {max(1, round(plan.interval_seconds / plan.step_seconds))} steps"
    )


def _bound_words(plan: Estimate) -> str:
    step = plan.step
    assert step is not None
    return (
        f"{step.binds}: device {step.device * 1e3:.0f} ms + {step.exposed * 1e3:.1f} ms of communication that shows, host "
        f"{step.host * 1e3:.0f} ms, file system {step.data * 1e3:.1f} ms"
    )


def _plan_json(workload: Workload, plan: Estimate) -> dict[str, Any]:
    found = asdict(plan) | {"fits": plan.fits, "memory_total_gib": plan.memory.gib}
    found["binds"] = plan.step.binds if plan.step else None
    found["micro_batches"], found["micro_batch"] = split(workload, plan.ranks)
    return found
