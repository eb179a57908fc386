"""Which pairs a step sees: pure functions of (seed, step), fair over an epoch, and no wrong negatives."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.first_stage.pairs import DistinctOrder, EpochOrder, draws, read_pairs, share
from tests.pipeline.first_stage.tiny import Pair


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**64))
def test_every_pair_once_an_epoch_whatever_the_batch(pairs: int, batch: int, seed: int) -> None:
    places = np.arange(100, 100 + pairs)
    steps = -(-3 * pairs // batch)
    order = EpochOrder(places, batch=batch, seed=seed)
    stream = np.concatenate([order.batch(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * pairs : (epoch + 1) * pairs]) == places.tolist()
    backwards = EpochOrder(places, batch=batch, seed=seed)
    for step in reversed(range(steps)):
        np.testing.assert_array_equal(backwards.batch(step), stream[step * batch : (step + 1) * batch])


def test_epochs_and_seeds_differ() -> None:
    places = np.arange(50)
    order = EpochOrder(places, batch=50, seed=3)
    assert (order.batch(0) != order.batch(1)).any()
    assert (order.batch(0) != EpochOrder(places, batch=50, seed=4).batch(0)).any()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 9))
def test_distinct_batches_are_whole_and_disjoint_in_an_epoch(
    captions: list[int], batch: int, seed: int
) -> None:
    batch = min(batch, len(captions))
    ids = np.array(captions)
    order = DistinctOrder(np.arange(len(ids)), ids, batch=batch, seed=seed)
    dealt = [order.batch(step) for step in range(len(ids) // batch)]
    seen = np.concatenate(dealt)
    assert all(len(found) == batch for found in dealt) and len(set(seen.tolist())) == len(seen)
    np.testing.assert_array_equal(
        DistinctOrder(np.arange(len(ids)), ids, batch=batch, seed=seed).batch(len(dealt) - 1), dealt[-1]
    )


def test_no_caption_twice_while_the_captions_allow_it() -> None:
    ids = np.array([*range(60), *range(20)])
    for seed in range(20):
        order = DistinctOrder(np.arange(80), ids, batch=8, seed=seed)
        for step in range(8):
            counts = Counter(ids[order.batch(step)].tolist())
            assert max(counts.values()) == 1, (seed, step)


def test_pairs_left_out_of_an_epoch_change() -> None:
    ids = np.arange(10)
    order = DistinctOrder(ids, ids, batch=8, seed=0)
    left_out = [set(ids.tolist()) - set(order.batch(epoch).tolist()) for epoch in range(40)]
    assert set().union(*left_out) == set(range(10))
    assert any(before != after for before, after in pairwise(left_out))


def test_captions_that_do_not_allow_it_still_fill_batches() -> None:
    order = DistinctOrder(np.arange(12), np.zeros(12, dtype=np.int64), batch=4, seed=0)
    assert sorted(np.concatenate([order.batch(step) for step in range(3)]).tolist()) == list(range(12))


def test_draws_are_streams_of_their_own() -> None:
    first = draws(7, 1, 0).random(1000)
    np.testing.assert_array_equal(draws(7, 1, 0).random(1000), first)
    for other in (draws(8, 1, 0), draws(7, 2, 0), draws(7, 1, 1), draws(7 + 2**63, 1, 0)):
        assert abs(np.corrcoef(first, other.random(1000))[0, 1]) < 0.12


def test_shares_make_up_the_batch() -> None:
    batch = np.arange(12)
    for world_size in (1, 2, 3, 4, 6, 12):
        parts = [batch[share(batch, rank, world_size)] for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_table_is_in_the_order_of_the_keys(pairs: list[Pair]) -> None:
    table, reordered = read_pairs(pairs, 16), read_pairs(pairs[::-1], 16)
    keys = [pairs[place].key for place in table.train]
    assert keys == sorted(keys) and len(keys) == 32 and len(table.validation) == 8
    assert {pairs[place].split for place in table.validation} == {"validation"}
    assert table.digest == reordered.digest
    np.testing.assert_array_equal(table.pixels(table.train), reordered.pixels(reordered.train))
    same = [Pair(pair.image, "same", pair.key, pair.split) for pair in pairs]
    assert len(set(table.caption_ids.tolist())) == 40 and set(read_pairs(same, 16).caption_ids.tolist()) == {
        0
    }


@pytest.mark.parametrize("field", ["image", "caption", "key", "split"])
def test_digest_sees_every_field(pairs: list[Pair], field: str) -> None:
    changes = {"image": 255 - pairs[3].image, "caption": "other", "key": "999", "split": "validation"}
    assert pairs[3].split == "train"
    changed = Pair(**{**vars(pairs[3]), field: changes[field]})
    assert read_pairs([*pairs[:3], changed, *pairs[4:]], 16).digest != read_pairs(pairs, 16).digest


def test_wrong_pairs_are_named(pairs: list[Pair]) -> None:
    with pytest.raises(DataError, match=r"picture is uint8 \(16, 16, 3\); expected uint8 \(32, 32, 3\)"):
        read_pairs(pairs, 32)
    floats = Pair(pairs[0].image.astype(np.float32), "", "k", "train")
    with pytest.raises(DataError, match="picture is float32"):
        read_pairs([floats], 16)
    with pytest.raises(DataError, match="007: this key appears twice"):
        read_pairs([*pairs, Pair(pairs[0].image, "", "007", "train")], 16)
    with pytest.raises(DataError, match="split is 'test'"):
        read_pairs([Pair(pairs[0].image, "", "k", "test")], 16)
    with pytest.raises(DataError, match="no training pairs among 8"):
        read_pairs([pair for pair in pairs if pair.split == "validation"], 16)
