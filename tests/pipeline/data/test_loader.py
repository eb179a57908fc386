"""The loader is a pure function of (seed, data set, k): ranks, micro-batches, threads and restarts do not enter."""

import itertools
import threading

import numpy as np
import pytest
import torch

from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.loader import LatentBatch, LatentLoader
from pipeline.diffusion import draws
from pipeline.errors import DataError
from pipeline.latents.reader import LatentDataset
from tests.distributed.dataset import build_dataset

SAMPLES = 23
FIELDS = (
    "moments",
    "text",
    "tokens",
    "noise",
    "posterior_noise",
    "timesteps",
    "dropped",
    "positions",
    "indices",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return LatentDataset(build_dataset(tmp_path_factory.mktemp("data") / "set", SAMPLES))


def loader(
    dataset: LatentDataset, rank: int = 0, world_size: int = 1, batch: int = 6, micro: int = 6, **data
) -> LatentLoader:
    return LatentLoader(
        dataset,
        seed=5,
        engine=EngineConfig(global_batch=batch, micro_batch=micro),
        objective=ObjectiveConfig(caption_dropout=0.3),
        data=DataConfig(**data),
        rank=rank,
        world_size=world_size,
    )


def global_steps(
    dataset: LatentDataset, world_size: int, micro: int, steps: int, consumed: int = 0, **data
) -> list[dict]:
    """Return for each step the real samples of all ranks, put together in the order of their positions."""
    ranks = [
        loader(dataset, rank, world_size, micro=micro, **data).steps(consumed) for rank in range(world_size)
    ]
    together = []
    for _ in range(steps):
        batches = [batch for rank in ranks for batch in next(rank)]
        kept = {
            name: torch.cat([getattr(batch, name)[batch.weight == 1] for batch in batches]) for name in FIELDS
        }
        order = kept["positions"].argsort()
        together.append({name: values[order] for name, values in kept.items()})
    for rank in ranks:
        rank.close()
    return together


@pytest.mark.parametrize(
    ("world_size", "micro", "threads"), [(1, 2, 4), (2, 3, 1), (2, 1, 2), (3, 2, 3), (4, 1, 2), (6, 6, 1)]
)
def test_global_batches_do_not_depend_on_who_reads_them(
    dataset, world_size: int, micro: int, threads: int
) -> None:
    expected = global_steps(dataset, 1, 6, 8)
    found = global_steps(dataset, world_size, micro, 8, threads=threads)
    for one, two in zip(expected, found, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in FIELDS)


def test_starting_anywhere_is_going_on(dataset: LatentDataset) -> None:
    straight = global_steps(dataset, 1, 6, 12)
    for stop in (1, 5, 9):
        resumed = global_steps(dataset, 2, 2, 12 - stop, consumed=stop * 6)
        for one, two in zip(straight[stop:], resumed, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in FIELDS)


def test_every_sample_once_an_epoch_and_batches_straddle_epochs(dataset: LatentDataset) -> None:
    steps = global_steps(dataset, 2, 2, SAMPLES)  # 23 steps of 6 = 6 epochs of 23
    seen = torch.cat([step["indices"] for step in steps]).reshape(6, SAMPLES)
    assert all(sorted(epoch.tolist()) == list(range(SAMPLES)) for epoch in seen)
    assert all(len(step["indices"]) == 6 for step in steps)


def test_every_rank_runs_equally_many_micro_batches_and_fillers_weigh_nothing(dataset: LatentDataset) -> None:
    for world_size, micro in ((4, 1), (5, 1), (4, 2)):
        ranks = [next(loader(dataset, rank, world_size, micro=micro).steps(0)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        assert sum(batch.weight.sum().item() for batches in ranks for batch in batches) == 6
        assert all(batch.size <= micro and batch.size >= 1 for batches in ranks for batch in batches)


def test_a_batch_holds_what_the_data_set_and_the_draws_say(dataset: LatentDataset) -> None:
    (batch,) = next(loader(dataset).steps(12))
    assert batch.positions.tolist() == list(range(12, 18))
    for row, (k, index) in enumerate(zip(batch.positions.tolist(), batch.indices.tolist(), strict=True)):
        sample = dataset.read(index)
        assert np.array_equal(batch.moments[row].numpy(), sample.arrays["latent"])
        assert batch.text is not None and np.array_equal(batch.text[row].numpy(), sample.arrays["text"][0])
        assert np.array_equal(batch.tokens[row].numpy(), sample.arrays["tokens"][0])
        assert np.array_equal(batch.noise[row].numpy(), draws.training_noise(5, k, shape=(4, 8, 8)))
        assert batch.dropped[row].item() == draws.drops_caption(5, k, 0.3)
    assert (batch.moments.dtype, batch.noise.dtype, batch.timesteps.dtype) == (
        torch.float16,
        torch.float32,
        torch.int64,
    )


def test_closing_ends_the_threads(dataset: LatentDataset) -> None:
    before = threading.active_count()
    steps = loader(dataset, threads=4).steps(0)
    for _ in itertools.islice(steps, 3):
        assert threading.active_count() > before
    steps.close()
    assert threading.active_count() == before


def test_more_ranks_than_samples_in_a_step_is_refused(dataset: LatentDataset) -> None:
    with pytest.raises(DataError, match=r"global_batch 6 is smaller than the world size 7"):
        loader(dataset, 0, 7)
    empty = LatentDataset(dataset.folder, "validation")
    with pytest.raises(DataError, match="validation' has no samples"):
        loader(empty)


def test_a_batch_moves_whole(dataset: LatentDataset) -> None:
    (batch,) = next(loader(dataset).steps(0))
    moved = batch.to("meta")
    assert isinstance(moved, LatentBatch) and moved.noise.device.type == "meta" and moved.size == batch.size
