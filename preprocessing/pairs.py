"""Prepared pictures with captions for the first stage: the same reading, rules and split as `encode`.

The pictures lie in an unnamed file that is mapped into memory, so a set larger than memory is only slower. Cost:
decoding every picture once, image_size^2 x 3 bytes each on disk while the sequence lives.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from pipeline.config import EncodeConfig
from pipeline.errors import DataError
from pipeline.latents.shard import Counts
from preprocessing.filters import Rejection, Rules
from preprocessing.images import PreparedSample, prepare_sample
from preprocessing.refusals import check_failures
from preprocessing.roster import validation_shares
from preprocessing.sources import list_shards
from preprocessing.writer import validation_keys


@dataclass(frozen=True)
class PreparedPair:
    """One picture, uint8 [S,S,3], with its first caption; the key is unique over all shards (STEM/KEY)."""

    image: np.ndarray
    caption: str
    key: str
    split: str


class PreparedPairs(Sequence[PreparedPair]):
    """All pairs of a source in input order; `counts` says what became of the others."""

    def __init__(self, images: np.ndarray, texts: list[tuple[str, str, str]], counts: Counts) -> None:
        """Take pictures uint8 [N,S,S,3] and for each (caption, key, split)."""
        assert len(images) == len(texts) == counts.written
        self._images, self._texts, self.counts = images, texts, counts

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._texts)

    @overload
    def __getitem__(self, place: int) -> PreparedPair: ...
    @overload
    def __getitem__(self, place: slice) -> list[PreparedPair]: ...
    def __getitem__(self, place: int | slice) -> PreparedPair | list[PreparedPair]:
        """Return the pair at `place`."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return PreparedPair(self._images[place], *self._texts[place])

    def __iter__(self) -> Iterator[PreparedPair]:
        """Yield the pairs in order."""
        return (self[place] for place in range(len(self)))


def prepared_pairs(encode: EncodeConfig) -> PreparedPairs:
    """Return all usable pairs of `encode.source`.

    The split is that of `encode`, decided before encoding: should the encoder reject a validation sample later
    (nonfinite_latent), the data set takes the shard's next key into validation, and this split does not know.

    Raises:
        DataError: when a shard is damaged, nothing is usable, or more than `encode.max_failed_fraction` failed.
    """
    shards, rules = list_shards(encode.source, encode), Rules.from_config(encode).squares_only()
    texts: list[tuple[str, str, str]] = []
    read = 0
    rejected, failed = Counter[str](), Counter[str]()
    with tempfile.TemporaryFile() as stream:
        for shard, share in zip(
            shards, validation_shares(len(shards), encode.validation_samples), strict=True
        ):
            kept: list[tuple[str, str]] = []
            for raw in shard.samples():
                read += 1
                outcome = prepare_sample(raw, rules)
                if isinstance(outcome, PreparedSample):
                    stream.write(outcome.picture.pixels.tobytes())
                    kept.append((outcome.captions[0], outcome.key))
                elif isinstance(outcome, Rejection):
                    rejected[outcome.reason] += 1
                else:
                    failed[outcome.error] += 1
            validation = validation_keys([key for _, key in kept], share)
            texts += [
                (caption, f"{shard.stem}/{key}", "validation" if key in validation else "train")
                for caption, key in kept
            ]
        counts = Counts(read, len(texts), dict(sorted(rejected.items())), dict(sorted(failed.items())))
        check_failures(counts, encode.max_failed_fraction)
        if not texts:
            raise DataError(f"{encode.source}: none of {read} samples is usable: {dict(rejected)}")
        stream.flush()
        shape = (len(texts), rules.image_size, rules.image_size, 3)
        return PreparedPairs(np.memmap(stream, np.uint8, "c", shape=shape), texts, counts)
