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
from tests.pipeline.data.datasets import square_shards, with_captions, write_dataset

SAMPLES = 23
OBJECTIVE = ObjectiveConfig(caption_dropout=0.3)
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
    return LatentDataset(write_dataset(tmp_path_factory.mktemp("data") / "set", square_shards(9, 4, 10)))


def loader(
    dataset: LatentDataset,
    rank: int = 0,
    world_size: int = 1,
    micro: int = 6,
    objective: ObjectiveConfig = OBJECTIVE,
    **data,
) -> LatentLoader:
    return LatentLoader(
        dataset,
        seed=5,
        engine=EngineConfig(global_batch=6, micro_batch=micro),
        objective=objective,
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
        assert np.array_equal(batch.noise[row].numpy(), draws.training_noise(5, k, shape=(2, 4, 4)))
        assert batch.dropped[row].item() == draws.drops_caption(5, k, 0.3)
    assert (batch.moments.dtype, batch.noise.dtype, batch.timesteps.dtype) == (
        torch.float16,
        torch.float32,
        torch.int64,
    )


def noises(
    dataset: LatentDataset, objective: ObjectiveConfig, world_size: int = 1, micro: int = 6
) -> dict[int, tuple[np.ndarray, np.ndarray | None]]:
    """Return position -> (noise, input noise) of the real samples of the third step."""
    found = {}
    for rank in range(world_size):
        steps = loader(dataset, rank, world_size, micro, objective).steps(12)
        for batch in next(steps):
            for row in (batch.weight == 1).nonzero().flatten().tolist():
                mixed = None if batch.input_noise is None else batch.input_noise[row].numpy().copy()
                found[int(batch.positions[row])] = (batch.noise[row].numpy().copy(), mixed)
        steps.close()
    return found


@pytest.mark.parametrize(("offset", "perturbation"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (0.5, 0.25)])
def test_offset_and_perturbation_are_what_the_papers_say(
    dataset: LatentDataset, offset: float, perturbation: float
) -> None:
    objective = ObjectiveConfig(offset_noise=offset, input_perturbation=perturbation)
    found = noises(dataset, objective)
    assert sorted(found) == list(range(12, 18))
    for k, (noise, mixed) in found.items():
        white = draws.training_noise(5, k, shape=(2, 4, 4))
        constant = draws.normal(5, k, draws.Purpose.OFFSET, (2, 1, 1))
        assert np.allclose(noise, white + offset * constant, atol=1e-6)
        if perturbation:
            extra = draws.normal(5, k, draws.Purpose.PERTURBATION, (2, 4, 4))
            assert mixed is not None and np.allclose(mixed, noise + perturbation * extra, atol=1e-6)
        else:
            assert mixed is None
        if not offset:
            assert np.array_equal(noise, white), "nothing but the noise where nothing is asked for"


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (2, 3), (2, 1), (4, 2)])
def test_offset_and_perturbation_do_not_depend_on_who_reads(
    dataset: LatentDataset, world_size: int, micro: int
) -> None:
    objective = ObjectiveConfig(offset_noise=0.1, input_perturbation=0.1)
    expected, found = noises(dataset, objective), noises(dataset, objective, world_size, micro)
    assert sorted(expected) == sorted(found)
    for k, pair in expected.items():
        assert all(np.array_equal(one, two) for one, two in zip(pair, found[k], strict=True))


