"""10^9 samples in 10^5 shards on disk: opened, sought to the middle and read by rank 4,095 in a second and little memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import DataConfig
from pipeline.data.mixture import Mixture
from pipeline.latents.manifest import SEGMENTS_NAME, SHARDS_NAME, Manifest
from pipeline.latents.reader import LatentDataset
from pipeline.latents.record import stride_bytes
from pipeline.latents.rows import SHARD_SCHEMA, write_table
from pipeline.latents.segments import SEGMENT_DTYPE
from pipeline.latents.shard import Counts, shard_path
from pipeline.publish import file_digest
from tests.faults.outcome import ROOT
from tests.pipeline.data.datasets import SPEC, SQUARE, sample_bytes, square_shards, write_dataset

SHARDS, ROWS, BATCH, RANK, WORLD = 100_000, 10_000, 32_768, 4095, 4096
SPARSE_SPEC = replace(SPEC, text="tokens", latent="mean")
JSON_BYTES = 256
MIDDLE = SHARDS * ROWS // 2
STRIDE = stride_bytes(SPARSE_SPEC.members(SQUARE), JSON_BYTES)

# A process of its own: its peak memory is measured against what the imports alone take.
OPEN_AND_DRAW = """
import json, resource, sys, time
from pathlib import Path
from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.loader import LatentLoader
from pipeline.latents.reader import LatentDataset
def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before, began = resident(), time.monotonic()
dataset = LatentDataset(Path(sys.argv[1]), rank={rank}, world_size={world})
loader = LatentLoader(dataset, seed=0, engine=EngineConfig(global_batch={batch}, micro_batch=8),
    objective=ObjectiveConfig(), data=DataConfig(order=sys.argv[2], verify="off"), rank={rank}, world_size={world})
(batch,) = next(loader.steps({middle}))
print(json.dumps(dict(seconds=time.monotonic() - began, grown=resident() - before, opens=dataset.opens,
    read=dataset.bytes_read, indices=batch.indices.tolist(), latents=batch.moments.flatten(1).double().sum(1).tolist())))
""".format(rank=RANK, world=WORLD, batch=BATCH, middle=MIDDLE)  # noqa: UP032


def write_sparse(folder: Path, written: dict[int, list[int]]) -> None:
    """Write tables of all shards, sparse tars for those that are looked at, with the named samples in them."""
    table = np.zeros(SHARDS, SEGMENT_DTYPE)
    table["shard"], table["rows"], table["stride"] = np.arange(SHARDS), ROWS, STRIDE
    table["height"], table["width"], table["json_bytes"] = *SQUARE, JSON_BYTES
    np.save(folder / SEGMENTS_NAME, table, allow_pickle=False)
    size_bytes = ROWS * STRIDE + 1024
    rows: list[dict[str, Any]] = [
        {"name": f"{number:05d}", "samples": ROWS, "bytes": size_bytes, "digest": "0" * 64}
        for number in range(SHARDS)
    ]
    write_table(folder / SHARDS_NAME, rows, SHARD_SCHEMA)
    for number in sorted({*written, *range(RANK, SHARDS, WORLD)}):
        path = shard_path(folder, f"{number:05d}", ".tar")
        path.parent.mkdir(exist_ok=True, parents=True)
        with path.open("wb") as stream:
            stream.truncate(size_bytes)
            for row in written.get(number, []):
                record = {"key": f"{number}-{row}", "captions": ["a"]}
                block = sample_bytes(record, SPARSE_SPEC.members(SQUARE), JSON_BYTES, (number, row))
                os.pwrite(stream.fileno(), block, row * STRIDE)
    Manifest(
        spec=SPARSE_SPEC,
        counts=Counts(SHARDS * ROWS, SHARDS * ROWS),
        splits={"train": SHARDS * ROWS, "validation": 0},
        buckets=[],
        encoder={},
        preprocessing={},
        statistics={},
        tables={name: file_digest(folder / name) for name in (SHARDS_NAME, SEGMENTS_NAME)},
        null={},
    ).save(folder)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["global", "lanes"])
def test_a_billion_samples(tmp_path: Path, order: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_sparse(tmp_path, {})
    dataset = LatentDataset(tmp_path, rank=RANK, world_size=WORLD)
    assert len(dataset) == 10**9
    plan = Mixture([dataset], seed=0, global_batch=BATCH, data=DataConfig(order=order))
    everything = plan.by_lane(np.arange(MIDDLE, MIDDLE + BATCH))
    mine = plan.samples(everything[RANK * BATCH // WORLD : (RANK + 1) * BATCH // WORLD])
    # What the reader has in hand beyond the first batch must be there too.
    ahead = [plan.by_lane(np.arange(MIDDLE + s * BATCH, MIDDLE + (s + 1) * BATCH)) for s in range(8)]
    needed = np.concatenate([mine, *(plan.samples(step[-BATCH // WORLD :]) for step in ahead)])
    written: dict[int, list[int]] = {}
    for index in needed.tolist():
        written.setdefault(index // ROWS, []).append(index % ROWS)
    write_sparse(tmp_path, written)
    done = subprocess.run(
        [sys.executable, "-c", OPEN_AND_DRAW, str(tmp_path), order],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        print(
            f"\n10^9 samples, {order}: first batch after {found['seconds']:.2f} s, {found['grown'] / 2**20:.0f} MiB grown, "
            f"{found['opens']} opens, {found['read']} bytes read"
        )
    assert found["indices"] == mine.tolist() and len(mine) == 8
    for index, total in zip(found["indices"], found["latents"], strict=True):
        sample = dataset.read(index)
        assert sample.key == f"{index // ROWS}-{index % ROWS}"
        assert total == pytest.approx(float(sample.arrays["latent"].astype(np.float64).sum()))
    assert (
        found["grown"] < 200 * 2**20 and found["seconds"] < 30
    )  # A second alone; other work may run beside.
    assert found["opens"] <= 80 and found["read"] <= 80 * STRIDE


def test_opens_are_few_in_lanes(tmp_path: Path) -> None:
    """60 shards of 40 samples, two ranks: each opens each of its shards once and forgets none too early."""
    folder = write_dataset(tmp_path, square_shards(*[40] * 60))
    opens = 0
    data = DataConfig(order="lanes", lanes=4, lane_window=80)
    for rank in range(2):
        dataset = LatentDataset(folder)
        plan = Mixture([dataset], seed=0, global_batch=48, data=data)
        for first in range(0, len(dataset), 48):
            found = plan.look_up(plan.by_lane(np.arange(first, first + 48))[rank * 24 : rank * 24 + 24])
            dataset.read_batch(found.indices, dataset.empty_arrays(SQUARE, 24))
        opens += dataset.opens
    assert opens / 2400 <= 0.05
