"""Memory by stage, goodput, storage, what binds: against the engine's table, closed forms and the format itself."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.latents.record import LatentSample, npy_bytes
from pipeline.paths import RunPaths
from pipeline.plan.advice import advice
from pipeline.plan.devices import Device, Site, device_named, devices, host_floor
from pipeline.plan.estimate import Estimate, Target, encode_hours, estimate
from pipeline.plan.goodput import Saving, best_interval_seconds, goodput, mttf_seconds
from pipeline.plan.memory import GIB, bucket_bytes, device_memory, state_bytes
from pipeline.plan.published import newest
from pipeline.plan.speed import published_bound, wire_bytes
from pipeline.plan.workload import Workload, workload_of
from tests.pipeline.plan.meta import ROOT

SD15 = ROOT / "configs" / "sd15-512.yaml"


def workload(*overrides: str, path: Path = SD15, samples: int | None = None) -> Workload:
    config: RunConfig = load_config(path, overrides)
    return workload_of(config, RunPaths(Path("nowhere")), samples)


def target(device: str = "h100", **site: Any) -> Target:
    named = device_named(device)
    return Target(named, newest(named.name), Site(**site))


def plan(*overrides: str, ranks: int = 64, device: str = "h100", **site: Any) -> Estimate:
    return estimate(workload(*overrides), target(device, **site), ranks)


@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "bytes_per_parameter"),
    [
        (0, "fp32", 8, 4 + 4 + 8 + 4 / 8),
        (1, "fp32", 8, 4 + (4 + 4 + 8 + 4) / 8),
        (1, "bf16", 8, 2 + 6 + (4 + 8 + 4) / 8),
        (2, "bf16", 8, 2 + (4 + 4 + 8 + 4) / 8),
        (3, "bf16", 8, (2 + 4 + 4 + 8 + 4) / 8),
        (3, "bf16", 64, 22 / 64),
    ],
)
def test_states_are_the_table_of_the_engines_page(
    stage: int, precision: str, ranks: int, bytes_per_parameter: float
) -> None:
    """docs/engine.md, whose bytes tests/distributed/test_engine.py measures on two ranks."""
    assert sum(state_bytes(stage, precision, ranks).values()) == pytest.approx(bytes_per_parameter)


def test_every_part_of_memory_grows_with_what_it_is_made_of() -> None:
    eager = device_memory(workload(), 64, 32)
    assert eager.activations == pytest.approx(32 * workload().network.activation_bytes("bf16"))
    assert (
        device_memory(workload("engine.activation_checkpointing=true"), 64, 32).activations
        < 0.4 * eager.activations
    )
    more = device_memory(workload("ema.more_decays=[0.999,0.9]"), 64, 32)
    assert more.averages == pytest.approx(3 * eager.averages)
    tokens = device_memory(workload("encode.text=tokens"), 64, 32)
    assert tokens.text_encoder == 4 * 123_060_480 and eager.text_encoder == 0
    offloaded = device_memory(workload("engine.offload_optimizer=true", "engine.zero_stage=2"), 8, 32)
    assert offloaded.masters == offloaded.moments == offloaded.averages == 0


def test_buckets_are_what_the_derived_config_asks_for() -> None:
    assert workload().bucket_elements == 144_000_000
    hatch = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}"
    assert workload(hatch).bucket_elements == 1000
    assert bucket_bytes(0, "fp32", 10) == 0 and bucket_bytes(1, "bf16", 10) == 20
    assert bucket_bytes(2, "bf16", 10) == 80 and bucket_bytes(1, "fp32", 10) == 80


def test_published_bound_is_predicts_figure_for_the_benchmarks_network() -> None:
    path = ROOT / "configs" / "sd2-512.yaml"
    load = workload("engine.global_batch=2048", "engine.micro_batch=4", path=path)
    generation = newest("H100")
    assert generation is not None
    assert published_bound(load, generation, 512) == pytest.approx(generation.step_seconds(1, 4))


def test_ours_is_never_told_faster_than_the_published_stack() -> None:
    for ranks in (8, 64, 512):
        found = plan(ranks=ranks)
        assert found.step_seconds is not None and found.bound_seconds is not None
        assert found.step_seconds > found.bound_seconds


def test_small_micro_batches_are_bound_by_the_host() -> None:
    found = plan(ranks=2048)
    assert found.step is not None and found.step.binds == "host"
    assert found.step_seconds == pytest.approx(host_floor().seconds(1, 1, "bf16", found_tensors()))
    assert "the host's" in " ".join(advice(workload(), target(), [found]))


def found_tensors() -> int:
    return workload().network.tensors


def test_a_slow_file_system_binds_and_tokens_help() -> None:
    found = plan("encode.image_size=512", read_gb_per_second=0.05)
    assert found.step is not None and found.step.binds == "file system"
    assert "tokens" in " ".join(advice(workload(), target(), [found]))
    ids = plan("encode.text=tokens", read_gb_per_second=0.05)
    assert ids.step is not None and ids.step.data < 0.5 * found.step.data


def test_a_slow_network_binds() -> None:
    slow = Device("SLOW", 989.0, 80, 3350.0, 8, 365.0, 1.0)
    found = estimate(workload(), Target(slow, newest("H100"), Site()), 64)
    assert found.step is not None and found.step.binds == "network"
    assert found.step.exposed > 8 * 859e6 / 1e9


@pytest.mark.parametrize(("stage", "per_parameter"), [(1, 10), (2, 10), (3, 8)])
def test_bytes_on_the_wire(stage: int, per_parameter: int) -> None:
    load = workload(f"engine.zero_stage={stage}")
    assert wire_bytes(load, 64) == pytest.approx(per_parameter * 859_520_964 * 63 / 64)


def test_memory_that_does_not_fit_says_what_helps() -> None:
    found = plan("engine.micro_batch=256", "engine.global_batch=16384")
    assert not found.fits
    assert "engine.micro_batch" in " ".join(advice(workload(), target(), [found]))


def test_strong_scaling_that_burns_money_is_named() -> None:
    plans = [estimate(workload(), target(), ranks) for ranks in (8, 64, 1024)]
    said = [line for line in advice(workload(), target(), plans) if "burn money" in line]
    assert len(said) == 1 and said[0].startswith("1024 devices")
    assert plans[0].dollars is not None and plans[2].dollars is not None
    assert plans[2].dollars > 1.25 * plans[0].dollars


def test_a_grace_shorter_than_two_saves_is_named() -> None:
    slow = plan("cluster.signal_lead_seconds=60", ranks=8, write_gb_per_second=0.1)
    assert slow.saving.write_seconds == pytest.approx(16 * 859_520_964 / 0.1e9)
    assert any(
        "signal_lead_seconds 60" in line
        for line in advice(workload("cluster.signal_lead_seconds=60"), target(), [slow])
    )
    assert not any("signal_lead" in line for line in advice(workload(), target(), [plan(ranks=8)]))


def test_best_interval_is_the_best_of_all() -> None:
    saving, mttf, restart = Saving(1e10, 2.0, 5.0), mttf_seconds(128, 5e-3), 235.0
    best = best_interval_seconds(saving, mttf)
    assert best == pytest.approx(math.sqrt(2 * 2.0 * 135_000))
    there = goodput(saving, best, mttf, restart)
    assert all(
        goodput(saving, best * factor, mttf, restart) <= there + 1e-6 for factor in np.geomspace(0.1, 10, 41)
    )


def test_goodput_of_the_published_comparison() -> None:
    """1024 GPUs: 0.2 s stalls and 310 s restarts keep 99.6 %, Gaudi's 57 s stalls 96.9 %."""
    mttf = mttf_seconds(128, 5e-3)
    quick, slow = Saving(1e10, 0.2, 0.2), Saving(1e10, 57.0, 57.0)
    assert goodput(quick, best_interval_seconds(quick, mttf), mttf, 310) == pytest.approx(0.996, abs=0.002)
    assert goodput(slow, best_interval_seconds(slow, mttf), mttf, 300) == pytest.approx(0.969, abs=0.004)


