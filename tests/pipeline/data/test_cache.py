"""The node's cache: whole files, within its limit, whoever reads, writes, dies or evicts beside."""

import errno
import multiprocessing
import os
import random
from pathlib import Path
from typing import BinaryIO

import pytest

from pipeline.data.cache import NodeCache
from pipeline.errors import ConfigError

SIZE = 20_000


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def fetched(cache: NodeCache, number: int) -> bytes:
    descriptor = cache.open(f"file {number}", SIZE, lambda stream: stream.write(content(number)))
    try:
        return os.pread(descriptor, 2 * SIZE, 0)
    finally:
        os.close(descriptor)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "files").iterdir())


def test_fetched_once_and_least_recently_used_goes(tmp_path: Path) -> None:
    cache, asked = NodeCache(tmp_path, 3 * SIZE), []

    def get(number: int) -> None:
        def fill(stream: BinaryIO) -> None:
            asked.append(number)
            stream.write(content(number))

        os.close(cache.open(str(number), SIZE, fill))

    for number in (0, 1, 2, 0, 1, 2, 0, 3, 0, 2, 1):
        get(number)
    assert asked == [0, 1, 2, 3, 1] and held(tmp_path) == 3 * SIZE


def test_an_open_file_outlives_its_place(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, SIZE)
    first = cache.open("a", SIZE, lambda stream: stream.write(content(1)))
    os.close(cache.open("b", SIZE, lambda stream: stream.write(content(2))))
    assert held(tmp_path) == SIZE and os.pread(first, SIZE, 0) == content(1)
    os.close(first)


def test_failed_and_killed_fetches_leave_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 2 * SIZE)

    def fail(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise OSError(errno.ECONNRESET, "cut")

    with pytest.raises(OSError, match=r"cut"):
        cache.open("a", SIZE, fail)
    assert held(tmp_path) == 0
    child = multiprocessing.get_context("fork").Process(
        target=cache.open, args=("b", SIZE, lambda stream: os.kill(os.getpid(), 9))
    )
    child.start()
    child.join(30)
    assert child.exitcode == -9 and held(tmp_path) == SIZE  # The dead one's temporary file
    assert fetched(cache, 1) == content(1) and held(tmp_path) == SIZE
    assert fetched(cache, 2) == content(2) and held(tmp_path) == 2 * SIZE


def test_a_file_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.cache_gib: .* raise data.cache_gib or set data.remote_reads: range"
    ):
        NodeCache(tmp_path, SIZE - 1).open("a", SIZE, lambda stream: None)


def work(folder: Path, seed: int) -> None:
    cache, random_ = NodeCache(folder, 4 * SIZE), random.Random(seed)
    for _ in range(150):
        number = random_.randrange(10)
        if fetched(cache, number) != content(number) or held_or_zero(folder) > 4 * SIZE:
            os._exit(1)


def held_or_zero(folder: Path) -> int:
    total = 0
    for path in (folder / "files").iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.distributed
def test_several_processes_share_it(tmp_path: Path) -> None:
    """Ten files, room for four, four processes: each read is whole and right, the limit holds at every moment."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(tmp_path, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 4
    assert held(tmp_path) <= 4 * SIZE