def test_what_is_off_draws_nothing(dataset: LatentDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, plain = set(), draws.stream

    def stream(seed: int, position: int, purpose: draws.Purpose) -> np.random.Generator:
        drawn.add(purpose)
        return plain(seed, position, purpose)

    monkeypatch.setattr(draws, "stream", stream)
    noises(dataset, OBJECTIVE)
    assert draws.Purpose.NOISE in drawn
    assert not drawn & {draws.Purpose.OFFSET, draws.Purpose.PERTURBATION}


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
    with pytest.raises(DataError, match=r"validation' has no samples"):
        loader(empty)


def test_a_batch_moves_whole(dataset: LatentDataset) -> None:
    (batch,) = next(loader(dataset).steps(0))
    moved = batch.to("meta")
    assert isinstance(moved, LatentBatch) and moved.noise.device.type == "meta" and moved.size == batch.size


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """Three captions a sample and a pooled state, as SDXL has them."""
    folder = tmp_path_factory.mktemp("rich") / "set"
    return LatentDataset(
        write_dataset(folder, square_shards(9, 4), spec=with_captions(3, pooled_width=5), captions=3)
    )


def rich_batches(dataset: LatentDataset, world_size: int, micro: int) -> dict[str, torch.Tensor]:
    names = (*FIELDS, "pooled", "time_ids")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for rank in range(world_size):
        steps = loader(dataset, rank, world_size, micro=micro, flip=True).steps(30)
        for batch in next(steps):
            for name in names:
                found[name].append(getattr(batch, name)[batch.weight == 1])
        steps.close()
    together = {name: torch.cat(parts) for name, parts in found.items()}
    order = together["positions"].argsort()
    return {name: values[order] for name, values in together.items()}


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (2, 3), (2, 1), (4, 2)])
def test_flip_captions_pooled_and_sizes_do_not_depend_on_who_reads(
    rich: LatentDataset, world_size: int, micro: int
) -> None:
    expected, found = rich_batches(rich, 1, 6), rich_batches(rich, world_size, micro)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_a_rich_batch_holds(rich: LatentDataset) -> None:
    """Against the samples read one by one: 30 positions have all captions, flips and drops among them."""
    steps = loader(rich, flip=True).steps(0)
    seen_flips, seen_captions, seen_drops = set(), set(), set()
    null = rich.null_text()["pooled"][0]
    for _ in range(5):
        (batch,) = next(steps)
        assert batch.pooled is not None and batch.time_ids is not None and batch.text is not None
        for row, (k, index) in enumerate(zip(batch.positions.tolist(), batch.indices.tolist(), strict=True)):
            arrays = rich.read(index).arrays
            flip, chosen, dropped = (
                draws.flips(5, k),
                draws.caption_choice(5, k, 3),
                draws.drops_caption(5, k, 0.3),
            )
            latent = arrays["latent"][..., ::-1] if flip else arrays["latent"]
            assert np.array_equal(batch.moments[row].numpy(), latent)
            assert np.array_equal(batch.text[row].numpy(), arrays["text"][chosen])
            assert np.array_equal(batch.tokens[row].numpy(), arrays["tokens"][chosen])
            assert np.array_equal(batch.pooled[row].numpy(), null if dropped else arrays["pooled"][chosen])
            # The crop (4, 10, 20, 40) of a 40 x 60 picture became 8 x 8; mirrored it begins at 60 - 10 - 40.
            assert batch.time_ids[row].tolist() == pytest.approx([40, 60, 1.6, 2.0, 8, 8])
            seen_flips.add(flip)
            seen_captions.add(chosen)
            seen_drops.add(dropped)
    steps.close()
    assert seen_flips == seen_drops == {False, True} and seen_captions == {0, 1, 2}


def test_plain_sets_have_no_pooled_and_nothing_is_flipped_by_default(dataset: LatentDataset) -> None:
    (batch,) = next(loader(dataset).steps(0))
    assert batch.pooled is None and batch.time_ids is None
    assert np.array_equal(batch.moments[0].numpy(), dataset.read(int(batch.indices[0])).arrays["latent"])


def test_the_memory_of_a_batch_is_used_again_only_when_it_is_gone(dataset: LatentDataset) -> None:
    steps = loader(dataset).steps(0)
    kept = [next(steps)[0] for _ in range(8)]
    copies = [batch.moments.clone() for batch in kept]
    for _ in range(20):
        next(steps)
    assert all(torch.equal(batch.moments, copy) for batch, copy in zip(kept, copies, strict=True))
    assert len({batch.moments.data_ptr() for batch in kept}) == 8
    pointers = {next(steps)[0].moments.data_ptr() for _ in range(40)}
    assert len(pointers) < 20
    view = kept[0].moments[2]
    del kept
    for _ in range(20):
        next(steps)
    assert torch.equal(view, copies[0][2])
    steps.close()
