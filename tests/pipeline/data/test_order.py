"""The order is a bijection of each epoch, the shares are a partition of each step, for any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import GlobalOrder
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
