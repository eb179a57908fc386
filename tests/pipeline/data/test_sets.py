"""From the config to data sets: one or several, what goes together, and what a resume says to another one."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig, EngineConfig, MixedSet, ObjectiveConfig
from pipeline.data.loader import LatentLoader
from pipeline.data.mixture import Mixture, is_local_disk, uses_lanes
from pipeline.data.sets import open_datasets
from pipeline.errors import ConfigError
from pipeline.latents.reader import LatentDataset
from tests.pipeline.data.datasets import square_shards, with_captions, write_dataset


def test_default_one_and_several(tmp_path: Path) -> None:
    a = write_dataset(tmp_path / "a", square_shards(5), seed=1)
    b = write_dataset(tmp_path / "b", square_shards(6), seed=2)
    (found,) = open_datasets(DataConfig(), a)
    assert found.folder == a
    (other,) = open_datasets(DataConfig(dataset=str(b)), a)
    assert other.folder == b
    mix = (MixedSet(dataset=str(a), weight=1.0), MixedSet(dataset=str(b), weight=2.0))
    data = DataConfig(mix=mix)
    both = open_datasets(data, tmp_path / "nowhere")
    assert [dataset.folder for dataset in both] == [a, b]
    with pytest.raises(ValueError, match="exclude each other"):
        DataConfig(dataset="a", mix=mix)


def test_sets_that_do_not_go_together_are_refused_by_field(tmp_path: Path) -> None:
    sets = [
        LatentDataset(write_dataset(tmp_path / "a", square_shards(5))),
        LatentDataset(write_dataset(tmp_path / "b", square_shards(5), spec=with_captions(2), captions=2)),
    ]
    data = DataConfig(mix=(MixedSet(dataset="a"), MixedSet(dataset="b")))
    with pytest.raises(ConfigError, match=r"max_captions of .*b is 2, of .*a it is 1"):
        Mixture(sets, seed=0, global_batch=2, data=data)


def test_a_new_epoch_begins_at_the_origin(tmp_path: Path) -> None:
    """After a change at position 17 the new set's first epoch is positions 17 to 17 + N, each sample once."""
    dataset = LatentDataset(write_dataset(tmp_path, square_shards(12)))
    plain = Mixture([dataset], seed=4, global_batch=4, data=DataConfig())
    loader = LatentLoader(
        dataset,
        seed=4,
        engine=EngineConfig(global_batch=4, micro_batch=4),
        objective=ObjectiveConfig(),
        data=DataConfig(),
        rank=0,
        world_size=1,
    )
    loader.resume(origin=17, substituted={})
    steps = loader.steps(17)
    batches = [next(steps)[0] for _ in range(3)]
    steps.close()
    positions = np.concatenate([batch.positions.numpy() for batch in batches])
    indices = np.concatenate([batch.indices.numpy() for batch in batches])
    assert positions.tolist() == list(range(17, 29)) and sorted(indices.tolist()) == list(range(12))
    assert np.array_equal(indices, plain.samples(np.arange(12)))


def test_lanes_above_a_thousand_shards_and_a_warning_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = LatentDataset(write_dataset(tmp_path, square_shards(2, 2, 2)))
    assert not uses_lanes(DataConfig(), dataset) and uses_lanes(DataConfig(order="lanes"), dataset)
    monkeypatch.setattr("pipeline.data.mixture.MANY_SHARDS", 2)
    assert uses_lanes(DataConfig(), dataset) and not uses_lanes(DataConfig(order="global"), dataset)
    assert not caplog.text
    monkeypatch.setattr("pipeline.data.mixture.LOCAL_FILE_SYSTEMS", frozenset())
    assert not uses_lanes(DataConfig(order="global"), dataset)
    assert "data.order global opens any of 3 shards" in caplog.text


def test_file_systems_of_the_machine_and_others(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path}/far nfs4 rw 0 0\nd {tmp_path}/far/near xfs rw 0 0\n"
    )
    assert is_local_disk(tmp_path, mounts) and is_local_disk(tmp_path / "far/near/data", mounts)
    assert not is_local_disk(tmp_path / "far/data", mounts) and is_local_disk(tmp_path / "farther", mounts)
