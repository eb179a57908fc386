"""Damage is reported with shard and key, a bad sample stops the run or is replaced and recorded."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import DataConfig, EngineConfig, ObjectiveConfig
from pipeline.data.loader import LatentLoader
from pipeline.errors import DataError
from pipeline.latents import reader
from pipeline.latents.reader import LatentDataset
from pipeline.latents.shard import shard_path
from pipeline.latents.shard_files import LocalShards
from tests.faults.damage import flip_bit, truncate, zero_page
from tests.pipeline.data.datasets import SQUARE, square_shards, write_dataset

STRIDE_ROWS = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set", square_shards(STRIDE_ROWS, STRIDE_ROWS, STRIDE_ROWS))


def middle(folder: Path) -> Path:
    return shard_path(folder, "00001", ".tar")


def stride(folder: Path) -> int:
    return LatentDataset(folder).table.place(0).stride


def open_loader(folder: Path, substituted: dict[int, int] | None = None, **data: Any) -> LatentLoader:
    return LatentLoader(
        LatentDataset(folder),
        seed=3,
        engine=EngineConfig(global_batch=24, micro_batch=24),
        objective=ObjectiveConfig(),
        data=DataConfig(**data),
        rank=0,
        world_size=1,
        substituted=substituted,
    )


AT_REST: dict[str, Callable[[Path, int], object]] = {
    "cut at a sample boundary": lambda tar, step: truncate(tar, 3 * step),
    "cut at a member boundary": lambda tar, step: truncate(tar, 3 * step + 1024),
    "cut inside member data": lambda tar, step: truncate(tar, 3 * step + 700),
    "cut inside a header": lambda tar, step: truncate(tar, 3 * step + 100),
    "empty": lambda tar, step: truncate(tar, 0),
    "a web page": lambda tar, step: tar.write_bytes(b"<html>quota exceeded</html>"),
    "missing": lambda tar, step: tar.unlink(),
}
# Equal sizes: where the damage lies in sample 3 of the shard, and its number among all.
SAME_SIZE: dict[str, Callable[[Path, int], object]] = {
    "bit of a tar header": lambda tar, step: flip_bit(tar, 3 * step + 5),
    "bit of an npy header": lambda tar, step: flip_bit(tar, 3 * step + 512 + 3),
    "bit of a payload": lambda tar, step: flip_bit(tar, 3 * step + 512 + 128 + 40, 1),
    "byte of the json": lambda tar, step: flip_bit(tar, 4 * step - 512 + 200, 4),
    "a page of zeros": lambda tar, step: zero_page(tar, (3 * step + 1000) // 512, 512),
    "members in another order": lambda tar, step: _swap(tar, 3 * step, 512),
}


def _swap(tar: Path, start: int, size: int) -> None:
    content = bytearray(tar.read_bytes())
    first, second = content[start : start + size], content[start + size : start + 2 * size]
    content[start : start + 2 * size] = second + first
    tar.write_bytes(content)


@pytest.mark.covers("F39")
@pytest.mark.parametrize("fault", AT_REST)
def test_a_shard_of_another_size_is_named_before_the_first_step(folder: Path, fault: str) -> None:
    AT_REST[fault](middle(folder), stride(folder))
    with pytest.raises(DataError, match=r"1 damaged or missing shards: .*00001.tar \("):
        LatentDataset(folder)


@pytest.mark.covers("F39")
def test_each_rank_looks_at_its_own_shards_and_names_all(folder: Path) -> None:
    middle(folder).unlink()
    truncate(shard_path(folder, "00002", ".tar"), -512)
    LatentDataset(folder, rank=0, world_size=3)
    for rank in (1, 2):
        with pytest.raises(
            DataError, match=r"2 damaged or missing shards: .*00001.*missing.*00002.*bytes instead"
        ):
            LatentDataset(folder, rank=rank, world_size=3)


@pytest.mark.covers("F39")
@pytest.mark.parametrize("fault", SAME_SIZE)
def test_verify_all_names_shard_and_key(folder: Path, fault: str) -> None:
    SAME_SIZE[fault](middle(folder), stride(folder))
    with pytest.raises(DataError, match=r"00001.tar: row 3, key 'k000011'"):
        next(open_loader(folder, verify="all").steps(0))


@pytest.mark.covers("F39")
def test_all_damaged_samples_of_a_batch_are_named(folder: Path) -> None:
    step = stride(folder)
    for row in (1, 5):
        flip_bit(middle(folder), row * step + 900)
    with pytest.raises(DataError, match=r"k000009.*k000013|k000013.*k000009"):
        next(open_loader(folder, verify="all").steps(0))


def test_headers_are_compared_even_without_checksums(folder: Path) -> None:
    SAME_SIZE["bit of an npy header"](middle(folder), stride(folder))
    with pytest.raises(DataError, match=r"key 'k000011': member 'latent' has not its header"):
        next(open_loader(folder, verify="off").steps(0))


def test_verify_sample_looks_at_one_sample_a_shard_on_opening(folder: Path) -> None:
    open_loader(folder, verify="sample")
    content = bytearray(middle(folder).read_bytes())
    for row in range(STRIDE_ROWS):
        content[row * stride(folder) + 900] ^= 1
    middle(folder).write_bytes(content)
    open_loader(folder, verify="off")
    with pytest.raises(DataError, match=r"1 damaged samples: .*00001.tar: row ., key 'k0000"):
        open_loader(folder, verify="sample")


@pytest.mark.covers("F39")
def test_a_bad_sample_is_replaced_and_recorded(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (intact,) = next(open_loader(folder).steps(0))
    SAME_SIZE["bit of a payload"](middle(folder), stride(folder))
    loader = open_loader(folder, verify="all", on_bad_sample="substitute")
    with caplog.at_level(logging.WARNING):
        (batch,) = next(loader.steps(0))
    row = intact.indices.tolist().index(11)
    ((position, number),) = [(k, n) for k, n in loader.substituted.items() if k < 24]
    assert position == row and number != 11 and batch.indices[row] == number
    sample = loader.order.read(number)
    assert np.array_equal(batch.moments[row].numpy(), sample.arrays["latent"])
    others = torch.arange(24) != row
    assert torch.equal(batch.indices[others], intact.indices[others]) and torch.equal(
        batch.noise, intact.noise
    )
    assert "key 'k000011'" in caplog.text and f"sample {number} takes its place" in caplog.text
    again = open_loader(folder, verify="all", on_bad_sample="substitute")
    (same,) = next(again.steps(0))
    assert torch.equal(same.indices, batch.indices)
    # From a checkpoint the record holds, even if the sample can be read by then.
    (told,) = next(open_loader(folder, substituted={row: 7}).steps(0))
    assert told.indices[row] == 7


class Stumbling:
    """A shard whose reads fail a few times, then work."""

    def __init__(self, shards: LocalShards, failures: int, number: int) -> None:
        self.shards, self.failures, self.number = shards, failures, number
        self.verified = False
        self.sizes, self.table, self.where = shards.sizes, shards.table, shards.where

    def open(self, stem: str) -> "Stumbling":
        self.tar = self.shards.open(stem)
        return self

    def readv(self, buffers: Any, offset: int) -> int:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.tar.readv(buffers, offset)


@pytest.mark.covers("F40")
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_is_tried_again_and_gives_up_as_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(reader, "PAUSES_SECONDS", (0.001, 0.001, 0.001))
    expected = LatentDataset(folder).read(5)
    for failures in (1, 3):
        dataset = LatentDataset(folder, shards=Stumbling(LocalShards(folder), failures, number))
        arrays = dataset.empty_arrays(SQUARE, 1)
        assert dataset.read_batch(np.array([5]), arrays).failed == {}
        assert np.array_equal(arrays["latent"][0], expected.arrays["latent"])
    dataset = LatentDataset(folder, shards=Stumbling(LocalShards(folder), 10**6, number))
    failed = dataset.read_batch(np.array([5]), dataset.empty_arrays(SQUARE, 1)).failed
    assert isinstance(failed[0], OSError) and failed[0].errno == number
    assert "row 5, key 'k000005': cannot be read after 4 attempts" in str(failed[0])


@pytest.mark.covers("F40")
def test_a_shard_that_vanishes_while_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its open descriptor reads on; once it is opened anew the error names it, or others take its samples' place."""
    monkeypatch.setattr(reader, "PAUSES_SECONDS", (0.001, 0.001, 0.001))
    strict, lenient = open_loader(folder), open_loader(folder, on_bad_sample="substitute")
    for loader in (strict, lenient):
        loader.order.sets[0].close()
    middle(folder).unlink()
    with pytest.raises(OSError, match=r"00001.tar"):
        next(strict.steps(0))
    (batch,) = next(lenient.steps(0))
    assert batch.size == 24 and not set(batch.indices.tolist()) & set(range(8, 16))
    assert len([position for position in lenient.substituted if position < 24]) == 8
