"""Decoding ahead changes when pictures are decoded, never what comes out or in which order."""

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from preprocessing.ahead import GROUP, SWITCH_SECONDS, Decoders
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


def test_threads_hand_the_interpreter_over_at_once_while_they_decode_and_not_after() -> None:
    before, seen = sys.getswitchinterval(), []

    def look(raw: RawSample) -> Rejection:
        seen.append(sys.getswitchinterval())
        return Rejection(raw.key)

    with Decoders(2, ahead=4) as decoders:
        assert len(list(decoders.outcomes(raws(3), look))) == 3
    assert seen == [pytest.approx(SWITCH_SECONDS)] * 3 and SWITCH_SECONDS < before
    with pytest.raises(ZeroDivisionError), Decoders(1, ahead=4) as decoders:
        list(decoders.outcomes(raws(1), lambda raw: Rejection(str(1 // 0))))
    assert sys.getswitchinterval() == before


def test_so_far_ahead_and_no_further() -> None:
    taken: list[int] = []
    with Decoders(2, ahead=5) as decoders:
        outcomes = decoders.outcomes(raws(50, taken), lambda raw: Rejection("x"))
        next(outcomes)
        assert 5 < len(taken) <= 5 + GROUP
        outcomes.close()


def test_large_files_wait_in_smaller_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.ahead.AHEAD_BYTES", 40)
    taken: list[int] = []

    def large() -> Iterator[RawSample]:
        for raw in raws(20, taken):
            yield dataclasses.replace(raw, image=bytes(30))

    with Decoders(2, ahead=100) as decoders:
        outcomes = decoders.outcomes(large(), lambda raw: Rejection(raw.key))
        next(outcomes)
        assert len(taken) == 2, "more than 40 bytes wait"
        assert [outcome.reason for _, outcome in outcomes if isinstance(outcome, Rejection)] == [
            str(number) for number in range(1, 20)
        ]


def test_what_waits_of_the_elder_shard_goes_first() -> None:
    begun, younger_waits, elder_waits = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []

    def elder() -> Iterator[RawSample]:
        for number in range(5 * GROUP):
            begun.set()
            if number == GROUP:
                assert younger_waits.wait(10)
            yield RawSample(str(number), str(number), "elder")
        elder_waits.set()

    def younger() -> Iterator[RawSample]:
        for number in range(2 * GROUP):
            yield RawSample(str(number), str(number), "younger")
        younger_waits.set()

    def prepare(raw: RawSample) -> Rejection:
        assert elder_waits.wait(10)  # holds the one thread in the elder's first group
        order.append(raw.source)
        return Rejection("x")

    with Decoders(1, ahead=100) as decoders:
        first = threading.Thread(target=list, args=(decoders.outcomes(elder(), prepare),))
        first.start()
        assert begun.wait(10)
        second = threading.Thread(target=list, args=(decoders.outcomes(younger(), prepare),))
        second.start()
        for thread in (first, second):
            thread.join(10)
    assert order == ["elder"] * 5 * GROUP + ["younger"] * 2 * GROUP


def test_the_next_ones_are_decoded_while_the_consumer_is_busy() -> None:
    busy, seen = threading.Event(), threading.Event()

    def prepare(raw: RawSample) -> Rejection:
        if raw.key == str(GROUP):
            assert busy.wait(10)
            seen.set()
        return Rejection("x")

    with Decoders(1, ahead=GROUP) as decoders:
        outcomes = decoders.outcomes(raws(3 * GROUP), prepare)
        next(outcomes)
        busy.set()
        assert seen.wait(10), "the second group was not prepared although nobody has asked for it yet"
        assert len(list(outcomes)) == 3 * GROUP - 1


def test_an_error_comes_to_the_consumer() -> None:
    def broken(raw: RawSample) -> Rejection:
        raise MemoryError

    with Decoders(1, ahead=2) as decoders, pytest.raises(MemoryError):
        list(decoders.outcomes(raws(3), broken))
