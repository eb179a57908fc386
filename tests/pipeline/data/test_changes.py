"""What a checkpoint says of its data, and what a resume on other data is told."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import MixedSet, RunConfig
from pipeline.data.changes import data_changes, data_facts, refuse_changes
from pipeline.errors import DataError
from pipeline.latents.reader import LatentDataset
from tests.builders import tiny_config
from tests.pipeline.data.datasets import square_shards, write_dataset


@pytest.fixture
def sets(tmp_path: Path) -> list[LatentDataset]:
    """Two data sets of 5 and 6 samples."""
    folders = [write_dataset(tmp_path / name, square_shards(5 + n), seed=n) for n, name in enumerate("ab")]
    return [LatentDataset(folder) for folder in folders]


def config_of(*weights: float, **data: Any) -> RunConfig:
    mix = tuple(MixedSet(dataset=name, weight=weight) for name, weight in zip("ab", weights, strict=False))
    plain = tiny_config(Path("runs"))
    return plain.model_copy(update={"data": plain.data.model_copy(update={"mix": mix, **data})})


def test_one_set_is_its_manifest_and_several_are_their_order_and_weights(sets: list[LatentDataset]) -> None:
    assert data_facts(sets[:1], config_of())["data_digest"] == sets[0].manifest.digest
    mixtures = [(sets, (1.0, 2.0)), (sets, (1.0, 3.0)), (sets[::-1], (1.0, 2.0)), (sets[::-1], (2.0, 1.0))]
    digests = {data_facts(both, config_of(*weights))["data_digest"] for both, weights in mixtures}
    assert len(digests) == 4 and digests.isdisjoint(dataset.manifest.digest for dataset in sets)


def test_a_moved_data_set_and_other_threads_are_no_change(sets: list[LatentDataset]) -> None:
    before = data_facts(sets[:1], config_of())
    now = data_facts(sets[:1], config_of(dataset="s3://elsewhere/a", threads=7, lanes=8))
    assert now["data"]["sets"][0]["dataset"] == "s3://elsewhere/a" and data_changes(before, now) == []
    refuse_changes(Path("step-1"), [])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"lanes": 8}, "data.lanes was 64, the config's is 8"),
        ({"lane_window": 17}, "data.lane_window was 4096, the config's is 17"),
        ({"order": "global"}, "data.order was 'lanes', the config's is 'global'"),
    ],
)
def test_another_order_of_the_same_samples_is_a_change(
    sets: list[LatentDataset], other: dict[str, Any], said: str
) -> None:
    before = data_facts(sets[:1], config_of(order="lanes"))
    assert data_changes(before, data_facts(sets[:1], config_of(**{"order": "lanes"} | other))) == [said]


def test_another_seed_is_another_order(sets: list[LatentDataset]) -> None:
    plain = config_of()
    other = plain.model_copy(update={"seed": plain.seed + 1})
    (line,) = data_changes(data_facts(sets[:1], plain), data_facts(sets[:1], other))
    assert line == f"seed was {plain.seed}, the config's is {plain.seed + 1}"


def test_the_refusal_is_one_line_that_says_what_changed_and_the_flag(sets: list[LatentDataset]) -> None:
    before, now = data_facts(sets[:1], config_of()), data_facts(sets, config_of(1.0, 3.0))
    with pytest.raises(DataError) as raised:
        refuse_changes(Path("checkpoints/step-1"), data_changes(before, now))
    said, digests = str(raised.value), [dataset.manifest.digest[:16] for dataset in sets]
    assert said == (
        f"checkpoints/step-1: the data was {sets[0].folder} (5 samples, {digests[0]}), the config's is "
        f"a (5 samples, {digests[0]}, weight 1) and b (6 samples, {digests[1]}, weight 3); give back what it was trained "
        "on, use another run name, or begin a new epoch here with --accept-data-change"
    )


def test_what_an_older_version_wrote_is_compared_by_digest(sets: list[LatentDataset]) -> None:
    old = {"data_digest": sets[0].manifest.digest, "data": {}}
    assert data_changes(old, data_facts(sets[:1], config_of())) == []
    (line,) = data_changes(old, data_facts(sets[1:], config_of()))
    assert line.startswith(f"the data was the data set {sets[0].manifest.digest[:16]}, the config's is ")