@pytest.mark.parametrize("text", ["embeddings", "tokens"])
def test_stored_bytes_are_those_of_a_tar(text: str) -> None:
    load = workload(f"encode.text={text}")
    arrays = {member.name: np.zeros(member.shape, member.dtype) for member in load.spec.members((512, 512))}
    sample = LatentSample("0", arrays, {})
    payload = [len(npy_bytes(array)) for array in sample.arrays.values()] + [256]
    assert load.stored_bytes() == sum(512 + -(-size // 512) * 512 for size in payload)
    assert load.stored_bytes("embeddings") > 2 * load.stored_bytes("tokens")


def test_encoding_hours_are_arithmetic_over_efficiency() -> None:
    hours = encode_hours(workload(), device_named("h100"), 100_000_000)
    assert hours == pytest.approx(1e8 * (1116.658e9 + 13.2985e9) / (0.45 * 989e12) / 3600, rel=1e-4)


def test_a_device_without_published_runs_gets_no_speed() -> None:
    found = plan(device="l40s")
    assert found.step_seconds is found.dollars is found.mfu is found.read_per_node is None
    assert found.memory.total / GIB == found.memory.gib
    assert any("--calibrate" in line for line in advice(workload(), target("l40s"), [found]))


def test_every_device_of_the_table_makes_a_plan() -> None:
    for name in devices():
        assert plan(device=name).memory.gib > 0


def test_mfu_counts_the_networks_own_flop_only() -> None:
    once, again = plan(), plan("engine.activation_checkpointing=true")
    assert once.mfu is not None and again.mfu is not None
    assert again.mfu < once.mfu
    assert once.mfu == pytest.approx(
        (once.samples_per_second or 0) * 2_406_773_063_680 / (64 * 989e12), rel=1e-3
    )
