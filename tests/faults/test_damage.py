"""Damage does exactly what its name says, keeps the times, and can be undone."""

import os
from pathlib import Path

import pytest

from tests.faults.damage import flip_bit, restored, spread_offsets, truncate, zero_page

pytestmark = pytest.mark.faults

CONTENT = bytes(range(1, 251)) * 40  # 10,000 bytes without a zero
OLD_NS = 1_600_000_000_123_456_789


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shard.tar"
    path.write_bytes(CONTENT)
    os.utime(path, ns=(OLD_NS, OLD_NS))
    return path


@pytest.mark.parametrize(("offset", "place"), [(0, 0), (4321, 4321), (-1, 9999)])
def test_one_bit_differs(file: Path, offset: int, place: int) -> None:
    flip_bit(file, offset, bit=7)
    after = file.read_bytes()
    differing = [i for i, (old, new) in enumerate(zip(CONTENT, after, strict=True)) if old != new]
    assert differing == [place]
    assert CONTENT[place] ^ after[place] == 0x80
    assert file.stat().st_mtime_ns == OLD_NS
    flip_bit(file, offset, bit=7)
    assert file.read_bytes() == CONTENT


@pytest.mark.parametrize(("size", "left"), [(0, 0), (512, 512), (-2, 9998)])
def test_truncation_keeps_the_head(file: Path, size: int, left: int) -> None:
    truncate(file, size)
    assert file.read_bytes() == CONTENT[:left]
    assert file.stat().st_mtime_ns == OLD_NS


@pytest.mark.parametrize(("page", "stretch"), [(0, slice(0, 4096)), (2, slice(8192, 10_000))])
def test_zeroed_page_leaves_all_else(file: Path, page: int, stretch: slice) -> None:
    zero_page(file, page)
    expected = bytearray(CONTENT)
    expected[stretch] = bytes(len(CONTENT[stretch]))
    assert file.read_bytes() == expected
    assert file.stat().st_mtime_ns == OLD_NS


def test_damage_that_would_change_nothing_is_refused(file: Path) -> None:
    zero_page(file, 0)
    with pytest.raises(AssertionError, match="holds only zeros"):
        zero_page(file, 0)
    with pytest.raises(AssertionError, match="cannot be cut"):
        truncate(file, 10_000)
    with pytest.raises(AssertionError, match="no byte"):
        flip_bit(file, 10_000)


def test_restored_undoes_damage_and_removal(file: Path) -> None:
    with restored(file):
        truncate(file, 3)
    assert file.read_bytes() == CONTENT
    with pytest.raises(ValueError, match="oracle"), restored(file):
        file.unlink()
        raise ValueError("oracle")
    assert file.read_bytes() == CONTENT
    assert file.stat().st_mtime_ns == OLD_NS


def test_spread_offsets_reach_both_ends_and_every_tenth() -> None:
    offsets = spread_offsets(10_000, 100, seed=1)
    assert offsets == sorted(set(offsets))
    assert 95 <= len(offsets) <= 100
    assert offsets[0] == 0
    assert offsets[-1] == 9999
    assert {offset // 1000 for offset in offsets} == set(range(10))
    assert offsets == spread_offsets(10_000, 100, seed=1) != spread_offsets(10_000, 100, seed=2)
    assert spread_offsets(5, 100, seed=1) == [0, 1, 2, 3, 4]
