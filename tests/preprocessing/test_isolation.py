"""Decode processes: the same pictures as without, and a picture that costs too much costs itself alone."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocessing.filters import Failure, Rejection, Rules
from preprocessing.images import Picture, prepare_image
from preprocessing.isolation import (
    CRASHED,
    OUT_OF_MEMORY,
    OUT_OF_TIME,
    DecodeProcesses,
    Limits,
    open_decoder,
)
from preprocessing.roster import Work, encode_shards
from preprocessing.sources import list_shards
from tests.preprocessing.builders import NumpyEncoder, encode_config, image_file, noise, three_shards

RULES = Rules.from_config(encode_config(max_pixels=200_000_000))
GOOD = image_file(noise(3, 40, 30))


@pytest.fixture(scope="module")
def crew() -> Iterator[DecodeProcesses]:
    with DecodeProcesses(1, RULES, Limits(1.0, 600 << 20)) as processes:
        yield processes


def same(first: object, second: object) -> bool:
    assert isinstance(first, Picture) and isinstance(second, Picture)
    return np.array_equal(first.pixels, second.pixels) and (first.crop, first.scaling, first.remarks) == (
        second.crop,
        second.scaling,
        second.remarks,
    )


def test_outcomes_are_those_of_the_worker_itself(crew: DecodeProcesses) -> None:
    jpeg = image_file(noise(4, 90, 200), "JPEG", icc_profile=b"none")
    for payload in (GOOD, jpeg):
        assert same(crew.decode(payload, RULES), prepare_image(payload, RULES))
    for payload in (b"", b"<html>", GOOD[:50]):
        assert crew.decode(payload, RULES) == prepare_image(payload, RULES)
        assert isinstance(crew.decode(payload, RULES), Rejection)


def test_a_picture_too_large_for_the_memory_fails_and_the_next_is_served(crew: DecodeProcesses) -> None:
    large = image_file(Image.new("RGB", (13000, 13000)))
    assert len(large) < 2_000_000
    assert crew.decode(large, RULES) == Failure(OUT_OF_MEMORY)
    assert same(crew.decode(GOOD, RULES), prepare_image(GOOD, RULES))


def test_a_picture_that_takes_too_long_ends_its_process_and_the_next_is_served() -> None:
    slow = image_file(Image.fromarray(noise(5, 3000, 3000)), "JPEG", progressive=True, quality=100)
    last = slow.rindex(b"\xff\xda")
    slow = slow[:last] + slow[last:-2] * 60 + slow[-2:]  # each scan is another pass over the picture
    rules = Rules.from_config(encode_config(draft=False, max_pixels=200_000_000))
    with DecodeProcesses(1, rules, Limits(0.1, 2 << 30)) as processes:
        assert processes.decode(slow, rules) == Failure(OUT_OF_TIME)
        assert isinstance(processes.decode(GOOD, rules), Picture)


def test_a_crash_of_the_codec_costs_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that dies at once stands for a codec that does."""
    monkeypatch.setattr(sys, "executable", "/bin/true")
    processes = DecodeProcesses(1, RULES, Limits(1.0, 1 << 30))
    assert processes.decode(GOOD, RULES) == Failure(CRASHED)
    monkeypatch.undo()
    assert processes.decode(GOOD, RULES) == Failure(CRASHED)  # the one that took its place was started before
    with processes:
        assert isinstance(processes.decode(GOOD, RULES), Picture)


def test_none_is_wanted() -> None:
    with open_decoder(0, RULES, Limits(1.0, 1 << 30)) as nobody:
        assert nobody is None


def test_a_job_with_decode_processes_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = three_shards(tmp_path / "in")
    decoded: dict[int, int] = {}
    decode = DecodeProcesses.decode

    def counted(self: DecodeProcesses, *given: Any) -> Any:
        decoded[processes] = decoded.get(processes, 0) + 1
        return decode(self, *given)

    monkeypatch.setattr(DecodeProcesses, "decode", counted)
    for out, processes in (("plain", 0), ("isolated", 2)):
        encode = encode_config(decode_processes=processes)
        counts = encode_shards(Work(list_shards(source), tmp_path / out), NumpyEncoder(), encode)
        assert counts.counts.written == 18
    assert decoded == {2: 18}
    plain, isolated = (sorted((tmp_path / out / "00").glob("*.tar")) for out in ("plain", "isolated"))
    assert len(plain) == 3
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in isolated]
