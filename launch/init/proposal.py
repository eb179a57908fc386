"""What is proposed: settings with their reasons, laid over a shipped config, and what it is expected to cost."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch.init.cost import GpuCost, StageCost
from launch.init.look import Facts
from launch.init.pictures import BACKGROUNDS, best_background
from launch.init.shapes import BUCKET_FILL, Shapes, propose_shapes
from pipeline.config import DataConfig, RunConfig
from pipeline.config_file import load_config, with_settings
from pipeline.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NVIDIA = Path("/proc/driver/nvidia/gpus")
USUAL_GPUS = 8
USUAL_MINUTES = 20
DeviceKind = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Machine:
    """What the run is proposed for."""

    device: DeviceKind
    cores: int
    gpus: int
    minutes: int | None = None
    """The user's budget; None = 20 on a CPU, what the visits ask for on GPUs."""

    @classmethod
    def here(cls, device: DeviceKind | None, minutes: int | None) -> "Machine":
        """Return this machine; without a `device` the one it has."""
        gpus = len(list(NVIDIA.iterdir())) if NVIDIA.is_dir() else 0
        kind: DeviceKind = device or ("gpu" if gpus else "cpu")
        return cls(kind, len(os.sched_getaffinity(0)), gpus or USUAL_GPUS, minutes)


@dataclass
class Choices:
    """Settings by dotted key, each with its reason."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: Any, reason: str) -> None:
        """Choose `value` (plain JSON data) for `key`."""
        self.values[key], self.reasons[key] = value, reason


@dataclass(frozen=True)
class Proposal:
    """A run for a source."""

    config: RunConfig
    base: str
    """The shipped config that everything not chosen comes from."""
    reasons: dict[str, str]
    notes: tuple[str, ...]
    """What the user should know before starting, most important first."""
    stages: tuple[StageCost, ...]
    gpu: GpuCost | None
    shapes: Shapes
    visits: float
    """Of each concept in the proposed training."""

    @property
    def minutes(self) -> float:
        """Of all stages on this machine's cores."""
        return sum(stage.seconds for stage in self.stages) / 60


def shipped(name: str) -> RunConfig:
    """Return a shipped config.

    Raises:
        ConfigError: where the package runs without the clone that has them.
    """
    path = CONFIGS / name
    if not path.is_file():
        raise ConfigError(
            f"init: {path} is not there; it starts from the shipped configs: install from a clone (-e .)"
        )
    return load_config(path)


def settled(base: RunConfig, choices: Choices) -> RunConfig:
    """Return the base with the choices over it, and nothing left of where the base's own data lies."""
    plain = {"data": DataConfig().model_dump(mode="json"), "warm_start": None, **choices.values}
    return with_settings(base, plain)


def choose_input(choices: Choices, facts: Facts, name: str) -> None:
    """Choose what follows from the source alone: its place, captions, columns, background."""
    choices.set("name", name, "the run folder is RUNS/NAME")
    choices.set("runs", "runs", "relative to where `ldm` starts")
    choices.set("tracking.experiment", name, "one experiment for the runs on this data")
    choices.set(
        "encode.source", facts.source, f"{facts.kind}, {facts.samples:,} samples, as given to `ldm init`"
    )
    columns = facts.captions.columns
    usual = columns == ("caption", "text")
    choices.set(
        "encode.caption_columns",
        list(columns),
        "the usual ones, where there is no .txt"
        if usual
        else "the usual ones are absent, these hold the captions",
    )
    captions = min(5, facts.captions.typical_a_sample)
    choices.set(
        "encode.max_captions",
        captions,
        f"a sample has {facts.captions.typical_a_sample}, at most {facts.captions.most_a_sample}",
    )
    choices.set("encode.image_column", facts.image_column, _column_words(facts))
    background, said = "white", "no picture is transparent; what is, lies on white"
    if facts.lights:
        background, contrast = best_background(list(facts.lights))
        said = (
            f"{background}: {len(facts.lights):,} pictures have transparent parts, nine in ten differ from it by "
            f"{contrast:.0%} in lightness"
        )
    choices.set("encode.background", list(BACKGROUNDS[background]), said)


def choose_shapes(
    choices: Choices, facts: Facts, *, size: int, step: int, batch: int, overflow: str
) -> Shapes:
    """Choose the square, or buckets whose sides are multiples of `step` and that fill batches; `overflow` says why."""
    least = (BUCKET_FILL * batch + choices.values["encode.validation_samples"]) / max(1, facts.usable)
    shapes = propose_shapes(facts.headers, size, step, choices.values["encode.max_aspect"], least)
    buckets = None if shapes.buckets is None else [list(bucket) for bucket in shapes.buckets]
    choices.set("encode.buckets", buckets, shapes.reason)
    choices.set("encode.bucket_step", None, "the list above, or a square")
    said = overflow if buckets else "without buckets unused"
    choices.set("encode.bucket_overflow", shapes.overflow, said)
    return shapes


def _column_words(facts: Facts) -> str:
    return "found in the parquet" if facts.image_column else "found by its usual name, or files"


def validation_samples(usable: int, most: int) -> int:
    """Return how many pairs are kept from training: a twentieth, at least 4, at most `most`."""
    return max(min(4, usable // 4), min(most, usable // 20))


def input_notes(facts: Facts) -> list[str]:
    """Return what is wrong with the source, the worst first."""
    notes = [f"damaged, none of it will be used: {said}" for said in facts.damaged[:3]]
    if len(facts.damaged) > 3:
        notes.append(f"{len(facts.damaged) - 3} more damaged shards")
    lost = sum(facts.problems.values())
    if lost:
        notes.append(
            f"{lost:,} of {facts.counted:,} samples will be rejected by their names alone: {named(facts.problems)}"
        )
    if facts.faults:
        notes.append(
            f"{sum(facts.faults.values()):,} of the {facts.looked:,} that were read will be rejected: {named(facts.faults)}"
        )
    if facts.duplicates:
        notes.append(
            f"{facts.duplicates:,} of {len(facts.headers):,} pictures are byte for byte another one; they are kept"
        )
    if len(facts.headers) > 20 and facts.captions.distinct == 1:
        notes.append("all captions are equal: nothing can be learnt from the text")
    return notes


def named(counts: dict[str, int]) -> str:
    """Return counts by name, largest first."""
    return ", ".join(
        f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda entry: -entry[1])
    )
