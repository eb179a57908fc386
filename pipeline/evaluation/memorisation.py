"""Does the network paint what it has seen? The nearest training latents of each painted one.

A picture counts as memorised when its nearest training latent is much nearer than the next ones: the distance is divided
by the mean distance to the others of the 50 nearest, since plain pictures lie near to everything. The same is asked of the
validation latents, which nobody trained on: their share says what the data's own near-duplicates give.
Source: Carlini et al. 2023, section 5.1: l2 over alpha = 0.5 times the mean to the 50 nearest.
Shape letters: Q questions, N training latents, D numbers of a latent, K neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.diffusion.posterior import scale_latents, split_moments
from pipeline.evaluation.together import agreed, exchanged, in_turns
from pipeline.latents.reader import LatentDataset
from pipeline.latents.spec import Bucket
from pipeline.training.world import World

NEIGHBOURS = 50
THRESHOLD = 0.5
BLOCK_BYTES = 64 * 2**20
"""Of training latents in float64 at once on each rank."""


@dataclass(frozen=True)
class Block:
    """Training samples that are read at once: of one data set, with their places among all that are searched."""

    dataset: int
    first_place: int
    indices: np.ndarray


@dataclass(frozen=True)
class Nearest:
    """The nearest training latents of each question: distances [Q, K], rising, and their places [Q, K]."""

    distance_QK: np.ndarray
    place_QK: np.ndarray

    def ratios(self) -> np.ndarray:
        """Return the nearest distance over the mean of the others, [Q]; 1 is nothing special, 0 a copy."""
        others_Q = self.distance_QK[:, 1:].mean(axis=1)
        return self.distance_QK[:, 0] / np.maximum(others_Q, np.finfo(np.float64).tiny)


class TrainingLatents:
    """The training latents of one shape that are searched: all, or so many spread evenly over the data sets."""

    def __init__(self, sets: Sequence[LatentDataset], bucket: Bucket, most: int) -> None:
        self._sets, self._bucket = list(sets), bucket
        known = [dataset.table.indices_of(bucket) for dataset in sets]
        rows = [int(dataset.table.rows_of(bucket).sum()) for dataset in sets]
        self.total, self.of_other_shape = sum(rows), sum(map(len, sets)) - sum(rows)
        self.count = min(self.total, most)
        spec = sets[0].spec
        height, width = (side // spec.downsampling for side in bucket)
        self.size = spec.channels * height * width
        wanted = np.arange(self.count, dtype=np.int64) * self.total // max(self.count, 1)
        ends = np.cumsum(rows)
        self.blocks: list[Block] = []
        at_once = max(1, BLOCK_BYTES // (8 * self.size))
        place = 0
        for number, (indices, end, length) in enumerate(zip(known, ends, rows, strict=True)):
            mine = wanted[(wanted >= end - length) & (wanted < end)] - (end - length)
            for first in range(0, len(mine), at_once):
                part = indices[mine[first : first + at_once]]
                self.blocks.append(Block(number, place, part))
                place += len(part)

    def read(self, block: Block) -> np.ndarray:
        """Return the scaled posterior means of a block, float64 [n, D].

        Raises:
            DataError, OSError: a sample cannot be read.
        """
        dataset = self._sets[block.dataset]
        arrays = dataset.empty_arrays(self._bucket, len(block.indices))
        for error in dataset.read_batch(block.indices, arrays).failed.values():
            raise error
        return flat_means(torch.from_numpy(arrays["latent"]), dataset)

    def key(self, place: int) -> str:
        """Return the key of the searched sample with this place."""
        block = next(block for block in reversed(self.blocks) if block.first_place <= place)
        index = int(block.indices[place - block.first_place])
        return self._sets[block.dataset].read(index).key


def flat_means(moments_NMHW: Tensor, dataset: LatentDataset) -> np.ndarray:
    """Return the scaled posterior means of stored moments, float64 [N, D]."""
    mean, _ = split_moments(moments_NMHW, dataset.spec.channels)
    scaled = scale_latents(mean, dataset.spec.scaling_factor, dataset.spec.shift_factor)
    return scaled.double().flatten(1).numpy()


def nearest(questions_QD: np.ndarray, training: TrainingLatents, world: World) -> Nearest:
    """Return the nearest training latents of each question; the blocks are dealt to the ranks.

    Each rank reads a block at a time and keeps K distances a question, whatever the size of the data set. Distances are
    float64 of the same blocks at any world size, and equal ones are taken in the order of places: the same answer.

    Raises:
        DataError: on all ranks, when any cannot read its part.
    """
    found = _Best(len(questions_QD), min(NEIGHBOURS, training.count))
    questions = torch.from_numpy(questions_QD.astype(np.float64)).to(world.device)
    for number, means, filler in in_turns(
        world, len(training.blocks), lambda piece: training.read(training.blocks[piece])
    ):
        if not filler:
            found.take(_distances(questions, means), training.blocks[number].first_place)
    merged = _Best(len(questions_QD), found.keep)
    for part in exchanged(world, {world.rank: {"distance": found.distance, "place": found.place}}).values():
        merged.merge(part["distance"], part["place"])
    return Nearest(merged.distance, merged.place)


class _Best:
    def __init__(self, questions: int, keep: int) -> None:
        self.keep = keep
        self.distance = np.full((questions, 0), np.inf)
        self.place = np.zeros((questions, 0), np.int64)

    def take(self, distance_QN: np.ndarray, first_place: int) -> None:
        places = np.arange(first_place, first_place + distance_QN.shape[1])
        self.merge(distance_QN, np.broadcast_to(places, distance_QN.shape))

    def merge(self, distance: np.ndarray, place: np.ndarray) -> None:
        distance = np.concatenate([self.distance, distance], axis=1)
        place = np.concatenate([self.place, place], axis=1)
        order = np.lexsort((place, distance), axis=1)[:, : self.keep]
        self.distance = np.take_along_axis(distance, order, axis=1)
        self.place = np.take_along_axis(place, order, axis=1)


def _distances(questions: Tensor, means_ND: np.ndarray) -> np.ndarray:
    """Return Euclidean distances [Q, N]. The plain form of cdist: a copy is at 0, not at the root of rounding."""
    training = torch.from_numpy(means_ND).to(questions.device)
    found: Tensor = torch.cdist(questions, training, compute_mode="donot_use_mm_for_euclid_dist")
    return found.cpu().numpy()


def memorised(
    painted_QD: np.ndarray,
    captions: Sequence[str],
    validation_VD: np.ndarray,
    training: TrainingLatents,
    world: World,
) -> dict[str, Any]:
    """Return how many painted latents, and how many validation latents, are much nearer to one training latent."""
    record: dict[str, Any] = {
        "searched": training.count,
        "training_samples": training.total,
        "of_other_shape": training.of_other_shape,
        "neighbours": min(NEIGHBOURS, training.count),
        "threshold": THRESHOLD,
    }
    if training.count < 3:
        return record | {"painted": None, "validation": None, "nearest": []}
    answers = nearest(painted_QD, training, world)
    record["painted"] = _summary(answers)
    record["validation"] = _summary(nearest(validation_VD, training, world)) if len(validation_VD) else None
    record["nearest"] = agreed(world, lambda: list(_closest(answers, captions, training)))
    return record


def _summary(found: Nearest) -> dict[str, Any]:
    ratio_Q = found.ratios()
    flagged = int((ratio_Q < THRESHOLD).sum())
    return {
        "pictures": len(ratio_Q),
        "flagged": flagged,
        "share": flagged / len(ratio_Q),
        "smallest_ratio": float(ratio_Q.min()),
        "median_ratio": float(np.median(ratio_Q)),
    }


def _closest(
    found: Nearest, captions: Sequence[str], training: TrainingLatents, count: int = 5
) -> Iterator[dict[str, Any]]:
    """Yield the pictures that lie nearest to a training latent, and its key, for people to look at."""
    ratio_Q = found.ratios()
    for number in np.argsort(ratio_Q, kind="stable")[:count].tolist():
        yield {
            "picture": number,
            "caption": captions[number],
            "ratio": float(ratio_Q[number]),
            "distance": float(found.distance_QK[number, 0]),
            "key": training.key(int(found.place_QK[number, 0])),
        }
