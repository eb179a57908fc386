"""What published runs say: seconds per step of a tuned stack, by device and generation of its software.

Source: MLPerf Training, benchmark "stable_diffusion" (the U-Net of SD 2, 512 px, cached latents), the raw logs in
github.com/mlcommons/training_results_v3.1, _v4.0, _v4.1 and _v5.0, steady state after the first block. For the A100 the
README of github.com/mosaicml/diffusion, same network and size.
"""

import csv
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from pipeline.data.shares import micro_batches_per_step
from pipeline.errors import ConfigError

SD2_PARAMETERS = 865_910_724
MLPERF_FLOPS = 2_408_741_109_760
"""FLOP of forward and backward of one sample of the benchmark: 64 x 64 latents, 77 tokens."""


@dataclass(frozen=True)
class Point:
    """One published run."""

    generation: str
    submission: str
    device: str
    accelerators: int
    global_batch: int
    micro_batch: int
    step_seconds: float
    peak_gib: float | None


@dataclass(frozen=True)
class Generation:
    """A device with one generation of software: at most two constants, and the runs that set them.

    seconds per step = `base_seconds` + micro-batches x micro-batch x `sample_seconds`.
    """

    device: str
    generation: str
    sample_seconds: float
    base_seconds: float
    set_by: tuple[str, ...]

    def step_seconds(self, micro_batches: int, micro_batch: float) -> float:
        """Return the seconds of one optimizer step of the benchmark's network."""
        return self.base_seconds + micro_batches * micro_batch * self.sample_seconds


@dataclass(frozen=True)
class MemoryFit:
    """What a device holds beyond weights, gradients, masters and moments, in the published runs."""

    base_gib: float
    sample_gib: float
    set_by: tuple[str, ...]


def predict(device: str, generation: str, n_accelerators: int, global_batch: int, micro_batch: int) -> float:
    """Return the seconds of one optimizer step of MLPerf's SD 2 U-Net at 512 px on a published stack.

    `device` and `generation` name a row of data/constants.toml, such as "H100" and "v4.1". The published stack is
    NVIDIA's or Google's tuned one (CUDA graphs, compiled, fp16), not this project's: a bound, not a promise.
    Where the global batch needs several micro-batches a step, the base is counted once.

    Raises:
        ConfigError: there are no constants for the pair; the message lists those there are.
    """
    known = constants()
    if (device, generation) not in known:
        there = ", ".join(f"{one.device} {one.generation}" for one in known.values())
        raise ConfigError(f"plan: no constants for {device} {generation}; there are {there}")
    micro_batches = micro_batches_per_step(global_batch, micro_batch, n_accelerators)
    share = global_batch / n_accelerators / micro_batches
    return known[device, generation].step_seconds(micro_batches, share)


@lru_cache(maxsize=1)
def constants() -> dict[tuple[str, str], Generation]:
    """Return the constants of every generation, newest last for each device."""
    rows = _constants_file()["generation"]
    found = [
        Generation(
            row["device"],
            row["generation"],
            row["sample_ms"] / 1000,
            row["base_ms"] / 1000,
            tuple(row["set_by"]),
        )
        for row in rows
    ]
    return {(one.device, one.generation): one for one in found}


def newest(device: str) -> Generation | None:
    """Return the constants of a device's newest generation, None where nothing usable is published."""
    found = [one for (name, _), one in constants().items() if name == device]
    return found[-1] if found else None


@lru_cache(maxsize=1)
def memory_fit() -> MemoryFit:
    """Return the two constants of the published peaks of memory."""
    row = _constants_file()["memory"]
    return MemoryFit(row["base_gib"], row["sample_gib"], tuple(row["set_by"]))


def published_peak_gib(micro_batch: float, ranks_that_share: int) -> float:
    """Return the peak of the benchmark's tuned stack: fp16 weights and gradients, fp32 masters and moments shared."""
    states = SD2_PARAMETERS * (2 + 2 + 12 / ranks_that_share) / 2**30
    return states + memory_fit().base_gib + memory_fit().sample_gib * micro_batch


def excluded() -> dict[tuple[str, str], str]:
    """Return the generations that have points but no constants, with the reason."""
    return {(row["device"], row["generation"]): row["reason"] for row in _constants_file()["excluded"]}


@lru_cache(maxsize=1)
def points() -> tuple[Point, ...]:
    """Return every published run of data/*_points.csv."""
    tables = files("pipeline.plan").joinpath("data")
    text = "".join(
        tables.joinpath(f"{name}_points.csv").read_text() for name in ("mlperf_sd", "mosaicml_sd2")
    )
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return tuple(
        Point(
            row["round"],
            row["submission"],
            row["accelerator"],
            int(row["n_acc"]),
            int(row["global_batch"]),
            int(row["micro_batch"]),
            float(row["step_ms"]) / 1000,
            float(row["max_mem_gib"]) if row["max_mem_gib"] else None,
        )
        for row in csv.DictReader(lines)
        if row["round"] != "round"  # The second file's header.
    )


@lru_cache(maxsize=1)
def _constants_file() -> dict[str, Any]:
    return tomllib.loads(files("pipeline.plan").joinpath("data/constants.toml").read_text())
