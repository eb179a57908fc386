"""What no step saw, of several data sets as of one: numbers, shares, captions, and sets that are gone."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig, MixedSet
from pipeline.data.held_out import HeldOut, known_captions, open_held_out
from pipeline.data.sets import known_datasets
from tests.pipeline.data.datasets import Stretch, write_dataset

WIDE = (8, 12)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two data sets with 6 and 3 validation samples; the second has two buckets."""
    write_dataset(
        tmp_path / "a", [[Stretch(2), Stretch(4, split="validation")], [Stretch(2, split="validation")]]
    )
    held = [Stretch(2, split="validation"), Stretch(1, WIDE, split="validation")]
    write_dataset(tmp_path / "b", [[Stretch(2), *held]], seed=1)
    return DataConfig(mix=tuple(MixedSet(dataset=str(tmp_path / name)) for name in "ab"))


def test_the_splits_stand_end_to_end(data: DataConfig, tmp_path: Path) -> None:
    held = open_held_out(data, tmp_path)
    assert len(held) == 9 and held.where == f"{tmp_path}/a, {tmp_path}/b"
    expected = [dataset.read(index) for dataset in held.sets for index in range(len(dataset))]
    for number, sample in enumerate(expected):
        found = held.read(number)
        assert found.key == sample.key and np.array_equal(found.arrays["latent"], sample.arrays["latent"])
    assert [held.bucket(number) for number in range(9)] == [(8, 8)] * 8 + [WIDE]
    held.close()


def test_a_limit_takes_its_share_of_each_set_from_its_beginning(data: DataConfig, tmp_path: Path) -> None:
    whole = open_held_out(data, tmp_path)
    for most in range(1, 12):
        held = HeldOut(whole.sets, most)
        keys = [held.read(number).key for number in range(len(held))]
        assert len(held) == min(most, 9)
        shares = np.diff(held._starts)
        assert np.abs(shares - len(held) * np.array([6, 3]) / 9).max() < 1
        firsts = [whole.read(number).key for number in (*range(shares[0]), *range(6, 6 + shares[1]))]
        assert keys == firsts


def test_captions_come_from_all_over_and_a_set_that_is_gone_is_said(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(known_captions(data, tmp_path, 100)) == 9
    few = known_captions(data, tmp_path, 3)
    assert few == [open_held_out(data, tmp_path).read(number).record["captions"][0] for number in (0, 3, 6)]
    assert not caplog.text
    gone = DataConfig(mix=(data.mix[0], MixedSet(dataset="memory://nowhere/set"), MixedSet(dataset="gone")))
    assert [dataset.folder for dataset in known_datasets(gone, tmp_path)] == [tmp_path / "a"]
    assert "memory://nowhere/set is not there" in caplog.text and "gone is not there" in caplog.text
    assert known_captions(DataConfig(), tmp_path / "none", 3) == []
