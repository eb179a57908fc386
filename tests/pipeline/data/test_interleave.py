"""Turns by shares: at any prefix, for ever, every part within one turn of its share; against plain counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.interleave import PERIOD, Interleave


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40), start=st.integers(0, 10**12))
def test_every_prefix_is_within_one_turn_of_the_shares(weights: list[float], start: int) -> None:
    turns = Interleave(weights)
    assert sum(turns.shares) == pytest.approx(1.0)
    assert np.abs(np.array(turns.shares) - np.array(weights) / sum(weights)).max() < len(weights) / PERIOD
    places = np.arange(start, start + 2000)
    parts, before = turns.turns(places)
    counts = turns.counts(start)
    for place, part, count in zip(places.tolist(), parts.tolist(), before.tolist(), strict=True):
        assert count == counts[part]
        counts[part] += 1
        if place % 97 == 0:
            assert abs(counts - (place + 1) * np.array(turns.shares)).max() < 1.0
    assert np.array_equal(counts, turns.counts(start + 2000))


def test_a_whole_period_and_beyond() -> None:
    turns = Interleave([5, 3, 1, 0.5])
    parts, _ = turns.turns(np.arange(3 * PERIOD))
    counts = np.cumsum(parts[:, None] == np.arange(4), axis=0)
    ideal = np.arange(1, 3 * PERIOD + 1)[:, None] * np.array(turns.shares)
    assert np.abs(counts - ideal).max() < 1.0


def test_equal_parts_alternate_and_one_part_is_everything() -> None:
    assert Interleave([2.0, 2.0]).turns(np.arange(6))[0].tolist() in ([0, 1] * 3, [1, 0] * 3)
    parts, before = Interleave([0.3]).turns(np.arange(5))
    assert parts.tolist() == [0] * 5 and before.tolist() == list(range(5))
