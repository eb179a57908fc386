"""The judge's scores against answers that are known without a network."""

import torch
from torch.nn import functional

from benchmarks.judge.scores import floor_score, kind_score, rank_score, score_within_kind

PICTURES = 64


def unit_features(seed: int, count: int = PICTURES) -> torch.Tensor:
    return functional.normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_picture_is_its_own_nearest() -> None:
    features = unit_features(0)
    score = rank_score(features, features, torch.arange(PICTURES))
    assert (score.pictures, score.first, score.first_five) == (PICTURES, PICTURES, PICTURES)


def test_features_that_know_nothing_score_what_chance_gives() -> None:
    """Over 50 draws of 64 answers each, 1/64 and 5/64 of the answers come in by chance."""
    own = torch.arange(PICTURES)
    scores = [rank_score(unit_features(2 * k), unit_features(2 * k + 1), own) for k in range(50)]
    assert 0.4 * 50 < sum(score.first for score in scores) < 1.7 * 50
    assert 3.8 * 50 < sum(score.first_five for score in scores) < 6.2 * 50


def test_the_answers_may_be_more_than_the_pictures() -> None:
    answers = unit_features(0)
    score = rank_score(answers[10:20], answers, torch.arange(10, 20))
    assert (score.first, score.pictures) == (10, 10)
    assert rank_score(answers[10:20], answers, torch.arange(10)).first == 0


def test_twins_cannot_be_told_apart_and_both_count() -> None:
    features = unit_features(0)
    twins = torch.cat([features, features])
    assert rank_score(twins, twins, torch.arange(2 * PICTURES)).first == 2 * PICTURES


def test_the_floor_of_perfect_pictures_is_nothing() -> None:
    features = unit_features(0)
    assert floor_score(features, features, torch.arange(PICTURES)).first == 0


def test_a_kind_is_right_where_the_nearest_is_of_it_and_within_it_only_its_own_compete() -> None:
    answers = torch.eye(6)[:, :6]
    kinds = torch.tensor([0, 0, 1, 1, 2, 2])
    # Nearest: the twin of its kind; itself; another kind's, then its twin; itself.
    pictures = functional.normalize(
        torch.tensor(
            [
                [0.5, 0.9, 0.0, 0.0, 0.0, 0.0],
                [0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
                [0.9, 0.0, 0.4, 0.6, 0.0, 0.0],
                [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
            ]
        ),
        dim=1,
    )
    own = torch.arange(4)
    assert rank_score(pictures, answers, own).first == 2
    found = kind_score(pictures, answers, kinds[:4], kinds)
    assert (found.pictures, found.first, found.first_five) == (4, 3, 4)
    assert score_within_kind(pictures, answers, own, kinds[:4], kinds).first == 2
    alone = torch.arange(6)
    assert score_within_kind(pictures, answers, own, alone[:4], alone).first == 4
    assert kind_score(pictures, answers, alone[:4], alone) == rank_score(pictures, answers, own)
