"""Samples wait here until as many of one shape are there as the encoder takes at once."""

from collections.abc import Iterator

from preprocessing.images import PreparedSample


class Batches:
    """Full batches of one shape each, in an order that the shard alone decides."""

    def __init__(self, size: int) -> None:
        """Take how many samples make a batch."""
        self._size = size
        self._waiting: dict[tuple[int, int], list[PreparedSample]] = {}

    def add(self, sample: PreparedSample) -> list[PreparedSample] | None:
        """Take a sample; return the batch that it completes, or None."""
        waiting = self._waiting.setdefault(sample.bucket, [])
        waiting.append(sample)
        return self._waiting.pop(sample.bucket) if len(waiting) == self._size else None

    def rest(self) -> Iterator[list[PreparedSample]]:
        """Yield the incomplete batches, by shape, and forget them."""
        for bucket in sorted(self._waiting):
            yield self._waiting.pop(bucket)
