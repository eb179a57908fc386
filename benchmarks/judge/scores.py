"""How often the right one of N comes first: pure functions of features. Shape letters: N pictures, M answers, D width."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """Pictures whose right answer is the first, or among the first five, of all answers."""

    pictures: int
    first: int
    first_five: int

    def __str__(self) -> str:
        """Return both as counts."""
        return f"{self.first}/{self.pictures} ({self.first_five})"


def rank_score(pictures_ND: Tensor, answers_MD: Tensor, right_N: Tensor) -> Score:
    """Return the score of unit features against unit features; `right_N` is the place of each right answer.

    Equal answers share the better place: a picture cannot be told from its twin.
    """
    similarity_NM = pictures_ND.double() @ answers_MD.double().T
    own_N1 = similarity_NM.gather(1, right_N[:, None])
    better_N = (similarity_NM > own_N1 + 1e-9).sum(dim=1)
    return Score(len(right_N), int((better_N < 1).sum()), int((better_N < 5).sum()))


def floor_score(pictures_ND: Tensor, answers_MD: Tensor, right_N: Tensor) -> Score:
    """Return the score with each picture asked for the next one's answer: what colour and chance alone give."""
    return rank_score(pictures_ND, answers_MD, torch.roll(right_N, 1))


def kind_score(pictures_ND: Tensor, answers_MD: Tensor, kinds_N: Tensor, kinds_M: Tensor) -> Score:
    """Return how often the nearest answer is of the picture's kind; each kind must have an answer."""
    similarity_NM = pictures_ND.double() @ answers_MD.double().T
    of_kind_NM = kinds_N[:, None] == kinds_M[None, :]
    best_N1 = similarity_NM.masked_fill(~of_kind_NM, -2.0).amax(dim=1, keepdim=True)
    better_N = ((similarity_NM > best_N1 + 1e-9) & ~of_kind_NM).sum(dim=1)
    return Score(len(kinds_N), int((better_N < 1).sum()), int((better_N < 5).sum()))


def score_within_kind(
    pictures_ND: Tensor, answers_MD: Tensor, right_N: Tensor, kinds_N: Tensor, kinds_M: Tensor
) -> Score:
    """Return the score of `rank_score` where only answers of the picture's kind compete."""
    similarity_NM = pictures_ND.double() @ answers_MD.double().T
    own_N1 = similarity_NM.gather(1, right_N[:, None])
    of_kind_NM = kinds_N[:, None] == kinds_M[None, :]
    better_N = ((similarity_NM > own_N1 + 1e-9) & of_kind_NM).sum(dim=1)
    return Score(len(right_N), int((better_N < 1).sum()), int((better_N < 5).sum()))
