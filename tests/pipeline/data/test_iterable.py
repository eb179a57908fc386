"""Under a DataLoader, forked or spawned, the micro-batches are those of the loader, in their order."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.iterable import LatentIterable
from pipeline.data.loader import LatentBatch, LatentLoader
from pipeline.latents.reader import LatentDataset
from tests.pipeline.data.datasets import square_shards, write_dataset


def open_loader(folder: Path) -> LatentLoader:
    return LatentLoader(
        LatentDataset(folder),
        seed=1,
        engine=EngineConfig(global_batch=6, micro_batch=3),
        objective=ObjectiveConfig(),
        data=DataConfig(),
        rank=0,
        world_size=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("set"), square_shards(9, 8))


def same(one: LatentBatch, two: LatentBatch) -> bool:
    names = ("moments", "text", "noise", "timesteps", "positions", "indices")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "spawn")])
def test_order_and_content_are_the_loaders(folder: Path, workers: int, method: str | None) -> None:
    parent = open_loader(folder)  # Open in the parent, threads running, while the workers are forked.
    steps = parent.steps(6)
    expected = [batch for step in itertools.islice(steps, 4) for batch in step]
    data = LatentIterable(partial(open_loader, folder), consumed=6)
    batches = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=method)
    found = list(itertools.islice(iter(batches), 8))
    assert all(same(one, two) for one, two in zip(expected, found, strict=True))
    steps.close()


def test_state_goes_on_where_it_was(folder: Path) -> None:
    straight = list(itertools.islice(iter(LatentIterable(partial(open_loader, folder))), 9))
    first = LatentIterable(partial(open_loader, folder))
    before = list(itertools.islice(iter(first), 4))
    second = LatentIterable(partial(open_loader, folder))
    second.load_state_dict(first.state_dict())
    after = list(itertools.islice(iter(second), 5))
    assert first.state_dict() == {"consumed": 0, "done": 4}
    assert all(same(one, two) for one, two in zip(straight, before + after, strict=True))
