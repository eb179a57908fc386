"""CLIP score and the rank of the own caption, with ceiling and floor, of features whose answer is plain."""

import numpy as np
import pytest

from pipeline.evaluation.alignment import agreement, clip_alignment

CAPTIONS = [f"caption {number}" for number in range(6)]


def turned(features_ND: np.ndarray, degrees: float) -> np.ndarray:
    """Return unit vectors at that angle to the rows of an identity, towards the next axis."""
    angle = np.radians(degrees)
    return np.cos(angle) * features_ND + np.sin(angle) * np.roll(features_ND, 1, axis=1)


def test_perfect_pictures_reach_the_ceiling_and_shuffled_captions_the_floor() -> None:
    texts = np.eye(6)
    found = clip_alignment(texts, texts, texts, CAPTIONS)
    assert found["painted"] == found["ceiling"]
    assert found["painted"]["score"]["value"] == 100.0 and found["painted"]["first"] == 1.0
    assert found["floor"]["score"]["value"] == 0.0 and found["floor"]["first"] == 0.0
    assert found["floor"]["median_rank"] == 2.0  # Behind the own one alone: the others are as wrong.


@pytest.mark.parametrize(("degrees", "rank"), [(30, 1), (60, 2)])
def test_the_score_is_a_hundred_cosines_and_the_rank_counts_the_better_captions(
    degrees: float, rank: int
) -> None:
    texts = np.eye(6)
    found = clip_alignment(turned(texts, degrees), texts, texts, CAPTIONS)["painted"]
    assert found["score"]["value"] == pytest.approx(100 * np.cos(np.radians(degrees)))
    assert found["median_rank"] == rank and found["mean_reciprocal_rank"] == pytest.approx(1 / rank)
    assert found["first"] == (rank == 1) and found["first_few"] == 1.0


def test_equal_captions_are_one_answer() -> None:
    captions = ["a", "b", "a", "c"]
    texts = np.eye(3)[[0, 1, 0, 2]]
    found = clip_alignment(texts, texts, texts, captions)
    assert found["captions"] == 3 and found["painted"]["first"] == 1.0
    assert found["floor"]["first"] == 0.0  # Nobody is asked for its own caption under another number.


def test_ties_share_the_better_place() -> None:
    found = agreement(np.array([[1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([1]))
    assert found["first"] == 1.0 and found["score"]["low"] is None
