"""Three starts of processes that the distributed tests share; each runs many cases, for a start costs seconds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cases import STEPS
from tests.distributed.dataset import build_dataset
from tests.distributed.starter import Orders, start

DROPOUT = {"dropout": 0.1}
EVERY_STEP = {"checkpoint_every": 1}
PRECISIONS = {
    0: ("fp32", "autocast_bf16"),
    1: ("fp32", "bf16"),
    2: ("bf16", "autocast_bf16"),
    3: ("bf16",),
}
SETTINGS: dict[str, dict[str, Any]] = {
    f"zero{stage}-{precision}": {"engine": {"zero_stage": stage, "precision": precision}, "model": DROPOUT}
    for stage, precisions in PRECISIONS.items()
    for precision in precisions
}
SETTINGS["zero2-offload"] = {
    "engine": {"zero_stage": 2, "precision": "fp32", "offload_optimizer": True},
    "model": DROPOUT,
}
STOPS = dict.fromkeys(SETTINGS, (3,)) | {"zero1-fp32": (1, 3, 4), "zero1-bf16": (1, 4)}
PLAIN = [0, 1, 2, 3]


@dataclass(frozen=True)
class Results:
    """The folder of all runs and what each case returned, by rank."""

    root: Path
    by_case: dict[str, list[Any]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Return the results of all cases at world sizes 1, 2 and 1 again."""
    root = tmp_path_factory.mktemp("distributed")
    build_dataset(root / "latents", 30)
    build_dataset(root / "other-latents", 30, seed=1)
    by_case: dict[str, list[Any]] = {}
    for world_size, orders in [(1, first_alone()), (2, together()), (1, alone_again())]:
        by_case |= start("tests.distributed.cases", root, world_size, orders, 400)
    yield Results(root, by_case)


def first_alone() -> Orders:
    """The cases of one process that the later starts compare with or load."""
    return {
        "alone": ("run", {"name": "alone"}),
        "alone-odd": ("run", {"name": "alone-odd", "engine": {"global_batch": 7}}),
        "alone-bf16": ("run", {"name": "alone-bf16", "engine": {"precision": "bf16"}}),
        "alone-nan": ("run_with_nan", {"name": "alone-nan", "rank": 0, "at_steps": [2], "train": EVERY_STEP}),
    }


def together() -> Orders:
    """The cases of two processes."""
    orders: Orders = {}
    for stage in PLAIN:
        orders[f"pair-{stage}"] = ("run", {"name": f"pair-{stage}", "engine": {"zero_stage": stage}})
        orders[f"from-alone-{stage}"] = (
            "reshard",
            {"name": "alone", "to": f"from-alone-{stage}", "engine": {"zero_stage": stage}},
        )
        nan = {"name": f"nan-{stage}", "rank": 1, "at_steps": [2], "train": EVERY_STEP}
        orders[f"nan-{stage}"] = ("run_with_nan", {**nan, "engine": {"zero_stage": stage}})
    nan = {"name": "nan-bf16", "rank": 1, "at_steps": [2], "train": EVERY_STEP}
    orders["nan-bf16"] = ("run_with_nan", {**nan, "engine": {"precision": "bf16"}})
    orders["pair-odd"] = ("run", {"name": "pair-odd", "engine": {"global_batch": 7}})
    orders["pair-bf16"] = ("run", {"name": "pair-bf16", "engine": {"precision": "bf16"}})
    orders["shard"] = ("shard_bytes", {"name": "shard"})
    for name, settings in SETTINGS.items():
        orders[f"{name}-straight"] = ("run", {"name": f"{name}-straight", **settings, "train": EVERY_STEP})
        for stop in STOPS[name]:
            cut = f"{name}-cut-{stop}"
            orders[f"{cut}-begun"] = ("run", {"name": cut, **settings, "train": {"steps": stop}})
            orders[cut] = ("run", {"name": cut, "attempt": "a2", **settings})
    orders |= accidents()
    return orders


def accidents() -> Orders:
    """Kills, damage, full disks, divergence and requests to stop, in two processes."""
    rare = {"log_every": 4, "checkpoint_every": 2}
    full = {"checkpoint_every": 1, "keep_last": 2}
    nan = {"rank": 1, "at_steps": [2, 3, 4], "health": {"max_skipped_in_a_row": 3}}
    return {
        "rare": ("run", {"name": "rare", "train": rare}),
        "killed-begun": ("run_killed", {"name": "killed", "at_step": 4, "train": rare}),
        "killed": ("run", {"name": "killed", "attempt": "a2", "train": rare}),
        "damaged-begun": ("run", {"name": "damaged"}),
        "damage": ("flip_bit", {"name": "damaged", "step": STEPS, "file": "rank-00001.safetensors"}),
        "damaged": ("run", {"name": "damaged", "attempt": "a2", "train": {"steps": 8}}),
        "all-damaged-begun": ("run", {"name": "all-damaged", "train": {"steps": 1}}),
        "all-damage": ("flip_bit", {"name": "all-damaged", "step": 1, "file": "checkpoint.json"}),
        "all-damaged": ("run", {"name": "all-damaged", "attempt": "a2"}),
        "diverged": ("run_with_nan", {"name": "diverged", **nan}),
        "full-once": ("run_with_full_disk", {"name": "full-once", "failures": [0], "train": full}),
        "full": ("run_with_full_disk", {"name": "full", "failures": [1, 2, 3], "train": full}),
        "wrong-shards": ("run_on_wrong_shards", {"name": "wrong-shards"}),
        "stop-file": ("run_with_stop_file", {"name": "stop-file"}),
        "max-seconds": ("run", {"name": "max-seconds", "train": {"max_seconds": 1e-9}}),
    }


def alone_again() -> Orders:
    """The cases of one process that load what two have saved, and what a resume refuses or says."""
    bf16 = {"engine": {"zero_stage": 1, "precision": "bf16"}, "model": DROPOUT}
    return {
        "from-pair-1": ("reshard", {"name": "pair-1", "to": "from-pair-1"}),
        "from-pair-2": ("reshard", {"name": "pair-2", "to": "from-pair-2", "engine": {"zero_stage": 0}}),
        "from-zero3-bf16": ("reshard", {"name": "zero3-bf16-straight", "to": "from-zero3-bf16", **bf16}),
        "pair-1-goes-on": ("run", {"name": "pair-1", "attempt": "a3", "train": {"steps": 8}}),
        "alone-goes-on": ("run", {"name": "alone", "attempt": "a3", "train": {"steps": 8}}),
        "other-model": ("run", {"name": "alone", "attempt": "a4", "model": {"layers_per_block": 2}}),
        "other-data": ("run", {"name": "alone", "attempt": "a5", "data": {"dataset": "other-latents"}}),
        "changed": ("run", {"name": "alone", "attempt": "a6", "optimizer": {"learning_rate": 1e-4}}),
    }
