"""Do the pictures show what their captions say? CLIP score and the rank of the right caption.

Between two bounds that a number alone does not have: the ceiling is what real pictures get, the floor is what the painted
ones get when each is asked for another's caption. Shape letters: N pictures, M captions, D features of unit length.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.evaluation.estimates import mean_estimate

FIRST_FEW = 5


def clip_alignment(
    painted_ND: np.ndarray, real_ND: np.ndarray, texts_ND: np.ndarray, captions: Sequence[str]
) -> dict[str, Any]:
    """Return score and ranks of painted pictures, of the real ones (`ceiling`) and with captions shuffled (`floor`).

    Row i of all three belongs to `captions[i]`. Equal captions are one answer.
    """
    names = list(dict.fromkeys(captions))
    own_N = np.array([names.index(caption) for caption in captions])
    answers_MD = texts_ND[[list(captions).index(name) for name in names]]
    other_N = (own_N + 1) % len(names)  # Another caption for everyone, as long as there are two.
    return {
        "captions": len(names),
        "painted": agreement(painted_ND, answers_MD, own_N),
        "ceiling": agreement(real_ND, answers_MD, own_N),
        "floor": agreement(painted_ND, answers_MD, other_N),
    }


def agreement(pictures_ND: np.ndarray, answers_MD: np.ndarray, own_N: np.ndarray) -> dict[str, Any]:
    """Return the score, 100 times the mean cosine with the own caption, and how often that caption comes first.

    `own_N` is the place of each picture's caption among the answers. Equal answers share the better place.
    Source: Hessel et al. 2021, with the factor 100 that is in use instead of their 2.5, and negative cosines kept.
    """
    cosine_NM = pictures_ND.astype(np.float64) @ answers_MD.astype(np.float64).T
    own_cosine_N = cosine_NM[np.arange(len(own_N)), own_N]
    rank_N = 1 + (cosine_NM > own_cosine_N[:, None] + 1e-9).sum(axis=1)
    return {
        "score": asdict(mean_estimate(100.0 * own_cosine_N)),
        "first": float((rank_N == 1).mean()),
        "first_few": float((rank_N <= FIRST_FEW).mean()),
        "median_rank": float(np.median(rank_N)),
        "mean_reciprocal_rank": float((1.0 / rank_N).mean()),
    }
