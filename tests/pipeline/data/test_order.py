"""The order is a bijection of each epoch, the shares are a partition of each step, for any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import GlobalOrder, LaneOrder
from pipeline.data.shares import micro_batches_per_step, share, split_share


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_epoch_visits_every_sample_once(count: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * count, (epoch + 1) * count)
    assert np.array_equal(np.sort(GlobalOrder(count, seed).samples(positions)), np.arange(count))


def test_epochs_and_seeds_differ() -> None:
    first = GlobalOrder(1000, 0).samples(np.arange(2000))
    other = GlobalOrder(1000, 1).samples(np.arange(1000))
    for one, two in ((first[:1000], first[1000:]), (first[:1000], other), (first[:1000], np.arange(1000))):
        assert (one == two).mean() < 0.02


def test_neighbours_are_spread_evenly() -> None:
    """The mean distance of consecutive samples of a uniform order is N / 3."""
    order = GlobalOrder(10_000, 3).samples(np.arange(10_000))
    assert np.abs(np.diff(order)).mean() == pytest.approx(10_000 / 3, rel=0.03)


def test_a_position_is_looked_up_alone_at_any_size() -> None:
    order = GlobalOrder(10**9, 7)
    together = order.samples(np.arange(5 * 10**9, 5 * 10**9 + 1000))
    assert order.samples(np.array([5 * 10**9 + 123]))[0] == together[123]
    assert order.epoch(5 * 10**9) == 5


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(), global_batch=st.integers(1, 300), micro=st.integers(1, 40), consumed=st.integers(0, 10**9)
)
def test_shares_are_a_partition_with_equal_micro_batches(
    data: st.DataObject, global_batch: int, micro: int, consumed: int
) -> None:
    world_size = data.draw(st.integers(1, global_batch))
    shares = [share(consumed, global_batch, rank, world_size) for rank in range(world_size)]
    assert [k for positions in shares for k in positions] == list(range(consumed, consumed + global_batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    parts = micro_batches_per_step(global_batch, micro, world_size)
    for positions in shares:
        cut = split_share(positions, parts)
        assert len(cut) == parts and [k for part in cut for k in part] == list(positions)
        assert max(map(len, cut)) <= micro


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(any),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 10**6),
    lanes=st.integers(1, 70),
    window=st.integers(1, 200),
)
def test_lanes_visit_every_sample_once_an_epoch(
    rows: list[int], seed: int, epoch: int, lanes: int, window: int
) -> None:
    order = LaneOrder(np.array(rows), seed, lanes, window)
    positions = np.arange(epoch * order.count, (epoch + 1) * order.count)
    assert np.array_equal(np.sort(order.samples(positions)), np.arange(order.count))


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16])
def test_lanes_keep_shards_to_one_node_and_mix_many(nodes: int) -> None:
    """2,000 uneven shards, 64 lanes, batches of 512: what a node reads, in three epochs with straddling batches."""
    rows = np.random.default_rng(0).integers(50, 151, 2000)
    order = LaneOrder(rows, 7, 64, 1024)
    shard_of = np.repeat(np.arange(len(rows)), rows)
    batch, readers = 512, [set[tuple[int, int]]() for _ in range(nodes)]
    mixed = []
    for first in range(0, 3 * order.count - batch, batch):
        positions = np.arange(first, first + batch)
        sorted_by_lane = positions[np.argsort(order.lanes_of(positions), kind="stable")]
        shards = shard_of[order.samples(sorted_by_lane)]
        mixed.append(len(set(shards.tolist())))
        epochs = sorted_by_lane // order.count
        for node, own in enumerate(np.split(np.arange(batch), nodes)):
            readers[node] |= set(zip(epochs[own].tolist(), shards[own].tolist(), strict=True))
    assert sum(map(len, readers)) <= 1.1 * 3 * len(rows)
    assert min(mixed) >= 64


def test_lanes_shuffle() -> None:
    """Epochs and seeds differ, and neighbours in a batch lie far apart."""
    rows = np.full(200, 50)
    first, second = LaneOrder(rows, 1, 16, 256), LaneOrder(rows, 2, 16, 256)
    epoch = first.samples(np.arange(20_000))
    assert (epoch[:10_000] == epoch[10_000:]).mean() < 0.02
    assert (epoch[:10_000] == second.samples(np.arange(10_000))).mean() < 0.02
    assert np.abs(np.diff(epoch[:10_000])).mean() == pytest.approx(10_000 / 3, rel=0.1)
    inside = epoch[:10_000:16]  # One lane: shuffled inside windows, not read in file order.
    assert (np.diff(inside) == 1).mean() < 0.05
