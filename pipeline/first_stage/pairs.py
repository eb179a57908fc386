"""Prepared picture-caption pairs, and which of them a step sees: pure functions of (seed, step).

Nothing about the data's order is saved with a checkpoint: the step says it all, so a killed and resumed training
meets the same pictures, flips and noise as one that ran through, on any number of processes.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np

from pipeline.errors import DataError
from pipeline.publish import json_digest

# One stream of random numbers for each purpose; the numbers are part of every trained model's identity.
ORDER, FLIP, POSTERIOR, CROP, VIEWS = 1, 2, 3, 4, 5
_WORD = 2**64


class PreparedPair(Protocol):
    """A picture as the encoder will see it, with its caption."""

    @property
    def image(self) -> np.ndarray:
        """Pixels, uint8 [H, W, 3]."""

    @property
    def caption(self) -> str:
        """The caption, possibly empty."""

    @property
    def key(self) -> str:
        """The sample's name, unique in the source."""

    @property
    def split(self) -> str:
        """`train` or `validation`."""


@dataclass(frozen=True)
class PairTable:
    """What one pass over the pairs found; pictures are fetched again when a step wants them."""

    pairs: Sequence[PreparedPair]
    train: np.ndarray
    validation: np.ndarray
    captions: tuple[str, ...]
    digest: str

    def pixels(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the pictures at `places` of the sequence, uint8 [B, H, W, 3]."""
        return np.stack([self.pairs[int(place)].image for place in places])

    @cached_property
    def caption_ids(self) -> np.ndarray:
        """One number a pair, int64 [N]: equal captions have equal numbers."""
        return np.unique(np.array(self.captions, dtype=np.str_), return_inverse=True)[1].reshape(-1)


def read_pairs(pairs: Sequence[PreparedPair], image_size: int) -> PairTable:
    """Return the table of `pairs`, each split in the order of the keys.

    Raises:
        DataError: when a picture is not uint8 [image_size, image_size, 3], a key appears twice, a split is
            neither `train` nor `validation`, or nothing is left to train on.
    """
    digests: list[tuple[str, str, str, str]] = []
    for pair in pairs:
        if pair.image.dtype != np.uint8 or pair.image.shape != (image_size, image_size, 3):
            raise DataError(
                f"{pair.key}: picture is {pair.image.dtype} {pair.image.shape}; "
                f"expected uint8 ({image_size}, {image_size}, 3) as encode.image_size says"
            )
        pixels = hashlib.sha256(pair.image.tobytes()).hexdigest()
        digests.append((pair.key, pair.split, pair.caption, pixels))
    order = sorted(range(len(digests)), key=lambda place: digests[place][0])
    for before, after in pairwise(order):
        if digests[before][0] == digests[after][0]:
            raise DataError(f"{digests[after][0]}: this key appears twice among the prepared pairs")
    places: dict[str, list[int]] = {"train": [], "validation": []}
    for place in order:
        key, split = digests[place][:2]
        if split not in places:
            raise DataError(f"{key}: split is {split!r}; expected 'train' or 'validation'")
        places[split].append(place)
    if not places["train"]:
        raise DataError(f"no training pairs among {len(digests)} prepared pairs; look at encode.source")
    return PairTable(
        pairs=pairs,
        train=np.array(places["train"], dtype=np.int64),
        validation=np.array(places["validation"], dtype=np.int64),
        captions=tuple(caption for _, _, caption, _ in digests),
        digest=json_digest([digests[place] for place in order]),
    )


def draws(seed: int, purpose: int, counter: int) -> np.random.Generator:
    """Return the random stream of (seed, purpose, counter): counter-based, so any step is reached at once."""
    return np.random.Generator(np.random.Philox(key=[seed % _WORD, purpose], counter=[0, 0, 0, counter]))


class EpochOrder:
    """Step -> places of its batch; every training pair once an epoch, batches straddle epochs."""

    def __init__(self, places: np.ndarray, *, batch: int, seed: int) -> None:
        """Shuffle `places` anew each epoch."""
        self._places, self._batch, self._seed = places, batch, seed
        self._cached: tuple[int, np.ndarray] = (-1, places)

    def batch(self, step: int) -> np.ndarray:
        """Return the places of step `step` (from 0), int64 [batch]."""
        first = step * self._batch
        return np.array([self._at(first + slot) for slot in range(self._batch)], dtype=np.int64)

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self._places))
        if self._cached[0] != epoch:
            self._cached = (epoch, draws(self._seed, ORDER, epoch).permutation(self._places))
        return int(self._cached[1][place])


class DistinctOrder:
    """Step -> places of its batch, no caption twice in a batch while the captions allow it.

    An equal caption is a wrong negative for the contrastive loss. An epoch is as many whole batches as the
    pairs give; the rest sits that epoch out, another rest each time.
    """

    def __init__(self, places: np.ndarray, caption_ids: np.ndarray, *, batch: int, seed: int) -> None:
        """Deal `places`, whose captions are `caption_ids[place]`, into batches anew each epoch."""
        assert 1 <= batch <= len(places)
        self._places, self._caption_ids, self._batch, self._seed = places, caption_ids, batch, seed
        self._cached: tuple[int, list[np.ndarray]] = (-1, [])

    def batch(self, step: int) -> np.ndarray:
        """Return the places of step `step` (from 0), int64 [batch]."""
        epoch, place = divmod(step, len(self._places) // self._batch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._deal(draws(self._seed, ORDER, epoch).permutation(self._places)))
        return self._cached[1][place]

    def _deal(self, order: np.ndarray) -> list[np.ndarray]:
        """Return the epoch's batches: a pair whose caption is already in the batch waits for the next one."""
        coming = deque(int(place) for place in order)
        batches = []
        while len(coming) >= self._batch:
            taken: list[int] = []
            waiting: list[int] = []
            seen: set[int] = set()
            while len(taken) < self._batch and coming:
                place = coming.popleft()
                caption = int(self._caption_ids[place])
                (waiting if caption in seen else taken).append(place)
                seen.add(caption)
            coming.extendleft(reversed(waiting))
            while len(taken) < self._batch:
                taken.append(coming.popleft())
            batches.append(np.array(taken, dtype=np.int64))
        return batches


def share(batch: np.ndarray, rank: int, world_size: int) -> slice:
    """Return the slots of a global batch that `rank` takes; `world_size` divides the batch."""
    size = len(batch) // world_size
    assert size * world_size == len(batch)
    return slice(rank * size, (rank + 1) * size)
