"""Decoding ahead: threads prepare the next samples of a shard while the encoder works on the present ones.

Pillow lets go of the interpreter while it decodes and resizes, so threads are enough and nothing is copied between
processes. Order and outcome are those of a plain loop, whatever the number of threads.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from preprocessing.filters import Failure, Rejection
from preprocessing.images import Decode, PreparedSample
from preprocessing.samples import RawSample

Outcome = PreparedSample | Rejection | Failure
AHEAD_BYTES = 256 << 20
"""Most bytes of undecoded files that wait at once, whatever their number."""


class Decoders:
    """A bounded crew of threads that all shards under way share."""

    def __init__(self, threads: int, ahead: int, decode: Decode | None = None) -> None:
        """Take `threads` threads; a shard has at most `ahead` samples decoded or waiting for it.

        `decode` turns bytes into a picture somewhere else (`isolation`); None = in these threads.
        """
        self.decode = decode
        self._crew = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._ahead = ahead

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._crew.shutdown(cancel_futures=True)

    def outcomes(
        self, raws: Iterable[RawSample], prepare: Callable[[RawSample], Outcome]
    ) -> Generator[tuple[RawSample, Outcome], None, None]:
        """Yield each sample with what `prepare` made of it, in order."""
        waiting: deque[tuple[RawSample, Future[Outcome]]] = deque()
        waiting_bytes = 0
        try:
            for raw in raws:
                waiting.append((raw, self._crew.submit(prepare, raw)))
                waiting_bytes += len(raw.image)
                while len(waiting) > self._ahead or (waiting_bytes > AHEAD_BYTES and len(waiting) > 1):
                    first, future = waiting.popleft()
                    waiting_bytes -= len(first.image)
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
