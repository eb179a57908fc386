"""Decoding ahead changes when pictures are decoded, never what comes out or in which order."""

import threading
import time
from collections.abc import Iterator

import pytest

from preprocessing.ahead import Decoders
from preprocessing.filters import Rejection
from preprocessing.samples import RawSample


def raws(count: int, taken: list[int] | None = None) -> Iterator[RawSample]:
    for number in range(count):
        if taken is not None:
            taken.append(number)
        yield RawSample(str(number), str(number), "here")


def test_order_is_that_of_the_input_whoever_is_faster() -> None:
    def slow_first(raw: RawSample) -> Rejection:
        time.sleep(0.01 * (int(raw.key) % 3 == 0))
        return Rejection(raw.key)

    with Decoders(4, ahead=8) as decoders:
        found = [(raw.key, outcome) for raw, outcome in decoders.outcomes(raws(20), slow_first)]
    assert found == [(str(number), Rejection(str(number))) for number in range(20)]


def test_so_far_ahead_and_no_further() -> None:
    taken: list[int] = []
    with Decoders(2, ahead=5) as decoders:
        outcomes = decoders.outcomes(raws(50, taken), lambda raw: Rejection("x"))
        next(outcomes)
        assert len(taken) == 6
        outcomes.close()


def test_the_next_ones_are_decoded_while_the_consumer_is_busy() -> None:
    busy, seen = threading.Event(), threading.Event()

    def prepare(raw: RawSample) -> Rejection:
        if raw.key == "3":
            assert busy.wait(10)
            seen.set()
        return Rejection("x")

    with Decoders(1, ahead=2) as decoders:
        outcomes = decoders.outcomes(raws(6), prepare)
        next(outcomes)
        next(outcomes)
        busy.set()
        assert seen.wait(10), "sample 3 was prepared although nobody has asked for it yet"
        assert len(list(outcomes)) == 4


def test_an_error_comes_to_the_consumer() -> None:
    def broken(raw: RawSample) -> Rejection:
        raise MemoryError

    with Decoders(1, ahead=2) as decoders, pytest.raises(MemoryError):
        list(decoders.outcomes(raws(3), broken))
