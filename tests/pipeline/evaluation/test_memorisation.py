"""Nearest training latents: a planted one is found by name, a fresh one is not, in bounded memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from pipeline.errors import DataError
from pipeline.evaluation import memorisation
from pipeline.evaluation.memorisation import TrainingLatents, flat_means, memorised, nearest
from pipeline.latents.reader import LatentDataset
from pipeline.training.world import World
from tests.distributed.dataset import BUCKET, SPEC, build_dataset

ALONE = World()


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> TrainingLatents:
    folder = build_dataset(tmp_path_factory.mktemp("memorised") / "latents", 60)
    return TrainingLatents([LatentDataset(folder)], BUCKET, 1000)


def all_means(training: TrainingLatents) -> np.ndarray:
    return np.concatenate([training.read(block) for block in training.blocks])


def fresh(count: int, training: TrainingLatents) -> np.ndarray:
    """Return latents drawn as the training's were, and that nobody has stored."""
    seen = all_means(training)
    return seen.mean() + seen.std() * default_rng(9).standard_normal((count, training.size))


def test_a_planted_latent_is_flagged_by_its_key_and_a_fresh_one_is_not(training: TrainingLatents) -> None:
    seen = all_means(training)
    painted = fresh(4, training)
    painted[2] = seen[17] + 0.05 * seen.std() * default_rng(0).standard_normal(training.size)
    found = memorised(painted, ["a", "b", "planted", "d"], fresh(5, training), training, ALONE)
    assert found["painted"] | {"median_ratio": 0} == {
        "pictures": 4,
        "flagged": 1,
        "share": 0.25,
        "smallest_ratio": pytest.approx(0.05, abs=0.02),
        "median_ratio": 0,
    }
    assert found["validation"]["flagged"] == 0 and found["validation"]["smallest_ratio"] > 0.7
    first = found["nearest"][0]
    assert (first["picture"], first["caption"], first["key"]) == (2, "planted", "k000017")
    assert all(entry["ratio"] > 0.7 for entry in found["nearest"][1:])
    assert (found["searched"], found["training_samples"], found["of_other_shape"]) == (60, 60, 0)


def test_an_exact_copy_is_at_distance_zero(training: TrainingLatents) -> None:
    found = nearest(all_means(training)[5:6], training, ALONE)
    assert found.distance_QK[0, 0] == 0.0 and found.place_QK[0, 0] == 5 and found.ratios()[0] == 0.0


def test_a_duplicate_in_the_training_data_hides_nothing(tmp_path: Path) -> None:
    """The second neighbour of a copied picture that is stored twice is a copy too; the mean of many is not."""
    sets = [LatentDataset(build_dataset(tmp_path / name, 40)) for name in ("one", "again")]
    twice = TrainingLatents(sets, BUCKET, 1000)
    copied = all_means(twice)[3:4]
    found = nearest(copied, twice, ALONE)
    assert found.distance_QK[0, 1] == 0.0
    assert memorised(copied, ["copied"], copied[:0], twice, ALONE)["painted"]["flagged"] == 1


@pytest.mark.parametrize("samples_at_once", [1, 7, 60])
def test_blocks_of_any_size_give_the_answer_of_brute_force(
    samples_at_once: int, training: TrainingLatents, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, seen = fresh(6, training), all_means(training)
    distance = np.linalg.norm(questions[:, None] - seen[None], axis=2)
    order = np.argsort(distance, axis=1, kind="stable")[:, :50]
    monkeypatch.setattr(memorisation, "BLOCK_BYTES", samples_at_once * 8 * training.size)
    pieces = TrainingLatents(training._sets, BUCKET, 1000)
    assert max(len(block.indices) for block in pieces.blocks) == samples_at_once
    found = nearest(questions, pieces, ALONE)
    assert np.array_equal(found.place_QK, order)
    np.testing.assert_allclose(found.distance_QK, np.take_along_axis(distance, order, axis=1), rtol=1e-12)


def test_a_part_is_spread_over_all_data_sets_and_said(tmp_path: Path) -> None:
    sets = [LatentDataset(build_dataset(tmp_path / str(n), 30, seed=n)) for n in range(2)]
    part = TrainingLatents(sets, BUCKET, 10)
    assert (part.count, part.total) == (10, 60)
    assert [block.indices.tolist() for block in part.blocks] == [[0, 6, 12, 18, 24], [0, 6, 12, 18, 24]]
    assert [part.key(place) for place in (0, 4, 5, 9)] == ["k000000", "k000024", "k000000", "k000024"]
    other = TrainingLatents(sets, (32, 16), 10)
    assert (other.count, other.of_other_shape, other.blocks) == (0, 60, [])
    empty = np.zeros((1, part.size))
    assert memorised(empty, ["x"], empty, other, ALONE)["painted"] is None


def test_means_are_scaled_as_the_network_sees_them(training: TrainingLatents) -> None:
    dataset = training._sets[0]
    moments = dataset.read(3).arrays["latent"].astype(np.float64)
    expected = (moments[: SPEC.channels] - SPEC.shift_factor) * SPEC.scaling_factor
    found = flat_means(torch.from_numpy(dataset.read(3).arrays["latent"].copy())[None], dataset)
    np.testing.assert_allclose(found[0], expected.ravel(), rtol=1e-6)


def test_a_damaged_sample_is_said(training: TrainingLatents, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = training._sets[0]
    plain = dataset.read_batch

    def damaged(indices: np.ndarray, arrays: dict[str, np.ndarray]) -> object:
        found = plain(indices, arrays)
        found.failed[0] = DataError("shard 00000: row 3 is damaged")
        return found

    monkeypatch.setattr(dataset, "read_batch", damaged)
    with pytest.raises(DataError, match="row 3 is damaged"):
        nearest(np.zeros((1, training.size)), training, ALONE)
