"""Every sample exactly once an epoch, whoever reads: simulated ranks up to 4,096, real processes, many resumes."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import DataConfig, EngineConfig, MixedSet, ObjectiveConfig
from pipeline.data.loader import LatentLoader
from pipeline.errors import ConfigError
from pipeline.latents.reader import LatentDataset
from tests.faults.ranks import run_ranks
from tests.pipeline.data.datasets import Stretch, square_shards, write_dataset

TWO_BUCKETS = [
    [Stretch(5), Stretch(3, (8, 16))],
    [Stretch(9), Stretch(2, split="validation")],
    [Stretch(7, (8, 16))],
]
WORLDS = (1, 2, 3, 5, 8, 12)


def open_loader(
    sets: list[LatentDataset], rank: int, world_size: int, batch: int = 12, micro: int = 3, **data: Any
) -> LatentLoader:
    return LatentLoader(
        sets,
        seed=11,
        engine=EngineConfig(global_batch=batch, micro_batch=micro),
        objective=ObjectiveConfig(),
        data=DataConfig(verify="off", **data),
        rank=rank,
        world_size=world_size,
    )


def planned(loader: LatentLoader, consumed: int) -> Iterator[list[int]]:
    """Yield the sample numbers this rank would read in each step, fillers left out."""
    parts = loader.parts(consumed)
    while True:
        step = list(itertools.islice(parts, loader.micro_batches))
        yield [int(n) for part in step if not part.filler for n in loader.order.numbers(part.found)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[LatentDataset]:
    return [LatentDataset(write_dataset(tmp_path_factory.mktemp("plain"), square_shards(40, 1, 33, 26)))]


@pytest.mark.parametrize("order", ["global", "lanes"])
def test_the_world_size_may_change_at_every_step(plain: list[LatentDataset], order: str) -> None:
    data = {"order": order, "lanes": 4, "lane_window": 8}
    reference = planned(open_loader(plain, 0, 1, **data), 0)
    seen: list[int] = []
    for step, world in zip(range(100), itertools.cycle(WORLDS)):  # 100 resumes, 12 epochs of 100
        ranks = [next(planned(open_loader(plain, rank, world, **data), step * 12)) for rank in range(world)]
        together = [number for rank in ranks for number in rank]
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
        assert Counter(together) == Counter(next(reference))
        seen += together
    # A batch may straddle two epochs: the multiset of 12 whole epochs is each sample 12 times.
    assert Counter(seen) == {number: 12 for number in range(100)}


@pytest.mark.parametrize("order", ["global", "lanes"])
@pytest.mark.parametrize("world", [64, 100, 4096])
def test_many_ranks(plain: list[LatentDataset], order: str, world: int) -> None:
    """A batch of 4,100 on up to 4,096 ranks, no divisor: the union over all ranks is the batch of one rank."""
    data = {"order": order, "lanes": 4, "batch": 4100, "micro": 50}
    whole = next(planned(open_loader(plain, 0, 1, **data), 4100))
    shared = open_loader(plain, 0, world, **data)
    together: list[int] = []
    for rank in range(world):
        shared.rank = rank
        together += next(planned(shared, 4100))
    assert Counter(together) == Counter(whole) and len(whole) == 4100


@pytest.mark.parametrize("order", ["global", "lanes"])
def test_buckets_have_one_shape_a_step_on_all_ranks(tmp_path: Path, order: str) -> None:
    sets = [LatentDataset(write_dataset(tmp_path, TWO_BUCKETS))]
    assert len(sets[0]) == 24
    data = {"order": order, "lanes": 2, "batch": 4, "micro": 2}
    seen: dict[tuple[int, int], list[int]] = {}
    for step, world in zip(range(60), itertools.cycle((1, 2, 3, 4))):
        shapes, read = set(), []
        for rank in range(world):
            loader = open_loader(sets, rank, world, **data)
            parts = list(itertools.islice(loader.parts(step * 4), loader.micro_batches))
            shapes |= {part.found.shape.bucket for part in parts}
            for part in parts:
                if not part.filler:
                    read += zip(
                        part.positions.tolist(), loader.order.numbers(part.found).tolist(), strict=True
                    )
        assert len(shapes) == 1 and len(read) == 4
        seen.setdefault(shapes.pop(), []).extend(number for _, number in sorted(read))
    square, wide = seen[(8, 8)], seen[(8, 16)]
    assert abs(len(square) / 4 - 60 * 14 / 24) < 1 and abs(len(wide) / 4 - 60 * 10 / 24) < 1
    for numbers, count in ((square, 14), (wide, 10)):
        for epoch in range(len(numbers) // count):
            assert len(set(numbers[epoch * count : (epoch + 1) * count])) == count
    assert not set(square) & set(wide)
    (batch,) = next(open_loader(sets, 0, 1, batch=4, micro=4).steps(4))
    for row, number in enumerate(batch.indices.tolist()):
        assert np.array_equal(batch.moments[row].numpy(), sets[0].read(number).arrays["latent"])
    with pytest.raises(ConfigError, match=r"does not divide the 5 samples"):
        next(open_loader(sets, 0, 1, batch=4).steps(5))


def test_mixed_sets_keep_their_weights_and_epochs(tmp_path: Path) -> None:
    sets = [
        LatentDataset(write_dataset(tmp_path / "a", square_shards(30), seed=1)),
        LatentDataset(write_dataset(tmp_path / "b", square_shards(7, 6), seed=2)),
    ]
    mix = (MixedSet(dataset="a", weight=3.0), MixedSet(dataset="b", weight=1.0))
    loader = open_loader(sets, 0, 1, batch=8, micro=8, mix=mix)
    seen = [
        number for _, step in zip(range(65), planned(loader, 0), strict=False) for number in step
    ]  # 520 samples
    first, second = [n for n in seen if n < 30], [n - 30 for n in seen if n >= 30]
    assert (len(first), len(second)) == (390, 130)
    assert Counter(first) == {n: 13 for n in range(30)} and Counter(second) == {n: 10 for n in range(13)}
    for numbers, count in ((first, 30), (second, 13)):
        for epoch in range(3):
            assert sorted(numbers[epoch * count : (epoch + 1) * count]) == list(range(count))
    report = loader.order.report(520)
    assert [(entry["samples"], entry["epochs"], entry["share"]) for entry in report] == [
        (390, 13.0, 0.75),
        (130, 10.0, 0.25),
    ]
    (batch,) = next(loader.steps(8))
    for row, number in enumerate(batch.indices.tolist()):
        assert np.array_equal(batch.moments[row].numpy(), loader.order.read(number).arrays["latent"])


def test_validation_is_never_trained_on(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, TWO_BUCKETS)
    train, validation = LatentDataset(folder), LatentDataset(folder, "validation")
    keys = [{dataset.read(index).key for index in range(len(dataset))} for dataset in (train, validation)]
    assert len(keys[0]) == 24 and len(keys[1]) == 2 and not keys[0] & keys[1]


def read_ids(folder: str, consumed: int, steps: int, out: str) -> None:
    """On each gloo rank: read `steps` steps and write the keys that were seen, as the files hold them."""
    from torch import distributed

    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    dataset = LatentDataset(Path(folder), rank=rank, world_size=world)
    loader = open_loader([dataset], rank, world, order="lanes", lanes=4, lane_window=8)
    keys: list[str] = []
    with closing(loader.steps(consumed)) as batches:
        for _, step in zip(range(steps), batches, strict=False):
            assert len(step) == loader.micro_batches
            distributed.barrier()
            for batch in step:
                real = batch.indices[batch.weight == 1].tolist()
                keys += [dataset.read(index).key for index in real]
    Path(out, f"{consumed}-{rank}-{os.getpid()}.json").write_text(json.dumps(keys))


@pytest.mark.distributed
@pytest.mark.covers("F45")
def test_real_processes_read_an_epoch_once_over_two_resumes(tmp_path: Path) -> None:
    """One shard more than ranks would need: 36 samples, 12 a step, on 3, then 2, then 1 processes."""
    folder = write_dataset(tmp_path / "set", square_shards(35, 1))
    (tmp_path / "seen").mkdir()
    args = {"folder": str(folder), "steps": 1, "out": str(tmp_path / "seen")}
    for consumed, world in ((0, 3), (12, 2), (24, 1)):
        run_ranks(f"{__name__}:read_ids", world, args | {"consumed": consumed}, timeout_seconds=60)
    files = list((tmp_path / "seen").iterdir())
    seen = Counter(key for file in files for key in json.loads(file.read_text()))
    assert len(files) == 6 and seen == {f"k{number:06d}": 1 for number in range(36)}
